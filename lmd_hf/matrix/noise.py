"""What pure noise would look like: Marchenko–Pastur, Tracy–Widom and Gavish–Donoho for one spectrum.

An m × n matrix (m ≤ n, β = m/n) with i.i.d. entries of variance v/n has squared singular values λ that follow the
Marchenko–Pastur law on [v(1−√β)², v(1+√β)²]. Everything here is a function of β and of the spectrum σ = √λ.
"""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy import ndarray


TRACY_WIDOM_95 = 0.979316  # quantiles of F₁, the law of the largest eigenvalue of a real noise matrix
TRACY_WIDOM_99 = 2.023449
POOR_FIT = 0.05  # Kolmogorov–Smirnov distances above this (and above NOISE_FIT / m) are not Marchenko–Pastur-like
NOISE_FIT = 6.0  # pure noise stays below NOISE_FIT / m


def mp_cdf(x: Float[ndarray, " N"], beta: float) -> Float[ndarray, " N"]:
    """Marchenko–Pastur distribution function of λ at ratio 0 < β ≤ 1 and variance 1, in closed form.

    F(λ) = ½ + [√((b−λ)(λ−a)) − (1+β)·arctan((r²−1)/2r) + (1−β)·arctan((a·r²−b)/(2(1−β)r))] / 2πβ
    with a, b = (1∓√β)², r² = (b−λ)/(λ−a). Source: Marchenko & Pastur 1967; integral as in scikit-rmt.
    """
    a, b = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    inside = (x > a) & (x < b)
    lam = np.where(inside, x, (a + b) / 2)
    r = np.sqrt((b - lam) / (lam - a))
    area = np.sqrt((b - lam) * (lam - a)) - (1 + beta) * np.arctan((r**2 - 1) / (2 * r))
    if beta < 1:
        area = area + (1 - beta) * np.arctan((a * r**2 - b) / (2 * (1 - beta) * r))
    return np.where(inside, 0.5 + area / (2 * math.pi * beta), np.where(x >= b, 1.0, 0.0))


def mp_density(x: Float[ndarray, " N"], beta: float) -> Float[ndarray, " N"]:
    """Marchenko–Pastur density of λ at ratio 0 < β ≤ 1 and variance 1: √((b−λ)(λ−a)) / 2πβλ with a, b = (1∓√β)².

    0 outside (a, b). The derivative of `mp_cdf`.
    """
    a, b = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    inside = (x > a) & (x < b)
    lam = np.where(inside, x, (a + b) / 2)
    return np.where(inside, np.sqrt((b - lam) * (lam - a)) / (2 * math.pi * beta * lam), 0.0)


@lru_cache(maxsize=1024)
def mp_median(beta: float) -> float:
    """Median of λ under Marchenko–Pastur at ratio 0 < β ≤ 1 and variance 1, to 1e-8 (inverse interpolation)."""
    grid = np.linspace((1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2, 50_001)
    return float(np.interp(0.5, mp_cdf(grid, beta), grid))


def gavish_donoho_omega(beta: float) -> float:
    """ω(β): the optimal hard threshold on σ, in units of the median σ, when the noise level is unknown.

    ω = √(2(β+1) + 8β/((β+1) + √(β²+14β+1))) / √(MP median). Source: Gavish & Donoho 2014, eqs. 11 and 5.
    """
    known = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    return known / math.sqrt(mp_median(beta))


def settled(sigma: Float[ndarray, " m"], n: int) -> Float[ndarray, " m"]:
    """σ with 0 for every value that float64 cannot tell from 0: up to max(n, 8√m)·u·σ₁, u = 2⁻⁵³."""
    return np.where(sigma > max(n, 8 * math.sqrt(len(sigma))) * 2.0**-53 * sigma[0], sigma, 0.0)


def noise_level(sigma: Float[ndarray, " m"], n: int) -> float:
    """v = median(λ) / median of Marchenko–Pastur: the noise variance times n, in one pass (iterating runs away); 0
    where half of the values or more are 0 (`settled`)."""
    return float(np.median(settled(sigma, n) ** 2)) / mp_median(len(sigma) / n)


def mp_edge(sigma: Float[ndarray, " m"], n: int) -> float:
    """√v·(1+√β): the largest σ of an infinite noise matrix with this bulk."""
    return math.sqrt(noise_level(sigma, n)) * (1 + math.sqrt(len(sigma) / n))


def spikes(sigma: Float[ndarray, " m"], n: int, quantile: float = TRACY_WIDOM_95) -> int:
    """How many λ stand above what a finite noise matrix reaches: #{λ > v(μ + t·q)}, q a quantile of Tracy–Widom F₁.

    μ = (√(n−1)+√m)²/n, t = (√(n−1)+√m)(1/√(n−1)+1/√m)^{1/3}/n. Source: Johnstone 2001, Theorem 1.1. With the
    95 % quantile, 3–12 % of pure noise matrices show one. `n` ≥ 2.
    """
    m = len(sigma)
    both = math.sqrt(n - 1) + math.sqrt(m)
    center = both**2 / n
    width = both * (1 / math.sqrt(n - 1) + 1 / math.sqrt(m)) ** (1 / 3) / n
    return int((sigma**2 > noise_level(sigma, n) * (center + width * quantile)).sum())


def mp_fit_distance(sigma: Float[ndarray, " m"], n: int) -> float:
    """Kolmogorov–Smirnov distance between Marchenko–Pastur and the λ/v that are not spikes, in [0, 1]."""
    bulk = np.sort(sigma**2)[: len(sigma) - spikes(sigma, n)] / noise_level(sigma, n)
    expected = mp_cdf(bulk, len(sigma) / n)
    steps = np.arange(len(bulk) + 1) / len(bulk)
    return float(max(np.max(steps[1:] - expected), np.max(expected - steps[:-1])))


def bulk_is_mp_like(distance: float, m: int) -> bool:
    """Whether a spike count means something: the bulk fits Marchenko–Pastur to within max(0.05, 6/m)."""
    return distance <= max(POOR_FIT, NOISE_FIT / m)
