"""Capacity and expressivity: the ratio of the two at the lowest held-out error, by manifold (the open question 1).

The paper calls the two complementary and asks for the best relation by kind of manifold. An answer would be a ratio
that repeats over seeds, between the extremes; the quantities and rules are this project's.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import spearmanr
from torch import Tensor

from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import panels
from lmd_hf.experiments.manifolds import MANIFOLDS, embed, sample, standardised
from lmd_hf.experiments.networks import ACTIVATIONS, fit, linears, perceptron
from lmd_hf.experiments.outcome import Check, Outcome, Row, averaged, counted, spread
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.matrix.activation import energy_degree
from lmd_hf.matrix.capacity import capacity_log10
from lmd_hf.matrix.dimension import expressivity, participation_ratio


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "capacity-expressivity"
NAMES = ("ReLU", "GELU", "tanh", "x²")
DIMENSION = 10
SHARE = 0.9  # a claim holds on at least nine of ten seeds
REPEATS = 0.5  # the best ratios of the seeds spread at most so much of what all ratios spread
METHOD = (
    "Points of a plane, a sphere, a torus and the Swiss roll, standardised and turned into 10 dimensions; networks "
    "with two hidden layers of 16, 48 or 128 and ReLU, GELU, tanh or x² (Adam, rate 1e-3, L2 penalty 1e-4) learn "
    "the sines of twice both own coordinates, each scaled to −π…π. Of the middle weight matrix: capacity, log₁₀ K "
    "with d the participation ratio of its singular values and a the activation's energy degree (2; x²: 3), and "
    "expressivity, the entropy of their squares over ln k. For each manifold and seed the ratio of the two at the "
    "lowest mean squared error on as many fresh points."
)


@dataclass(frozen=True)
class Setup:
    """Training points (and as many held out), widths of the hidden layers, steps of training."""

    points: int = 400
    widths: tuple[int, ...] = (16, 48, 128)
    steps: int = 500


@dataclass(frozen=True)
class Trial:
    """One network: capacity and expressivity of its middle matrix, and its held-out error."""

    capacity: float
    expressivity: float
    error: float

    @property
    def ratio(self) -> float:
        """log₁₀ K over expressivity."""
        return self.capacity / self.expressivity


Networks = dict[tuple[str, int], Trial]  # one seed on one manifold: by activation and width


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train a network for each manifold, activation, width and seed, and look where the error is lowest."""
    cases = [(name, seed) for name in MANIFOLDS for seed in seeds]
    found = each(lambda case: _networks(*case, setup), cases, what=NAME)
    trials = {name: found[i * len(seeds) : (i + 1) * len(seeds)] for i, name in enumerate(MANIFOLDS)}
    tables: dict[str, Sequence[Row]] = {
        "at the lowest error": [_best_row(name, group) for name, group in trials.items()],
        "by network": [_row(name, key, group) for name, group in trials.items() for key in group[0]],
    }
    figures = {"plane": _figure(trials)}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(trials), tuple(seeds), tables, figures)


def judge(trials: Mapping[str, Sequence[Networks]]) -> tuple[Check, ...]:
    """The stated rules, applied to the ratios and errors."""
    checks = []
    for name, group in trials.items():
        best = [_best(networks)[1].ratio for networks in group]
        every = [t.ratio for networks in group for t in networks.values()]
        inside = [_is_inside(networks) for networks in group]
        narrow = statistics.stdev(best) / statistics.stdev(every) if len(best) > 1 else math.inf
        width = f"{narrow:.2f} of all" if len(best) > 1 else "of one seed"
        checks.append(
            Check(
                f"{name}: the ratio at the lowest error repeats (its deviation over seeds at most {REPEATS} of all "
                f"networks') and lies between the extremes on at least {SHARE:.0%} of the seeds",
                f"{spread(best)}, {width}; between {counted(inside)}",
                narrow <= REPEATS and sum(inside) >= SHARE * len(group),
            )
        )
    means = [statistics.fmean(_best(networks)[1].ratio for networks in group) for group in trials.values()]
    within = [_deviation([_best(networks)[1].ratio for networks in group]) for group in trials.values()]
    complementary = [_correlation(group) < 0 for group in zip(*trials.values(), strict=True)]
    return (
        *checks,
        Check(
            "the best ratio depends on the manifold: its means differ more between manifolds than seeds do on one",
            f"deviation between manifolds {_deviation(means):.2f}, over seeds {statistics.fmean(within):.2f}",
            _deviation(means) > statistics.fmean(within),
        ),
        Check(
            "capacity and expressivity are complementary, one falls as the other rises: rank correlation over the "
            f"networks of one seed below 0 on at least {SHARE:.0%} of the seeds",
            f"correlation {spread([_correlation(group) for group in zip(*trials.values(), strict=True)])}, below 0 "
            f"{counted(complementary)}",
            sum(complementary) >= SHARE * len(complementary),
        ),
    )


def _best(networks: Networks) -> tuple[tuple[str, int], Trial]:
    return min(networks.items(), key=lambda item: item[1].error)


def _is_inside(networks: Networks) -> bool:
    """Whether the network of lowest error has neither the least nor the largest ratio."""
    ratios = [trial.ratio for trial in networks.values()]
    return min(ratios) < _best(networks)[1].ratio < max(ratios)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _correlation(manifolds: Sequence[Networks]) -> float:
    """Rank correlation of capacity and expressivity over the networks of one seed on all manifolds."""
    trials = [trial for networks in manifolds for trial in networks.values()]
    return float(spearmanr([t.capacity for t in trials], [t.expressivity for t in trials]).statistic)


def _networks(name: str, seed: int, setup: Setup) -> Networks:
    random = generator(f"{NAME}/{name}", seed)
    points, own = sample(name, 2 * setup.points, random)
    x, y = (t.to(torch.float32) for t in (embed(standardised(points), DIMENSION, random), _targets(own)))
    half = setup.points
    found = {}
    for activation in NAMES:
        for width in setup.widths:
            weights = generator(f"{NAME}/{activation}/{width}", seed)
            model = perceptron((DIMENSION, width, width, 2), weights, activation=activation)
            fit(model, x[:half], y[:half], steps=setup.steps)
            with torch.no_grad():
                error = float(((model(x[half:]) - y[half:]) ** 2).mean())
            found[activation, width] = _measured(linears(model)[1].weight.detach(), activation, error)
    return found


def _targets(own_N2: Tensor) -> Tensor:
    """sin 2θ of both coordinates, each scaled to −π…π, which leaves angles as they are."""
    low, high = own_N2.min(0).values, own_N2.max(0).values
    return torch.sin(2 * (2 * math.pi * (own_N2 - low) / (high - low) - math.pi))


def _measured(weight: Tensor, activation: str, error: float) -> Trial:
    sigma = torch.linalg.svdvals(weight.double()).numpy()
    capacity = capacity_log10(participation_ratio(sigma), energy_degree(ACTIVATIONS[activation]()))
    spread_of_energy = expressivity(sigma)
    assert capacity is not None  # these widths keep more than three dimensions
    assert spread_of_energy
    return Trial(capacity, spread_of_energy, error)


def _best_row(name: str, group: Sequence[Networks]) -> Row:
    best = [_best(networks) for networks in group]
    keys = [f"{activation} {width}" for (activation, width), _ in best]
    return {
        "manifold": name,
        **averaged("ratio", [trial.ratio for _, trial in best]),
        **averaged("capacity, log₁₀ K", [trial.capacity for _, trial in best]),
        **averaged("expressivity", [trial.expressivity for _, trial in best]),
        **averaged("held-out error", [trial.error for _, trial in best]),
        "network (seeds)": ", ".join(f"{key} ({keys.count(key)})" for key in dict.fromkeys(sorted(keys))),
    }


def _row(name: str, key: tuple[str, int], group: Sequence[Networks]) -> Row:
    trials = [networks[key] for networks in group]
    return {
        "manifold": name,
        "activation": key[0],
        "width": key[1],
        **averaged("ratio", [t.ratio for t in trials]),
        **averaged("capacity, log₁₀ K", [t.capacity for t in trials]),
        **averaged("expressivity", [t.expressivity for t in trials]),
        **averaged("held-out error", [t.error for t in trials]),
    }


def _figure(trials: Mapping[str, Sequence[Networks]]) -> "Figure":
    figure, axes = panels(tuple(trials))
    for ax, group in zip(axes, trials.values(), strict=True):
        for activation, marker in zip(NAMES, "os^D", strict=True):
            chosen = [t for networks in group for (name, _), t in networks.items() if name == activation]
            ax.plot(
                [t.ratio for t in chosen], [t.error for t in chosen], marker, markersize=3, alpha=0.6, label=activation
            )
        for networks in group:
            _, best = _best(networks)
            ax.plot(best.ratio, best.error, "o", markersize=7, markerfacecolor="none", color="black", linewidth=0.5)
        ax.set(yscale="log", xlabel="capacity / expressivity")
    axes[0].set_ylabel("held-out error")
    axes[0].legend(fontsize="x-small", title="ring: lowest of a seed", title_fontsize="x-small")
    return figure
