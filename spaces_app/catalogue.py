"""Which models may be asked for: Hub ids, the embedded model and the folders that were named at start. Nothing else is
ever a path."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, scan_cache_dir
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx


EMBEDDED = "lmd-hf/stdlib-llama-1m"
HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*(?:\.[\w-]+)*(?:/[A-Za-z0-9][\w-]*(?:\.[\w-]+)*)?")
REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w-][\w.-]*)*")
SUGGESTED = 8
UNREACHABLE = (httpx.TransportError, OfflineModeIsEnabled)


class AskedWrongly(Exception):
    """What a visitor asked for cannot be done; the text is one sentence with the remedy."""


@dataclass(frozen=True)
class Subject:
    """One model at one commit. `place` is what a worker opens; `shared` says that everybody may see what comes of it,
    `whole` that its files have to be fetched whole."""

    id: str
    revision: str | None
    commit: str | None
    place: str
    shared: bool
    stamp: str = ""
    whole: bool = False
    token: str | bool = field(default=False, repr=False)

    @property
    def key(self) -> tuple[str, str]:
        """The same for the same weights."""
        return self.id, self.commit or self.stamp

    @property
    def apart(self) -> bool:
        """Whether a worker is to leave nothing on disk: of a visitor's own model, or of files that would fill it."""
        return not self.shared or self.whole

    @property
    def on_hub(self) -> bool:
        """Whether it has a card and pull requests there."""
        return self.place == self.id != EMBEDDED

    def request(self) -> dict[str, Any]:
        """What a worker is told."""
        return {"id": self.id, "place": self.place, "revision": self.commit, "token": self.token}


@dataclass(frozen=True)
class Catalogue:
    """`folders` are {name that visitors see: folder}."""

    folders: dict[str, Path]

    def look(self, model: str, revision: str = "", token: str | None = None) -> Subject:
        """The model that is meant, at the commit that its revision means now. Raises `AskedWrongly`."""
        model, revision = (model or "").strip(), (revision or "").strip()
        if not model:
            raise AskedWrongly("Name a model first, such as org/name.")
        if model == EMBEDDED:
            return Subject(model, None, None, EMBEDDED, shared=True, stamp="embedded")
        if model in self.folders:
            folder = self.folders[model]
            stamp = str(max((path.stat().st_mtime_ns for path in folder.iterdir()), default=0))
            return Subject(model, None, None, str(folder), shared=True, stamp=stamp)
        if not HUB_ID.fullmatch(model) or len(model) > 96:
            raise AskedWrongly(f"“{model[:96]}” is not a Hub id; write it as org/name.")
        if revision and not REVISION.fullmatch(revision):
            raise AskedWrongly(f"“{revision[:96]}” is not a revision; give a branch, a tag or a commit.")
        return _on_hub(model, revision or None, token)

    def suggest(self, words: str = "", token: str | None = None) -> list[str]:
        """Ids that fit: the embedded model, local folders and cached repositories always, the Hub's if it answers."""
        words = (words or "").strip()
        known = [EMBEDDED, *self.folders, *_cached()]
        fits = [name for name in dict.fromkeys(known) if words.lower() in name.lower()]
        return list(dict.fromkeys([*fits, *_searched(words, token)]))


def _on_hub(model: str, revision: str | None, token: str | None) -> Subject:
    asked: str | bool = token or False  # never the token of whoever runs this
    try:
        info = HfApi(token=asked).model_info(model, revision=revision, timeout=20)
        if info.gated and not info.private:
            HfApi(token=asked).auth_check(model)
    except GatedRepoError:
        raise AskedWrongly(
            f"{model} is gated: accept its terms on its page, then {'try again' if token else 'sign in here'}."
        ) from None
    except RevisionNotFoundError:
        raise AskedWrongly(f"{model} has no revision “{revision}”; its page lists the branches.") from None
    except (RepositoryNotFoundError, HFValidationError):
        hint = "check the spelling" if token else "check the spelling or, if it is private, sign in"
        raise AskedWrongly(f"There is no model {model} on the Hub; {hint}.") from None
    except UNREACHABLE:
        if model in _cached():
            return Subject(model, revision, revision, model, shared=True, stamp=revision or "cached")
        raise AskedWrongly("The Hub cannot be reached; choose the embedded or a cached model, or try later.") from None
    except HfHubHTTPError as error:
        raise AskedWrongly(f"The Hub answered {error.response.status_code} for {model}; try again later.") from None
    names = [sibling.rfilename for sibling in info.siblings or []]
    if not any(name.endswith((".safetensors", ".gguf")) for name in names):
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in names):
            raise AskedWrongly(
                f"{model} holds pickles alone, which are not opened here; ask its owner for safetensors."
            )
        raise AskedWrongly(f"{model} holds no weights at this revision; choose another repository.")
    shared, whole = not (info.private or info.gated), not any(name.endswith(".safetensors") for name in names)
    return Subject(model, revision, str(info.sha), model, shared=shared, whole=whole, token=asked)


def _cached() -> list[str]:
    try:
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except CacheNotFound:
        return []


def _searched(words: str, token: str | None) -> list[str]:
    if is_offline_mode() or len(words) < 2:
        return []
    try:
        found = HfApi(token=token or False).list_models(search=words, filter="safetensors", limit=SUGGESTED)
        return [model.id for model in found]
    except (HfHubHTTPError, *UNREACHABLE):
        return []
