"""What this Space can do: values in, values out, one worker each. Nothing here knows of a page."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import gradio as gr
from catalogue import AskedWrongly, Catalogue, Subject
from jobs import Failed, Jobs
from store import Store

import lmd_hf


Event = tuple[str, Any]
SIZE_OF_PARTS = 2**21  # bytes that a plan, a head's tokens or the factors of a matrix take at most, about


@dataclass(frozen=True)
class Service:
    """The models that may be asked for, the workers and the shared results."""

    catalogue: Catalogue
    jobs: Jobs
    store: Store

    def look(self, model: str, revision: str = "", token: gr.OAuthToken | None = None) -> Subject:
        """Which model at which commit is meant. Raises `gr.Error`."""
        with told():
            return self.catalogue.look(model, revision, None if token is None else token.token)

    def plan(self, subject: Subject, session: str) -> dict[str, Any]:
        """What an analysis would do, and `refusal`, a sentence, where that is too much for this hardware."""
        asked = {"model": subject.request(), "limits": self.jobs.limits.of_plan()}
        key = "plan", *subject.key
        return self._once(key, subject, lambda: named(self._last("plan", session, subject.apart, asked), subject))

    def analysis(self, subject: Subject, session: str) -> Iterator[Event]:
        """("plan", …), ("progress", [done, total, name]) …, ("report", `lmd_hf.Report`); of a known one that alone."""
        yield from self._made(
            "report", subject.key, (subject,), session, lmd_hf.Report.from_json, model=subject.request()
        )

    def comparison(self, base: Subject, tuned: Subject, session: str) -> Iterator[Event]:
        """("progress", …) …, ("comparison", `lmd_hf.Comparison`)."""
        key, sides = (base.key, tuned.key), {"base": base.request(), "tuned": tuned.request()}
        yield from self._made("comparison", key, (base, tuned), session, lmd_hf.Comparison.from_json, **sides)

    def pieces(self, subject: Subject, part: str, layer: int | None, session: str) -> Any:
        """The `lmd_hf.interactive.Factors` of one matrix."""
        return self._part("factors", subject, part, layer, session, lmd_hf.interactive.Factors.from_dict)

    def tokens(self, subject: Subject, part: str, layer: int | None, session: str) -> dict[str, Any]:
        """The tokens nearest to the leading directions of a head."""
        return self._part("directions", subject, part, layer, session, dict)

    def proposal(self, subject: Subject, report: Any, how: str, session: str) -> dict[str, Any]:
        """What a pull request would change (`dry`), or what became of it (`pull`)."""
        asked = {"model": subject.request(), "report": report.to_json(), "how": how}
        with told():
            return self._last("card", session, subject.apart or how == "pull", asked)

    def _made(
        self, kind: str, key: Any, subjects: tuple[Subject, ...], session: str, read: Any, **asked: Any
    ) -> Iterator[Event]:
        """The answers of a worker as (name, value), the last of them the result; of a shared one that is known it
        alone. Whoever asks for the same meanwhile waits, and finds it."""
        shared, apart = all(s.shared for s in subjects), any(s.apart for s in subjects)
        if shared and (known := self.store.find((kind, key))) is not None:
            yield kind, known
            return
        task = {"report": "analyze", "comparison": "compare"}[kind]
        limits = self.jobs.limits.of_plan()
        with told(), self.store.locks[kind, key] if shared else nullcontext():
            if shared and (known := self.store.find((kind, key))) is not None:
                yield kind, known
                return
            for answer in self.jobs.ask(task, session=session, private=apart, limits=limits, **asked):
                if "done" in answer:
                    result = read(answer["done"])
                    if shared:
                        self.store.add((kind, key), result, len(answer["done"]))
                    yield kind, result
                else:
                    if "plan" in answer and shared:
                        planned = named(answer["plan"], subjects[0])
                        self.store.add(("plan", *subjects[0].key), planned, SIZE_OF_PARTS)
                    yield from answer.items()

    def _part(self, what: str, subject: Subject, part: str, layer: int | None, session: str, read: Any) -> Any:
        asked = {"model": subject.request(), "part": part, "layer": layer}
        key = what, *subject.key, part, layer
        return self._once(key, subject, lambda: read(self._last(what, session, subject.apart, asked)))

    def _once(self, key: Hashable, subject: Subject, make: Callable[[], Any]) -> Any:
        """What `make` gives; of a shared model whoever asks for the same meanwhile waits, and finds it."""
        if not subject.shared:
            with told():
                return make()
        with told(), self.store.locks[key]:
            if (found := self.store.find(key)) is None:
                found = make()
                self.store.add(key, found, SIZE_OF_PARTS)
            return found

    def _last(self, what: str, session: str, private: bool, asked: dict[str, Any]) -> Any:
        return next(a["done"] for a in self.jobs.ask(what, session=session, private=private, **asked) if "done" in a)


@contextmanager
def told() -> Iterator[None]:
    """Errors that a visitor may read, as Gradio shows them: one sentence, no traceback."""
    try:
        yield
    except (AskedWrongly, Failed) as error:
        raise gr.Error(str(error), print_exception=False) from None


def last(events: Iterator[Event]) -> Any:
    """The value of the last event."""
    *_, (_, value) = events
    return value


def session_of(request: gr.Request | None) -> str:
    """Whose request it is, for stopping it."""
    return "" if request is None else request.session_hash or ""


def named(planned: dict[str, Any], subject: Subject) -> dict[str, Any]:
    """Under the name that the visitor gave: of a local folder the path is nobody's business."""
    return {**planned, "model": {**planned["model"], "id": subject.id, "commit": subject.commit}}
