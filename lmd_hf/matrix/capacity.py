"""Memory capacity of a latent manifold: how many patterns an associative memory of that many dimensions can hold.

All of them are theoretical bounds under the cited model's assumptions (random patterns, its energy), not measurements.
d is a dimension, here the participation ratio of a spectrum (1/d is the variance of the cross-talk of random patterns);
a is the degree of the energy (`lmd_hf.matrix.activation.energy_degree`).
"""

import math

from scipy.special import wrightomega


CLASSICAL_LOAD = 0.138  # patterns per dimension of the quadratic energy, small errors allowed (Amit et al. 1985)
FAILURE = 0.001  # p: how likely a random set of so many patterns may fail to be stored
LEAST_DIMENSION = 3  # of the polynomial law, whose ln d must not be near 0


def capacity_log10(dimension: int | float | None, degree: int) -> float | None:
    """log₁₀ K, K = d^{a−1} / (2·(2a−3)!!·ln d): patterns stored without error by a polynomial energy of degree a.

    `dimension` d is the participation ratio of S', `degree` a an integer ≥ 2. `None` for d < 3 and where no capacity
    holds (a < 2). Source: Krotov & Hopfield 2016, eq. 6 (d = 100: 10.857, 361.91, 7238.24 for a = 2, 3, 4).
    """
    if dimension is None or dimension < LEAST_DIMENSION or degree < 2:
        return None
    # (2a−3)!! = 2^{a−1}·Γ(a−½)/√π, whose logarithm never overflows
    odd_factorial = (degree - 1) * math.log(2) + math.lgamma(degree - 0.5) - math.log(math.pi) / 2
    k = (degree - 1) * math.log(dimension) - math.log(2) - odd_factorial - math.log(math.log(dimension))
    return k / math.log(10)


def classical_capacity(dimension: int | float) -> float:
    """0.138·d: random patterns that the quadratic energy recalls with a few wrong entries each. Source: Amit, Gutfreund
    & Sompolinsky 1985."""
    return CLASSICAL_LOAD * dimension


def required_degree(n_samples: int | float, dimension: int | float) -> int | None:
    """The least degree a ≥ 2 whose capacity K(d, a) reaches `n_samples`: `capacity_log10` turned round.

    K(d, a+1)/K(d, a) = d/(2a−1), so K grows only while a < (d+1)/2: `None` where even the largest falls short, and for
    d < 3. Raises `ValueError` for less than one sample.

    >>> required_degree(361, 100), required_degree(362, 100), required_degree(10, 3)
    (3, 4, None)
    """
    if not n_samples >= 1:
        raise ValueError(f"n_samples is {n_samples}; give at least 1")
    if not LEAST_DIMENSION <= dimension < math.inf:
        return None
    wanted = math.log10(n_samples)
    for degree in range(2, 2 + math.ceil((dimension + 1) / 2)):
        if (capacity_log10(dimension, degree) or 0.0) >= wanted:
            return degree
    return None


def softmax_capacity_log10(
    dimension: int | float | None, sharpness: float, *, failure: int | float = FAILURE
) -> float | None:
    """log₁₀ K, K = √p·c^{(d−1)/4}: random patterns on a sphere that softmax attention stores, with probability 1 − p.

    c = b/W₀(exp(a + ln b)), a = 2/(d−1)·(1 + ln(2βκ²p(d−1))), b = 2βκ²/5, in the source's letters; `sharpness` is βκ²,
    β the inverse temperature and κ√(d−1) the norm of the patterns (only this product enters), `failure` is p.
    `None` where the theorem's condition c ≥ (2/√p)^{4/(d−1)} fails (K < 2), for d ≤ 1, for βκ² ≤ 0 or infinite, and
    (ours) for K·βκ²(d−1) ≤ 1: the balls of radius 1/(βKM) in which it finds each pattern, M their norm, all hold the
    origin then, so nothing is told apart, though the formula diverges as β → 0.
    Computed as ln c = ω(a + ln b) − a with the Wright function ω(z) = W₀(exp z), so no dimension overflows.
    Source: Ramsauer et al. 2020, Theorem 3 (β = 1, κ = 3, d = 20, p = .001: K = 7.41297; 1, 1, 75, .001: 10.9732).
    """
    if not 0 < failure <= 1:
        raise ValueError(f"failure is {failure}; it is a probability, above 0")
    if dimension is None or not dimension > 1 or not 0 < sharpness < math.inf:
        return None
    a = 2 / (dimension - 1) * (1 + math.log(2 * failure * (dimension - 1)) + math.log(sharpness))
    ln_c = float(wrightomega(a + math.log(0.4) + math.log(sharpness))) - a
    ln_k = math.log(failure) / 2 + (dimension - 1) / 4 * ln_c
    told_apart = ln_k + math.log(sharpness) + math.log(dimension - 1) > 0
    return ln_k / math.log(10) if ln_k >= math.log(2) * (1 - 1e-12) and told_apart else None


def head_capacity_log10(
    dimension: int | float | None,
    *,
    scale: int | float,
    query_norm: int | float | None,
    key_norm: int | float | None,
    failure: float = FAILURE,
) -> float | None:
    """`softmax_capacity_log10` of an attention head: βκ² = s·‖q‖·‖k‖/(d−1).

    `dimension` d is the participation ratio of its QK circuit, `scale` s multiplies the scores, `query_norm` and
    `key_norm` are root mean square norms of queries and keys: measured, or from weights alone ‖W_Q·diag γ‖_F and
    ‖W_K·diag γ‖_F, what white inputs of unit variance give. `None` where a norm is, or where the theorem does not hold.
    """
    if dimension is None or not dimension > 1 or query_norm is None or key_norm is None:
        return None
    return softmax_capacity_log10(dimension, scale * query_norm * key_norm / (dimension - 1), failure=failure)
