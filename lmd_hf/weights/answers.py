"""The Hub's client, and what it answers when it does not do what was asked: again after a while, or one line with the
remedy."""

import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from lmd_hf import __version__
from lmd_hf.compat import unreachable_errors
from lmd_hf.errors import SettingsError, SourceError


TRIES = 4  # of a request that was answered with 429 or 5xx
LONGEST_WAIT = 300.0  # seconds: the Hub counts requests in windows of five minutes
T = TypeVar("T")


def client(token: str | bool | None) -> HfApi:
    """The Hub's client, for the stored token (`None`, `True`), none (`False`) or this one.

    Raises `SettingsError` for one that no header can carry: the HTTP library would print it, and call the Hub
    unreachable.
    """
    sent = get_token() if token is None or token is True else token
    if isinstance(sent, str) and not re.fullmatch("[!-~]+", sent):
        raise SettingsError(
            "the token is empty, or has a space, a line break or a letter beyond ASCII in it; strip() it, or "
            "`hf auth login`"
        )
    return HfApi(token=token, library_name="lmd-hf", library_version=__version__)


def told(repo_id: str, call: Callable[[], T], *, revision: str | None = None) -> T:
    """What the call gives; the Hub's errors as a `SourceError` that names the repository and the remedy."""
    try:
        return call()
    except GatedRepoError:
        raise SourceError(f"{repo_id}: gated; accept its terms on its page, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise SourceError(f"{repo_id}: no revision '{revision}'; see the branches on its page") from None
    except HFValidationError:
        raise SourceError(f"{repo_id}: no such folder or file, and not a Hub id (org/name); check the path") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{repo_id}: no such folder, and no such Hub repository (if private: `hf auth login`)"
        ) from None
    except unreachable_errors():
        remedy = "connect, or give a local folder"
        raise SourceError(f"{repo_id}: not (wholly) in the cache and the Hub cannot be reached; {remedy}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedies = {
            401: "the token is not, or no longer, valid; `hf auth login`",
            403: "the token lacks a permission, such as write access; use one that has it",
        }
        said = f" ({' '.join(error.server_message.split())})" if error.server_message else ""
        raise SourceError(
            f"{repo_id}: the Hub answered {status}{said}; {remedies.get(status, 'try again later')}"
        ) from None


def patiently(call: Callable[[], T]) -> T:
    """What the call gives, again after 429 and 5xx: after what the answer says, else after 1, 2, 4 seconds."""
    for attempt in range(TRIES - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            if not is_transient(error):
                raise
            wait(error, attempt)
    return call()


def is_transient(error: HfHubHTTPError) -> bool:
    """Whether the same request may succeed a moment later."""
    return error.response.status_code == 429 or error.response.status_code >= 500


def wait(error: HfHubHTTPError, attempt: int) -> None:
    """As long as the answer says; else 1, 2, 4 … seconds."""
    asked = demanded_wait(error.response.headers)
    time.sleep(min(2.0**attempt if asked is None else asked, LONGEST_WAIT))


def demanded_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds from `Retry-After`, or until the window of the Hub's `RateLimit` header ends; `None` without either."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    limit = parse_ratelimit_headers(headers)
    return None if limit is None else float(limit.reset_in_seconds)
