"""Energy along subspaces, and standard errors that are the spread from one data set to the next."""

import numpy as np
import pytest
import torch

from lmd_hf.matrix.graph import covariance, knn_graph, scatter
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import dense
from lmd_hf.matrix.sampled import compact, energy_errors, energy_share, leading_axes


I = 6  # noqa: E741 - the field's letter


def layer(rows, seed=9):
    return torch.randn(rows, I, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts(seed, count=60, length=12):
    """Samples in groups that are alike, as the tokens of one text are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 1, I, generator=generator, dtype=torch.float64)
    own = torch.randn(count, length, I, generator=generator, dtype=torch.float64)
    scale = torch.tensor([3.0, 2, 1, 1, 0.5, 0.2], dtype=torch.float64)
    return ((0.7 * common + own) * scale).reshape(-1, I), torch.arange(count).repeat_interleave(length)


def ratio(gram):
    return gram.trace().item() ** 2 / (gram**2).sum().item()


@pytest.mark.parametrize("rows", [4, 6, 15])
def test_compact_keeps_lengths_and_distances(rows):
    w, (x, _) = layer(rows), texts(0)
    small = compact(w)
    assert len(small) == min(rows, I)
    near, far = x[:50] @ small.T, x[:50] @ w.T
    torch.testing.assert_close(near @ near.T, far @ far.T)


@pytest.mark.parametrize("rows", [4, 15])
def test_energy_along_axes_is_one_minus_the_error_of_the_cut(rows):
    w, (x, _) = layer(rows), texts(0)
    m = covariance(x)
    small = compact(w)
    gram = small @ m @ small.T
    full = decompose(w, input_metric=dense(m))
    torch.testing.assert_close(torch.linalg.eigvalsh(gram).flip(0), full.s_K**2, rtol=1e-6, atol=1e-9)
    total = (full.s_K**2).sum().item()
    plain = decompose(w, rank=2).reconstruct()
    lost = ((w - plain) @ m @ (w - plain).T).trace().item()
    assert energy_share(gram, leading_axes(small @ small.T, 2)) == pytest.approx(1 - lost / total, rel=1e-8)
    best = (full.s_K[:2] ** 2).sum().item() / total
    assert energy_share(gram, leading_axes(gram, 2)) == pytest.approx(best, rel=1e-8)
    assert best > 1 - lost / total


@pytest.mark.parametrize("graph", [None, 10])
def test_errors_are_the_spread_from_one_data_set_to_the_next(graph):
    w = layer(4)
    energies, ratios, told = [], [], []
    for seed in range(60):
        x, groups = texts(seed)
        edges = None if graph is None else knn_graph(x, graph)
        y = (x - x.mean(0)) @ w.T
        gram = w @ (covariance(x) if edges is None else scatter(x, edges)) @ w.T
        energies.append(gram.trace().item())
        ratios.append(ratio(gram))
        told.append(energy_errors(y, gram, groups, edges))
    spread = np.std(energies) / np.mean(energies), np.std(ratios)
    for real, errors in zip(spread, zip(*told, strict=True), strict=True):
        assert 0.7 < np.mean(errors) / real < 1.5


def test_likeness_within_groups_is_counted():
    x, groups = texts(0)
    y, gram = x - x.mean(0), covariance(x)
    together, apart = energy_errors(y, gram, groups)[0], energy_errors(y, gram, torch.arange(len(y)))[0]
    assert together > 1.3 * apart


def test_one_group_and_no_energy_have_no_error():
    x, groups = texts(0)
    assert energy_errors(x, covariance(x), torch.zeros_like(groups)) == (None, None)
    assert energy_errors(0 * x, torch.zeros(I, I), groups) == (None, None)
    assert energy_share(torch.zeros(I, I), torch.eye(I)) is None
