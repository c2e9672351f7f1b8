"""Many small matrices at once give what one by one gives."""

import numpy as np
import pytest
import torch

from lmd_hf.matrix import batched
from lmd_hf.matrix.batched import exact_each
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
