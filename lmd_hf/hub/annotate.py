"""From a model to its card: look, decide, analyse, draft, decide again, write. A dry run ends before the last."""

import difflib
import io
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import HfApi

from lmd_hf import __version__
from lmd_hf.api import analyze
from lmd_hf.errors import FormatError, OutputError, SettingsError, SourceError
from lmd_hf.hub import repository
from lmd_hf.hub.etiquette import TITLE, Decision, Look, Marks, decide
from lmd_hf.hub.metadata import add_tag
from lmd_hf.hub.section import place
from lmd_hf.pipeline import Request, analyze_one, fetch_ahead
from lmd_hf.records import Settings
from lmd_hf.report.files import bytes_writer, write_folder
from lmd_hf.report.summary import numbers_digest, summary_text
from lmd_hf.run.world import World
from lmd_hf.weights.answers import client
from lmd_hf.weights.source import FileSource, open_source


if TYPE_CHECKING:
    from lmd_hf.report.report import Report

TAG = "lmd"
FIGURE, SUMMARY = "lmd/heatmap.svg", "lmd/summary.json"
How = Literal["dry", "pull", "push"]
ROUNDS = 3  # of looking again because main has moved
REQUEST = Request(Settings(heads=True))
RENEW = "Renew the Layer Matrix Decomposition section"


@dataclass(frozen=True)
class Draft:
    """What would be written: the card before and after, the files beside it, and notes on what was left alone."""

    before: str
    after: str
    files: dict[str, bytes]
    marks: Marks
    notes: tuple[str, ...]

    def diff(self) -> str:
        """The change of the card as a unified diff."""
        lines = difflib.unified_diff(
            self.before.splitlines(keepends=True), self.after.splitlines(keepends=True), "README.md", "README.md"
        )
        return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


@dataclass(frozen=True)
class Outcome:
    """What became of one model: `written` (with the address), `drafted` (a dry run), `left` alone or `failed`."""

    model: str
    status: Literal["written", "drafted", "left", "failed"]
    reason: str
    url: str | None = None
    draft: Draft | None = None


def draft(card: str | None, report: "Report", *, weights: str = "local") -> Draft:
    """The card with the section and the tag, and the files beside it, from a report alone. `weights` is the digest of
    the weight files on the Hub.

    Metadata that cannot be edited in place stays as it is, and `notes` says so. Raises `FormatError` as `place` does.
    """
    before = card or ""
    marks = {
        "lmd_hf": report.lmd_hf,
        "commit": report.model.commit or "none",
        "weights": weights,
        "numbers": numbers_digest(report),
    }
    tagged, reason = add_tag(before, TAG)
    figure = _heatmap(report)
    body = report.card() if figure is None else report.card(figure=FIGURE)
    after = place(tagged, body, **marks)
    notes = () if reason is None else (f"tag not added: {reason}",)
    beside = {SUMMARY: summary_text(report).encode(), **({} if figure is None else {FIGURE: figure})}
    return Draft(before, after, {"README.md": after.encode(), **beside}, marks, notes)


@dataclass(frozen=True)
class Begun:
    """A repository before the analysis: what was seen there, what may be done, and the headers of its weights, `None`
    where nothing may, or need be read."""

    look: Look
    early: Decision
    source: FileSource | None

    def let_go(self) -> None:
        """Forget what was fetched, and fetch no more."""
        if self.source is not None:
            self.source.forget()


def begin(
    model: str, *, how: How = "dry", force: bool = False, token: str | bool | None = None, known: str | None = None
) -> Begun:
    """All that comes before the weights themselves, from the Hub alone; nothing is opened at the commit `known`, whose
    report is there. Raises what `annotate` does."""
    look = _look(client(token), model, how)
    if how != "dry" and look.me is None:
        raise SettingsError(f"{model}: writing needs a token with write access; `hf auth login`")
    early = decide(look, {"weights": look.weights, "lmd_hf": __version__}, force=force)
    if early.action == "nothing" or look.commit == known:
        return Begun(look, early, None)
    source = open_source(model, revision=look.commit, token=token)
    assert isinstance(source, FileSource), "a repository has files"
    return Begun(look, early, source)


def fetch(begun: Begun) -> Begun:
    """The same with its weights on their way (`fetch_ahead`), for a model that will be annotated later."""
    return begun if begun.source is None else replace(begun, source=fetch_ahead(begun.source, REQUEST.settings))


def annotate(
    model: str,
    *,
    how: How = "dry",
    force: bool = False,
    token: str | bool | None = None,
    report: "Report | None" = None,
    begun: Begun | None = None,
) -> Outcome:
    """Put the LMD section into a repository's card: as a diff (`dry`), a pull request (`pull`) or a commit (`push`).

    Whatever was refused, opted out of or said before is left alone (`etiquette.decide`); weights are only read when
    something may come of it, and not at all where `report` is that of the commit which main is at. `begun` is what
    `begin` gave for the same arguments a while ago: before anything is written, the repository is looked at again.
    Raises `SourceError` where the repository cannot be read or written, `FormatError` for a card that a person has to
    mend, `SettingsError` without a token where one is needed.
    """
    api = client(token)
    known = None if report is None else report.model.commit
    begun = begun or begin(model, how=how, force=force, token=token, known=known)
    look = begun.look
    if begun.early.action == "nothing":
        return Outcome(model, "left", begun.early.reason)
    if report is None or known != look.commit:
        assert begun.source is not None, "opened, unless a report of this commit is there"
        report = analyze_one(begun.source, REQUEST, World(), None)
    if report.unread:
        raise SourceError(f"{model}: {len(report.unread)} matrices {report.unread[0].reason}; nothing was written")
    analysed = look.weights
    for attempt in range(ROUNDS):
        if look.weights != analysed:
            raise SourceError(f"{model}: its weights were replaced meanwhile; run again")
        made = draft(look.card, report, weights=analysed)
        decision = decide(look, made.marks, force=force)
        if decision.action == "nothing":
            return Outcome(model, "left", decision.reason)
        branch = next((pull for pull in look.pulls if pull.number == decision.pull), None)
        if branch is not None and branch.marks is not None:  # what others have changed there stays
            made = draft(branch.card, report, weights=analysed)
        if how == "dry":
            return Outcome(model, "drafted", decision.reason, draft=made)
        now = _look(api, model, how)  # analysing takes minutes, in which others may have written
        if now == look:
            if done := repository.tried(model, partial(_write, api, now, decision, made, how), attempt):
                return done
            now = _look(api, model, how)  # an answer of 500 does not tell whether it was written
        look = now
    raise SourceError(f"{model}: it keeps changing, or the Hub keeps failing; run again later")


def annotate_file(model: str, path: Path, *, token: str | bool | None = None) -> Draft:
    """Put the section of any model that `analyze` reads into a local card, and `lmd/` beside it; the card is made if it
    is not there. Raises what `analyze` and `draft` do, and `OutputError` where the folder takes no file."""
    try:
        card = path.read_bytes().decode() if path.exists() else None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8, which the Hub requires; convert it first") from None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); give --to a file") from None
    write_folder(path.parent, {})
    made = draft(card, analyze(model, heads=True, token=token))
    files = {name: data for name, data in made.files.items() if name != "README.md"}
    write_folder(path.parent / "lmd", {Path(name).name: bytes_writer(data) for name, data in files.items()})
    write_folder(path.parent, {path.name: bytes_writer(made.files["README.md"])})
    return made


def _look(api: HfApi, model: str, how: How) -> Look:
    """Whoever pushes to an own repository asks nobody: pull requests do not matter then."""
    look = repository.look_at(api, model)
    return replace(look, pulls=()) if how == "push" else look


def _write(api: HfApi, look: Look, decision: Decision, made: Draft, how: How) -> Outcome:
    if how == "push":
        info: Any = repository.push(api, look, made.files, commit_message=TITLE if look.marks is None else RENEW)
        return Outcome(look.repo_id, "written", "committed to main", str(info.commit_url), made)
    if decision.pull is not None:
        repository.renew_pull(api, look, decision.pull, made.files, commit_message=RENEW)
        url = f"{api.endpoint}/{look.repo_id}/discussions/{decision.pull}"
        return Outcome(look.repo_id, "written", f"pull request #{decision.pull} renewed", url, made)
    text = repository.DESCRIPTION.format(version=__version__, author=look.me, commit=look.commit)
    info = repository.open_pull(api, look, made.files, commit_message=TITLE, description=text)
    return Outcome(look.repo_id, "written", f"pull request #{info.pr_num} opened", info.pr_url, made)


def _heatmap(report: "Report") -> bytes | None:
    """The layer × role map as SVG, the same bytes for the same report: text, which a repository keeps without LFS."""
    import matplotlib

    from lmd_hf.report.plots import layer_map

    figure = layer_map(report)
    if figure is None:
        return None
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lmd_hf", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()
