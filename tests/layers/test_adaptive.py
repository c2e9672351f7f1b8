"""Training in factors: they stay orthonormal, S' stays the spectrum, and growing changes nothing."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from lmd_hf import LMDLinear, decompose
from lmd_hf.errors import SettingsError
from lmd_hf.layers.adaptive import Orthonormal, adapt, grow, latent_spectrum, orthonormal, plain
from lmd_hf.matrix.metrics import norm


def weight(out, width, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def layer(out=12, width=9, axes=8, rank=4, seed=0):
    return orthonormal(LMDLinear.from_lmd(decompose(weight(out, width, seed), rank=axes)), rank=rank)


def step(layers, target, optimizer):
    x = torch.randn(64, layers[0].in_features)
    y = x
    for each in layers:
        y = each(y)
    optimizer.zero_grad()
    (y - x @ target.T).square().mean().backward()
    optimizer.step()


def off_orthonormal(each):
    eye = torch.eye(each.rank)
    return max((f @ f.mT - eye).abs().max().item() for f in (each.projection.mT, each.similarity))


@pytest.mark.parametrize(("out", "width"), [(20, 6), (6, 20), (8, 8)])
def test_the_parametrisation_is_the_q_of_qr_and_differentiable(out, width):
    x = weight(out, width).double().requires_grad_()
    tall = x.mT if out < width else x
    q, r = torch.linalg.qr(tall)
    expected = q * torch.sign(torch.diagonal(r))
    torch.testing.assert_close(Orthonormal()(x), expected.mT if out < width else expected)
    assert torch.autograd.gradcheck(Orthonormal(), x)


def test_the_truncated_matrix_and_then_training_with_decay_keeps_the_factors_orthonormal():
    each = layer()
    torch.testing.assert_close(
        each.weight, decompose(weight(12, 9), rank=4).reconstruct().float(), rtol=1e-4, atol=1e-5
    )
    optimizer = torch.optim.AdamW(each.parameters(), lr=0.02, weight_decay=0.5)
    torch.manual_seed(0)
    for _ in range(60):
        step([each], weight(12, 9, seed=1), optimizer)
    assert off_orthonormal(each) < 1e-5
    values = torch.linalg.svdvals(each.weight.detach())
    torch.testing.assert_close(values[:4], latent_spectrum(each), rtol=1e-4, atol=1e-5)
    assert values[4] < 1e-5


def test_the_orthogonal_of_torch_loses_its_factors_under_decay_which_is_why_ours_is_another():
    theirs = orthogonal(nn.Linear(4, 12, bias=False), orthogonal_map="householder", use_trivialization=False)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.02, weight_decay=0.5)
    theirs(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert (theirs.weight.mT @ theirs.weight - torch.eye(4)).abs().max() > 0.5


def test_singular_values_learn_as_fast_as_those_of_a_dense_layer():
    """The first step of Adam moves W by η in each of its entries, and S' by as much in Frobenius norm."""
    torch.manual_seed(0)
    each, dense = layer(rank=6), nn.Linear(9, 12, bias=False)
    before = each.s.detach().clone()
    start = dense.weight.detach().clone()
    for model in (each, dense):
        step([model], weight(12, 9, seed=1), torch.optim.Adam(model.parameters(), lr=1e-3))
    moved = (each.s - before).norm().item()
    assert moved == pytest.approx((dense.weight - start).norm().item(), rel=1e-3)


def test_growing_changes_nothing_and_the_new_axes_learn():
    each = layer()
    before = each.weight.detach().clone()
    grow([each], 2)
    torch.testing.assert_close(each.weight, before)
    assert len(latent_spectrum(each)) == 6
    optimizer = torch.optim.Adam(each.parameters(), lr=0.01)
    for _ in range(20):
        step([each], weight(12, 9, seed=1), optimizer)
    assert (latent_spectrum(each) > 1e-3).all()
    grow([each], 100)
    assert len(latent_spectrum(each)) == 8  # no more than there are


def test_a_state_brings_its_own_scale():
    first, other = layer(rank=4), layer(rank=8, seed=1)
    other.load_state_dict(first.state_dict())
    torch.testing.assert_close(other.weight, first.weight)


def test_what_is_cut_is_the_least_and_the_budget_holds():
    layers = [layer(rank=8), layer(out=9, width=12, rank=8, seed=2)]
    with torch.no_grad():
        layers[0].parametrizations.s.original[4:] *= 0.01
    budget = 9 * (12 + 9 + 1)
    weights = [each.weight.detach().clone() for each in layers]
    ranks = adapt(layers, budget)
    assert sum(ranks) == 9
    assert ranks[0] < ranks[1]  # where S' falls off, axes are given away
    for each, w, rank in zip(layers, weights, ranks, strict=True):
        torch.testing.assert_close(each.weight, decompose(w, rank=rank).reconstruct().float(), rtol=1e-3, atol=1e-4)
        assert off_orthonormal(each) < 1e-5
    with pytest.raises(SettingsError, match="43 parameters are too few: one axis in each of 2"):
        adapt(layers, 43)


def test_plain_is_the_same_layer_without_the_spare_axes():
    each = orthonormal(LMDLinear.from_lmd(decompose(weight(12, 9), rank=8), bias=torch.arange(12.0)), rank=5)
    with torch.no_grad():
        each.parametrizations.s.original[1] *= -2
    found = plain(each)
    x = torch.randn(3, 9)
    torch.testing.assert_close(found(x), each(x), rtol=1e-4, atol=1e-5)
    assert found.rank == 5
    assert (found.s[:-1] >= found.s[1:]).all()
    assert (found.s >= 0).all()
    assert {name for name, _ in found.named_parameters()} == {"projection", "s", "similarity", "bias"}


def test_factors_of_another_metric_and_ranks_out_of_range_are_refused():
    other = LMDLinear.from_lmd(decompose(weight(12, 9), input_metric=norm(torch.linspace(0.1, 3, 9)), rank=4))
    with pytest.raises(SettingsError, match="not orthonormal"):
        orthonormal(other)
    with pytest.raises(SettingsError, match="rank is 9; the layer has 1 to 8 axes"):
        layer(rank=9)
