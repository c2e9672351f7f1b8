"""High dimension: does S' tell data of few intrinsic dimensions from data of many?

Curved synthetic data with a dial for their dimension, handwritten digits, and patches of natural photographs, which are
said to be data of high dimension. All have 64 columns, and a network learns to give back what it gets.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import spearmanr
from torch import Tensor

from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import dots, doublings, panels
from lmd_hf.experiments.images import PIXELS, digits, patches
from lmd_hf.experiments.networks import fit, layer_inputs, linears, perceptron
from lmd_hf.experiments.outcome import Check, Outcome, Row, averaged, counted, spread
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.matrix.dimension import energy_rank, participation_ratio
from lmd_hf.matrix.graph import GRAPHS, metric_matrix
from lmd_hf.matrix.intrinsic import intrinsic_dimensions
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import dense


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "high-dimension"
DIAL = (1, 2, 4, 8, 16, 32)
LOW = 2  # the synthetic set that real images are held against
FOUND = 8  # up to here the samples suffice to see the dimension
FACTOR = 1.5
CORRELATION = 0.9
SHARE = 0.9  # a claim holds on at least nine of ten seeds
METHOD = (
    "Synthetic: sin(A·z + φ) with 64 outputs, z uniform in a cube of d dimensions, A Gaussian of variance 4/d, φ "
    "uniform. Digits: scikit-learn's, 8 × 8. Photographs: 8 × 8 grey patches of scikit-learn's china.jpg and "
    "flower.jpg. Every set is centred and scaled to variance 1 over all entries; a 64-64-64-64 ReLU network learns to "
    "give it back (full-batch Adam). S' is the middle layer's, in the data metric of either graph; covariance is the "
    "participation ratio of the data's own. TwoNN and maximum likelihood estimate the intrinsic dimension of the same "
    "samples from distances to neighbours."
)


@dataclass(frozen=True)
class Setup:
    """Sizes of every set and of the training."""

    points: int = 1000
    steps: int = 1000


@dataclass(frozen=True)
class Trial:
    """One set and seed: participation ratio of the middle S' by graph, trained and not; its 90 % energy rank; two
    estimates of the intrinsic dimension; the participation ratio of the data's own covariance; the error left."""

    trained: dict[str, float]
    untrained: dict[str, float]
    energy_rank: int | None
    two_nn: float | None
    likelihood: float | None
    covariance: float
    error: float


Trials = dict[str, list[Trial]]  # {set: one a seed}


def curved(dimension: int, points: int, random: torch.Generator) -> Tensor:
    """sin(A·z + φ): samples of a curved manifold of that dimension in 64 columns, float64."""
    z = torch.rand(points, dimension, generator=random, dtype=torch.float64) * 2 - 1
    a = torch.randn(dimension, PIXELS, generator=random, dtype=torch.float64) * 2 / math.sqrt(dimension)
    phase = torch.rand(PIXELS, generator=random, dtype=torch.float64) * 2 * math.pi
    return torch.sin(z @ a + phase)


def _curved(dimension: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda points, random: curved(dimension, points, random)


SETS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    **{f"d = {dimension}": _curved(dimension) for dimension in DIAL},
    "digits": lambda points, random: digits(random)[0][:points],
    "photographs": patches,
}


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train one network for every set and seed; compare S' with the dial and between the sets."""
    cases = [(name, seed) for name in SETS for seed in seeds]
    done = iter(each(lambda case: _trial(*case, setup), cases, what=NAME))
    trials: Trials = {name: [next(done) for _ in seeds] for name in SETS}
    tables = {"by data set": [_row(name, trials[name]) for name in SETS]}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(trials), tuple(seeds), tables, {"dimension": _figure(trials)})


def judge(trials: Trials) -> tuple[Check, ...]:
    """The stated rules, applied to the participation ratios of the middle layer's S'."""
    return tuple(check for graph in GRAPHS for check in _judge_graph(graph, trials))


def _judge_graph(graph: str, trials: Trials) -> tuple[Check, ...]:
    ratios = {name: [t.trained[graph] for t in of_seeds] for name, of_seeds in trials.items()}
    dial = [ratios[f"d = {dimension}"] for dimension in DIAL]
    correlations = _correlations(dial)
    control = _correlations([[t.untrained[graph] for t in trials[f"d = {dimension}"]] for dimension in DIAL])
    rising, flat = [value >= CORRELATION for value in correlations], [value < CORRELATION for value in control]
    low, images = ratios[f"d = {LOW}"], (ratios["digits"], ratios["photographs"])
    above = [min(pair) > bound for bound, *pair in zip(low, *images, strict=True)]
    means = {d: statistics.fmean(values) for d, values in zip(DIAL, dial, strict=True) if d <= FOUND}
    needed = f"on at least {SHARE:.0%} of the seeds"
    return (
        Check(
            f"{graph} graph: S' follows the dial, rank correlation at least {CORRELATION} {needed}",
            f"{spread(correlations)}, that much {counted(rising)}",
            sum(rising) >= SHARE * len(rising),
        ),
        Check(
            f"{graph} graph, control: the same layer untrained does not follow it that closely {needed}",
            f"{spread(control)}, less {counted(flat)}",
            sum(flat) >= SHARE * len(flat),
            decides=False,
        ),
        Check(
            f"{graph} graph: S' is the dial, its mean participation ratio within a factor {FACTOR} of each d ≤ {FOUND}",
            ", ".join(f"{mean:.1f} for {d}" for d, mean in means.items()),
            all(1 / FACTOR <= mean / d <= FACTOR for d, mean in means.items()),
        ),
        Check(
            f"{graph} graph: digits and photographs both lie above the synthetic set with d = {LOW} {needed}",
            f"{spread(images[0])} and {spread(images[1])} against {spread(low)}; both above {counted(above)}",
            sum(above) >= SHARE * len(above),
        ),
    )


def _correlations(dial: Sequence[Sequence[float]]) -> list[float]:
    return [float(spearmanr(DIAL, values).statistic) for values in zip(*dial, strict=True)]


def _trial(name: str, seed: int, setup: Setup) -> Trial:
    x = SETS[name](setup.points, generator(f"{NAME}/{name}", seed))
    x = x - x.mean(dim=0)
    x = x / x.std()
    two_nn, likelihood = intrinsic_dimensions(x)
    model = perceptron((PIXELS,) * 4, generator(f"{NAME}/weights", seed))
    rows = x.to(torch.float32)
    untrained, _ = _middle(model, rows)
    error = fit(model, rows, rows, steps=setup.steps)
    trained, rank = _middle(model, rows)
    energies = torch.linalg.eigvalsh(metric_matrix(x)).clamp_min(0)
    return Trial(
        trained,
        untrained,
        rank,
        two_nn and two_nn.value,
        likelihood and likelihood.value,
        participation_ratio(energies.sqrt().numpy()) or 0.0,
        error,
    )


def _middle(model: torch.nn.Sequential, x: Tensor) -> tuple[dict[str, float], int | None]:
    """({graph: participation ratio of the middle layer's S'}, its 90 % energy rank in the complete graph's metric)."""
    inputs, weight = layer_inputs(model, x)[1], linears(model)[1].weight.detach()
    spectra = {g: decompose(weight, input_metric=dense(metric_matrix(inputs, g))).s_K.numpy() for g in GRAPHS}
    return {g: participation_ratio(s) or 0.0 for g, s in spectra.items()}, energy_rank(spectra["complete"], 0.9)


def _row(name: str, trials: Sequence[Trial]) -> Row:
    return {
        "data": name,
        **averaged("TwoNN", [t.two_nn for t in trials if t.two_nn is not None]),
        **averaged("likelihood", [t.likelihood for t in trials if t.likelihood is not None]),
        **averaged("covariance", [t.covariance for t in trials]),
        **{k: v for graph in GRAPHS for k, v in averaged(f"S', {graph}", [t.trained[graph] for t in trials]).items()},
        **{f"S', {graph}, untrained": averaged("", [t.untrained[graph] for t in trials])[""] for graph in GRAPHS},
        **averaged("n' (90 % energy)", [t.energy_rank for t in trials if t.energy_rank is not None]),
        **averaged("error", [t.error for t in trials]),
    }


def _figure(trials: Trials) -> "Figure":
    figure, axes = panels([f"middle S', {graph} graph" for graph in GRAPHS])
    for ax, graph in zip(axes, GRAPHS, strict=True):
        dots(ax, "untrained", {name: [t.untrained[graph] for t in trials[name]] for name in SETS})
        dots(ax, "trained", {name: [t.trained[graph] for t in trials[name]] for name in SETS})
        ax.plot([f"d = {d}" for d in DIAL], DIAL, "--", color="0.5", linewidth=0.8, label="d")
        doublings(ax)
        ax.tick_params(axis="x", labelsize="small", rotation=60)
    axes[0].set_ylabel("participation ratio")
    axes[0].legend(fontsize="small")
    return figure
