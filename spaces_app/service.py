"""What this Space can do: values in, values out, one worker each. Nothing here knows of a page."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from catalogue import AskedWrongly, Catalogue, Subject
from jobs import Failed, Jobs
from store import Store

import lmd_hf


Event = tuple[str, Any]


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
        key = "plan", *subject.key
        made = self.store.find(key) if subject.shared else None
        if made is None:
            with told():
                asked = {"model": subject.request(), "limits": self.jobs.limits.of_plan()}
                made = named(self._last("plan", session, not subject.shared, asked), subject)
            if subject.shared:
                self.store.add(key, made, len(str(made)))
        return made

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
            return self._last("card", session, not subject.shared or how == "pull", asked)

    def _made(
        self, kind: str, key: Any, subjects: tuple[Subject, ...], session: str, read: Any, **asked: Any
    ) -> Iterator[Event]:
        shared = all(subject.shared for subject in subjects)
        known = self.store.find((kind, key))
        if known is not None and shared:
            yield kind, known
            return
        task = {"report": "analyze", "comparison": "compare"}[kind]
        limits = self.jobs.limits.of_plan()
        # whoever asks for the same meanwhile waits, and finds it
        lock = self.store.locks[kind, key] if shared else None
        if lock is not None:
            lock.acquire()
        try:
            known = self.store.find((kind, key)) if shared else None
            if known is None:
                with told():
                    for answer in self.jobs.ask(task, session=session, private=not shared, limits=limits, **asked):
                        if "done" in answer:
                            known = read(answer["done"])
                            if shared:
                                self.store.add((kind, key), known, len(answer["done"]))
                        else:
                            yield from answer.items()
            yield kind, known
        finally:
            if lock is not None:
                lock.release()

    def _part(self, what: str, subject: Subject, part: str, layer: int | None, session: str, read: Any) -> Any:
        key = what, *subject.key, part, layer
        found = self.store.find(key) if subject.shared else None
        if found is None:
            with told():
                asked = {"model": subject.request(), "part": part, "layer": layer}
                made = self._last(what, session, not subject.shared, asked)
            found = read(made)
            if subject.shared:
                self.store.add(key, found, len(str(made)))
        return found

    def _last(self, what: str, session: str, private: bool, asked: dict[str, Any]) -> Any:
        return next(a["done"] for a in self.jobs.ask(what, session=session, private=private, **asked) if "done" in a)


class told:
    """Errors that a visitor may read, as Gradio shows them: one sentence, no traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, (AskedWrongly, Failed)):
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
