"""Finished spectra on disk, at once: what a rerun need not compute again, and a cache for later runs.

One folder a model, below the Hugging Face cache. Every process appends to a file of its own, so that ranks and runs
that share a file system never write to the same one. A line is one matrix, `checksum content place record`: a line that
was torn by a kill or a full disk does not match its checksum and is passed over. The same matrix found twice counts
once.
"""

import base64
import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from huggingface_hub import constants

import lmd_hf
from lmd_hf.errors import OutputError
from lmd_hf.matrix.spectrum import Sketch, Spectrum
from lmd_hf.records import Factored, MatrixRef, ModelIdentity
from lmd_hf.run.measure import Spectra
from lmd_hf.weights.stored import Rounding, Stored


LIBRARY = "lmd_hf"  # the folder among the cached assets
SUFFIX = ".spectra"
VERSION = (
    f"4 {lmd_hf.__version__}"  # the first number changes with anything that changes a spectrum: kernels, unpacking
)
PLACE = "@"  # how keys of places begin; one that is nothing more names none
LONGEST_NAME = 200  # bytes of a folder's, which file systems limit to 255; of a long path its end
SYNC_SECONDS = 1.0  # a kill loses nothing that was written; a power cut this much, for syncing each line is slow
HASHED_ENTRIES = 2**20  # of a matrix at a time, so that one with its rows apart is not copied whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keys:
    """What a spectrum belongs to: the entries themselves, whatever file they are in, and where they lie.

    `place` tells without reading: the hash of each file and the bytes of it. It is `PLACE`
    alone for files whose hash nobody has told.
    """

    content: str
    place: str


@dataclass
class Journal:
    """The finished spectra of one model. Without a folder, as when it is closed, it remembers nothing.

    `reused` counts what was found. Whatever goes wrong with the folder costs the memory, never the run: it is logged
    once, as a warning.
    """

    folder: Path | None = None
    reused: int = 0
    places: dict[str, tuple[Path, int]] = field(default_factory=dict)  # key: which file, from which byte
    file: int = -1
    size: int = 0
    synced: float = 0.0
    warned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def has(self, key: str) -> bool:
        """Whether a spectrum was finished, as far as this process has seen."""
        return key in self.places

    def find(self, key: str) -> Spectra | None:
        """The finished spectrum of that key; `None` if there is none, or none any more."""
        if key not in self.places:
            return None
        path, start = self.places[key]
        try:
            with path.open("rb") as file:
                file.seek(start)
                line = file.readline()
        except OSError:  # cleared in the meantime
            return None
        parts = _parts(line)
        if parts is None:
            return None
        with self.lock:
            self.reused += 1
        return _from_record(json.loads(parts[2]))

    def add(self, keys: Keys, spectra: Spectra) -> None:
        """Write one finished matrix: after this, a kill does not lose it."""
        if self.folder is None:
            return
        body = f"{keys.content} {keys.place} {json.dumps(_to_record(spectra))}".encode()
        line = _checksum(body) + b" " + body + b"\n"
        with self.lock:
            if self.folder is None:  # closed in the meantime, by a run that has ended without this worker
                return
            try:
                self._append(self.folder, line)
            except OSError as error:
                self._warn(error)

    def _append(self, folder: Path, line: bytes) -> None:
        if self.file < 0:
            path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
            self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        try:
            written = 0
            while written < len(line):  # a disk that fills up takes a part, and then raises
                written += os.write(self.file, line[written:])
        except OSError:
            os.ftruncate(self.file, self.size)  # the next line must not continue a torn one
            raise
        self.size += len(line)
        if time.monotonic() - self.synced > SYNC_SECONDS:
            os.fsync(self.file)
            self.synced = time.monotonic()

    def close(self) -> None:
        """All that was written is on disk; from here on nothing is: the number of the file may be another file's."""
        with self.lock:
            if self.file >= 0:
                with contextlib.suppress(OSError):
                    os.fsync(self.file)
                os.close(self.file)
            self.folder, self.file = None, -1

    def _warn(self, error: OSError) -> None:
        if not self.warned:
            log.warning("finished matrices are not kept for a later run (%s: %s)", self.folder, error.strerror)
        self.warned = True


@contextlib.contextmanager
def open_journal(identity: ModelIdentity) -> Iterator[Journal]:
    """The journal of a model, with what earlier runs and other ranks have finished."""
    folder = _folder(identity.id)
    journal = Journal(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            journal.places |= _index(path)
    except OSError as error:
        journal._warn(error)
    try:
        yield journal
    finally:
        journal.close()


@dataclass(frozen=True)
class Kept:
    """What the cache holds of one model."""

    model: str
    matrices: int
    bytes: int
    changed: float


def list_kept() -> list[Kept]:
    """What the cache holds, a model each, in the order of names; `changed` is the time of the last line."""
    return [kept for folder in sorted(_root().glob("*")) if (kept := _kept(folder)) is not None]


def _kept(folder: Path) -> Kept | None:
    """What a folder holds; `None` for nothing, and where another process clears it at this moment."""
    try:
        files = list(folder.glob(f"*{SUFFIX}"))
        contents = {key for path in files for key in _index(path) if not key.startswith(PLACE)}
        stats = [path.stat() for path in files]
    except OSError:
        return None
    size, changed = sum(stat.st_size for stat in stats), max((stat.st_mtime for stat in stats), default=0.0)
    return Kept(folder.name, len(contents), size, changed) if files else None


def clear_kept(model: str = "") -> list[Kept]:
    """Remove what the cache holds of a model, of all without one; returns what was removed. Raises `OutputError` if the
    disk refuses it."""
    removed = [kept for kept in list_kept() if not model or kept.model == _folder(model).name]
    for kept in removed:
        folder = _root() / kept.model
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:  # another process clears it too
            continue
        except OSError as error:
            remedy = "it is another user's, or a run writes there"
            raise OutputError(f"{folder}: cannot be cleared ({error.strerror}); {remedy}") from None
    return removed


def content_key(ref: MatrixRef, stored: Stored, gain: torch.Tensor | None, procedure: str, device: torch.device) -> str:
    """The key of a matrix by its entries as they are stored: 128 bits of XXH3, which tells apart whatever was not made
    to deceive, at the speed of memory."""
    matrix = stored.matrix
    if isinstance(matrix, Factored):
        tensors = [matrix.left, matrix.right]
    else:
        tensors = [matrix.T if ref.transposed else matrix]
    tensors += [] if gain is None else [gain]
    scale = matrix.scale if isinstance(matrix, Factored) else 1.0
    digest = xxhash.xxh3_128()
    turned = gain is not None and ref.transposed
    digest.update(repr((VERSION, procedure, device.type, stored.rounding, turned, scale)).encode())
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        rows = tensor.reshape(len(tensor), -1)
        for part in rows.split(max(1, HASHED_ENTRIES // max(1, rows.shape[1]))):
            digest.update(part.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def place_key(ref: MatrixRef, hashes: dict[str, str | None], metric: str, procedure: str, device: torch.device) -> str:
    """The key of a matrix by where its bytes lie, which is known without reading them; `hashes` are the files'."""
    pair = ref.low_rank
    tensors = [*ref.tensors, *((pair.left, pair.right, pair.magnitude) if pair is not None else ())]
    norm = ref.norm if metric == "norm" else None
    tensors += [norm.tensor] if norm is not None else []
    spans = [(hashes.get(t.file), t.name, t.start, t.stop, t.dtype, t.shape) for t in tensors if t is not None]
    if any(file is None for file, *_ in spans):
        return PLACE
    turned = ref.transposed and (ref.rows != () or norm is not None or pair is not None)  # else no σ feels it
    recipe = (ref.stored, ref.rows, ref.expert, turned, norm and norm.offset)
    update = pair and (pair.scale, pair.experts)
    told = repr((VERSION, procedure, device.type, spans, recipe, update))
    return PLACE + xxhash.xxh3_128_hexdigest(told.encode())


def _root() -> Path:
    return Path(constants.HF_ASSETS_CACHE) / LIBRARY


def folder_name(identifier: str) -> str:
    """A model's id or path as the name of a folder."""
    name = re.sub(r"[^\w.-]+", "--", identifier).encode()[-LONGEST_NAME:].decode(errors="ignore")
    return name.strip(".-") or "model"


def _folder(identifier: str) -> Path:
    return _root() / folder_name(identifier)


def _checksum(body: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(body).encode()


def _parts(line: bytes) -> list[bytes] | None:
    """[content, place, record] of a whole line; `None` for a torn one."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    return body.split(b" ", 2) if line.endswith(b"\n") and checksum == _checksum(body) else None


def _index(path: Path) -> dict[str, tuple[Path, int]]:
    """Where each key of a file stands; nothing of one that is cleared at this moment, or that its user does not
    share."""
    found: dict[str, tuple[Path, int]] = {}
    start = 0
    with contextlib.suppress(FileNotFoundError, PermissionError), path.open("rb") as file:
        for line in file:
            if parts := _parts(line):
                found |= {key.decode(): (path, start) for key in parts[:2] if key != PLACE.encode()}
            start += len(line)
    return found


def _to_record(spectra: Spectra) -> dict[str, Any]:
    rounding = dataclasses.asdict(spectra.rounding)
    return {"rounding": rounding, "raw": _encode(spectra.raw), "used": spectra.used and _encode(spectra.used)}


def _from_record(record: dict[str, Any]) -> Spectra:
    used = record["used"]
    return Spectra(_spectrum(record["raw"]), used and _spectrum(used), Rounding(**record["rounding"]))


def _encode(value: Any) -> Any:
    """A spectrum as JSON types, arrays as the bytes of their float64 entries."""
    if dataclasses.is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(value, dtype="<f8")
        return {"shape": array.shape, "float64": base64.b64encode(array.tobytes()).decode()}
    return value


def _spectrum(plain: dict[str, Any]) -> Spectrum:
    sketch = plain["sketch"]
    known = None if sketch is None else Sketch(**{name: _decode(value) for name, value in sketch.items()})
    return Spectrum(torch.from_numpy(_decode(plain["values"])), plain["error_bound"], plain["method"], known)


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    flat = np.frombuffer(base64.b64decode(value["float64"]), dtype="<f8")
    return flat.astype(np.float64).reshape(value["shape"])
