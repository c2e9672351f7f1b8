"""Swiss roll: does S' find the intrinsic dimension, 2, of data that lies rolled up in 20 dimensions?

The paper proposes the experiment without numbers; setup and expectation are this project's. Data (3-D) and output (2-D)
bound the outer layers, so the evidence is the middle one, with itself untrained as the control.
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
METHOD = (
    "Points of scikit-learn's Swiss roll, standardised in its three coordinates and turned into a space of more "
    "dimensions by a random isometry; a ReLU network with two hidden layers learns the standardised angle and height "
    "(full-batch Adam, rate 1e-3, L2 penalty 1e-4). S' of each weight matrix W is that of W·M^½, M the identity "
    "(weights alone), the covariance of the layer's input (complete graph) or its scatter over the edges of the graph "
    "of 10 nearest neighbours (knn). Its participation ratio is (Σs²)²/Σs⁴."
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
    """One seed: ratios before and after training, and the mean squared error after."""

    untrained: Ratios
    trained: Ratios
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
        ),
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
    random = generator(f"{NAME}/data", seed)
    points, own = sample("swiss roll", setup.points, random)
    x, y = (t.to(torch.float32) for t in (embed(standardised(points), setup.dimension, random), standardised(own)))
    model = perceptron((setup.dimension, setup.width, setup.width, 2), generator(f"{NAME}/weights", seed))
    untrained = ratios(model, x)
    error = fit(model, x, y, steps=setup.steps)
    return Trial(untrained, ratios(model, x), error)


def _sides(trial: Trial) -> tuple[Ratios, Ratios]:
    return trial.trained, trial.untrained


def _is_two(ratio: float) -> bool:
    return abs(ratio - INTRINSIC) <= TOLERANCE


def _distance(ratios: Ratios, metric: str) -> float:
    return abs(ratios["middle", metric] - INTRINSIC)


def _middle(trial: Trial) -> Row:
    numbers = {f"{metric}": trial.trained["middle", metric] for metric in METRICS}
    numbers |= {f"{metric}, untrained": trial.untrained["middle", metric] for metric in METRICS}
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
