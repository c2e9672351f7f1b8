"""Where a model's tensors are: a folder, a file, a Hub repository or a live module. One tensor is read at a time."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import lmd_hf
from lmd_hf.errors import FormatError, NoDataError, SourceError
from lmd_hf.records import ModelIdentity, TensorRef, WeightFile
from lmd_hf.weights.header import read_header
from lmd_hf.weights.ranged import Connection, RemoteFile


TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "BOOL": torch.bool, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
EMBEDDED_ID = "lmd-hf/stdlib-llama-1m"  # the model that travels inside the package, for `lmd-hf demo`
EMBEDDED_FOLDER = Path(lmd_hf.__file__).parent / "demo" / "model"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".bin")
NAMED = 5  # files that a note names before it counts


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

    def read(self, tensor: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start…stop of the first stored axis, as stored, on the CPU (a live module: where it lives)."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Safetensors files. `locate` gives a weight file to read from: a path, or a file on the Hub, read by ranges."""

    identity: ModelIdentity
    config: dict[str, Any] | None
    tensors: tuple[TensorRef, ...]
    locate: Callable[[str], Path | RemoteFile]
    module: nn.Module | None = None
    shared: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    connection: Connection | None = None

    def on_disk(self, name: str) -> bool:
        """Whether reading that file costs no network."""
        return self.connection is None or self.connection.cached(name) is not None

    def read(self, tensor: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads just those bytes: no mapping, so memory in use is the slice itself."""
        rows = tensor.shape[0] if tensor.shape else 1
        stop = rows if stop is None else stop
        row_bytes = (tensor.stop - tensor.start) // rows
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        with self.locate(tensor.file).open("rb") as file:
            file.seek(tensor.start + start * row_bytes)
            if file.readinto(buffer.numpy().data) != len(buffer):
                raise FormatError(f"{tensor.file}: '{tensor.name}' ends early; the file changed while it was read")
        return buffer.view(TORCH_DTYPES[tensor.dtype]).reshape(
            (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        )


@dataclass(frozen=True)
class LiveSource:
    """A module in memory. Parameters that share memory are one tensor with several names."""

    identity: ModelIdentity
    config: dict[str, Any] | None
    module: nn.Module
    tensors: tuple[TensorRef, ...]
    shared: tuple[tuple[str, str], ...]
    values: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    def read(self, tensor: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
        """A view of the parameter; nothing is copied."""
        value = self.values[tensor.name].detach()
        if value.is_meta:
            raise NoDataError("no data: it is on the meta device; load or materialise it first")
        return value.reshape(tensor.shape)[start:stop]


def open_source(
    model: str | Path | nn.Module,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    download: bool = False,
) -> Source:
    """The source of a model: a live module, a `.safetensors` file, a folder in Hub layout, or a Hub id.

    Of a Hub id only the tensors that are read are fetched, and not kept; `download` keeps whole files in the cache.
    A path that exists wins over a Hub id of the same name; the embedded model answers to its own id, offline. Raises
    `SourceError` if there is no such model or it holds no safetensors weights, `FormatError` if a file is damaged.
    """
    if isinstance(model, nn.Module):
        return _open_live(model)
    path = Path(model).expanduser()
    if path.is_file():
        return _open_file(path)
    if (path / subfolder).is_dir():
        return open_folder(path / subfolder, identifier=str(model))
    text = str(model)
    if text == EMBEDDED_ID and revision is None:
        return open_folder(EMBEDDED_FOLDER, identifier=text)
    if (
        re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", text)
        and not text.startswith((".", "~"))
        and path.suffix != ".safetensors"
    ):
        from lmd_hf.weights.hub import open_repository

        return open_repository(text, revision=revision, subfolder=subfolder, token=token, download=download)
    raise SourceError(f"{text}: no such folder or file, and not a Hub id (org/name); check the path")


def open_folder(folder: Path, *, identifier: str) -> FileSource:
    """A folder in Hub layout: config.json and model.safetensors, or shards with their index."""
    present = sorted(path.name for path in folder.iterdir())
    names = weight_files(present, str(folder))
    below = [path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.suffix in WEIGHTS]
    if INDEX not in names:
        source = _from_files(folder, names, read_config(folder / "config.json"), identifier)
        return replace(source, notes=unread_files([*present, *below], names))
    index = read_index((folder / INDEX).read_bytes(), f"{folder}/{INDEX}")
    if absent := [name for name in index.shards if name not in present]:
        raise FormatError(
            f"{folder}/{INDEX}: names {len(absent)} shards that are absent, first '{absent[0]}'; download them"
        )
    source = _from_files(folder, index.shards, read_config(folder / "config.json"), identifier)
    index.check(source.tensors)
    return replace(source, notes=unread_files([*present, *below], index.shards))


def _open_file(path: Path) -> FileSource:
    if path.suffix in PICKLES:
        raise SourceError(_pickle_refusal(path.name))
    if path.suffix != ".safetensors":
        raise SourceError(f"{path}: not a .safetensors file; give a folder, a .safetensors file or a Hub id")
    return _from_files(path.parent, [path.name], read_config(path.parent / "config.json"), str(path))


def _from_files(folder: Path, names: list[str], config: dict[str, Any] | None, identifier: str) -> FileSource:
    files: list[WeightFile] = []
    tensors: list[TensorRef] = []
    for name in names:
        path = folder / name
        size = path.stat().st_size
        tensors += read_local_header(path, name)
        blob = path.resolve().name  # in the Hub's cache a weight file is a link to a blob called by its hash
        files.append(WeightFile(name, size, blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None))
    identity = make_identity(identifier, None, None, config, files)
    return FileSource(identity, config, unique(tensors), lambda name: folder / name)


def read_local_header(path: Path, name: str) -> tuple[TensorRef, ...]:
    """The tensors of one file on disk."""
    with path.open("rb") as file:

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return read_header(name, path.stat().st_size, read)


def weight_files(names: list[str], where: str) -> list[str]:
    """Which of a repository's files hold the weights: its index, or its safetensors files. `SourceError` if none."""
    if INDEX in names:
        return [INDEX]
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if "model.safetensors" in weights:
        return ["model.safetensors"]
    plain = [name for name in weights if not name.startswith(("adapter", "consolidated"))]
    if plain or any(name.startswith("consolidated") for name in weights):
        return plain or weights
    if weights:
        raise SourceError(
            f"{where}: holds only a PEFT adapter; merge it first (peft: merge_and_unload) and save the model"
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise SourceError(_pickle_refusal(f"{where}: {pickles[0]}"))
    raise SourceError(f"{where}: no .safetensors weights in it; save the model with save_pretrained first")


def unread_files(present: list[str], read: list[str]) -> tuple[str, ...]:
    """A note that names the weight files which are there, here or in folders below, but not read. A pickle beside
    safetensors holds the same weights and is not named."""
    weights = [PurePosixPath(name) for name in present if name.endswith(".safetensors")]
    folders = {path.parent for path in weights}
    pickles = [path for path in map(PurePosixPath, present) if path.match("pytorch_model*.bin")]
    unread = sorted({str(p) for p in (*weights, *(p for p in pickles if p.parent not in folders))} - set(read))
    if not unread:
        return ()
    named = ", ".join(unread[:NAMED]) + (f" and {len(unread) - NAMED} more" if len(unread) > NAMED else "")
    return (f"weight files not read: {named}" + ("; --subfolder reads a folder" if "/" in "".join(unread) else ""),)


def _pickle_refusal(name: str) -> str:
    return (
        f"{name}: pickled weights are not opened, because unpickling can run code; convert them once with "
        "AutoModel.from_pretrained(…).save_pretrained(…), which writes safetensors"
    )


@dataclass(frozen=True)
class Index:
    """model.safetensors.index.json: which shards there are, and which tensors they promise."""

    shards: list[str]
    promised: set[str]
    where: str

    def check(self, tensors: tuple[TensorRef, ...]) -> None:
        """`FormatError` if the shards do not hold every tensor that the index promises."""
        if missing := sorted(self.promised - {tensor.name for tensor in tensors}):
            raise FormatError(
                f"{self.where}: promises {len(missing)} tensors that no shard holds, first '{missing[0]}'; "
                "the shards belong to another version: download them again"
            )


def read_index(data: bytes, where: str) -> Index:
    """The index of a sharded checkpoint; `FormatError` if it is none, or names a file elsewhere."""
    try:
        weight_map = json.loads(data)["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{where}: not a safetensors index (JSON with a weight_map); download it again") from None
    if not shards or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in shards):
        raise FormatError(f"{where}: the weight_map must name .safetensors files beside it; download it again")
    return Index(shards, set(weight_map), where)


def read_config(path: Path) -> dict[str, Any] | None:
    """config.json as a dictionary, `None` if there is none; `FormatError` if it is not a JSON object."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: not a JSON object; download it again")
    return config


def make_identity(
    identifier: str, revision: str | None, commit: str | None, config: dict[str, Any] | None, files: list[WeightFile]
) -> ModelIdentity:
    """The identity of a model from its configuration and files."""
    config = config or {}
    architectures = tuple(str(name) for name in config.get("architectures") or ())
    return ModelIdentity(identifier, revision, commit, config.get("model_type"), architectures, tuple(files))


def unique(tensors: list[TensorRef]) -> tuple[TensorRef, ...]:
    """The tensors; `FormatError` if two files hold the same name."""
    seen: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in seen:
            raise FormatError(f"'{tensor.name}' is in {seen[tensor.name]} and in {tensor.file}; remove one of them")
        seen[tensor.name] = tensor.file
    return tuple(tensors)


def _open_live(module: nn.Module) -> LiveSource:
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    values: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    shared = []
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):  # extra state of a module, such as a quantiser's, is no parameter
            continue
        if id(value) in first:
            shared.append((name, first[id(value)]))
        else:
            first[id(value)], values[name] = name, value
    tensors = tuple(
        TensorRef(name, "", 0, 0, names.get(v.dtype, str(v.dtype).removeprefix("torch.").upper()), tuple(v.shape))
        for name, v in values.items()
    )
    config: Any = getattr(module, "config", None)
    raw = config.to_dict() if hasattr(config, "to_dict") else None
    identifier = getattr(config, "_name_or_path", "") or type(module).__name__
    identity = replace(make_identity(identifier, None, None, raw, []), architectures=(type(module).__name__,))
    return LiveSource(identity, raw, module, tensors, tuple(shared), values)
