"""The leading factors of every matrix on disk: one safetensors file each, written by the rank that has the matrix."""

import contextlib
import json
import os
import re
import uuid
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmd_hf.errors import OutputError
from lmd_hf.matrix.lmd import LMD, decompose, decompose_product
from lmd_hf.matrix.metrics import Metric
from lmd_hf.records import Factored, MatrixRef
from lmd_hf.weights.stored import Stored


LONGEST = 200  # characters of a file's name that are a matrix's: file systems take 255


def factor_file(folder: Path, ref: MatrixRef) -> Path:
    """Where the factors of a matrix are: its name, and its part if it is one of several in a tensor."""
    name = f"{ref.name}.{ref.part}" if ref.part else ref.name
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip(".")[:LONGEST]
    if plain != name:  # another name may have become the same
        plain += f"-{xxhash.xxh3_64_hexdigest(name.encode('utf-8', 'surrogatepass'))}"
    return folder / f"{plain}.safetensors"


def is_written(folder: Path, ref: MatrixRef, rank: int, key: str) -> bool:
    """Whether the factors there are those of this rank, of the matrix that a journal's key means."""
    try:
        with safe_open(factor_file(folder, ref), framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("lmd", "{}"))
    except (OSError, SafetensorError):
        return False
    return told.get("rank") == rank and key in (told.get("content"), told.get("place"))


def write_factors(
    folder: Path, ref: MatrixRef, stored: Stored, metric: Metric | None, *, rank: int, keys: tuple[str, str]
) -> None:
    """Write the `rank` leading axes (all, where there are fewer) of W ≈ projection · diag(s) · similarity.

    projection = U·Odist (O × K), s = S' (K), similarity = Idist·Vᵀ (K × I), float64; the metadata `lmd` is JSON: name,
    part, role, layer, shape, metric, rank, error = ‖W − W'‖_F in that metric, and the keys of the journal. A file is
    complete or not there. Raises `OutputError` where the folder cannot take it.
    """
    matrix = stored.matrix
    if isinstance(matrix, Factored):
        lmd = decompose_product(matrix, rank=min(rank, len(matrix.right), *ref.shape))
    else:
        lmd = decompose(matrix, input_metric=metric, rank=min(rank, *matrix.shape))
    path = factor_file(folder, ref)
    scratch = path.with_name(f".{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(lmd), scratch, metadata={"lmd": json.dumps(_told(lmd, ref, rank, keys))})
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise OutputError(f"cannot write {path} ({error}); free some space or choose another --out") from None


def _tensors(lmd: LMD) -> dict[str, Tensor]:
    parts = {"projection": lmd.projection, "s": lmd.s_K, "similarity": lmd.similarity}
    return {name: part.to("cpu", torch.float64).contiguous() for name, part in parts.items()}


def _told(lmd: LMD, ref: MatrixRef, rank: int, keys: tuple[str, str]) -> dict[str, object]:
    return {
        "name": ref.name,
        "part": ref.part,
        "role": ref.role,
        "layer": ref.layer,
        "shape": ref.shape,
        "metric": lmd.input_metric,
        "rank": rank,
        "error": lmd.error_bound,
        "content": keys[0],
        "place": keys[1],
    }
