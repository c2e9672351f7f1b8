"""Many models, one after the other, from a durable queue: what is done stays done, whatever happens to the process."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from lmd_hf.errors import LmdError, SettingsError
from lmd_hf.hub.annotate import How, Outcome, annotate
from lmd_hf.hub.queue import Queue
from lmd_hf.weights.answers import patiently, told


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
    models: Iterable[str],
    *,
    how: How = "dry",
    skip: Iterable[str] = (),
    force: bool = False,
    token: str | bool | None = None,
) -> Iterator[Outcome]:
    """One outcome a model; an error is one too (`failed`) and stops no other."""
    skipped = frozenset(skip)
    for model in models:
        if model in skipped:
            yield Outcome(model, "left", "on the skip list")
            continue
        try:
            yield annotate(model, how=how, force=force, token=token)
        except LmdError as error:
            yield Outcome(model, "failed", str(error).removeprefix(f"{model}: "))


def work_off(queue: Queue, **options: Any) -> Iterator[Outcome]:
    """Annotate what waits in the queue until nothing does (`options` as for `annotate_each`).

    Several processes may work on one file: each takes the next model that waits. A process that is killed leaves its
    model waiting; since what was written is found again on the Hub (`decide`), no model is annotated twice.
    """
    while (entry := queue.take()) is not None:
        (outcome,) = annotate_each([entry.model], **options)
        queue.finish(entry, STATES[outcome.status], outcome.reason, outcome.url)
        yield outcome
