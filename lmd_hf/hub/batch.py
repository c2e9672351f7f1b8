"""Many models, one after the other on each rank, from a durable queue: what is done stays done, whatever happens to
the process."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from lmd_hf.errors import LmdError, SettingsError
from lmd_hf.hub.annotate import Begun, How, Outcome, annotate, begin, fetch
from lmd_hf.hub.queue import Entry, Queue
from lmd_hf.run.world import World
from lmd_hf.weights.answers import client, patiently, told


log = logging.getLogger(__name__)

Following = tuple[str, str | None]  # a model to do, and the one that will probably be next
PAGES = "https://huggingface.co/"
STATES = {"written": "done", "drafted": "done", "left": "left", "failed": "failed"}


def listed(path: Path) -> list[str]:
    """The models of a text file: one a line, an id or the address of its page; blank lines and what follows # are left
    out. Raises `SettingsError`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path}: cannot read a list of models ({error}); give a text file, one model a line"
        ) from None
    return [name.removeprefix(PAGES).rstrip("/") for line in lines if (name := line.partition("#")[0].strip())]


def searched(*, author: str | None, search: str | None, limit: int, token: str | bool | None = None) -> list[str]:
    """The models of an author, or that a search finds on the Hub, most downloaded first."""
    if limit < 1:
        raise SettingsError(f"limit is {limit}; give 1 or more")
    api = client(token)

    def find() -> list[str]:
        return [m.id for m in api.list_models(author=author, search=search, sort="downloads", limit=limit)]

    return told(author or search or "the Hub", lambda: patiently(find))


def annotate_each(
    models: Sequence[str],
    *,
    how: How = "dry",
    skip: Iterable[str] = (),
    force: bool = False,
    token: str | bool | None = None,
    world: World | None = None,
) -> Iterator[Outcome]:
    """One outcome for each model that falls to this rank: always the next one that no rank has taken. An error is an
    outcome too (`failed`) and stops no other.

    While a model is analysed, the next one is looked at (`begin`), and its weights are fetched ahead (`fetch`).
    """
    taken = _tickets(models, world or World())
    yield from _annotated(taken, skip=frozenset(skip), options={"how": how, "force": force, "token": token})


def work_off(
    queue: Queue,
    *,
    how: How = "dry",
    skip: Iterable[str] = (),
    force: bool = False,
    token: str | bool | None = None,
) -> Iterator[Outcome]:
    """Annotate what waits in the queue until nothing does (the arguments as for `annotate_each`).

    Several processes may work on one file: each takes the next model that waits. A process that is killed leaves its
    model waiting; since what was written is found again on the Hub (`decide`), no model is annotated twice.
    """
    entries: list[Entry] = []

    def taken() -> Iterator[Following]:
        while (entry := queue.take()) is not None:
            entries.append(entry)
            yield entry.model, queue.peek()

    for outcome in _annotated(taken(), skip=frozenset(skip), options={"how": how, "force": force, "token": token}):
        queue.finish(entries.pop(), STATES[outcome.status], outcome.reason, outcome.url)
        yield outcome


def _tickets(models: Sequence[str], world: World) -> Iterator[Following]:
    """The next model that no rank has taken, until there is none."""
    tickets = world.counter()
    while (index := round(tickets.add(1)) - 1) < len(models):
        following = round(tickets.add(0))
        yield models[index], models[following] if following < len(models) else None


def _annotated(taken: Iterator[Following], *, skip: frozenset[str], options: dict[str, Any]) -> Iterator[Outcome]:
    """One outcome a model. What comes next is a guess where other processes take models too; a wrong one costs a look
    in vain, and what was fetched by then."""
    with closing(_Scout(options)) as scout:
        for model, following in taken:
            begun = scout.take(model)
            if following is not None and following not in skip:
                scout.look_at(following)
            if model in skip:
                yield Outcome(model, "left", "on the skip list")
                continue
            try:
                yield annotate(model, **options, begun=begun)
            except LmdError as error:
                yield Outcome(model, "failed", str(error).removeprefix(f"{model}: "))
            finally:
                if begun is not None:
                    begun.let_go()


class _Scout:
    """Sees to the model that will probably be next, in a thread of its own: first a look at it, then its weights."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lmd_hf.look")
        self._found: dict[str, tuple[Future[Begun], Future[Begun]]] = {}

    def look_at(self, model: str) -> None:
        """Begin with a model."""
        looked = self._pool.submit(begin, model, **self._options)
        self._found[model] = looked, self._pool.submit(lambda: fetch(looked.result()))

    def take(self, model: str) -> Begun | None:
        """What was found of that model, if it was looked at; whatever else was found is let go. `None` where that went
        wrong: a fresh look may go well now."""
        if model not in self._found:
            self._let_go()
            return None
        looked, fetched = self._found.pop(model)
        found = looked if fetched.cancel() else fetched
        error = found.exception()
        if error is None:
            return found.result()
        if not isinstance(error, LmdError):
            log.warning("%s: nothing was fetched ahead", model, exc_info=error)
        looked.add_done_callback(_forget)
        return None

    def close(self) -> None:
        """Look at nothing more."""
        self._let_go()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _let_go(self) -> None:
        for found in self._found.values():
            for future in found:
                future.cancel()
                future.add_done_callback(_forget)
        self._found.clear()


def _forget(found: Future[Begun]) -> None:
    if not found.cancelled() and found.exception() is None:
        found.result().let_go()
