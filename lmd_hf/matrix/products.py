"""Products with W and thin decompositions, on the CPU by numpy and on a device by torch.

On the CPU numpy's BLAS keeps to its share of the cores, which a worker thread of torch does not, and everything beside
the products keeps to one thread: torch's own threads would go on waiting for work, spinning, on the cores that BLAS
works on, which doubles the time of a sketch.

Shapes: R × N, P × N rows of length N (a leading P means one matrix a probe), L × S the matrix W, p columns.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.compat import without_tf32


CHUNK_ENTRIES = 2**20  # entries of W in float64 at a time
DEPENDENT = (
    1e-8  # condition of the squares past which their eigenvectors leave fewer than eight digits of orthogonality
)
Array = Any  # of numpy or torch, by the same operators


def by_numpy(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function of arrays as one of tensors: of numpy's arrays on the CPU, and without TF32 on a GPU."""

    @wraps(function)
    def called(first: Tensor, *others: Any) -> Tensor:
        arguments = (first, *others)
        if first.device.type == "cpu":
            result = function(*(each.numpy() if isinstance(each, Tensor) else each for each in arguments))
            return torch.from_numpy(result)
        with without_tf32():
            result = function(*arguments)
        assert isinstance(result, Tensor)
        return result

    return called


@by_numpy
def product(a: Array, b: Array) -> Array:
    """A·B in their own dtype."""
    return a @ b


@by_numpy
def without(x_RN: Array, basis_KN: Array) -> Array:
    """X − (X·Bᵀ)·B: the rows of X less what lies in the orthonormal rows of B."""
    return x_RN - (x_RN @ basis_KN.mT) @ basis_KN


@by_numpy
def store(target: Array, values: Array) -> Array:
    """Copy the values over the target, in its dtype."""
    target[...] = values
    return target


@by_numpy
def scaled(x_RN: Array, scale_R: Array) -> Array:
    """The rows of X, each times its own number."""
    return x_RN * scale_R[:, None]


def times(w: Tensor, x: Tensor, *, exact: bool = False) -> Float[Tensor, "N p"]:
    """W·X: the product runs in the dtype of W, or in float64 a few rows of W at a time if `exact`."""
    if not exact or w.dtype == torch.float64:
        return product(w, cast(x, w.dtype))
    turned = w.stride(0) < w.stride(1)  # a transposed W is taken by its own columns, which lie together in memory
    stored = w.T if turned else w
    rows = max(1, CHUNK_ENTRIES // max(1, stored.shape[1]))
    buffer = x.new_empty(min(rows, stored.shape[0]), stored.shape[1])
    return _times_in_chunks(x.new_zeros(w.shape[0], x.shape[1]), stored, x, buffer, turned)


@by_numpy
def _times_in_chunks(result: Array, stored: Array, x: Array, buffer: Array, turned: bool) -> Array:
    for start in range(0, len(stored), len(buffer)):
        rows = slice(start, min(start + len(buffer), len(stored)))
        chunk = buffer[: rows.stop - start]
        chunk[...] = stored[rows]
        if turned:
            result += chunk.T @ x[rows]
        else:
            result[rows] = chunk @ x
    return result


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X in this dtype."""
    return x if x.dtype == dtype else store(torch.empty_like(x, dtype=dtype), x)


def lengths(x_RN: Float[Tensor, "R N"]) -> Float[np.ndarray, " R"]:
    """‖x‖ of every row, in float64."""
    if x_RN.device.type == "cpu":
        return np.sqrt(np.einsum("rn,rn->r", x_RN.numpy(), x_RN.numpy(), dtype=np.float64))
    return torch.linalg.vector_norm(x_RN, dim=1, dtype=torch.float64).cpu().numpy()


def orthonormal_rows(x_RN: Float[Tensor, "R N"]) -> Float[Tensor, "R N"]:
    """An orthonormal basis of the rows, to 1e-8, and to rounding where they are that near to one: call it twice.

    From the eigenvectors of X·Xᵀ (Stathopoulos & Wu 2002, §3): two products where Householder's has hundreds of small
    ones, at each of which the threads wait for each other. Householder's where the rows are nearly dependent.
    """
    values, vectors = np.linalg.eigh(product(x_RN, x_RN.T).cpu().numpy())
    if len(values) and values[0] > DEPENDENT * values[-1]:
        return product(torch.from_numpy(vectors.T / np.sqrt(values)[:, None]).to(x_RN), x_RN)
    return orthonormal(x_RN.T).T


def orthonormal(x_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Q of X = QR."""
    return torch.from_numpy(np.linalg.qr(x_NK.numpy())[0]) if x_NK.device.type == "cpu" else torch.linalg.qr(x_NK).Q


def thin_svd(x_NK: Float[Tensor, "N K"]) -> tuple[Float[Tensor, "N K"], Float[Tensor, " K"], Float[Tensor, "K K"]]:
    """U, σ, Vᵀ: Q's columns span those of X, and the K × K matrix QᵀX is small enough for LAPACK, wherever X is."""
    q_KN = orthonormal_rows(orthonormal_rows(x_NK.T))
    u, s, vh = (torch.from_numpy(part).to(x_NK) for part in np.linalg.svd(product(q_KN, x_NK).cpu().numpy()))
    return product(q_KN.T, u), s, vh


def row_svd(x_KN: Float[Tensor, "K N"]) -> tuple[Float[Tensor, " K"], Float[Tensor, "K K"]]:
    """σ, descending, and Uᵀ of X = U·Σ·Vᵀ, K ≤ N, from the eigenvectors of X·Xᵀ: σ to 1e-8 · σ₁, as rows that come of
    float32 products are known anyway."""
    values, vectors = np.linalg.eigh(product(x_KN, x_KN.T).cpu().numpy())
    s_K = np.sqrt(np.maximum(values[::-1], 0))
    return torch.from_numpy(s_K).to(x_KN), torch.from_numpy(vectors.T[::-1].copy()).to(x_KN)
