"""Semantics: do the latent axes of a trained network separate the classes that it learned?

What is proposed is MNIST. Here: scikit-learn's digits always, MNIST beside them where the Hub can be reached. The first
latent axes are held against as many random ones, the untrained network's, and principal axes of the same activations,
which know nothing of W.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import dots, panels
from lmd_hf.experiments.images import digits, mnist
from lmd_hf.experiments.networks import fit, layer_inputs, linears, perceptron
from lmd_hf.experiments.outcome import Cell, Check, Outcome, Row, averaged, counted, spread
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.matrix.graph import GRAPHS, metric_matrix
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import dense


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "semantics"
KEPT = (1, 2, 4, 8, 16)
JUDGED = (2, 4, 8)  # one axis cannot separate ten classes, and sixteen of any kind do
LATENT = ("weights alone", "complete graph", "knn graph")
RANDOM_DRAWS = 5
SHARE = 0.9  # a claim holds on at least nine of ten seeds
CLASSES = 10
METHOD = (
    "A ReLU network with two hidden layers of 64 learns the classes of scikit-learn's 8 × 8 digits (full-batch Adam, "
    "cross entropy; two thirds for training). Latent coordinates are Idist·Vᵀ of the middle layer times its centred "
    "input, in the metric named; principal axes are those of the covariance of that same input; random axes are "
    f"orthonormal, the mean of {RANDOM_DRAWS} draws. Probe: the held-out accuracy of a logistic regression on the "
    "first so many coordinates, each scaled to variance 1. Separation: the share of a coordinate's variance that lies "
    "between the classes, mean over the first eight, held out."
)


@dataclass(frozen=True)
class Setup:
    """Size of the training set of digits, images of MNIST that are used, and training."""

    training: int = 1200
    mnist: int = 3000
    steps: int = 400


@dataclass(frozen=True)
class Trial:
    """One seed: held-out accuracy of the network, of probes {axes: one for each of KEPT}, and separation {axes: η²}."""

    accuracy: float
    probes: dict[str, tuple[float, ...]]
    separation: dict[str, float]


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train one network a seed on each set and probe its latent axes; the digits alone are judged."""
    trials = each(lambda seed: _trial(*digits(generator(f"{NAME}/data", seed)), seed, setup), seeds, what=NAME)
    tables = {"digits: probe accuracy by axes kept": _rows(trials), "digits": [_accuracy(trials)]}
    method = METHOD
    images = mnist(setup.mnist)
    if images is None:
        method += " MNIST: left out, the Hub could not be reached."
    else:
        more = each(lambda seed: _trial(*_shuffled(*images, seed), seed, setup), seeds, what=f"{NAME}, MNIST")
        tables |= {"MNIST: probe accuracy by axes kept": _rows(more), "MNIST": [_accuracy(more)]}
    return Outcome(NAME, EXPERIMENTS[NAME], method, judge(trials), tuple(seeds), tables, {"probes": _figure(trials)})


def judge(trials: Sequence[Trial]) -> tuple[Check, ...]:
    """The stated rules, applied to the probes' accuracies and the separations."""
    return (
        *(_beats(f"latent, {metric}", "random", trials) for metric in LATENT),
        _separates(trials),
        _beats("latent, complete graph", "latent, untrained", trials, decides=False),
        _beats("latent, complete graph", "principal", trials, decides=False),
    )


def _beats(better: str, worse: str, trials: Sequence[Trial], *, decides: bool = True) -> Check:
    places = [KEPT.index(kept) for kept in JUDGED]
    first, second = ([[t.probes[axes][place] for place in places] for t in trials] for axes in (better, worse))
    ahead = [all(np.greater(a, b)) for a, b in zip(first, second, strict=True)]
    means = [" / ".join(f"{mean:.3f}" for mean in np.mean(side, axis=0)) for side in (first, second)]
    numbers = " and ".join((", ".join(map(str, JUDGED[:-1])), str(JUDGED[-1])))
    return Check(
        f"axes “{better}” probe better than “{worse}” with {numbers} axes alike, on at least {SHARE:.0%} of the seeds",
        f"{means[0]} against {means[1]}; better with each {counted(ahead)}",
        sum(ahead) >= SHARE * len(ahead),
        decides,
    )


def _separates(trials: Sequence[Trial]) -> Check:
    latent, random = ([t.separation[axes] for t in trials] for axes in ("latent, complete graph", "random"))
    ahead = [a > b for a, b in zip(latent, random, strict=True)]
    return Check(
        "a leading latent axis (complete graph) separates the classes more than a random one, on at least "
        f"{SHARE:.0%} of the seeds",
        f"share of variance between classes {spread(latent)} against {spread(random)}; more {counted(ahead)}",
        sum(ahead) >= SHARE * len(ahead),
    )


def _trial(images: Tensor, labels: Tensor, seed: int, setup: Setup) -> Trial:
    cut = min(setup.training, 2 * len(images) // 3)
    x = images.to(torch.float32)
    sizes = (images.shape[1], 64, 64, CLASSES)
    start, model = (perceptron(sizes, generator(f"{NAME}/weights", seed)) for _ in range(2))
    fit(model, x[:cut], labels[:cut], steps=setup.steps, loss=nn.functional.cross_entropy)
    with torch.no_grad():
        accuracy = (model(x[cut:]).argmax(dim=1) == labels[cut:]).to(torch.float64).mean().item()
    hidden, before = layer_inputs(model, x)[1], layer_inputs(start, x)[1]
    axes = {f"latent, {metric}": a for metric, a in zip(LATENT, _latent_axes(model, hidden[:cut]), strict=True)}
    axes["principal"] = torch.linalg.eigh(metric_matrix(hidden[:cut])).eigenvectors.flip(1)
    coordinates = {name: hidden @ columns for name, columns in axes.items()}
    coordinates["latent, untrained"] = before @ _latent_axes(start, before[:cut])[1]
    judged = {name: _judged(c, labels, cut) for name, c in coordinates.items()}
    draws = [_judged(hidden @ q, labels, cut) for q in _random_axes(hidden.shape[1], seed)]
    probes = {name: numbers[0] for name, numbers in judged.items()}
    probes["random"] = tuple(np.mean([draw[0] for draw in draws], axis=0).tolist())
    separation = {name: numbers[1] for name, numbers in judged.items()}
    return Trial(accuracy, probes, separation | {"random": statistics.fmean(draw[1] for draw in draws)})


def _latent_axes(model: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """Columns of (Idist·Vᵀ)ᵀ of the middle layer, for weights alone and for both graphs."""
    weight = linears(model)[1].weight.detach()
    metrics = [None, *(dense(metric_matrix(inputs, graph)) for graph in GRAPHS)]
    return [decompose(weight, input_metric=metric).similarity.T for metric in metrics]


def _random_axes(size: int, seed: int) -> list[Tensor]:
    random = generator(f"{NAME}/random axes", seed)
    shape = (size, max(KEPT))
    return [torch.linalg.qr(torch.randn(shape, generator=random, dtype=torch.float64)).Q for _ in range(RANDOM_DRAWS)]


def _judged(coordinates: Tensor, labels: Tensor, cut: int) -> tuple[tuple[float, ...], float]:
    """(accuracy of the probe for each of KEPT, separation) of coordinates whose first `cut` rows are for training."""
    scale = coordinates[:cut].std(dim=0)
    c = ((coordinates - coordinates[:cut].mean(dim=0)) / torch.where(scale > 0, scale, 1.0)).numpy()
    y = labels.numpy()
    probe = LogisticRegression(max_iter=500)
    accuracies = tuple(float(probe.fit(c[:cut, :k], y[:cut]).score(c[cut:, :k], y[cut:])) for k in KEPT)
    return accuracies, separation(c[cut:, :8], y[cut:])


def separation(coordinates: np.ndarray, labels: np.ndarray) -> float:
    """η²: the variance of the class means (weighted by the size of the classes) over the variance of all, mean over the
    columns that vary; in [0, 1]."""
    total = coordinates.var(axis=0)
    means = np.stack([coordinates[labels == label].mean(axis=0) for label in np.unique(labels)])
    sizes = np.unique(labels, return_counts=True)[1] / len(labels)
    between = (sizes[:, None] * (means - coordinates.mean(axis=0)) ** 2).sum(axis=0)
    return float((between[total > 0] / total[total > 0]).mean())


def _shuffled(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images), generator=generator(f"{NAME}/order", seed))
    return images[order], labels[order]


def _rows(trials: Sequence[Trial]) -> list[Row]:
    rows: list[Row] = []
    for axes in trials[0].probes:
        probes: dict[str, Cell] = {}
        for place, kept in enumerate(KEPT):
            probes |= averaged(f"{kept} kept", [t.probes[axes][place] for t in trials])
        rows.append({"axes": axes, **probes, **averaged("separation", [t.separation[axes] for t in trials])})
    return rows


def _accuracy(trials: Sequence[Trial]) -> Row:
    return averaged("held-out accuracy of the network", [t.accuracy for t in trials])


def _figure(trials: Sequence[Trial]) -> "Figure":
    figure, (probes, separated) = panels(("probe accuracy, digits", "variance between classes"))
    for axes in trials[0].probes:
        dots(probes, axes, {kept: [t.probes[axes][place] for t in trials] for place, kept in enumerate(KEPT)})
    probes.set_xscale("log", base=2)
    probes.set(xlabel="axes kept", ylabel="held-out accuracy")
    probes.legend(fontsize="x-small")
    dots(separated, "", {axes.replace(", ", ",\n"): [t.separation[axes] for t in trials] for axes in trials[0].probes})
    separated.tick_params(axis="x", labelsize="x-small", rotation=60)
    return figure
