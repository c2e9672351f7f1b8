"""Swiss roll: does S' find the intrinsic dimension, 2, of data that lies rolled up in 20 dimensions?

The paper proposes the experiment without numbers; setup and expectation are this project's. Data (3-D) and output (2-D)
bound the outer layers, so the evidence is the middle one. Controls: the same layer untrained, and networks that learn
one number or six, for a ratio of 2 might be the two numbers that the network gives and not the dimensions of its data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import dots, doublings, panels
from lmd_hf.experiments.manifolds import embed, sample, standardised
from lmd_hf.experiments.networks import fit, layer_inputs, linears, perceptron
from lmd_hf.experiments.outcome import Check, Outcome, Row, averaged, counted, spread
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.matrix.dimension import participation_ratio
from lmd_hf.matrix.graph import metric_matrix
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import Metric, dense, identity


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "swiss-roll"
INTRINSIC, TOLERANCE = 2, 0.6  # "found": a participation ratio of S' within 0.6 of 2 …
SHARE = 0.9  # … on at least nine of ten seeds
LEARNED = 2e-4  # mean squared error, of targets with variance 1
LAYERS = ("first", "middle", "last")
METRICS = ("identity", "complete", "knn")
OTHERS = ("one target", "six targets")
METHOD = (
    "Points of scikit-learn's Swiss roll, standardised in its three coordinates and turned into a space of more "
    "dimensions by a random isometry; a ReLU network with two hidden layers learns the standardised angle and height "
    "(full-batch Adam, rate 1e-3, L2 penalty 1e-4). S' of each weight matrix W is that of W·M^½, M the identity "
    "(weights alone), the covariance of the layer's input (complete graph) or its scatter over the edges of the graph "
    "of 10 nearest neighbours (knn). Its participation ratio is (Σs²)²/Σs⁴. For the other targets (the angle a alone; "
    "a, the height h, sin 3a, cos 3h, sin 2(a + h) and cos 2(a − h), standardised) half of the points are used."
)


@dataclass(frozen=True)
class Setup:
    """Sizes of the data, the network and its training."""

    points: int = 2000
    dimension: int = 20
    width: int = 128
    steps: int = 3000


Ratios = dict[tuple[str, str], float]  # {(layer, metric): participation ratio of S'}


@dataclass(frozen=True)
class Trial:
    """One seed: ratios before and after training, after training on other targets, and the mean squared error."""

    untrained: Ratios
    trained: Ratios
    others: dict[str, Ratios]
    error: float


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train one network a seed and compare the participation ratios of S' with the intrinsic dimension."""
    trials = each(lambda seed: _trial(seed, setup), seeds, what=NAME)
    tables: dict[str, Sequence[Row]] = {
        "participation ratio of S' by layer": _by_layer(trials),
        "middle layer by seed": [{"seed": s, **_middle(trial)} for s, trial in zip(seeds, trials, strict=True)],
    }
    figures = {"participation": _figure(trials)}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(trials), tuple(seeds), tables, figures)


def judge(trials: Sequence[Trial]) -> tuple[Check, ...]:
    """The stated rules, applied to the ratios of the middle layer and the errors."""
    needed = f"on at least {SHARE:.0%} of the seeds"
    checks = []
    for metric in ("complete", "knn"):
        after, before = ([r["middle", metric] for r in side] for side in zip(*map(_sides, trials), strict=True))
        found, outside = [_is_two(ratio) for ratio in after], [not _is_two(ratio) for ratio in before]
        checks += [
            Check(
                f"{metric} graph: participation ratio of the middle S' within {TOLERANCE} of {INTRINSIC} {needed}",
                f"{spread(after)}, within {counted(found)}",
                sum(found) >= SHARE * len(trials),
            ),
            Check(
                f"{metric} graph, control: untrained, the same layer is outside that range {needed}",
                f"{spread(before)}, outside {counted(outside)}",
                sum(outside) >= SHARE * len(trials),
            ),
            _whatever_it_learns(metric, trials),
        ]
    nearer = [max(_distance(t.trained, g) for g in METRICS[1:]) < _distance(t.trained, "identity") for t in trials]
    weights = [t.trained["middle", "identity"] for t in trials]
    errors = [t.error for t in trials]
    return (
        *checks,
        Check(
            f"weights alone are farther from {INTRINSIC} in the middle layer than either data metric {needed}",
            f"weights alone {spread(weights)}, farther {counted(nearer)}",
            sum(nearer) >= SHARE * len(trials),
        ),
        Check(
            f"the network learns its data: mean squared error at most {LEARNED:g} on every seed",
            f"at most {max(errors):.1e}",
            max(errors) <= LEARNED,
            decides=False,
        ),
    )


def _whatever_it_learns(metric: str, trials: Sequence[Trial]) -> Check:
    values = {other: [t.others[other]["middle", metric] for t in trials] for other in OTHERS}
    both = [all(map(_is_two, pair)) for pair in zip(*values.values(), strict=True)]
    return Check(
        f"{metric} graph, control: within that range too for {' and for '.join(OTHERS)}, on at least {SHARE:.0%} of "
        "the seeds",
        f"{' and '.join(map(spread, values.values()))}, both within {counted(both)}",
        sum(both) >= SHARE * len(trials),
        decides=False,
    )


def ratios(model: nn.Sequential, x_NI: Tensor) -> Ratios:
    """The participation ratio of S' of every layer in every metric."""
    found = {}
    for name, layer, inputs in zip(LAYERS, linears(model), layer_inputs(model, x_NI), strict=True):
        for metric in METRICS:
            lmd = decompose(layer.weight.detach(), input_metric=_metric(metric, inputs))
            ratio = participation_ratio(lmd.s_K.numpy())
            assert ratio is not None  # no weight matrix here is zero
            found[name, metric] = ratio
    return found


def _metric(name: str, inputs: Tensor) -> Metric:
    return identity() if name == "identity" else dense(metric_matrix(inputs, name))


def _trial(seed: int, setup: Setup) -> Trial:
    points, own = sample("swiss roll", setup.points, generator(f"{NAME}/data", seed))
    x = embed(standardised(points), setup.dimension, generator(f"{NAME}/rotation", seed)).to(torch.float32)
    own = standardised(own)
    untrained = ratios(_new(2, seed, setup), x)
    trained, error = _learn(x, own, seed, setup)
    half = setup.points // 2
    targets = dict(zip(OTHERS, (own[:, :1], _six(own)), strict=True))
    others = {name: _learn(x[:half], target[:half], seed, setup)[0] for name, target in targets.items()}
    return Trial(untrained, trained, others, error)


def _new(outputs: int, seed: int, setup: Setup) -> nn.Sequential:
    return perceptron((setup.dimension, setup.width, setup.width, outputs), generator(f"{NAME}/weights", seed))


def _learn(x: Tensor, y: Tensor, seed: int, setup: Setup) -> tuple[Ratios, float]:
    model = _new(y.shape[1], seed, setup)
    error = fit(model, x, y.to(torch.float32), steps=setup.steps)
    return ratios(model, x), error


def _six(own_N2: Tensor) -> Tensor:
    """Six functions of the two coordinates, of the same variance."""
    a, h = own_N2.T
    waves = (torch.sin(3 * a), torch.cos(3 * h), torch.sin(2 * (a + h)), torch.cos(2 * (a - h)))
    return standardised(torch.stack([a, h, *waves], dim=1))


def _sides(trial: Trial) -> tuple[Ratios, Ratios]:
    return trial.trained, trial.untrained


def _is_two(ratio: float) -> bool:
    return abs(ratio - INTRINSIC) <= TOLERANCE


def _distance(ratios: Ratios, metric: str) -> float:
    return abs(ratios["middle", metric] - INTRINSIC)


def _middle(trial: Trial) -> Row:
    numbers = {f"{metric}": trial.trained["middle", metric] for metric in METRICS}
    numbers |= {f"{metric}, untrained": trial.untrained["middle", metric] for metric in METRICS}
    numbers |= {f"{metric}, {other}": trial.others[other]["middle", metric] for other in OTHERS for metric in METRICS}
    return numbers | {"mean squared error": trial.error}


def _by_layer(trials: Sequence[Trial]) -> list[Row]:
    return [
        {
            "layer": layer,
            "metric": metric,
            **averaged("trained", [t.trained[layer, metric] for t in trials]),
            **averaged("untrained", [t.untrained[layer, metric] for t in trials]),
        }
        for layer in LAYERS
        for metric in METRICS
    ]


def _figure(trials: Sequence[Trial]) -> "Figure":
    figure, axes = panels(METRICS)
    for ax, metric in zip(axes, METRICS, strict=True):
        for label, side in (("untrained", 1), ("trained", 0)):
            dots(ax, label, {layer: [_sides(t)[side][layer, metric] for t in trials] for layer in LAYERS})
        ax.axhline(INTRINSIC, color="0.5", linewidth=0.8, linestyle="--")
        doublings(ax)
        ax.set_xlabel("layer")
    axes[0].set_ylabel("participation ratio of S'")
    axes[0].legend(fontsize="small")
    return figure
