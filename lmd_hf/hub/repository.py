"""The only reader and writer of repositories' cards and pull requests, on huggingface_hub's client."""

import json
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lmd_hf.compat import unreachable_errors
from lmd_hf.errors import FormatError, SourceError
from lmd_hf.hub import section
from lmd_hf.hub.etiquette import TITLE, Look, Marks, Pull


CARD = "README.md"
TRIES = 4  # of a request that the Hub answered with 429 or 5xx
LONGEST_WAIT = 300.0  # seconds: the Hub counts requests in windows of five minutes
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
            Pull(each.num, each.author, each.status, _marks_of_pull(api, repo_id, each.num, each.status))
            for each in found
            if each.title == TITLE or each.author == me
        ]
        concern = tuple(p for p in pulls if p.marks is not None or p.number in titled)
        return Look(repo_id, commit, card, _marks(card), concern, me, bool(getattr(info, "disabled", False)))

    return told(repo_id, lambda: patiently(look))


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
    return None if api.token is False or not _has_token(api) else str(api.whoami(cache=True)["name"])


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
        api.change_discussion_status(
            look.repo_id, made.pr_num, "closed", comment=f"Opened twice at the same moment; #{min(earlier)} stays."
        )
    return made


def renew_pull(api: HfApi, look: Look, number: int, files: Mapping[str, bytes], *, commit_message: str) -> CommitInfo:
    """Another commit on an own open pull request."""
    return _commit(api, look, files, commit_message, "", revision=f"refs/pr/{number}")


def push(api: HfApi, look: Look, files: Mapping[str, bytes], *, commit_message: str) -> CommitInfo:
    """A commit on main, which fails if main is no longer what was looked at."""
    return _commit(api, look, files, commit_message, "", parent_commit=look.commit)


def patiently(call: Callable[[], T]) -> T:
    """The call, again after 429 and 5xx: after what the Hub's answer says, else after 1, 2, 4 seconds."""
    for attempt in range(TRIES - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            if not _is_transient(error):
                raise
            time.sleep(_wait(error, attempt))
    return call()


def tried(repo_id: str, write: Callable[[], T], attempt: int) -> T | None:
    """What a write gave; `None`, after a wait, where it failed in a way that looking again may mend: main has moved
    (412), 429 and 5xx. Raises `SourceError` for everything else."""
    try:
        return told(repo_id, write)
    except _Transient as error:
        time.sleep(_wait(error.cause, attempt))
        return None
    except json.JSONDecodeError:  # the check of the metadata reads its answer before it looks at the status
        time.sleep(2.0**attempt)
        return None
    except ValueError as error:
        if "metadata" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{repo_id}: the Hub refuses its card's metadata ({reason}); its owner has to mend it"
        ) from None


class _Transient(SourceError):
    def __init__(self, text: str, cause: HfHubHTTPError) -> None:
        super().__init__(text)
        self.cause = cause


def _is_transient(error: HfHubHTTPError) -> bool:
    return error.response.status_code in (412, 429) or error.response.status_code >= 500


def _wait(error: HfHubHTTPError, attempt: int) -> float:
    asked = _asked_wait(error)
    return min(2.0**attempt if asked is None else asked, LONGEST_WAIT)


def _asked_wait(error: HfHubHTTPError) -> float | None:
    """Seconds, from `Retry-After` or from the `t=` of the Hub's `RateLimit` header."""
    headers = error.response.headers
    fields = dict(pair.strip().split("=", 1) for pair in headers.get("RateLimit", "").split(";") if "=" in pair)
    asked = headers.get("Retry-After") or fields.get("t", "")
    return float(asked) if asked.isdigit() else None


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


def _marks_of_pull(api: HfApi, repo_id: str, number: int, status: str) -> Marks | None:
    if status not in ("open", "draft"):  # the branch of a closed one may be gone
        return None
    try:
        return _marks(read_card(api, repo_id, f"refs/pr/{number}"))
    except (RevisionNotFoundError, FormatError):
        return None


def _has_token(api: HfApi) -> bool:
    from huggingface_hub import get_token

    return isinstance(api.token, str) or get_token() is not None


def told(repo_id: str, call: Callable[[], T]) -> T:
    """The call, its errors as one line with the remedy."""
    try:
        return call()
    except GatedRepoError:
        raise SourceError(f"{repo_id}: gated; accept its terms on its page, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise SourceError(f"{repo_id}: no such Hub repository (if private: `hf auth login`)") from None
    except unreachable_errors():
        raise SourceError(f"{repo_id}: the Hub cannot be reached; connect, or use --to with a local card") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if _is_transient(error):
            raise _Transient(f"{repo_id}: the Hub answered {status}; try again later", error) from None
        remedy = "the token lacks a permission; use one with write access" if status in (401, 403) else "see its page"
        raise SourceError(f"{repo_id}: the Hub answered {status}; {remedy}") from None
