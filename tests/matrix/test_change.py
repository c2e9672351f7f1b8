"""The numbers of a change against float64 LAPACK, in closed form, and in the cases that have no numbers."""

import math

import numpy as np
import pytest
import torch

from lmd_hf.matrix.change import UNMOVED, Side, rounding_errors, rounding_floor
from lmd_hf.matrix.change import measure_change as measure_sides
from lmd_hf.matrix.dimension import latent_dimension
from lmd_hf.matrix.subspaces import leading_subspaces, principal_angles


F32, BF16 = 2.0**-24, 2.0**-8
PAIR = (F32, F32)
SHAPES = [(60, 40), (40, 60), (30, 30)]


def measure_change(base, tuned, roundoffs):
    return measure_sides(Side(base, roundoffs[0]), Side(tuned, roundoffs[1]))


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def low_rank(rows, columns, values, seed=1):
    """A matrix with exactly these singular values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    k = len(values)
    return (orthonormal(rows, k, seed) * values) @ orthonormal(columns, k, seed + 1).T


def oracle_angles(a, b):
    """cos of the principal angles, the textbook way."""
    return np.linalg.svd(a.numpy().T @ b.numpy(), compute_uv=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_of_a_low_rank_update(build, shape):
    w = build(*shape)
    update, drift = measure_change(w, w + low_rank(*shape, [0.4, 0.2, 0.1]), PAIR)
    np.testing.assert_allclose(update.singular_values[:3], [0.4, 0.2, 0.1], rtol=1e-12)
    assert update.norm == pytest.approx(math.sqrt(0.21), rel=1e-12)
    assert update.relative == pytest.approx(math.sqrt(0.21) / w.norm().item())
    assert update.spectral_norm == pytest.approx(0.4)
    assert (update.rank, update.energy) == (3, pytest.approx(1))
    assert update.stable_rank == pytest.approx(0.21 / 0.16)
    assert (update.energy_rank_90, update.energy_rank_95, update.energy_rank_99) == (2, 2, 3)
    share = np.array([4, 2, 1]) / 7
    assert update.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    before, after = (np.linalg.svd(x.numpy(), compute_uv=False) for x in (w, w + low_rank(*shape, [0.4, 0.2, 0.1])))
    assert drift.spectrum == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-9)
    assert (drift.latent_dim, drift.latent_dim_rule) == latent_dimension(before, before, max(shape), "identity")


@pytest.mark.parametrize("shape", SHAPES)
def test_angles_are_those_of_the_singular_vectors(build, shape):
    spectrum = np.r_[[9, 7, 6, 5], np.full(min(shape) - 4, 0.1)]
    w = build(*shape, spectrum)
    t = w + low_rank(*shape, [1.0, 0.7])
    _, drift = measure_change(w, t, PAIR)
    n = drift.latent_dim
    (ub, _, vb), (ut, _, vt) = (torch.linalg.svd(x, full_matrices=False) for x in (w, t))
    left, right = oracle_angles(ub[:, :n], ut[:, :n]), oracle_angles(vb[:n].T, vt[:n].T)
    assert n == 4
    assert drift.left_cos2 == pytest.approx((left**2).mean(), rel=1e-10)
    assert drift.right_cos2 == pytest.approx((right**2).mean(), rel=1e-10)
    assert drift.left_angle == pytest.approx(math.degrees(math.acos(left[-1])), rel=1e-6)
    assert drift.right_angle == pytest.approx(math.degrees(math.acos(right[-1])), rel=1e-6)
    assert not drift.degenerate


@pytest.mark.parametrize("degrees", [0.001, 1.0, 30.0, 89.0])
def test_a_rotation_of_one_direction_is_the_angle_it_was_made_with(degrees):
    """W = Σ σᵢ uᵢvᵢᵀ; turning v₁ towards a direction outside the top three moves the right subspace by that angle."""
    u, v = orthonormal(40, 3, 0), orthonormal(30, 4, 1)
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    angle = math.radians(degrees)
    turned = v[:, :3].clone()
    turned[:, 0] = math.cos(angle) * v[:, 0] + math.sin(angle) * v[:, 3]
    bases = [leading_subspaces(w, 3) for w in ((u * s) @ v[:, :3].T, (u * s) @ turned.T)]
    cos2, largest = principal_angles(bases[0][1], bases[1][1])
    assert largest == pytest.approx(degrees, rel=1e-6)
    assert cos2 == pytest.approx((math.cos(angle) ** 2 + 2) / 3, rel=1e-10)
    assert principal_angles(bases[0][0], bases[1][0]) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


def test_transposing_swaps_the_sides_and_scaling_leaves_the_subspaces(build):
    w, t = build(50, 30, seed=1), build(50, 30, seed=2)
    (update, drift), (turned, swapped) = measure_change(w, t, PAIR), measure_change(w.T, t.T, PAIR)
    assert (swapped.left_cos2, swapped.left_angle) == pytest.approx((drift.right_cos2, drift.right_angle))
    assert (swapped.right_cos2, swapped.gap) == pytest.approx((drift.left_cos2, drift.gap))
    np.testing.assert_allclose(turned.singular_values, update.singular_values)
    _, scaled = measure_change(w, 1.5 * w, PAIR)
    assert scaled.spectrum == pytest.approx(0.5)
    assert (scaled.left_cos2, scaled.right_cos2) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_identical_weights_give_exactly_zero(build, dtype):
    w = build(20, 30).to(dtype)
    wide = w.to(torch.float64)
    for other in (w.clone(), wide):  # the same numbers in another format are as identical
        update, drift = measure_change(w, other, PAIR)
        numbers = {name: value for name, value in vars(update).items() if name not in ("base_norm", "singular_values")}
        assert set(numbers.values()) == {0}
        assert not update.singular_values.any()
        assert len(update.singular_values) == 20
        assert drift == UNMOVED
        assert (drift.left_cos2, drift.right_angle) == (1, 0)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, BF16), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("outlier", [1, 30])
def test_rounding_to_another_format_is_no_update(build, dtype, unit, outlier):
    """Also where one row stands far out, as in real models: there the flat rule δ(√O + √I) fails."""
    w = build(200, 300).float()
    w[7] *= outlier
    update, _ = measure_change(w, w.to(dtype), (F32, unit))
    assert (update.rank, update.energy) == (0, 0)
    assert 0 < update.relative < unit
    flat = unit * w.norm().item() / math.sqrt(w.numel()) * (math.sqrt(200) + math.sqrt(300))
    assert (update.spectral_norm > flat) == (outlier > 1)


def test_a_low_rank_update_is_seen_through_the_rounding_of_its_storage(build):
    w = build(200, 300)
    t = w + low_rank(200, 300, [0.3, 0.2, 0.15, 0.1])
    update, _ = measure_change(w.bfloat16(), t.bfloat16(), (BF16, BF16))
    assert update.rank == 4
    assert update.energy == pytest.approx(1, abs=1e-2)
    assert len(update.singular_values) == 200
    assert update.singular_values[4] < update.floor < update.singular_values[3]


def test_for_entries_of_one_size_the_floor_is_that_of_the_numerical_rank():
    w = torch.ones(20, 50) * 3
    floor = rounding_floor(rounding_errors(Side(w, BF16)))
    assert floor == pytest.approx(3 * BF16 * (math.sqrt(20) + math.sqrt(50)))
    both = rounding_floor(rounding_errors(Side(w, BF16)), rounding_errors(Side(w, BF16)))
    assert both == pytest.approx(math.sqrt(2) * floor)
    step = rounding_floor(rounding_errors(Side(w, 0.0, 0.1)))
    assert step == pytest.approx(0.1 * (math.sqrt(20) + math.sqrt(50)))


def test_equal_singular_values_at_the_cut_are_flagged(build):
    clear = build(40, 60, np.r_[[5, 4, 3], np.full(37, 0.1)])
    tie = build(40, 60, np.full(40, 2.0))
    for w, expected in ((clear, False), (tie, True)):
        _, drift = measure_change(w.float(), w.float() + low_rank(40, 60, [0.01]).float(), PAIR)
        assert drift.degenerate is expected
    assert drift.gap < 1e-6


def test_what_has_no_number_is_none(build):
    zero, w = torch.zeros(6, 9), build(6, 9).float()
    update, drift = measure_change(zero, w, PAIR)
    assert update.relative is drift.spectrum is drift.latent_dim is drift.left_cos2 is drift.gap is None
    assert update.rank == 6
    update, drift = measure_change(w, zero, PAIR)
    assert (update.relative, drift.spectrum) == (pytest.approx(1), pytest.approx(1))
    assert drift.latent_dim is not None
    assert drift.left_cos2 is None
    update, drift = measure_change(torch.ones(1, 1), torch.full((1, 1), 3.0), PAIR)
    assert (update.rank, update.relative, drift.spectrum, drift.left_cos2) == (1, 2, 2, 1)


def test_huge_and_tiny_entries_do_not_overflow(build):
    w = build(12, 9)
    plain = measure_change(w, w + low_rank(12, 9, [0.1]), (2.0**-53, 2.0**-53))
    for scale in (1e100, 1e-100):
        update, drift = measure_change(scale * w, scale * (w + low_rank(12, 9, [0.1])), (2.0**-53, 2.0**-53))
        assert update.norm / scale == pytest.approx(plain[0].norm)
        assert (update.rank, update.stable_rank) == (1, pytest.approx(1))
        assert drift.left_cos2 == pytest.approx(plain[1].left_cos2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_raise(build, bad, side):
    pair = [build(5, 4), build(5, 4)]
    pair[side][2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        measure_change(*pair, PAIR)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_gives_the_same_numbers(build, shape):
    w, t = build(*shape), build(*shape) + low_rank(*shape, [0.4, 0.2])
    (update, drift), (there, moved) = measure_change(w, t, PAIR), measure_change(w.cuda(), t.cuda(), PAIR)
    np.testing.assert_allclose(there.singular_values, update.singular_values, atol=1e-12)
    assert vars(moved) == pytest.approx(vars(drift), rel=1e-9)
