"""Many small matrices at once give what one by one gives."""

import numpy as np
import pytest
import torch

from lmd_hf.matrix import batched
from lmd_hf.matrix.batched import cores_each, exact_each, triangles_each
from lmd_hf.matrix.hopfield import core_of, ov_circuit, qk_circuit, read_core
from lmd_hf.matrix.kernels import exact


@pytest.mark.parametrize(("rows", "columns"), [(40, 90), (90, 40), (24, 24), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_batch_is_its_matrices(build, rows, columns, dtype):
    matrices = [build(rows, columns, seed=seed).to(dtype) for seed in range(5)]
    for w, found in zip(matrices, exact_each(matrices), strict=True):
        reference = np.linalg.svd(w.double().numpy(), compute_uv=False)
        trusted = reference > 1e-6 * reference[0]
        assert (np.abs(found.values.numpy() / reference - 1)[trusted]).max() <= max(found.error_bound, 1e-15)
        torch.testing.assert_close(found.values, exact(w).values, rtol=1e-10, atol=1e-12)
        assert (found.method, found.values.device.type) == (exact(w).method, "cpu")


def test_small_values_of_one_are_refined_and_its_neighbours_are_left_alone(build):
    steep = torch.cat([torch.ones(59), torch.tensor([1e-9])])
    found = exact_each([build(90, 60), build(90, 60, steep), build(90, 60, seed=1)])
    assert found[0].method == found[2].method == "gram"
    assert found[1].method == exact(build(90, 60, steep)).method != "gram"
    assert found[1].values[-1].item() == pytest.approx(1e-9, rel=1e-3)


def test_what_is_no_number_is_an_error_of_its_own(build):
    broken = build(20, 30)
    broken[3, 4] = torch.inf
    found = exact_each([build(20, 30), broken, torch.zeros(20, 30, dtype=torch.float64)])
    assert found[0].method == "gram"
    assert isinstance(found[1], ValueError)
    assert "NaN or infinity" in str(found[1])
    assert found[2].values.tolist() == [0] * 20


def test_each_has_its_own_scale_and_long_sides_are_taken_in_chunks(build, monkeypatch):
    monkeypatch.setattr(batched, "CHUNK_ENTRIES", 40)
    w = build(500, 20, torch.linspace(1, 0.2, 20))
    scales = (1e-200, 1.0, 1e200)
    for scale, found in zip(scales, exact_each([w * scale for scale in scales]), strict=True):
        torch.testing.assert_close(found.values / scale, torch.linspace(1, 0.2, 20).double(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("lowest", [1.0, 1e-3, 1e-7, 1e-12, 0.0])
def test_triangles_are_those_of_householder_whatever_the_condition(build, lowest):
    x = torch.stack(
        [build(70, 12, torch.logspace(0, np.log10(lowest), 12) if lowest else torch.zeros(12)), build(70, 12)]
    )
    for r, each in zip(triangles_each(x), x, strict=True):
        expected = torch.linalg.qr(each, mode="r").R
        torch.testing.assert_close(r.T @ r, expected.T @ expected, rtol=0, atol=1e-15 * 70)
        reference = torch.linalg.svdvals(each)
        assert (torch.linalg.svdvals(r) - reference).abs().max() <= 1e-14 * max(reference[0].item(), 1e-300)
        assert r.tril(-1).abs().max() == 0


def test_triangles_of_wide_ones_and_of_great_numbers(build):
    wide = torch.stack([build(5, 8), build(5, 8, seed=1)])
    assert triangles_each(wide).shape == (2, 5, 8)
    great = build(30, 4)[None] * 1e200  # whose squares are no numbers
    torch.testing.assert_close(
        torch.linalg.svdvals(triangles_each(great)), torch.linalg.svdvals(great), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cores_of_many_are_cores_of_each(build, dtype):
    pairs = [(build(8, 60, seed=i).to(dtype), build(8, 60, seed=90 + i).to(dtype)) for i in range(4)]
    for products in ([qk_circuit(q, k, 0.3) for q, k in pairs], [ov_circuit(k.T, q) for q, k in pairs]):
        for product, core in zip(products, cores_each(products, one_stream=True), strict=True):
            found, expected = read_core(core), read_core(core_of(product, one_stream=True))
            torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-15)
            assert found.symmetric_energy == pytest.approx(expected.symmetric_energy, rel=1e-12)
            assert found.eigenvalue_score == pytest.approx(expected.eigenvalue_score, abs=1e-9)
            assert found.error_bound == pytest.approx(expected.error_bound, rel=1e-6)
        between = cores_each(products, one_stream=False)[0]
        assert between.inner is None
        assert read_core(between).symmetric_energy is None


def test_a_head_of_no_numbers_leaves_the_others_alone(build):
    pairs = [(build(8, 60, seed=i), build(8, 60, seed=90 + i)) for i in range(3)]
    pairs[1][0][2, 3] = torch.nan
    found = cores_each([qk_circuit(q, k, 0.3) for q, k in pairs], one_stream=True)
    assert isinstance(found[1], ValueError)
    assert "NaN or infinity" in str(found[1])
    whole = read_core(core_of(qk_circuit(*pairs[2], 0.3), one_stream=True))
    torch.testing.assert_close(read_core(found[2]).values, whole.values, rtol=1e-12, atol=1e-15)
