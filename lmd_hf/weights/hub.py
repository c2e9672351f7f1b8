"""A Hub repository as a source: pinned once to a commit, headers and selected tensors by HTTP range."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

from lmd_hf import __version__
from lmd_hf.compat import redirect_errors, resolve_commit, unreachable_errors
from lmd_hf.errors import SourceError, first_line
from lmd_hf.records import TensorRef, WeightFile
from lmd_hf.weights.answers import client, patiently, told
from lmd_hf.weights.header import read_header
from lmd_hf.weights.ranged import CONNECTIONS, Connection, RemoteFile
from lmd_hf.weights.repository import (
    INDEX,
    PICKLES,
    STATE,
    check_state,
    config_file,
    find_state,
    newest_state,
    read_config,
    read_index,
    unread_files,
    weight_files,
)
from lmd_hf.weights.source import FileSource, from_files, make_identity, open_folder, read_local_header, unique


FIRST_BYTES = 100_000  # 97 % of safetensors headers are shorter (huggingface_hub, parse_safetensors_file_metadata)


def open_repository(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    download: bool = False,
) -> FileSource:
    """A model repository at the commit that `revision` means now.

    Opening fetches config.json, the index and headers only; a snapshot that is wholly cached needs nothing. Later,
    files that are cached are read from disk, of the others only the bytes asked for are fetched, or, with `download`,
    whole files into the cache. Raises `SourceError` with the remedy for a repository that is missing, private, gated
    or out of reach.
    """
    api = client(token)
    opened = told(repo_id, lambda: _open(api, repo_id, revision, subfolder, download), revision=revision)
    return replace(opened, identity=replace(opened.identity, subfolder=subfolder), token=token)


def _open(api: HfApi, repo_id: str, revision: str | None, subfolder: str, download: bool) -> FileSource:
    commit = patiently(lambda: resolve_commit(api, repo_id, revision))
    if folder := _cached_folder(repo_id, commit, subfolder):
        source = open_folder(folder, identifier=repo_id)
        identity = replace(source.identity, revision=revision, commit=commit)
        return replace(
            source, identity=identity, training=partial(_cached_state, api, folder, repo_id, commit, subfolder)
        )
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        listing = list(api.list_repo_tree(repo_id, path_in_repo=subfolder or None, recursive=True, revision=commit))
    except EntryNotFoundError:
        raise SourceError(f"{repo_id}: no folder '{subfolder}' in it; check --subfolder") from None
    sizes = {entry.path.removeprefix(prefix): entry for entry in listing if hasattr(entry, "size")}
    fetch = partial(_fetch, api, repo_id, prefix, commit)
    names, index = _weight_files(list(sizes), repo_id), None
    if names[0].endswith(".json"):
        index = read_index(fetch(names[0]).read_bytes(), f"{repo_id}/{names[0]}")
        names = index.shards
        if absent := [name for name in names if name not in sizes]:
            raise SourceError(f"{repo_id}: its index names shards that are absent, first '{absent[0]}'; ask its owner")
    described = config_file(names)
    config = read_config(fetch(described)) if described in sizes else None
    notes = unread_files(list(sizes), names)
    connection = Connection(repo_id, _headers(api), partial(_cached, repo_id, prefix, commit))
    state = newest_state(list(sizes))

    def training() -> tuple[str, Path] | None:
        if state is None:
            return None
        check_state(state, sizes[state].size)
        return state, _download(fetch, state, connection)

    if not names[0].endswith(".safetensors"):  # the header of a pickle or a GGUF file is not at one place
        paths = [_download(fetch, name, connection) for name in names]
        source = from_files(paths[0].parent, names, config, repo_id)
        identity = replace(source.identity, revision=revision, commit=commit)
        return replace(source, identity=identity, notes=(*source.notes, *notes), training=training)
    files = [WeightFile(name, sizes[name].size, sizes[name].lfs.sha256 if sizes[name].lfs else None) for name in names]
    remote = {
        file.name: RemoteFile(
            connection, file.name, hf_hub_url(repo_id, prefix + file.name, revision=commit), file.bytes, file.sha256
        )
        for file in files
    }

    def locate(name: str) -> Path | RemoteFile:
        if path := connection.cached(name):
            return path
        return _download(fetch, name, connection) if download else remote[name]

    with ThreadPoolExecutor(CONNECTIONS) as pool:  # a large model has hundreds of shards, each a round trip or two
        tensors = [tensor for header in pool.map(partial(_header, connection, remote), names) for tensor in header]
    if index is not None:
        index.check(tuple(tensors))
    identity = make_identity(repo_id, revision, commit, config, files)
    return FileSource(identity, config, unique(tensors), locate, connection=connection, notes=notes, training=training)


def _cached_state(api: HfApi, folder: Path, repo_id: str, commit: str, subfolder: str) -> tuple[str, Path] | None:
    """The trainer's state of a snapshot whose weights are cached: from the cache, or by one question to the Hub;
    without a Hub, what the cache has."""
    if (found := find_state(folder)) is not None or is_offline_mode():
        return found
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        url = hf_hub_url(repo_id, prefix + STATE, revision=commit)
        check_state(STATE, get_hf_file_metadata(url, token=api.token).size)
        return STATE, _fetch(api, repo_id, prefix, commit, STATE)
    except (HfHubHTTPError, *unreachable_errors()):  # no such file, or no answer
        return None


def _headers(api: HfApi) -> dict[str, str]:
    headers: Any = build_hf_headers(token=api.token, library_name="lmd-hf", library_version=__version__)
    return {**{key.lower(): value for key, value in headers.items()}, "accept-encoding": "identity"}


def _weight_files(names: list[str], repo_id: str) -> list[str]:
    """The files to read, or `SourceError`, which tells the folders of the repository that hold weights."""
    try:
        return weight_files([name for name in names if "/" not in name], repo_id)
    except SourceError:
        folders = sorted({str(PurePosixPath(name).parent) for name in names if name.endswith(".safetensors")} - {"."})
        if not folders:
            raise
        raise SourceError(
            f"{repo_id}: no weights at its top; give --subfolder, one of: {', '.join(folders[:9])}"
        ) from None


def _fetch(api: HfApi, repo_id: str, prefix: str, commit: str, name: str) -> Path:
    return Path(hf_hub_download(repo_id, prefix + name, revision=commit, token=api.token))


def _download(fetch: Callable[[str], Path], name: str, connection: Connection) -> Path:
    """The whole file, in the cache. What the client's own tries do not heal ends the connection: no matrix of many
    waits for it again."""
    with connection.lock:  # two threads that need the same shard download it once
        if path := connection.cached(name):
            return path
        if connection.fault:
            raise SourceError(connection.fault)
        try:
            return fetch(name)
        except (OSError, HfHubHTTPError, *unreachable_errors(), *redirect_errors()) as error:
            reason = re.sub(r"\?[^\s')]*", "", first_line(error))  # a signed address opens the file to whoever reads it
            raise connection.end(f"cannot download {name} ({reason}); what has arrived is kept") from None


def _cached(repo_id: str, prefix: str, commit: str, name: str) -> Path | None:
    path = try_to_load_from_cache(repo_id, prefix + name, revision=commit)
    return Path(path) if isinstance(path, str) else None


def _header(connection: Connection, remote: dict[str, RemoteFile], name: str) -> tuple[TensorRef, ...]:
    if path := connection.cached(name):
        return read_local_header(path, name)
    file = remote[name]
    first = file.read_range(0, FIRST_BYTES)
    return read_header(
        name, file.size, lambda start, stop: first[start:stop] if stop <= len(first) else file.read_range(start, stop)
    )


def _cached_folder(repo_id: str, commit: str, subfolder: str) -> Path | None:
    """The folder of the cached snapshot, if the configuration and every weight file that it names are there."""

    cached = partial(_cached, repo_id, f"{subfolder}/" if subfolder else "", commit)
    config, index = cached("config.json"), cached(INDEX)
    if config is not None and is_offline_mode() and not list(config.parent.glob("*.safetensors*")):
        others = [path for path in config.parent.iterdir() if path.suffix in (".gguf", *PICKLES)]
        return config.parent if others else None  # whatever is there is all that there is
    names = ["model.safetensors"] if index is None else read_index(index.read_bytes(), f"{repo_id}/{INDEX}").shards
    complete = config is not None and all(cached(name) is not None for name in names)
    return config.parent if config is not None and complete else None
