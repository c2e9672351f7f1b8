"""Metrics on the input or output space: M = B·Λ·Bᵀ with B orthogonal and Λ > 0.

Distances are xᵀM⁻¹x. A `Metric` is its eigen-decomposition; the identity and diagonal ones never form a matrix.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


REGULARISATION = 1e-10  # ε: M + ε·(mean eigenvalue)·I, applied to dense metrics and to gains that hold a zero

SYMMETRY = 1e-5  # relative to the largest entry: what accumulating a covariance in float32 leaves


@dataclass(frozen=True)
class Metric:
    """`basis` B (n × n, `None` = I), `eigenvalues` Λ (n, `None` = 1), `regularisation` the ε·mean that was added."""

    name: str
    basis: Tensor | None = None
    eigenvalues: Tensor | None = None
    regularisation: float = 0.0

    def power_times(self, exponent: float, x_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """M^exponent · X."""
        if self.eigenvalues is None:
            return x_NK
        powers_N1 = self.eigenvalues.to(x_NK.device)[:, None] ** exponent
        if self.basis is None:
            return powers_N1 * x_NK
        basis = self.basis.to(x_NK.device)
        return basis @ (powers_N1 * (basis.T @ x_NK))


def identity() -> Metric:
    """M = I: the plain singular value decomposition."""
    return Metric("identity")


def norm(gain_N: Float[Tensor, " N"]) -> Metric:
    """M = diag(γ²), γ the gain of the norm that feeds the matrix: the spectrum of W·diag(γ).

    Exact for RMSNorm. LayerNorm's mean subtraction is left out: s_{i+1} ≤ centred s_i ≤ s_i. A gain with a zero entry
    is regularised by ε = 1e-10 of the mean of γ². Raises `ValueError` if the gain is all zero or not finite.
    """
    squares = gain_N.to(torch.float64) ** 2
    if not torch.isfinite(squares).all() or squares.max() == 0:
        raise ValueError("a norm gain must be finite and not all zero")
    shift = REGULARISATION * squares.mean().item() if squares.min() == 0 else 0.0
    return Metric("norm", None, squares + shift, shift)


def dense(m_NN: Float[Tensor, "N N"], name: str = "data") -> Metric:
    """A symmetric positive semi-definite metric, such as a covariance, regularised by ε = 1e-10 of its mean eigenvalue.

    Columns of the basis carry the sign convention of `fix_signs`. Raises `ValueError` if M is not symmetric or has an
    eigenvalue below −ε·(mean eigenvalue), or is all zero.
    """
    m_NN = m_NN.to(torch.float64)
    if not torch.allclose(m_NN, m_NN.T, rtol=0, atol=SYMMETRY * m_NN.abs().max().item()):
        raise ValueError("a metric must be symmetric")
    eigenvalues, basis = torch.linalg.eigh((m_NN + m_NN.T) / 2)
    shift = REGULARISATION * eigenvalues.mean().item()
    if shift <= 0 or eigenvalues[0] < -shift:
        raise ValueError("a metric must be positive semi-definite and not zero")
    return Metric(name, fix_signs(basis.flip(1)), eigenvalues.flip(0).clamp_min(0) + shift, shift)


def column_signs(columns_NK: Float[Tensor, "N K"]) -> Float[Tensor, " K"]:
    """±1 for each column: the sign of its first entry of largest magnitude."""
    pivots = columns_NK.abs().argmax(dim=0, keepdim=True)
    return torch.where(columns_NK.gather(0, pivots)[0] < 0, -1.0, 1.0).to(columns_NK.dtype)


def fix_signs(columns_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """The same columns, each with a positive first entry of largest magnitude."""
    return columns_NK * column_signs(columns_NK)
