"""How many dimensions a spectrum has: ranks, effective ranks and the latent dimension n'.

σ is a full spectrum (k values, descending, non-negative), λ = σ², p = σ/Σσ. Every function returns `None` where the
number does not exist (the zero matrix), never a stand-in.
"""

import math

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmd_hf.matrix import noise


def stable_rank(sigma: Float[ndarray, " k"]) -> float | None:
    """Σλ/λ₁ = ‖W‖_F²/‖W‖₂², in [1, k]. Source: Rudelson & Vershynin 2007."""
    return float((sigma**2).sum() / sigma[0] ** 2) if sigma[0] > 0 else None


def participation_ratio(sigma: Float[ndarray, " k"]) -> float | None:
    """(Σλ)²/Σλ², in [1, k]: the number of equal values with the same first two moments."""
    share = _share(sigma**2)
    return None if share is None else float(1 / (share**2).sum())


def effective_rank(sigma: Float[ndarray, " k"]) -> float | None:
    """exp H(p), p = σ/Σσ, in [1, k]. Source: Roy & Vetterli 2007, eq. 4."""
    return _exp_entropy(sigma)


def effective_rank_energy(sigma: Float[ndarray, " k"]) -> float | None:
    """exp H(λ/Σλ): the same on the energies, where large values weigh more; ≤ `effective_rank`."""
    return _exp_entropy(sigma**2)


def energy_rank(sigma: Float[ndarray, " k"], share: float) -> int | None:
    """The least r with Σ_{i≤r} λᵢ ≥ share · Σλ."""
    energies = _share(sigma**2)
    if energies is None:
        return None
    return min(int(np.searchsorted(np.cumsum(energies), share * (1 - 1e-12))) + 1, len(sigma))


def expressivity(sigma: Float[ndarray, " r"], k: int | None = None) -> float | None:
    """H(λ/Σλ)/ln k, in [0, 1]: 0 when one direction carries all, 1 when all k = min(m, n) of them carry the same;
    `None` for k = 1. Where k (else r) is given, the values that are not in `sigma` are 0."""
    k, rank = k or len(sigma), effective_rank_energy(sigma)
    return None if rank is None or k < 2 else math.log(rank) / math.log(k)


def log_volume(sigma: Float[ndarray, " k"], count: int | None) -> float | None:
    """Σ ln σᵢ over the `count` largest: the logarithm of the volume to which the kept axes take the unit cube. `None`
    where none is kept or one of them is 0."""
    kept = sigma[:count] if count else sigma[:0]
    return float(np.log(kept).sum()) if len(kept) and kept[-1] > 0 else None


def numerical_rank(sigma: Float[ndarray, " m"], n: int, relative: float, absolute: float = 0.0) -> int:
    """#{σ > δ(√m+√n) + n·u·σ₁}: the values that rounding alone cannot explain, m ≤ n.

    δ is the root mean square of the largest rounding error of each stored entry: `relative` · ‖W‖_F/√(mn) for floats
    (bf16 2⁻⁸, fp16 2⁻¹¹, fp32 2⁻²⁴, e4m3 2⁻⁴), `absolute`, half a step, for integers; a matrix of errors of size δ has
    norm up to δ(√m+√n). u = 2⁻⁵³.
    """
    m = len(sigma)
    delta = math.hypot(relative * math.sqrt(float((sigma**2).sum()) / (m * n)), absolute)
    return int((sigma > delta * (math.sqrt(m) + math.sqrt(n)) + n * 2.0**-53 * sigma[0]).sum())


def gavish_donoho(sigma: Float[ndarray, " m"], n: int) -> int:
    """#{σ > ω(m/n)·median(σ)}: the rank that denoises best when the noise level is unknown, m ≤ n; the rank itself
    where at least half of the values are 0 (`noise.settled`)."""
    sigma = noise.settled(sigma, n)
    return int((sigma > noise.gavish_donoho_omega(len(sigma) / n) * np.median(sigma)).sum())


def latent_dimension(
    kept: Float[ndarray, " k"], raw: Float[ndarray, " m"], n: int, metric: str
) -> tuple[int | None, str | None]:
    """(n', the rule that gave it). `kept` is S', `raw` is σ(W); they are the same under the identity metric.

    Gavish–Donoho on σ(W) under `identity` and `norm` when it keeps anything, else the 90 % energy rank of S'; always
    that for a `product` of thin factors, which has no noise to tell apart.
    """
    if metric in ("identity", "norm") and raw[0] > 0 and (count := gavish_donoho(raw, n)) > 0:
        return count, "gavish-donoho"
    count_energy = energy_rank(kept, 0.90)
    return count_energy, None if count_energy is None else "energy-0.90"


def _share(values: ndarray) -> ndarray | None:
    total = values.sum()
    return values / total if total > 0 else None


def _exp_entropy(values: ndarray) -> float | None:
    p = _share(values)
    if p is None:
        return None
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
