"""The only reader and writer of repositories' cards and pull requests, on huggingface_hub's client."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from lmd_hf.errors import FormatError, SourceError
from lmd_hf.hub import section
from lmd_hf.hub.etiquette import TITLE, Look, Marks, Pull
from lmd_hf.run.asked import hub_id
from lmd_hf.weights.answers import is_transient, patiently, told, wait
from lmd_hf.weights.repository import WEIGHTS


CARD = "README.md"
MOVED = 412  # main is no longer at the parent of the commit
DESCRIPTION = """\
Opened automatically by lmd_hf {version}, run by {author}. It adds one section to the card, the tag `lmd`, and two \
small files in `lmd/`; nothing else is touched. The numbers were computed from the weights at commit `{commit}` and \
measure neither quality nor safety.

Close this pull request and it will not be opened again. `lmd: false` in the card's metadata keeps the tool away.
"""
T = TypeVar("T")


def look_at(api: HfApi, repo_id: str) -> Look:
    """What the repository looks like now. Raises `SourceError`, with the remedy, if it cannot be seen, and
    `FormatError` for a card that is not UTF-8."""

    def look() -> Look:
        info = api.model_info(repo_id)
        commit = str(info.sha)
        card = read_card(api, repo_id, commit)
        me = who(api)
        found = list(api.get_repo_discussions(repo_id, discussion_type="pull_request"))
        titled = {each.num for each in found if each.title == TITLE}
        pulls = [
            Pull(each.num, each.author, each.status, _marks(proposed), proposed)
            for each in found
            if each.title == TITLE or each.author == me
            for proposed in [_card_of_pull(api, repo_id, each.num, each.status)]
        ]
        concern = tuple(p for p in pulls if p.marks is not None or p.number in titled)
        weights = _weights_digest(api.list_repo_tree(repo_id, revision=commit))
        return Look(repo_id, commit, weights, card, _marks(card), concern, me, bool(getattr(info, "disabled", False)))

    return told(hub_id(repo_id), lambda: patiently(look))


def _weights_digest(entries: Iterable[RepoFile | RepoFolder]) -> str:
    """16 hexadecimal digits of which weight files lie at the top of a repository, by name and hash."""
    files = [e for e in entries if isinstance(e, RepoFile) and e.path.endswith(WEIGHTS)]
    known = sorted((file.path, file.lfs.sha256 if file.lfs else file.blob_id) for file in files)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def read_card(api: HfApi, repo_id: str, revision: str) -> str | None:
    """README.md at a revision, or `None`."""
    try:
        path = hf_hub_download(repo_id, CARD, revision=revision, token=api.token, endpoint=api.endpoint)
    except EntryNotFoundError:
        return None
    with open(path, "rb") as file:
        data = file.read()
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{repo_id}: its README.md is not UTF-8, which the Hub requires; convert it first") from None


def who(api: HfApi) -> str | None:
    """The name behind the token; `None` without one."""
    has_token = isinstance(api.token, str) or (api.token is not False and get_token() is not None)
    return str(api.whoami(cache=True)["name"]) if has_token else None


def open_pull(
    api: HfApi, look: Look, files: Mapping[str, bytes], *, commit_message: str, description: str
) -> CommitInfo:
    """A new pull request, made from the commit that was looked at. Of two annotators that do this at once, the one with
    the larger number closes its own again."""
    made = _commit(api, look, files, commit_message, description, create_pr=True, parent_commit=look.commit)
    if made.pr_num is None:
        return made
    now = look_at(api, look.repo_id)
    earlier = [pull.number for pull in now.ours if pull.is_open]
    if earlier and min(earlier) < made.pr_num:
        number, told_why = made.pr_num, f"Opened twice at the same moment; #{min(earlier)} stays."
        # under another title: later it must not look as if its maintainers had refused it
        patiently(lambda: api.rename_discussion(look.repo_id, number, new_title=f"Duplicate of #{min(earlier)}"))
        patiently(lambda: api.change_discussion_status(look.repo_id, number, "closed", comment=told_why))
    return made


def renew_pull(api: HfApi, look: Look, number: int, files: Mapping[str, bytes], *, commit_message: str) -> CommitInfo:
    """Another commit on an own open pull request."""
    return _commit(api, look, files, commit_message, "", revision=f"refs/pr/{number}")


def push(api: HfApi, look: Look, files: Mapping[str, bytes], *, commit_message: str) -> CommitInfo:
    """A commit on main, which fails if main is no longer what was looked at."""
    return _commit(api, look, files, commit_message, "", parent_commit=look.commit)


def tried(repo_id: str, write: Callable[[], T], attempt: int) -> T | None:
    """What a write gave; `None`, after a wait, where it failed in a way that looking again may mend: main has moved
    (412), 429 and 5xx. Raises `SourceError` for everything else."""

    def call() -> T | None:
        try:
            return write()
        except HfHubHTTPError as error:
            if not is_transient(error) and error.response.status_code != MOVED:
                raise
            wait(error, attempt)
        except json.JSONDecodeError:  # the check of the metadata reads its answer before it looks at the status
            time.sleep(2.0**attempt)
        except ValueError as error:
            if "metadata" not in str(error):
                raise
            reason = " ".join(str(error).split())
            remedy = "its owner has to mend it"
            raise SourceError(f"{repo_id}: the Hub refuses its card's metadata ({reason}); {remedy}") from None
        return None

    return told(repo_id, call)


def _commit(
    api: HfApi, look: Look, files: Mapping[str, bytes], message: str, description: str, **where: object
) -> CommitInfo:
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(
        look.repo_id,
        operations,
        commit_message=message,
        commit_description=description,
        **where,  # type: ignore[arg-type]
    )


def _marks(card: str | None) -> Marks | None:
    """What a card's section says; `None` where there is none, or where a person has to mend it first."""
    try:
        found = section.find(card or "")
    except FormatError:
        return None
    return None if found is None else found.fields


def _card_of_pull(api: HfApi, repo_id: str, number: int, status: str) -> str | None:
    if status not in ("open", "draft"):  # the branch of a closed one may be gone
        return None
    try:
        return read_card(api, repo_id, f"refs/pr/{number}")
    except (RevisionNotFoundError, FormatError):
        return None
