"""The exact kernel against float64 LAPACK: kernels × shapes × spectra × storage."""

import numpy as np
import pytest
import scipy.linalg
import torch

from lmd_hf.errors import SettingsError
from lmd_hf.matrix import kernels
from lmd_hf.matrix.kernels import FLOOR, KERNELS, exact, get_kernel


SHAPES = [(1, 7), (7, 1), (64, 64), (300, 200), (200, 700), (384, 384), (3000, 120)]
SPECTRA = {
    "noise": lambda k: None,
    "slow": lambda k: torch.linspace(1, 0.5, k),
    "kappa 1e4": lambda k: torch.logspace(0, -4, k),
    "kappa 1e5": lambda k: torch.logspace(0, -5, k),
    "kappa 1e8": lambda k: torch.logspace(0, -8, k),
    "small tail": lambda k: torch.cat([torch.ones(max(k - 3, 0)), torch.tensor([1e-4, 1e-5, 1e-7])])[-k:],
    "repeated": lambda k: torch.tensor([3.0, 2.0]).repeat(k)[:k].sort(descending=True).values,
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_equal_lapack_and_the_bound_holds(build, shape, spectrum):
    for dtype in DTYPES:
        w = build(*shape, SPECTRA[spectrum](min(shape))).to(dtype)
        result = KERNELS["exact"](w)
        reference = scipy.linalg.svd(w.double().numpy(), compute_uv=False)
        trusted = reference > FLOOR * reference[0]
        error = (np.abs(result.values.numpy() - reference) / reference)[trusted].max()
        assert error <= 1e-7
        assert error <= result.error_bound
        assert result.values.dtype == torch.float64
        assert len(result.values) == min(shape)
        assert (result.values.diff() <= 0).all()


def test_each_route_is_taken_where_it_should_be(build):
    few_small = torch.cat([torch.ones(58), torch.tensor([1e-4, 1e-5])])
    assert exact(build(90, 60, torch.linspace(1, 0.1, 60))).method == "gram"
    assert exact(build(190, 60, few_small)).method == exact(build(60, 190, few_small)).method == "gram+ritz"
    assert exact(build(60, 60, few_small)).method == "gram+ritz"
    more_small = torch.cat([torch.ones(55), torch.full((5,), 1e-5)])  # more than the sixteenth that a subspace may have
    assert exact(build(90, 60, more_small)).method == "svd"
    assert exact(build(190, 60, more_small)).method == "gram+ritz"
    assert exact(build(190, 60, torch.logspace(0, -7, 60))).method == "svd"


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_two_stages_find_what_one_does(build, monkeypatch, spectrum):
    monkeypatch.setattr("lmd_hf.matrix.kernels.BAND_FROM", 1)
    for shape in ((301, 301), (200, 700), (3, 9)):
        w = build(*shape, SPECTRA[spectrum](min(shape)))
        reference = scipy.linalg.svd(w.double().numpy(), compute_uv=False)
        result = exact(w)
        trusted = reference > FLOOR * reference[0]
        error = (np.abs(result.values.numpy() - reference) / reference)[trusted].max()
        assert error <= min(1e-7, result.error_bound)


def test_small_values_are_refined_not_guessed(build):
    """Without refinement the Gram matrix would leave nothing of σ = 1e-9·σ₁, which is below its rounding."""
    spectrum = torch.cat([torch.ones(59), torch.tensor([1e-9])])
    smallest = exact(build(90, 60, spectrum)).values[-1].item()
    assert smallest == pytest.approx(1e-9, rel=1e-3)
    gram = build(90, 60, spectrum)
    naive = np.linalg.eigvalsh((gram.T @ gram).numpy())[0]
    assert abs(np.sqrt(abs(naive)) - 1e-9) > 1e-10


def test_transposing_changes_nothing_and_scaling_scales(build):
    w = build(50, 80)
    values = exact(w).values
    torch.testing.assert_close(exact(w.T.contiguous()).values, values, rtol=1e-12, atol=0)
    torch.testing.assert_close(exact(8 * w).values, 8 * values, rtol=1e-12, atol=0)
    rotation = torch.linalg.qr(build(50, 50, seed=1)).Q
    torch.testing.assert_close(exact(rotation @ w).values, values, rtol=1e-11, atol=0)


def test_the_gram_matrix_of_a_gpu_is_that_of_the_cpu(build):
    """A GPU adds whole products up in place; the CPU makes the lower triangle."""
    chunk = build(70, 40)
    whole, lower = torch.ones(40, 40, dtype=torch.float64), torch.ones(40, 40, dtype=torch.float64)
    kernels._add_whole(whole, chunk)
    kernels._add_lower(lower, chunk)
    torch.testing.assert_close(whole.tril(), lower.tril(), rtol=1e-13, atol=1e-13)


def test_long_sides_are_taken_in_chunks(build, monkeypatch):
    w = build(500, 40)
    whole = exact(w).values
    monkeypatch.setattr("lmd_hf.matrix.kernels.CHUNK_ENTRIES", 40 * 7)
    monkeypatch.setattr("lmd_hf.matrix.kernels.CHUNK_ROWS", 7)
    monkeypatch.setattr("lmd_hf.matrix.kernels.GRAM_BLOCK", 16)
    torch.testing.assert_close(exact(w).values, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_extreme_float64_scales_neither_overflow_nor_vanish(build, scale):
    w = build(30, 20, torch.linspace(1, 0.2, 20))
    torch.testing.assert_close(exact(w * scale).values / scale, torch.linspace(1, 0.2, 20).double(), rtol=1e-10, atol=0)


def test_the_zero_matrix_has_zero_values():
    result = exact(torch.zeros(5, 3))
    assert result.values.tolist() == [0, 0, 0]
    assert result.error_bound == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    w = torch.ones(4, 3)
    w[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        exact(w)


def test_empty_matrices_are_refused():
    with pytest.raises(ValueError, match="empty"):
        exact(torch.zeros(0, 3))


def test_an_unknown_kernel_lists_the_known_ones():
    with pytest.raises(SettingsError, match="known: exact, sketch"):
        get_kernel("magic")
