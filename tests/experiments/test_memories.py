"""The capacity experiment against brute force and closed forms, its rules, and those of its three neighbours."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lmd_hf.evidence import EncodingMargin
from lmd_hf.experiments import capacity, capacity_expressivity, convergence, encoding_margin


def verdicts(checks):
    return [check.agrees for check in checks]


@pytest.mark.parametrize("degree", [2, 3, 4, 5])
def test_the_update_is_that_of_krotov_and_hopfield(degree):
    """Every bit against F(1·ξ + o) − F(−1·ξ + o) summed over the patterns, in integers."""
    patterns = torch.randint(2, (40, 13), generator=torch.Generator().manual_seed(degree)) * 2 - 1
    found = capacity.update_errors(patterns.to(torch.int8), degree, 7)
    for state, wrong in zip(patterns[:7], found, strict=True):
        others = (patterns @ state)[:, None] - patterns * state
        field = ((patterns + others) ** degree - (others - patterns) ** degree).sum(0) * state
        expected = (field < 0).double() + (field == 0).double() / 2
        assert wrong.tolist() == expected.tolist()


def test_one_pattern_is_always_recalled_and_too_many_are_not():
    patterns = (torch.randint(2, (400, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1).to(torch.int8)
    assert capacity.update_errors(patterns[:1], 3, 1).sum() == 0
    assert capacity.update_errors(patterns, 2, 64).mean() > 0.2
    assert capacity.update_errors(patterns, 4, 64).mean() == 0


@pytest.mark.parametrize("target", [0.01, 0.5])
def test_the_crossing_of_a_known_rate(target):
    """A rate Φ(ln(K/1000)/2 − 1), whose probit is a line in ln K."""
    found = capacity.crossing(lambda count: norm.cdf(math.log(count / 1000) / 2 - 1), target, 16)
    assert found == pytest.approx(math.log(1000) + 2 * (norm.ppf(target) + 1), abs=0.01)


def test_noise_of_a_rate_does_not_bias_the_crossing():
    rng = np.random.default_rng(0)
    truth = math.log(1000) + 2 * (norm.ppf(0.01) + 1)

    def noisy(count):
        return rng.binomial(6000, norm.cdf(math.log(count / 1000) / 2 - 1)) / 6000

    found = [capacity.crossing(noisy, 0.01, 16) for _ in range(400)]
    assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / 20)


def test_what_finite_dimensions_shift_vanishes_with_them():
    shifts = [abs(capacity.expected_slope(3, (d, 2 * d)) - 2) for d in (64, 256, 1024)]
    assert shifts[0] > shifts[1] > shifts[2]
    for degree, dims in capacity.Setup().dimensions:
        assert abs(capacity.expected_slope(degree, dims) - (degree - 1)) < 0.0115


def test_softmax_moves_a_lone_point_nowhere_and_a_crowd_to_its_mean():
    points = torch.nn.functional.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(0))) * 4
    assert not capacity.softmax_failures(points[:1], 1).any()
    assert capacity.softmax_failures(0.05 * points, 50).all()


def memory_trials(shift=0.0, softmax="exponential", noise=0.02):
    """Ten seeds whose exponents are a − 1 + shift under the first criterion, and a − 1.2 under the second."""
    rng, setup = np.random.default_rng(0), capacity.Setup()
    wobble = noise * np.linspace(-1, 1, 10)
    trials = []
    for seed in range(10):
        found = {}
        for degree, dims in setup.dimensions:
            logs = np.log(dims)
            found[degree, capacity.FEW] = tuple((degree - 1 + shift + wobble[seed]) * logs)
            found[degree, capacity.NONE] = tuple((degree - 1.2 + wobble[seed]) * logs)
        d = np.array(setup.softmax) if softmax == "exponential" else 5 * np.log(setup.softmax)
        trials.append(capacity.Trial(found, tuple(0.6 * d + 0.001 * rng.normal(size=len(d)))))
    return trials


def test_capacity_follows_its_rules():
    assert verdicts(capacity.judge(memory_trials())) == [True] * 5
    assert verdicts(capacity.judge(memory_trials(shift=0.05))) == [False, False, False, True, True]
    assert verdicts(capacity.judge(memory_trials(shift=0.05, noise=0.2)))[:3] == [True] * 3
    assert verdicts(capacity.judge(memory_trials(softmax="power")))[-1] is False


def training_trial(early="unstable", long="stable", untrained="unstable"):
    kinds = ("loss curve", "from nine tenths", "from half", "together")
    runs = {}
    for length, verdict in ((convergence.EARLY, early), (convergence.LONG, long)):
        for rate in convergence.RATES:
            runs[length, rate] = convergence.Run(
                (1.0,), 1.0, {}, {**dict.fromkeys(kinds, verdict), "weights": "unknown"}
            )
    return convergence.Trial(runs, untrained)


def test_convergence_follows_its_rules():
    assert verdicts(convergence.judge([training_trial()] * 10)) == [True] * 18
    assert verdicts(convergence.judge([training_trial(early="stable")] * 10)) == [False, False, True, True] * 4 + [
        True, True,
    ]  # fmt: skip
    assert verdicts(convergence.judge([training_trial(long="unstable")] * 10)) == [True, True, False, False] * 4 + [
        True, True,
    ]  # fmt: skip
    assert verdicts(convergence.judge([training_trial(untrained="unknown")] * 10))[-2:] == [False, True]
    mixed = [training_trial()] * 9 + [training_trial(early="stable")]
    assert verdicts(convergence.judge(mixed)) == [True] * 18  # nine of ten are enough


def networks(best, lowest="GELU"):
    """Twelve networks of which one has the lowest error, with this ratio, between the extremes."""
    found = {}
    for place, key in enumerate((name, width) for name in capacity_expressivity.NAMES for width in (16, 48, 128)):
        found[key] = capacity_expressivity.Trial(1.0 + place, 1.0 + 0.01 * place, 1.0)
    found[lowest, 48] = capacity_expressivity.Trial(best, 1.0, 0.1)
    return found


def test_capacity_and_expressivity_follow_their_rules():
    manifolds = ("plane", "sphere", "torus", "swiss roll")
    near = {name: [networks(3.0 + i + 0.01 * seed) for seed in range(10)] for i, name in enumerate(manifolds)}
    assert verdicts(capacity_expressivity.judge(near)) == [True] * 5 + [False]  # both rise together
    wide = {name: [networks(1.5 + seed) for seed in range(10)] for name in manifolds}
    assert verdicts(capacity_expressivity.judge(wide)) == [False] * 6
    outside = {name: [networks(100.0 + 0.01 * seed) for seed in range(10)] for name in manifolds}
    assert verdicts(capacity_expressivity.judge(outside))[:4] == [False] * 4


def margin(upper=2.0, observed=1.0, radius=0.1):
    return EncodingMargin(10, 10, 0.1, radius, 0.3, 5.0, "", 1.0, 1.0, upper, 1.5, observed)


def margin_trials(first=0.2, **values):
    """Networks whose δ and ε are smaller with more points, and digits."""
    last = encoding_margin.Trial(margin(**values), 1.0)
    few = replace(last, margin=replace(last.margin, covering_radius=first, margin_upper=3.0))
    trials = {("swiss roll", a, n): [t] * 10 for a in ("ReLU", "GELU") for n, t in ((1, few), (2, last))}
    return trials | {("digits", "ReLU", 3): [last] * 10}


def test_encoding_margin_follows_its_rules():
    assert verdicts(encoding_margin.judge(margin_trials())) == [True] * 5
    assert verdicts(encoding_margin.judge(margin_trials(first=0.05))) == [True] * 3 + [False] * 2
    assert verdicts(encoding_margin.judge(margin_trials(observed=1.7))) == [True, True, False, True, True]
    assert verdicts(encoding_margin.judge(margin_trials(observed=2.5)))[0] is False
    worse = {case: [replace(t, fresh=9.0) for t in group] for case, group in margin_trials().items()}
    assert verdicts(encoding_margin.judge(worse))[1] is False
