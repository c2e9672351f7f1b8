"""The eigenvectors of a Gram matrix that belong to its few smallest eigenvalues, for less than one LAPACK reduction.

Shapes: k × k the Gram matrix G, s = `size` the width of the subspace, a few columns more than the m vectors asked for.
"""

import math

import numpy as np
import torch
from torch import Tensor


UNIT_ROUNDOFF = 2.0**-53
GAP = 10  # the eigenvalue past the subspace is so many times the last one asked for: one digit an iteration, or better
SHARE = 1 / 16  # of k, at most, for the subspace: past it, all eigenvectors cost less
BLOCK = 256  # rows solved for at a time


def subspace_size(squares: Tensor, count: int) -> int | None:
    """How wide a subspace finds the `count` smallest of these eigenvalues (descending, all of G's) in a few iterations;
    `None` if it would be too wide."""
    shift, ascending = _shift(squares), squares.flip(0)
    beyond = torch.nonzero(ascending >= GAP * (ascending[count - 1].clamp_min(0) + shift))
    size = int(beyond[0]) if len(beyond) else len(squares)
    return size if size <= SHARE * len(squares) else None


def smallest_subspace(gram_KK: Tensor, squares: Tensor, count: int, size: int) -> Tensor | None:
    """Q (k × s, orthonormal), whose span holds the eigenvectors of the `count` smallest eigenvalues of G.

    Inverse subspace iteration (Parlett 1998, §14.4) with the Cholesky factor of G + ε·I, ε = 4k·u·λ₁, which moves no
    eigenvector. The sine of the angle between the span and an eigenvector falls by ρ = (λₘ + ε) / (λₛ₊₁ + ε) ≤ 1/10 an
    iteration from at most some 10·√k at a random start, and a Ritz value errs by its square over ρ: the iterations are
    as many as bring that below u. Solving adds an error as large as G's own rounding. G's lower triangle is read, and
    the whole overwritten. `None` where G + ε·I has no Cholesky factor.
    """
    shift = _shift(squares)
    gram_KK.diagonal().add_(shift)
    ascending = squares.flip(0).clamp_min(0) + shift
    rate = (ascending[count - 1] / ascending[size]).item()
    steps = math.ceil(math.log(UNIT_ROUNDOFF * rate / (100 * len(squares))) / (2 * math.log(rate)))
    q = torch.randn(len(squares), size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if gram_KK.device.type != "cpu":
        return _iterate_on_device(gram_KK, q.to(gram_KK.device), steps)
    try:
        lower = np.linalg.cholesky(gram_KK.numpy())
    except np.linalg.LinAlgError:
        return None
    columns = q.numpy()
    for _ in range(steps):
        columns = np.linalg.qr(_solve_both(lower, columns))[0]
    return torch.from_numpy(columns)


def _shift(squares: Tensor) -> Tensor:
    return 4 * len(squares) * UNIT_ROUNDOFF * squares[0]


def _iterate_on_device(gram: Tensor, q: Tensor, steps: int) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed.item():
        return None
    for _ in range(steps):
        half = torch.linalg.solve_triangular(lower, q, upper=False)
        q = torch.linalg.qr(torch.linalg.solve_triangular(lower.T, half, upper=True)).Q
    return q


def _solve_both(lower: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(L·Lᵀ)⁻¹ · columns, by blocks of rows: numpy has no triangular solver."""
    x, starts = columns.copy(), range(0, len(lower), BLOCK)
    for a in starts:
        b = a + BLOCK
        x[a:b] = np.linalg.solve(lower[a:b, a:b], x[a:b] - lower[a:b, :a] @ x[:a])
    for a in reversed(starts):
        b = a + BLOCK
        x[a:b] = np.linalg.solve(lower[a:b, a:b].T, x[a:b] - lower[b:, a:b].T @ x[b:])
    return x
