"""Intrinsic dimension: known manifolds, honest error bars, bad samples."""

import numpy as np
import pytest
import torch

from lmd_hf.matrix.intrinsic import (
    Dimension,
    intrinsic_dimensions,
    maximum_likelihood,
    neighbour_distances,
    two_nn,
)


def normal(count, dimension, seed, ambient=None):
    """Samples of a `dimension`-dimensional normal distribution, turned into `ambient` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    if ambient is None:
        return x
    return x @ torch.linalg.qr(torch.randn(ambient, dimension, generator=generator, dtype=torch.float64)).Q.T


def swiss_roll(count, seed):
    rng = np.random.default_rng(seed)
    angle, height = 1.5 * np.pi * (1 + 2 * rng.random(count)), 21 * rng.random(count)
    roll = np.stack([angle * np.cos(angle), height, angle * np.sin(angle)], axis=1)
    turn = np.linalg.qr(rng.standard_normal((20, 3)))[0]
    return torch.from_numpy((roll - roll.mean(0)) / roll.std(0) @ turn.T)


def test_the_swiss_roll_is_a_surface():
    for found in intrinsic_dimensions(swiss_roll(2000, seed=0)):
        assert abs(found.value - 2) < 0.15
        assert 0.01 < found.error < 0.15


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_known_dimensions_in_any_ambient_space(dimension):
    for found in intrinsic_dimensions(normal(1500, dimension, 0, ambient=30)):
        assert abs(found.value - dimension) < 4 * found.error + 0.05 * dimension


def test_error_bars_are_the_spread_from_sample_to_sample():
    """Over 40 samples: not below the spread by more than a fifth, nor twice as wide."""
    found = [intrinsic_dimensions(normal(300, 3, seed)) for seed in range(40)]
    for estimates in zip(*found, strict=True):
        values, errors = np.array([e.value for e in estimates]), np.array([e.error for e in estimates])
        assert 0.8 < errors.mean() / values.std() < 2


def test_formulas_against_their_textbook_loops():
    x = normal(200, 3, 1).numpy()
    logs, inverse = [], []
    for i, point in enumerate(x):
        r = np.sort(np.linalg.norm(np.delete(x, i, axis=0) - point, axis=1))
        logs.append(np.log(r[1] / r[0]))
        inverse.append(np.mean([np.log(r[9] / r[j]) for j in range(9)]))
    kept = np.sort(logs)[:180]
    line = np.linalg.lstsq(kept[:, None], -np.log(1 - np.arange(1, 181) / 200), rcond=None)[0][0]
    first, second = intrinsic_dimensions(torch.from_numpy(x))
    assert first.value == pytest.approx(line, rel=1e-12)
    assert second.value == pytest.approx(1 / np.mean(inverse), rel=1e-12)


def test_scale_and_rotation_do_not_change_the_dimension():
    x = normal(300, 3, 2)
    turned = 7 * x @ torch.linalg.qr(normal(3, 3, 3)).Q
    for before, after in zip(intrinsic_dimensions(x), intrinsic_dimensions(turned), strict=True):
        assert after.value == pytest.approx(before.value, rel=1e-6)


def test_duplicates_count_once():
    x = normal(200, 3, 4)
    repeated = torch.cat([x, x[:50], x[:1].expand(30, 3)])
    once = intrinsic_dimensions(x)
    assert intrinsic_dimensions(repeated) == once
    shaken = repeated + 1e-7 * torch.randn(repeated.shape, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(intrinsic_dimensions(shaken), once, strict=True):  # equal but for rounding
        assert found.value == pytest.approx(expected.value, rel=1e-3)


@pytest.mark.parametrize(
    "x",
    [
        normal(19, 3, 0),
        torch.zeros(500, 4),
        normal(10, 3, 0).repeat(100, 1),
    ],
    ids=["few", "all equal", "few distinct"],
)
def test_too_few_samples_have_none(x):
    assert neighbour_distances(x) is None
    assert intrinsic_dimensions(x) == (None, None)


def test_equal_distances_have_none():
    """The vectors of an orthonormal basis are all equally far apart: no ratio, no dimension."""
    distances = neighbour_distances(torch.eye(50))
    assert two_nn(np.ones_like(distances)) is None
    assert maximum_likelihood(np.ones_like(distances)) is None


def test_bfloat16_samples_are_taken():
    found = intrinsic_dimensions(normal(500, 2, 5).to(torch.bfloat16))
    assert all(isinstance(each, Dimension) for each in found)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        intrinsic_dimensions(torch.full((100, 3), float("nan")))
