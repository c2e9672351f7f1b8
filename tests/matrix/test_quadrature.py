"""Quadrature: rules against the moments they must have, and the distribution against the true one."""

import math

import numpy as np
import pytest
import torch

from lmd_hf.matrix import dimension
from lmd_hf.matrix.krylov import normal
from lmd_hf.matrix.quadrature import Bidiagonal, bidiagonalise, largest, quantiles, rules
from lmd_hf.matrix.spectrum import Sketch, error_parts, interval_of, student_quantile, variants


pytestmark = pytest.mark.usefixtures("one_thread")

NONE = torch.zeros(300, 0, dtype=torch.float64)
SPECTRA = {
    "noise": None,
    "slow": np.linspace(1, 0.5, 300),
    "to zero": np.linspace(1, 0, 300),
    "power": np.arange(1, 301) ** -0.5,
    "two clusters": np.repeat([1, 0.1], [180, 120]),
    "half empty": np.concatenate([np.linspace(1, 0.3, 150), np.zeros(150)]),
}


def interval(number, values, sketch):
    return interval_of([number(each) for each in variants(values, sketch)])


def spectrum_of(w, *, probes=64, steps=24, seed=0):
    run = bidiagonalise(w, NONE, probes=probes, steps=steps, seed=seed)
    return quantiles(*rules(run), np.full((1, probes), 1 / probes), 300)[0]


def test_every_rule_has_the_moments_of_its_probe(build):
    """Σ w·σ^2j = xᵀ(WᵀW)ʲx up to degree 4m − 2: one rule at a time, and so their mean."""
    w, steps = build(350, 300), 5
    run = bidiagonalise(w, NONE, probes=3, steps=steps, seed=0)
    nodes, weights = rules(run, 1)
    x = torch.nn.functional.normalize(normal(3, 300, seed=0), dim=1)
    power = x.clone()
    for j in range(2 * steps):
        moments = (weights * nodes ** (2 * j)).sum(1)
        np.testing.assert_allclose(moments, (x * power).sum(1).numpy(), rtol=1e-9)
        power = (power @ w.T) @ w
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_distribution_is_the_true_one(build, spectrum):
    """Largest distance of the two distribution functions, and the effective rank, to the error of 64 probes."""
    w = build(400, 300, SPECTRA[spectrum]).float()
    exact = np.linalg.svd(w.double().numpy(), compute_uv=False)
    found = spectrum_of(w)
    grid = np.linspace(0.02, 1.1, 60) * exact[0]
    apart = [abs((found > x).mean() - (exact > x).mean()) for x in grid]
    assert max(apart) < 0.04
    assert dimension.effective_rank(found) == pytest.approx(dimension.effective_rank(exact), rel=0.02)
    assert (np.diff(found) <= 0).all()


def test_one_gauss_rule_knows_the_distribution_to_a_node_only(build):
    """The reason for the family: its distribution function has no steps of the size of a weight."""
    w = build(300, 300)
    exact = np.linalg.svd(w.numpy(), compute_uv=False)
    run = bidiagonalise(w, NONE, probes=64, steps=12, seed=0)
    shares = np.full((1, 64), 1 / 64)
    gauss = Bidiagonal(run.alpha, run.beta * (np.arange(12) < 11))
    one, many = (quantiles(*rules(each), shares, 300)[0] for each in (gauss, run))
    assert np.abs(many - exact).mean() < 0.5 * np.abs(one - exact).mean()


def test_deflated_directions_are_not_seen(build):
    w = build(400, 300, np.concatenate([[50.0, 40.0, 30.0], np.linspace(1, 0.5, 297)]))
    right = torch.linalg.svd(w, full_matrices=False).Vh[:3].T
    run = bidiagonalise(w, right, probes=8, steps=10, seed=0)
    assert 0.99 < largest(run) <= 1 + 1e-12
    assert 0.999 < largest(bidiagonalise(w, NONE, probes=8, steps=10, seed=0)) / 50 <= 1 + 1e-12


def test_an_exhausted_recursion_stops_and_keeps_its_weight(build):
    run = bidiagonalise(build(400, 300, np.ones(300)), NONE, probes=4, steps=6, seed=0)
    np.testing.assert_allclose(run.alpha[:, 0], 1, rtol=1e-12)
    assert (run.beta == 0).all()
    np.testing.assert_allclose(quantiles(*rules(run), np.full((1, 4), 0.25), 10), 1, rtol=1e-12)


def test_quantiles_keep_the_mean():
    rng = np.random.default_rng(0)
    nodes, weights = rng.random((3, 20)), rng.random((3, 20))
    weights /= weights.sum(1, keepdims=True)
    shares = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    found = quantiles(nodes, weights, shares, 7)
    np.testing.assert_allclose(found.mean(1), (shares[:, :, None] * weights * nodes).sum((1, 2)))
    assert (np.diff(found, axis=1) <= 0).all()


def test_intervals_add_sampling_truncation_and_shift():
    values = np.array([4.0, 3.0, 2.0, 1.0])
    still = Sketch(np.zeros(0), np.tile(values, (16, 1)), np.tile(values, (3, 1)), np.zeros(4), 1.0)
    assert error_parts([np.mean(each) for each in variants(values, still)]) == (0, 0, 0)
    assert interval(np.mean, values, still) == (2.5, 2.5)
    assert interval(lambda s: len(s), values, still) == (3, 5)
    moved = Sketch(np.zeros(0), still.replicas, np.stack([values - 0.2, values, values]), np.full(4, 0.1), 1.0)
    assert interval(np.mean, values, moved) == pytest.approx((2.5 - 0.4, 2.5 + 0.4))
    spread = np.tile(values, (16, 1)) + np.tile([-1.0, 1.0], 8)[:, None]
    moving = Sketch(np.zeros(0), spread, still.coarse, np.zeros(4), 1.0)
    sampling, _, _ = error_parts([np.mean(each) for each in variants(values, moving)])
    assert sampling == pytest.approx(student_quantile(15) * math.sqrt(16 / 15))
    assert interval(lambda s: None if s[0] > 4 else 1.0, values, moved) is None


@pytest.mark.parametrize("degrees", [31, 63, 1000])
def test_students_quantile(degrees):
    from scipy.stats import t

    assert student_quantile(degrees) == pytest.approx(t.ppf(0.995, degrees), rel=1e-3)


def test_products_in_float64_see_what_float32_rounds_away(build):
    """Values of 1e-9 of the norm that was taken out: float32 products leave rounding of the norm's size instead."""
    spectrum = np.concatenate([[1.0], np.full(299, 1e-9)])
    w = build(400, 300, spectrum)
    right = torch.linalg.svd(w, full_matrices=False).Vh[:1].T
    assert largest(bidiagonalise(w, right, probes=4, steps=4, seed=0)) == pytest.approx(1e-9, rel=1e-3)
    assert largest(bidiagonalise(w.float(), right, probes=4, steps=4, seed=0)) > 2e-9
    precise = bidiagonalise(w.float(), right, probes=4, steps=4, seed=0, precise=True)
    assert (precise.alpha < 1e-7).all()


@pytest.mark.parametrize("spectrum", [None, np.linspace(1, 0.001, 300), np.logspace(0, -6, 300)])
def test_float32_products_move_values_by_less_than_the_intervals_count(build, spectrum):
    w = build(400, 300, spectrum).float()
    shares, rounding = np.full((1, 8), 1 / 8), torch.linalg.vector_norm(w).item() * 2.0**-24
    quick, precise = (
        quantiles(*rules(bidiagonalise(w, NONE, probes=8, steps=24, seed=0, precise=each)), shares, 300)[0]
        for each in (False, True)
    )
    assert 0 < np.abs(quick - precise).max() < rounding
    assert dimension.effective_rank(quick) == pytest.approx(dimension.effective_rank(precise), rel=1e-6)


def test_an_exhausted_run_in_float32_gives_no_value_above_the_norm(build):
    """Two distinct values: after two steps all is rounding, and must be orthogonal to what was there before."""
    w = build(400, 300, np.repeat([1, 0.1], [150, 150])).float()
    assert largest(bidiagonalise(w, NONE, probes=16, steps=24, seed=0)) == pytest.approx(1, abs=1e-5)
