"""The distribution of singular values below the leading ones, by stochastic Lanczos quadrature.

Shapes: L = long side, S = short side, W is L × S here; r = leading triplets taken out, P = probes, m = Lanczos steps,
N = 2m nodes of a rule, J = rules for each probe, C = values asked for. A = W·(I − VVᵀ).

A probe is a unit vector x, uniform on the sphere of the S − r dimensions that V leaves. Its spectral measure
Σᵢ (xᵀvᵢ)² δ(σᵢ) has the wanted distribution (1/(S−r)) Σᵢ δ(σᵢ) as expectation (Hutchinson 1990; Ubaru,
Chen & Saad 2017).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.matrix.krylov import normal
from lmd_hf.matrix.products import cast, lengths, scaled, store, times, without


RULES = 4  # for each probe; eight give the same numbers


@dataclass(frozen=True)
class Bidiagonal:
    """α (P × m) and β (P × m) of the Golub–Kahan recursions A·V = U·B, B upper bidiagonal with diagonal α and, above
    it, β without its last column, which couples to what was left out."""

    alpha: Float[np.ndarray, "P m"]
    beta: Float[np.ndarray, "P m"]

    def first(self, steps: int) -> "Bidiagonal":
        """What the recursions knew after so many steps."""
        return Bidiagonal(self.alpha[:, :steps], self.beta[:, :steps])


def bidiagonalise(
    w_LS: Float[Tensor, "L S"], v_Sr: Float[Tensor, "S r"], *, probes: int, steps: int, seed: int, precise: bool = False
) -> Bidiagonal:
    """Golub–Kahan bidiagonalisation of A from random starts, all probes together as one product with W a side and step.

    Products run in the dtype of W, or in float64 if `precise` (`products.times`), and every new vector is twice
    orthogonalised against all of its own run (Golub & Kahan 1965; Paige & Saunders 1982). A run that has exhausted its
    space goes on with zeros. A float32 product errs by c·u·‖W‖_F, u = 2⁻²⁴, and by Weyl so does a node: c = L in the
    worst case (Higham 2002, §3.1), but roundings do not all go one way, and on the tests' spectra values moved by at
    most c = 0.6 and effective ranks by 2e-7, of which intervals are 1e4 times as wide. `sketch` counts c = 1 in each.
    """
    dtype = torch.float64 if precise else w_LS.dtype
    long, short = w_LS.shape
    like = torch.empty(0, dtype=dtype, device=w_LS.device)
    start, common_rS = normal(probes, short, seed=seed).to(like), cast(v_Sr, dtype).T
    right, left = like.new_empty(probes, steps + 1, short), like.new_empty(probes, steps, long)
    alpha, beta = np.zeros((probes, steps)), np.zeros((probes, steps))
    store(right[:, 0], _unit(_new(start, right[:, :0], common_rS), 0.0)[0])
    floor = torch.finfo(dtype).eps
    for j in range(steps):
        u = _new(times(w_LS, right[:, j].T, exact=precise).T, left[:, :j])
        u, alpha[:, j] = _unit(u, floor * np.maximum(alpha, beta).max(1, initial=0))
        store(left[:, j], u)
        v = _new(times(w_LS.T, left[:, j].T, exact=precise).T, right[:, : j + 1], common_rS)
        v, beta[:, j] = _unit(v, floor * np.maximum(alpha, beta).max(1))
        store(right[:, j + 1], v)
    return Bidiagonal(alpha, beta)


def _new(x_PN: Tensor, basis_PjN: Tensor, common_rN: Tensor | None = None) -> Tensor:
    """What of each row lies neither in its own basis nor in the common one. Two passes: where a run has exhausted its
    space the first leaves rounding, which lies anywhere, and Ritz values above ‖A‖ would come of it."""
    for _ in range(2):
        if common_rN is not None:
            x_PN = without(x_PN, common_rN)
        x_PN = without(x_PN[:, None], basis_PjN)[:, 0]
    return x_PN


def _unit(x_PN: Tensor, floor: float | np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Rows of length 1 and their lengths; a row no longer than its floor is rounding and becomes 0."""
    size = lengths(x_PN)
    size = np.where(size > 16 * floor, size, 0.0)
    return scaled(x_PN, torch.from_numpy(np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)).to(x_PN)), size


def rules(run: Bidiagonal, count: int = RULES) -> tuple[Float[np.ndarray, "P JN"], Float[np.ndarray, "P JN"]]:
    """Nodes σ ≥ 0 and weights (each row adds up to 1) of J positive quadrature rules for every probe.

    The Jordan–Wielandt form of B is a symmetric tridiagonal T with zero diagonal and off-diagonal α₁, β₁, α₂, …, α_m,
    whose eigenvalues are ±σ, so that small σ keep their accuracy. T + τ·e_N·e_Nᵀ is for each τ the matrix of a rule
    that is exact to degree 4m − 2 in σ, with nodes between those of Gauss (τ = 0): one Gauss rule would know the
    distribution only to within the weight of a node. τ = β_m·tan θ with θ evenly over (0, π/2) sweeps the nodes through
    the gaps (a Cauchy law of width β_m, as a constant continuation of the recursion has it), which also cancels what a
    node too close to σ = 0 does to |σ|. Each probe has its own θ, so that together the P · J rules leave no steps. −τ
    gives the same values of |σ|. Source of the rules: Golub & Meurant 2010, §6.2; of the continuation, Haydock 1980.
    """
    probes, steps = run.alpha.shape
    off = np.empty((probes, 2 * steps - 1))
    off[:, 0::2], off[:, 1::2] = run.alpha, run.beta[:, :-1]
    phases = (np.arange(probes)[:, None] + 0.5) / probes + np.arange(count)
    last_PJ = run.beta[:, -1:] * np.tan(phases / count * math.pi / 2)
    nodes, weights = np.empty((2, probes, count, 2 * steps))
    low = np.arange(2 * steps - 1)
    t_JNN = np.zeros((count, 2 * steps, 2 * steps))  # LAPACK reads the lower triangle
    for probe in range(probes):
        t_JNN[:, low + 1, low], t_JNN[:, -1, -1] = off[probe], last_PJ[probe]
        nodes[probe], vectors = np.linalg.eigh(t_JNN)
        weights[probe] = vectors[:, 0] ** 2 / count
    return np.abs(nodes).reshape(probes, -1), weights.reshape(probes, -1)


def largest(run: Bidiagonal) -> float:
    """The largest Ritz value of all runs: at most ‖A‖₂."""
    steps = np.arange(run.alpha.shape[1] - 1)
    b_Pmm = run.alpha[:, :, None] * np.eye(run.alpha.shape[1])
    b_Pmm[:, steps, steps + 1] = run.beta[:, :-1]
    return float(np.linalg.norm(b_Pmm, 2, axis=(1, 2)).max())


def quantiles(
    nodes: Float[np.ndarray, "P JN"], weights: Float[np.ndarray, "P JN"], shares: Float[np.ndarray, "R P"], count: int
) -> Float[np.ndarray, "R C"]:
    """C values, descending, distributed as the rules say, for each row of `shares`, the weights of the probes.

    The i-th is the mean of the quantile function over ((i−1)/C, i/C), so the mean of σ is kept.
    """
    order = np.argsort(nodes, axis=None)
    sigma = nodes.ravel()[order]
    edges = np.linspace(0, 1, count + 1)
    result = np.empty((len(shares), count))
    for row, share in zip(result, shares, strict=True):
        mass = (weights * share[:, None]).ravel()[order]
        below, moment = np.append(0.0, np.cumsum(mass)), np.append(0.0, np.cumsum(mass * sigma))
        row[:] = np.sort(np.diff(np.interp(edges, below / below[-1], moment / below[-1])))[::-1] * count
    return result
