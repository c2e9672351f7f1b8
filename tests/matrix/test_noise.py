"""Marchenko–Pastur, Tracy–Widom, Gavish–Donoho: closed forms against integration, published values and simulation."""

import numpy as np
import pytest
from scipy.integrate import quad

from lmd_hf.matrix import noise


# β: lower and upper edge of λ, median of λ, ω
TABLE = {
    1.0: (0.0, 4.0, 0.652776, 2.858362),
    0.5: (0.085786, 2.914214, 0.830466, 2.171185),
    0.25: (0.25, 2.25, 0.916004, 1.836866),
}


def spectrum(m, n, seed, spike=0.0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((m, n)) / n**0.5
    w[0, 0] += spike
    return np.linalg.svd(w, compute_uv=False)


@pytest.mark.parametrize("beta", TABLE)
def test_edges_median_and_omega(beta):
    low, high, median, omega = TABLE[beta]
    assert noise.mp_cdf(np.array([low, high]), beta).tolist() == pytest.approx([0, 1], abs=1e-9)
    assert noise.mp_median(beta) == pytest.approx(median, abs=5e-7)
    assert noise.gavish_donoho_omega(beta) == pytest.approx(omega, abs=5e-7)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 0.01])
def test_the_closed_form_is_the_integral_of_the_density(beta):
    a, b = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2

    def density(x):
        return np.sqrt(max((b - x) * (x - a), 0)) / (2 * np.pi * beta * x)

    for share in (0.1, 0.5, 0.9):
        x = a + share * (b - a)
        assert noise.mp_cdf(np.array([x]), beta)[0] == pytest.approx(quad(density, a, x, limit=200)[0], abs=1e-6)


@pytest.mark.parametrize("shape", [(400, 400), (300, 600), (200, 800)])
def test_pure_noise_looks_like_noise(shape):
    m, n = shape
    false_alarms = 0
    for seed in range(20):
        sigma = spectrum(m, n, seed)
        assert noise.mp_fit_distance(sigma, n) < noise.NOISE_FIT / m
        false_alarms += noise.spikes(sigma, n) > 0
        assert noise.spikes(sigma, n, noise.TRACY_WIDOM_99) <= noise.spikes(sigma, n)
    assert false_alarms <= 5  # 3–12 % of noise matrices show a spike


@pytest.mark.parametrize(("beta", "theta", "out"), [(0.25, 1.5, 1.900292), (1.0, 2.0, 2.5), (0.25, 0.8, 1.510174)])
def test_a_planted_spike_comes_out_where_theory_says(beta, theta, out):
    assert np.sqrt((1 + theta**2) * (beta + theta**2)) / theta == pytest.approx(out, abs=1e-6)
    m = 500
    sigma = spectrum(m, int(m / beta), seed=5, spike=theta)
    assert sigma[0] == pytest.approx(out, rel=0.04)
    if theta > 1:
        assert noise.spikes(sigma, int(m / beta)) == 1


def test_a_spike_below_the_threshold_is_not_seen():
    assert noise.spikes(spectrum(300, 300, seed=2, spike=0.3), 300) == 0


def test_the_noise_level_is_that_of_the_entries():
    rng = np.random.default_rng(0)
    sigma = np.linalg.svd(0.02 * rng.standard_normal((300, 500)), compute_uv=False)
    assert noise.noise_level(sigma, 500) == pytest.approx(500 * 0.02**2, rel=0.02)
    assert noise.mp_edge(sigma, 500) == pytest.approx(sigma[0], rel=0.03)


def test_a_bulk_that_is_not_noise_says_so():
    sigma = np.logspace(0, -3, 300)
    distance = noise.mp_fit_distance(sigma, 300)
    assert not noise.bulk_is_mp_like(distance, 300)
    assert noise.bulk_is_mp_like(0.049, 10_000)
    assert not noise.bulk_is_mp_like(0.051, 10_000)
