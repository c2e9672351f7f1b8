"""Allocation beside the best of all choices, by trying them."""

from itertools import product

import numpy as np
import pytest

from lmd_hf.errors import SettingsError
from lmd_hf.matrix.allocation import Curve, by_energy, most_axes, within_budget


def curve(shape, seed, slope=None):
    values = np.sort(np.random.default_rng(seed).exponential(size=min(shape)))[::-1] ** 3
    most = most_axes(shape)
    return Curve(shape, values[:most], float(values[most:].sum()), slope)


def cost(each, rank):
    return each.whole if rank is None else rank * each.axis


def loss(each, rank):
    return 0.0 if rank is None else each.losses()[rank]


def best(curves, budget):
    """The least loss of any choice within the budget."""
    choices = [[*range(1, len(each.energies) + 1), None] for each in curves]
    fitting = (c for c in product(*choices) if sum(map(cost, curves, c)) <= budget)
    return min(sum(map(loss, curves, choice)) for choice in fitting)


def test_more_axes_than_these_do_not_pay():
    for shape in [(5, 7), (8, 8), (1, 9), (30, 4), (2, 2), (128, 352)]:
        most = most_axes(shape)
        assert most * (sum(shape) + 1) < shape[0] * shape[1] <= (most + 1) * (sum(shape) + 1)


@pytest.mark.parametrize("slopes", [(None,) * 3, (1.0, 5.0, 0.2)])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_optimal_for_what_it_spends(seed, slopes):
    """On the hull it cannot be beaten with the same parameters, and between two of its steps by less than one."""
    curves = [
        curve(shape, seed + i, slope)
        for i, (shape, slope) in enumerate(zip([(16, 16), (20, 12), (12, 24)], slopes, strict=True))
    ]
    total = sum(each.whole for each in curves)
    largest = max(np.max(-np.diff(each.losses()[1:]), initial=each.losses()[-1]) for each in curves)
    for budget in range(sum(each.axis for each in curves), total, total // 7):
        ranks = within_budget(curves, budget)
        spent, lost = sum(map(cost, curves, ranks)), sum(map(loss, curves, ranks))
        assert spent <= budget
        assert best(curves, budget) <= lost <= best(curves, budget) + largest


def test_the_marginal_loss_is_equal():
    """No layer would gain more from one more axis than another loses by its last one."""
    curves = [curve((200, 100), 1, 1.0), curve((100, 100), 2, 3.0), curve((100, 300), 3, 0.5)]
    ranks = within_budget(curves, sum(each.whole for each in curves) // 3)
    gains = [-np.diff(each.losses()) / each.axis for each in curves]
    kept = [(g, r) for g, r in zip(gains, ranks, strict=True) if r is not None]
    assert len(kept) >= 2
    assert max(g[r] for g, r in kept) <= min(g[r - 1] for g, r in kept)


def test_it_grows_with_the_budget_and_a_costlier_layer_keeps_more():
    curves = [curve((64, 64), 1, 1.0), curve((64, 64), 1, 20.0)]
    cheap, dear = within_budget(curves, 3000)
    assert dear is None or (cheap is not None and cheap < dear)
    losses = [sum(map(loss, curves, within_budget(curves, budget))) for budget in range(300, 8000, 500)]
    assert losses == sorted(losses, reverse=True)


def test_a_rank_deficient_matrix_takes_no_more_than_it_has():
    energies = np.array([4.0, 1.0, 0.0, 0.0])
    assert within_budget([Curve((10, 10), energies, 0.0)], 95) == (2,)
    assert within_budget([Curve((10, 10), np.zeros(4), 0.0)], 95) == (1,)


def test_energy_is_kept_in_every_matrix():
    curves = [curve((40, 30), seed) for seed in range(4)]
    for each, rank in zip(curves, by_energy(curves, 0.8), strict=True):
        left = each.left_out()
        assert rank is None or left[rank] <= 0.2 < left[rank - 1]
    assert by_energy([Curve((4, 4), np.array([1.0]), 3.0)], 0.8) == (None,)
    equal = Curve((40, 40), np.ones(10), 0.0)
    assert [by_energy([equal], tenths / 10)[0] for tenths in range(1, 10)] == list(range(1, 10))


def test_a_budget_below_one_axis_each_says_what_it_takes():
    with pytest.raises(SettingsError, match="100 parameters are too few: one axis in each of 2 matrices takes 130"):
        within_budget([curve((32, 32), 0), curve((32, 32), 1)], 100)
    with pytest.raises(SettingsError, match="energy is 1"):
        by_energy([curve((32, 32), 0)], 1.0)
