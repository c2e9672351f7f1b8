"""Leading singular triplets by randomised block Krylov iteration, each with a certificate.

Shapes: L = long side, S = short side, W is L × S here; p = block, K = dimension of the Krylov space, r = triplets kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.matrix.cost import BLOCK, MOST, STEPS
from lmd_hf.matrix.products import orthonormal, orthonormal_rows, product, row_svd, store, thin_svd, times, without


UNIT_ROUNDOFF = 2.0**-53
FAILURE = 1e-6  # probability that `norm_bound` is none: once in a million matrices
SALT = int.from_bytes(b"lmd_hf", "big")


@dataclass(frozen=True)
class Triplets:
    """U (L × r), σ (r, descending), V (S × r), float64, with W·V = U·diag(σ) to rounding; `residuals` ‖Wᵀuᵢ − σᵢvᵢ‖."""

    left: Float[Tensor, "L r"]
    values: Float[Tensor, " r"]
    right: Float[Tensor, "S r"]
    residuals: Float[Tensor, " r"]

    def first(self, count: int) -> "Triplets":
        """The leading `count` of them."""
        return Triplets(self.left[:, :count], self.values[:count], self.right[:, :count], self.residuals[:count])


def krylov(
    w_LS: Float[Tensor, "L S"], *, seed: int, tolerance: float, most: int = MOST, block: int = BLOCK
) -> Iterator[Triplets]:
    """Ritz triplets of the growing spaces span(X, (WᵀW)X, (WᵀW)²X, …), X Gaussian, each yield a few steps further.

    Rayleigh–Ritz (Musco & Musco 2015, Algorithm 2) on an orthonormal basis Q of the space, kept orthogonal by two full
    passes: σ̂ are the singular values of W·Q. Products with W run in the dtype of W (float32 or float64), all else in
    float64, and what is yielded is refined once more in float64 (`refined`), so that rounding of the products widens
    residuals and never falsifies them. A yield holds the leading triplets, at most `most` and at least one, up to the
    first whose residual is not expected below `tolerance` · σ̂. The first yield comes after `STEPS` products with WᵀW,
    each later one after as many more; the sequence ends when the space is the whole one.
    """
    long, short = w_LS.shape
    x_pS = orthonormal(normal(short, min(block, short), seed=seed).to(w_LS.device)).T
    space_KS, image_KL, back_KS = (x_pS.new_empty(0, size) for size in (short, long, short))
    done = 0
    while len(x_pS):
        more = min(STEPS * block, short - done)
        space_KS, image_KL, back_KS = (
            torch.cat([x, x.new_empty(more, x.shape[1])]) for x in (space_KS, image_KL, back_KS)
        )
        for _ in range(STEPS):
            rows = slice(done, done + len(x_pS))
            store(space_KS[rows], x_pS)
            store(image_KL[rows], times(w_LS, space_KS[rows].T).T)
            store(back_KS[rows], times(w_LS.T, image_KL[rows].T).T)
            done = rows.stop
            x_pS = _new_directions(back_KS[rows], space_KS[:done])[: short - done]
            if not len(x_pS):
                break
        right_Sr = _candidates(space_KS[:done], image_KL[:done], back_KS[:done], most, tolerance)
        yield refined(w_LS, right_Sr)


def _new_directions(y_pS: Tensor, space_KS: Tensor) -> Float[Tensor, "p S"]:
    """An orthonormal basis of what Y adds to the space; where it adds nothing, rounding gives directions as good."""
    for _ in range(2):
        y_pS = orthonormal_rows(without(y_pS, space_KS))
    return y_pS


def _candidates(
    space_KS: Tensor, image_KL: Tensor, back_KS: Tensor, most: int, tolerance: float
) -> Float[Tensor, "S r"]:
    """The leading right Ritz vectors up to the first whose residual exceeds `tolerance` · σ̂, but at least one.

    With W·Q = image and WᵀW·Q = back, Wᵀu = back·z/σ̂, to the rounding of the products.
    """
    s_K, zh = row_svd(image_KL)
    s_m, z_mK = s_K[:most, None], zh[:most]
    right_mS = product(z_mK, space_KS)
    floor = torch.finfo(torch.float64).tiny
    residuals = torch.linalg.vector_norm(product(z_mK, back_KS) / s_m.clamp_min(floor) - s_m * right_mS, dim=1)
    good = residuals <= tolerance * s_m[:, 0]
    return right_mS[: max(1, int(good.cumprod(0).sum()))].T


def refined(w_LS: Float[Tensor, "L S"], v_Sr: Float[Tensor, "S r"]) -> Triplets:
    """Rayleigh–Ritz on span(V) in float64: U, σ, V with W·V = U·diag(σ), and the residuals of the other side."""
    v_Sr = orthonormal(v_Sr)
    u_Lr, s_r, zh = thin_svd(times(w_LS, v_Sr, exact=True))
    v_Sr = product(v_Sr, zh.T)
    back_Sr = times(w_LS.T, u_Lr, exact=True)
    return Triplets(u_Lr, s_r, v_Sr, torch.linalg.vector_norm(back_Sr - v_Sr * s_r, dim=0))


def certificates(triplets: Triplets, rest: float, rounding: float) -> Float[np.ndarray, " r"]:
    """Bounds on |σ̂ᵢ − σᵢ|, i the rank, given `rest` ≥ ‖(I − UUᵀ)·W·(I − VVᵀ)‖₂.

    In the bases [U U⊥], [V V⊥] W is [Σ E; 0 R], the rows of E being the residuals. Certain, in exact arithmetic:
    σ̂ᵢ ≤ σᵢ (interlacing), and some singular value lies within ‖eᵢ‖ of σ̂ᵢ. That it is the i-th, and none larger was
    missed, needs ‖R‖₂ ≤ `rest`: with `norm_bound` this holds with probability 1 − 1e-6 over the probes. Then for any
    split s ≥ i of the triplets into the first s and the others, with ε = ‖E_{≤s}‖_F and
    ρ = max(σ̂_{s+1}, rest) + ‖E_{>s}‖_F, which bounds the norm of the block that remains,

        σᵢ ≤ max(σ̂ᵢ, ρ) + 2ε²/(η + √(η² + 4ε²)),   η = max(σ̂ᵢ − ρ, 0)

    (Li & Li 2005, Theorem 2, for singular values through the Jordan–Wielandt matrix; η = 0 gives Weyl's ε). The
    smallest over s stands, plus `rounding`, that of the float64 residuals.
    """
    s, squares = triplets.values.cpu().numpy(), triplets.residuals.cpu().numpy() ** 2
    inside = np.sqrt(np.cumsum(squares))
    outside = np.sqrt(np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0))
    below = np.maximum(np.append(s[1:], 0.0), rest) + outside
    gaps = np.maximum(s[:, None] - below[None, :], 0)
    spread = 2 * inside**2 / np.maximum(gaps + np.sqrt(gaps**2 + 4 * inside**2), np.finfo(float).tiny)
    upper = np.maximum(s[:, None], below[None, :]) + spread
    upper[np.tril_indices(len(s), -1)] = np.inf  # a split before i does not hold σ̂ᵢ
    return upper.min(axis=1) - s + rounding


def norm_bound(largest: float, size: int, probes: int, steps: int) -> float:
    """‖A‖₂ from the largest Ritz value of `probes` Lanczos runs of `steps` steps with independent uniform unit starts.

    A single run underestimates λ₁ = ‖A‖² by more than a share ε with a probability of at most
    1.648·√n·e^{−√ε(2m−1)}, n = `size` (Kuczyński & Woźniakowski 1992, §4); all of them do with its P-th power, which is
    set to 1e-6. Infinite where so few steps say nothing.
    """
    each = FAILURE ** (1 / probes)
    share = (math.log(1.648 * math.sqrt(size) / each) / (2 * steps - 1)) ** 2
    return largest / math.sqrt(1 - share) if share < 1 else math.inf


def normal(rows: int, columns: int, *, seed: int) -> Float[Tensor, "rows columns"]:
    """Independent standard normal numbers, float64, on the CPU. The salt keeps them apart from those that somebody's
    own seed 0 made the matrix of: probes that are rows of W would see anything but its spectrum."""
    return torch.from_numpy(np.random.default_rng([SALT, seed]).standard_normal((rows, columns)))
