"""From what is stored to the matrix W (out × in) that the forward pass uses."""

import torch
from torch import Tensor

from lmd_hf.records import MatrixRef, NormRef
from lmd_hf.weights.source import Source


def read_matrix(source: Source, ref: MatrixRef) -> Tensor:
    """W of shape `ref.shape` = (out, in) in its stored dtype; only its bytes are read where they lie together."""
    tensor = ref.tensors[0]
    if ref.expert is not None:
        w = source.read(tensor, ref.expert, ref.expert + 1)[0]
    elif ref.rows and not ref.transposed:
        first, last = min(row[0] for row in ref.rows), max(row[1] for row in ref.rows)
        w = source.read(tensor, first, last)
        return _cut(w.reshape(last - first, -1), [(a - first, b - first, step) for a, b, step in ref.rows])
    else:
        w = source.read(tensor)
    w = w.reshape(w.shape[0], -1)
    w = w.T if ref.transposed else w
    return _cut(w, list(ref.rows)) if ref.rows else w


def read_gain(source: Source, norm: NormRef) -> Tensor:
    """γ, float64, of the norm that feeds a matrix."""
    return source.read(norm.tensor).to(torch.float64).flatten() + norm.offset


def _cut(w_OI: Tensor, rows: list[tuple[int, int, int]]) -> Tensor:
    pieces = [w_OI[start:stop:step] for start, stop, step in rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
