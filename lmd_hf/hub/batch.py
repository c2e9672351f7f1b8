"""Many models, one after the other on each rank, from a durable queue: what is done stays done, whatever happens to
the process."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from lmd_hf.errors import LmdError, SettingsError
from lmd_hf.hub.annotate import Begun, How, Outcome, annotate, begin
from lmd_hf.hub.queue import Entry, Queue
from lmd_hf.run.world import World
from lmd_hf.weights.answers import patiently, told


Following = tuple[str, str | None]  # a model to do, and the one that will probably be next
STATES = {"written": "done", "drafted": "done", "left": "left", "failed": "failed"}


def listed(path: Path) -> list[str]:
    """The models of a text file: one a line, blank lines and what follows # left out. Raises `SettingsError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path}: cannot read a list of models ({error}); give a text file, one model a line"
        ) from None
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def searched(*, author: str | None, search: str | None, limit: int, token: str | bool | None = None) -> list[str]:
    """The models of an author, or that a search finds on the Hub, most downloaded first."""
    api = HfApi(token=token)

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

    While a model is analysed, the next one is looked at (`begin`): its listing, its card and the headers of its
    weights.
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
    in vain."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="lmd_hf.look")
    ahead: dict[str, Future[Begun]] = {}
    try:
        for model, following in taken:
            looked = ahead.pop(model, None)
            ahead.clear()
            if following is not None and following not in skip:
                ahead[following] = pool.submit(begin, following, **options)
            if model in skip:
                yield Outcome(model, "left", "on the skip list")
                continue
            try:
                # what went wrong ahead may go well now
                begun = looked.result() if looked is not None and looked.exception() is None else None
                yield annotate(model, **options, begun=begun)
            except LmdError as error:
                yield Outcome(model, "failed", str(error).removeprefix(f"{model}: "))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
