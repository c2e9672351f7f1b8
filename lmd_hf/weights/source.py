"""Where a model's tensors are: a folder, a file, a Hub repository or a live module. One tensor is read at a time."""

import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

import lmd_hf
from lmd_hf.errors import FormatError, NoDataError, SourceError
from lmd_hf.records import ModelIdentity, TensorRef, Weight, WeightFile
from lmd_hf.weights.gguf import ARCHITECTURE, PAIRED, read_gguf
from lmd_hf.weights.header import read_header
from lmd_hf.weights.local import Stamp, readable, stamp
from lmd_hf.weights.lora import adapter_note, is_adapter
from lmd_hf.weights.pickled import Pickled, read_pickled, repeated
from lmd_hf.weights.ranged import Connection, RemoteFile
from lmd_hf.weights.repository import (
    PICKLES,
    WEIGHTS,
    architectures,
    config_file,
    find_state,
    is_sliced,
    read_config,
    read_index,
    unread_files,
    weight_files,
)


if TYPE_CHECKING:
    from lmd_hf.weights.ahead import Ahead

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "BOOL": torch.bool, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
EMBEDDED_ID = "lmd-hf/stdlib-llama-1m"  # the model that travels inside the package, for `lmd-hf demo`
EMBEDDED_FOLDER = Path(lmd_hf.__file__).parent / "demo" / "model"
GGUF_NOTE = (
    "llama.cpp may order the rows of q and k for its own rotary form; no singular value feels it, a comparison does"
)
LARGEST = 2**25  # bytes of a tensor that is remembered: embeddings, which no head reads, would take all the room

Key = tuple[TensorRef, int, int]  # rows of a stored tensor: the first, and the one after the last


class Source(Protocol):
    """What the later stages may ask of a model."""

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is."""
        ...

    @property
    def config(self) -> dict[str, Any] | None:
        """config.json."""
        ...

    @property
    def module(self) -> nn.Module | None:
        """The live module, if it is one."""
        ...

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every stored tensor."""
        ...

    @property
    def shared(self) -> tuple[tuple[str, str], ...]:
        """(name, the stored tensor whose memory it shares)."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know of the files."""
        ...

    @property
    def updates(self) -> tuple[Weight, ...]:
        """The weights of an adapter that are merged in."""
        ...

    def read(self, tensor: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start…stop of the first stored axis, as stored, on the CPU (a live module: where it lives)."""
        ...


@dataclass
class Memory:
    """Tensors that were fetched and will be asked for once more, up to `room` bytes."""

    room: int
    kept: dict[Key, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, key: Key, value: Tensor) -> None:
        """Remember it, if there is room."""
        with self.lock:
            if key not in self.kept and value.nbytes <= min(self.room, LARGEST):
                self.kept[key] = value
                self.room -= value.nbytes

    def take(self, key: Key) -> Tensor | None:
        """What was remembered, which is forgotten then."""
        with self.lock:
            value = self.kept.pop(key, None)
            self.room += 0 if value is None else value.nbytes
            return value

    def clear(self) -> None:
        """Forget everything, and remember nothing more."""
        with self.lock:
            self.kept.clear()
            self.room = 0


@dataclass(frozen=True)
class FileSource:
    """Weight files. `locate` gives one to read from: a path, or a file on the Hub, read by ranges; `pickles` are those
    that were read when they were opened. `token` is what the repository was opened with. `training`
    finds the (name, path) of the state that a trainer left beside them, and fetches it. `loaded` keeps the whole model,
    by device, for whoever runs it again, `memory` what was fetched for whoever reads it again, `ahead` what is fetched
    before its turn (`fetching`). `stamps` are those of the files on disk when they were opened: what is read of another
    file is no answer."""

    identity: ModelIdentity
    config: dict[str, Any] | None
    tensors: tuple[TensorRef, ...]
    locate: Callable[[str], Path | RemoteFile]
    module: nn.Module | None = None
    shared: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    connection: Connection | None = None
    updates: tuple[Weight, ...] = ()
    stamps: dict[str, Stamp] = field(default_factory=dict, compare=False, repr=False)
    pickles: dict[str, Pickled] = field(default_factory=dict, compare=False, repr=False)
    token: str | bool | None = field(default=None, repr=False)
    training: Callable[[], tuple[str, Path] | None] = field(default=lambda: None)
    loaded: dict[str, nn.Module] = field(default_factory=dict, compare=False, repr=False)
    memory: Memory = field(default_factory=lambda: Memory(0), compare=False, repr=False)
    ahead: "Ahead | None" = field(default=None, compare=False, repr=False)

    def on_disk(self, name: str) -> bool:
        """Whether reading that file costs no network."""
        return self.connection is None or self.connection.cached(name) is not None

    def read(self, tensor: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads just those bytes (no mapping, so memory in use is the slice itself); of a pickle, a mapped slice; of
        ggml's blocks, the bytes of each row. `ValueError` for other types that torch computes nothing with."""
        if tensor.unread:
            raise NoDataError(tensor.unread)
        if tensor.file in self.pickles:
            self.check(tensor.file)  # of one that was saved again and shrank, the mapping has no bytes
            whole = self.pickles[tensor.file].tensors[tensor.name]
            return whole.reshape(tensor.shape)[start:stop] if tensor.shape else whole
        if tensor.dtype not in TORCH_DTYPES and not tensor.file.endswith(".gguf"):
            raise ValueError(f"'{tensor.name}' is stored as {tensor.dtype}, which is not read")
        rows = tensor.shape[0] if tensor.shape else 1
        stop = rows if stop is None else stop
        key = tensor, start, stop
        if (known := self.memory.take(key)) is not None:
            return known
        value = None if self.ahead is None else self.ahead.take(key)
        if value is None:
            value = self._read(tensor, start, stop, (tensor.stop - tensor.start) // max(1, rows))
        if self.memory.room and not self.on_disk(tensor.file):
            self.memory.keep(key, value)
        return value

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """A weight file at its first byte. `SourceError` if the disk refuses it, `FormatError` if the file is another
        than when the source was opened, before or after what is done with it."""
        with readable(name):
            self.check(name)
            with self.locate(name).open("rb") as file:
                yield file
            self.check(name)

    def check(self, name: str) -> None:
        """`FormatError` if a file on disk is another than when the source was opened."""
        place = self.locate(name) if name in self.stamps else None
        with readable(name):
            if isinstance(place, Path) and stamp(place) != self.stamps[name]:
                raise FormatError(f"{place}: the file changed while it was being read; run again")

    def forget(self) -> None:
        """Let go of all that is in memory, or on its way there."""
        self.loaded.clear()
        self.memory.clear()
        if self.ahead is not None:
            self.ahead.end()

    def _read(self, tensor: TensorRef, start: int, stop: int, row_bytes: int) -> Tensor:
        with self.opened(tensor.file) as file:
            buffer = _page_buffer((stop - start) * row_bytes)
            file.seek(tensor.start + start * row_bytes)
            if file.readinto(buffer.numpy().data) != len(buffer):
                raise FormatError(f"{tensor.file}: '{tensor.name}' ends early; the file changed while it was read")
        if tensor.dtype not in TORCH_DTYPES:
            return buffer.reshape(stop - start, *tensor.shape[1:-1], -1)
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        return buffer.view(TORCH_DTYPES[tensor.dtype]).reshape(shape)


def _page_buffer(size: int) -> Tensor:
    """Bytes in pages of their own, which go back to the system at once: many threads read, others let go of it, and
    the heap would keep what each of them ever held."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def open_source(
    model: str | Path | nn.Module | FileSource,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    download: bool = False,
    base: str | Path | None = None,
) -> Source:
    """The source of a model: a live module, a weight file (safetensors, GGUF, a pickle of tensors), a folder in Hub
    layout, or a Hub id.

    With `base`, `model` is a LoRA adapter, and the source is its base with the updates added: that base, or `auto` for
    the one that the adapter names. Of a Hub id only the tensors that are read are fetched, and not kept; `download`
    keeps whole files in the cache. A path that exists wins over a Hub id of the same name; the embedded model answers
    to its own id, offline. A source is returned as it is: whatever takes a model takes an opened one too, at the commit
    that it was pinned to. Raises `SourceError` if there is no such model or it holds no weights that may be read,
    `FormatError` if a file is damaged.
    """
    if isinstance(model, FileSource):
        return model
    if base is not None:
        from lmd_hf.weights.merged import open_merged

        return open_merged(model, base, revision=revision, subfolder=subfolder, token=token, download=download)
    if isinstance(model, nn.Module):
        from lmd_hf.weights.live import open_live

        return open_live(model)
    path = Path(os.path.expanduser(model))  # which, unlike those of Path, raise nothing for names that cannot be
    with readable(path):
        if os.path.isfile(path):
            return _open_file(path)
        if os.path.isdir(path):
            if not os.path.isdir(path / subfolder):
                raise SourceError(f"{model}: no folder '{subfolder}' in it; check --subfolder")
            found = open_folder(path / subfolder, identifier=str(model))
            return replace(found, identity=replace(found.identity, subfolder=subfolder))
    text = str(model)
    if text == EMBEDDED_ID and revision is None:
        return open_folder(EMBEDDED_FOLDER, identifier=text)
    if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", text) and not text.startswith((".", "~")) and path.suffix not in WEIGHTS:
        from lmd_hf.weights.hub import open_repository

        return open_repository(text, revision=revision, subfolder=subfolder, token=token, download=download)
    raise SourceError(f"{text}: no such folder or file, and not a Hub id (org/name); check the path")


def open_folder(folder: Path, *, identifier: str) -> FileSource:
    """A folder in Hub layout: config.json and model.safetensors, or shards with their index, or another weight file."""
    present = sorted(path.name for path in folder.iterdir())
    names, index = weight_files(present, str(folder)), None
    if names[0].endswith(".json"):
        index = read_index(_file(folder / names[0]).read_bytes(), f"{folder}/{names[0]}")
        names = index.shards
        if absent := [name for name in names if name not in present]:
            raise FormatError(f"{index.where}: names {len(absent)} shards that are absent, first '{absent[0]}'")
    source = from_files(folder, names, read_config(folder / config_file(names)), identifier)
    if index is not None:
        index.check(source.tensors)
    near = [path for path in (*folder.iterdir(), *folder.glob("*/*")) if path.suffix in WEIGHTS and path.is_file()]
    unread = unread_files([path.relative_to(folder).as_posix() for path in near], names)
    return replace(source, notes=(*source.notes, *unread))


def _open_file(path: Path) -> FileSource:
    if path.suffix not in WEIGHTS:
        kinds = "a folder, a .safetensors, .gguf or .bin file, or a Hub id"
        raise SourceError(f"{path}: not a weight file; give {kinds}")
    return from_files(path.parent, [path.name], read_config(path.parent / config_file([path.name])), str(path))


def _file(path: Path) -> Path:
    """The path; `SourceError` if no file is there, before something waits for a pipe to be written."""
    if not path.is_file():
        raise SourceError(f"{path}: not a file but a folder, a pipe or a link that leads nowhere; put the file there")
    return path


def from_files(folder: Path, names: list[str], config: dict[str, Any] | None, identifier: str) -> FileSource:
    """These files of a folder as a source; their headers are read, and checked."""
    files: list[WeightFile] = []
    tensors: list[TensorRef] = []
    shared: dict[str, str] = {}
    pickles: dict[str, Pickled] = {}
    stamps: dict[str, Stamp] = {}
    notes: list[str] = []
    for name in names:
        path = _file(folder / name)
        stamps[name] = stamp(path)
        if path.suffix == ".gguf":
            found, told = read_gguf(path, name)
            config = {**told, **(config or {})}
            notes += [GGUF_NOTE] if told[ARCHITECTURE] != PAIRED else []
        elif path.suffix in PICKLES:
            pickles[name] = held = read_pickled(path)
            found = _pickled_header(held, name)
            shared |= repeated({ref.name: held.tensors[ref.name] for ref in found if not ref.unread})
            notes += held.notes()
        else:
            found = read_local_header(path, name)
        tensors += [tensor for tensor in found if tensor.name not in shared]
        files.append(WeightFile(name, path.stat().st_size, _blob_hash(path)))
    identity = make_identity(identifier, None, None, config, files)
    if config is not None and is_adapter(config):
        notes.append(adapter_note(config))
    source = FileSource(
        identity,
        config,
        (),
        lambda name: folder / name,
        stamps=stamps,
        notes=tuple(notes),
        pickles=pickles,
        training=partial(find_state, folder),
    )
    if is_sliced(names):
        from lmd_hf.weights.sliced import join

        return join(source, tensors)
    return replace(source, tensors=unique(tensors), shared=tuple(shared.items()))


def _blob_hash(path: Path) -> str | None:
    """The SHA-256 of a file in the Hub's cache: REPO/snapshots/COMMIT/… links to REPO/blobs/HASH. Elsewhere a name is
    but a name."""
    blob = path.resolve()
    cached = blob.parent.name == "blobs" and blob.parent.with_name("snapshots") in path.parent.resolve().parents
    return blob.name if cached and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _pickled_header(pickled: Pickled, file: str) -> tuple[TensorRef, ...]:
    refs = []
    for name, value in pickled.tensors.items():
        shape = (value.numel(),) if value.is_nested else tuple(value.shape)
        reason = pickled.unread.get(name, "")
        refs.append(TensorRef(name, file, 0, 0 if reason else value.nbytes, dtype_name(value), shape, unread=reason))
    return tuple(refs)


def read_local_header(path: Path, name: str) -> tuple[TensorRef, ...]:
    """The tensors of one safetensors file on disk."""
    with path.open("rb") as file:

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return read_header(name, path.stat().st_size, read)


def make_identity(
    identifier: str, revision: str | None, commit: str | None, config: dict[str, Any] | None, files: list[WeightFile]
) -> ModelIdentity:
    """The identity of a model from its configuration and files."""
    model_type = (config or {}).get("model_type")
    known = model_type if model_type is None else str(model_type)
    return ModelIdentity(identifier, revision, commit, known, architectures(config), tuple(files))


def unique(tensors: list[TensorRef]) -> tuple[TensorRef, ...]:
    """The tensors; `FormatError` if two files hold the same name."""
    seen: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in seen:
            raise FormatError(f"'{tensor.name}' is in {seen[tensor.name]} and in {tensor.file}; remove one of them")
        seen[tensor.name] = tensor.file
    return tuple(tensors)


def dtype_name(value: Tensor) -> str:
    """A tensor's dtype as safetensors writes it."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    return names.get(value.dtype, str(value.dtype).removeprefix("torch.").upper())
