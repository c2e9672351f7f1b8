"""LMDLinear: W' without forming it, the factors back, and what a new one is like."""

import math

import pytest
import torch
from torch import nn

from lmd_hf import LMDLinear, decompose
from lmd_hf.errors import SettingsError
from lmd_hf.matrix.metrics import dense, norm


OUT, IN, RANK = 12, 9, 5


@pytest.fixture
def w():
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def metrics(size):
    draw = torch.Generator().manual_seed(1)
    root = torch.randn(size, 3 * size, generator=draw, dtype=torch.float64)
    return {"identity": None, "norm": norm(0.5 + torch.rand(size, generator=draw)), "data": dense(root @ root.T)}


@pytest.mark.parametrize("bias", [False, True])
def test_the_forward_pass_is_that_of_the_multiplied_matrix(w, bias):
    b = torch.arange(OUT, dtype=torch.float64) if bias else None
    layer = LMDLinear.from_lmd(decompose(w, rank=RANK), bias=b, dtype=torch.float64)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    expected = x @ decompose(w, rank=RANK).reconstruct().T + (b if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight, decompose(w, rank=RANK).reconstruct())
    assert sum(p.numel() for p in layer.parameters()) == RANK * (OUT + IN + 1) + bias * OUT


@pytest.mark.parametrize("inputs", ["identity", "norm", "data"])
@pytest.mark.parametrize("outputs", ["identity", "data"])
def test_the_five_factors_come_back_in_the_metrics_that_it_was_cut_in(w, inputs, outputs):
    m_x, m_y = metrics(IN)[inputs], metrics(OUT)[outputs]
    lmd = decompose(w, input_metric=m_x, output_metric=m_y, rank=RANK)
    found = LMDLinear.from_lmd(lmd, dtype=torch.float64).factors(input_metric=m_x, output_metric=m_y)
    for name in ("u", "odist", "s_K", "idist", "v"):
        torch.testing.assert_close(getattr(found, name), getattr(lmd, name), rtol=1e-7, atol=1e-9)


def test_a_new_layer_has_the_size_that_nn_linear_has_and_orthonormal_factors():
    torch.manual_seed(0)
    layer = LMDLinear(64, 48, 20)
    eye = torch.eye(20)
    torch.testing.assert_close(layer.projection.T @ layer.projection, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.similarity @ layer.similarity.T, eye, rtol=0, atol=1e-5)
    mean = torch.stack([nn.Linear(64, 48).weight.norm() for _ in range(20)]).mean()
    assert layer.weight.norm().item() == pytest.approx(math.sqrt(48 / 3), rel=1e-5)
    assert layer.weight.norm().item() == pytest.approx(mean.item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_new_layer_in_half_precision_is_the_same_rounded(dtype):
    torch.manual_seed(0)
    wide = LMDLinear(IN, OUT, RANK)
    torch.manual_seed(0)
    narrow = LMDLinear(IN, OUT, RANK, dtype=dtype)
    for name in ("projection", "s", "similarity"):
        assert torch.equal(getattr(narrow, name), getattr(wide, name).to(dtype))


@pytest.mark.parametrize("rank", [0, -1, 10])
def test_a_rank_out_of_range_says_the_range(rank):
    with pytest.raises(SettingsError, match=f"rank is {rank}; a layer of 12 × 9 has 1 to 9 axes"):
        LMDLinear(IN, OUT, rank)
