"""From what is stored to the matrix W (out × in) that the forward pass uses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmd_hf.records import Factored, LowRank, MatrixRef, TensorRef
from lmd_hf.weights.formats import unpack_weight
from lmd_hf.weights.grids import ROUNDOFF, real
from lmd_hf.weights.lora import multiplied, read_factors, updated
from lmd_hf.weights.source import Source
from lmd_hf.weights.unpack import Unpacked


@dataclass(frozen=True)
class Rounding:
    """The largest error that storing can have made, half the distance between neighbouring stored values: relative to
    each entry (floats), or absolute, as its root mean square over the entries (integers and codebooks)."""

    relative: float = 0.0
    absolute: float = 0.0


@dataclass(frozen=True)
class Stored:
    """W (out × in), or the thin factors of it, and how coarsely it was stored."""

    matrix: Tensor | Factored
    rounding: Rounding


def read_stored(source: Source, ref: MatrixRef) -> Stored:
    """W of shape `ref.shape` = (out, in): as stored, or in float32 where it has to be computed from several tensors.

    Only the bytes of W are read where they lie together. `ValueError` if the tensors do not fit together.
    """
    if ref.low_rank is not None:
        return _read_low_rank(source, ref, ref.low_rank)
    if ref.stored == "plain":
        w = _read_plain(source, ref)
        return Stored(w, Rounding(relative=ROUNDOFF[w.dtype]))
    unpacked = unpack_weight(ref.stored, ref.tensors, lambda tensor: _of_expert(source, ref, tensor))
    w = _cut(ref, _oriented(ref, unpacked.values))
    if tuple(w.shape) != ref.shape:
        raise ValueError(f"its {ref.stored} tensors make {tuple(w.shape)}, not {ref.shape}")
    return Stored(w, _rounding(ref, unpacked, w.shape[1]))


def read_matrix(source: Source, ref: MatrixRef) -> Tensor:
    """W alone, as `read_stored` gives it, multiplied out if it is stored as factors."""
    matrix = read_stored(source, ref).matrix
    return multiplied(matrix) if isinstance(matrix, Factored) else matrix


def read_long(source: Source, ref: MatrixRef, start: int, stop: int) -> Tensor:
    """Rows start…stop of W's long side, (stop − start) × k; only their bytes are read where they lie together."""
    if lies_in_rows(ref):
        return source.read(ref.tensors[0], start, stop).reshape(stop - start, -1)
    w = read_matrix(source, ref)
    return (w if _is_tall(ref) else w.T)[start:stop]


def lies_in_rows(ref: MatrixRef) -> bool:
    """Whether each row of W's long side lies together in its file, after the one before it."""
    return ref.stored == "plain" and ref.expert is None and not ref.rows and _is_tall(ref) != ref.transposed


def _is_tall(ref: MatrixRef) -> bool:
    return ref.shape[0] >= ref.shape[1]


def read_gain(source: Source, ref: MatrixRef) -> Tensor | None:
    """γ (I), float64, of the norm that feeds a matrix; `None` where none is known to. `ValueError` if it is not stored
    as floats, or has another length than the matrix's input."""
    if ref.norm is None:
        return None
    gain = real(source.read(ref.norm.tensor), "norm gain").to(torch.float64).flatten() + ref.norm.offset
    if len(gain) != ref.shape[1]:
        raise ValueError(f"its input has {ref.shape[1]} entries, the norm gain '{ref.norm.tensor.name}' {len(gain)}")
    return gain


def _read_low_rank(source: Source, ref: MatrixRef, pair: LowRank) -> Stored:
    """The factors themselves, or the base's matrix with them in it, a float64 sum."""
    factors = read_factors(pair, ref.expert, source.read)
    if ref.stored == "lora":
        return Stored(factors, Rounding())
    whole = read_stored(source, replace(ref, low_rank=None, rows=())).matrix
    assert isinstance(whole, Tensor)
    magnitude = None if pair.magnitude is None else source.read(pair.magnitude).flatten()
    return Stored(_cut(ref, updated(whole, factors, magnitude)), Rounding(relative=ROUNDOFF[torch.float64]))


def _read_plain(source: Source, ref: MatrixRef) -> Tensor:
    tensor = ref.tensors[0]
    if ref.expert is None and ref.rows and not ref.transposed:
        first, last = min(row[0] for row in ref.rows), max(row[1] for row in ref.rows)
        w = source.read(tensor, first, last).reshape(last - first, -1)
        return _take(w, [(a - first, b - first, step) for a, b, step in ref.rows])
    return _cut(ref, _oriented(ref, _of_expert(source, ref, tensor)))


def _of_expert(source: Source, ref: MatrixRef, tensor: TensorRef) -> Tensor:
    """A stored tensor, or one expert's part of it where it has one for every expert."""
    if ref.expert is None or not tensor.shape or tensor.shape[0] != ref.tensors[0].shape[0]:
        return source.read(tensor)
    return source.read(tensor, ref.expert, ref.expert + 1)[0]


def _oriented(ref: MatrixRef, weight: Tensor) -> Tensor:
    w = weight.reshape(weight.shape[0], -1)
    return w.T if ref.transposed else w


def _cut(ref: MatrixRef, w_OI: Tensor) -> Tensor:
    return _take(w_OI, list(ref.rows)) if ref.rows else w_OI


def _take(w_OI: Tensor, rows: list[tuple[int, int, int]]) -> Tensor:
    pieces = [w_OI[start:stop:step] for start, stop, step in rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _rounding(ref: MatrixRef, unpacked: Unpacked, columns: int) -> Rounding:
    """The rounding of W's own entries: the grid of half steps goes the way that the values went."""
    if unpacked.half_step is None:
        return Rounding(relative=unpacked.roundoff)
    steps = _oriented(ref, unpacked.half_step)
    if ref.rows:
        rows = unpacked.values.numel() // columns
        steps = _cut(ref, steps.repeat_interleave(rows // steps.shape[0], dim=0))
    return Rounding(absolute=float(steps.double().square().mean().sqrt()))
