"""A Hub repository as a source: pinned once to a commit, headers by HTTP range, shards downloaded when first read."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from lmd_hf import __version__
from lmd_hf.compat import resolve_commit, unreachable_errors
from lmd_hf.errors import SourceError
from lmd_hf.records import TensorRef, WeightFile
from lmd_hf.weights.header import read_header
from lmd_hf.weights.source import (
    INDEX,
    FileSource,
    make_identity,
    open_folder,
    read_config,
    read_index,
    read_local_header,
    unique,
    weight_files,
)


FIRST_BYTES = 100_000  # 97 % of safetensors headers are shorter (huggingface_hub, parse_safetensors_file_metadata)


def open_repository(
    repo_id: str, *, revision: str | None = None, subfolder: str = "", token: str | bool | None = None
) -> FileSource:
    """A model repository at the commit that `revision` means now.

    Opening downloads config.json, the index and headers only; a snapshot that is wholly cached needs no download.
    Raises `SourceError` with the remedy for a repository that is missing, private, gated or out of reach.
    """
    api = HfApi(token=token, library_name="lmd-hf", library_version=__version__)
    try:
        return _open(api, repo_id, revision, subfolder)
    except GatedRepoError:
        raise SourceError(f"{repo_id}: gated; accept its terms on its page, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise SourceError(f"{repo_id}: no revision '{revision}'; see the branches on its page") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{repo_id}: no such folder, and no such Hub repository (if private: `hf auth login`)"
        ) from None
    except unreachable_errors():
        remedy = "connect, or give a local folder"
        raise SourceError(f"{repo_id}: not (wholly) in the cache and the Hub cannot be reached; {remedy}") from None
    except HfHubHTTPError as error:
        raise SourceError(f"{repo_id}: the Hub answered {error.response.status_code}; try again later") from None


def _open(api: HfApi, repo_id: str, revision: str | None, subfolder: str) -> FileSource:
    commit = resolve_commit(api, repo_id, revision)
    if folder := _cached_folder(repo_id, commit, subfolder):
        source = open_folder(folder, identifier=repo_id)
        return replace(source, identity=replace(source.identity, revision=revision, commit=commit))
    prefix = f"{subfolder}/" if subfolder else ""
    entries = api.list_repo_tree(repo_id, path_in_repo=subfolder or None, revision=commit)
    sizes = {e.path.removeprefix(prefix): e for e in entries if hasattr(e, "size")}

    def locate(name: str) -> Path:
        try:
            with _DOWNLOADING:  # two workers that need the same shard fetch it once
                return Path(hf_hub_download(repo_id, prefix + name, revision=commit, token=api.token))
        except (OSError, HfHubHTTPError, *unreachable_errors()) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SourceError(f"{repo_id}: cannot download {name} ({reason}); what has arrived is kept") from None

    names, index = weight_files(sorted(sizes), repo_id), None
    if INDEX in names:
        index = read_index(locate(INDEX).read_bytes(), f"{repo_id}/{INDEX}")
        names = index.shards
        if absent := [name for name in names if name not in sizes]:
            raise SourceError(f"{repo_id}: its index names shards that are absent, first '{absent[0]}'; ask its owner")
    config = read_config(locate("config.json")) if "config.json" in sizes else None
    files: list[WeightFile] = []
    tensors: list[TensorRef] = []
    for name in names:
        entry = sizes[name]
        files.append(WeightFile(name, entry.size, entry.lfs.sha256 if entry.lfs else None))
        tensors += _header(api, repo_id, prefix + name, name, commit, entry.size)
    if index is not None:
        index.check(tuple(tensors))
    identity = make_identity(repo_id, revision, commit, config, files)
    return FileSource(identity, config, unique(tensors), locate)


_DOWNLOADING = threading.Lock()


def _header(api: HfApi, repo_id: str, path: str, name: str, commit: str, size: int) -> tuple[TensorRef, ...]:
    cached = try_to_load_from_cache(repo_id, path, revision=commit)
    if isinstance(cached, str):
        return read_local_header(Path(cached), name)
    return read_header(name, size, _ranges(api, hf_hub_url(repo_id, path, revision=commit)))


def _ranges(api: HfApi, url: str) -> Callable[[int, int], bytes]:
    """A reader of byte ranges of a remote file that asks for the first 100 kB once."""
    headers = build_hf_headers(token=api.token, library_name="lmd-hf", library_version=__version__)
    session: Any = get_session()

    def fetch(start: int, stop: int) -> bytes:
        answer = session.get(
            url,
            headers={**headers, "Range": f"bytes={start}-{stop - 1}"},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        )
        hf_raise_for_status(answer)
        return bytes(answer.content if answer.status_code == 206 else answer.content[start:stop])

    first = fetch(0, FIRST_BYTES)
    return lambda start, stop: first[start:stop] if stop <= len(first) else fetch(start, stop)


def _cached_folder(repo_id: str, commit: str, subfolder: str) -> Path | None:
    """The folder of the cached snapshot, if the configuration and every weight file that it names are there."""

    def cached(name: str) -> Path | None:
        path = try_to_load_from_cache(repo_id, f"{subfolder}/{name}".lstrip("/"), revision=commit)
        return Path(path) if isinstance(path, str) else None

    config, index = cached("config.json"), cached(INDEX)
    names = ["model.safetensors"] if index is None else read_index(index.read_bytes(), f"{repo_id}/{INDEX}").shards
    complete = config is not None and all(cached(name) is not None for name in names)
    return config.parent if config is not None and complete else None
