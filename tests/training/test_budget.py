"""How much time measuring takes: on a clock that the test moves."""

from types import SimpleNamespace

import pytest

from lmd_hf.errors import SettingsError
from lmd_hf.training.budget import ENDING_SECONDS, FIRST_RATE, Budget


def work(name, flops):
    return SimpleNamespace(ref=SimpleNamespace(name=name, part=""), flops=flops)


@pytest.fixture
def clock():
    now = SimpleNamespace(time=100.0)
    now.read = lambda: now.time
    return now


def test_room_is_what_was_earned_less_what_was_spent(clock):
    budget = Budget(0.02, clock.read)
    clock.time += 1000
    assert budget.room() == pytest.approx(20 - ENDING_SECONDS)
    with budget.spending():
        clock.time += 5
    assert budget.trained == pytest.approx(1000)
    assert budget.room() == pytest.approx(15 - ENDING_SECONDS)
    assert budget.used == pytest.approx(0.005)
    assert Budget(None, clock.read).room() == float("inf")


def test_a_short_training_has_a_floor(clock):
    budget = Budget(0.02, clock.read)
    assert budget.room() == 0
    assert budget.room(1.0) == 1.0


def test_costs_are_learned(clock):
    budget = Budget(0.02, clock.read)
    small, large = work("a", 1e6), work("b", 1e9)
    assert budget.expected(large) == pytest.approx(1e9 / FIRST_RATE)
    with budget.spending(small):
        clock.time += 9  # imports and caches
    assert budget.expected(small) == pytest.approx(1e6 / FIRST_RATE)
    with budget.spending(small):
        clock.time += 0.1  # ten million operations a second
    assert budget.expected(small) == pytest.approx(0.1)
    assert budget.expected(large) == pytest.approx(100)
    with budget.spending(large):
        clock.time += 2
    assert budget.expected(large) == pytest.approx(2)


@pytest.mark.parametrize("share", [0, -1, float("nan"), float("inf")])
def test_a_share_is_above_zero(share):
    with pytest.raises(SettingsError, match="budget is"):
        Budget(share)
