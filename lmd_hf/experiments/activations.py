"""Activations: does the latent dimension grow with the degree of the activation, and the held-out error with it?

The paper: an activation of degree k raises the dimension of all manifolds by a power and needs more data. The exact
part of that is the span of what the first hidden layer hands on: polynomials up to degree k in three coordinates.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import dots, panels
from lmd_hf.experiments.manifolds import embed, sample, standardised
from lmd_hf.experiments.networks import ACTIVATIONS, fit, layer_inputs, linears, perceptron
from lmd_hf.experiments.outcome import Check, Outcome, Row, averaged, counted, spread
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.matrix.activation import effective_degree, energy_degree
from lmd_hf.matrix.dimension import participation_ratio
from lmd_hf.matrix.graph import metric_matrix
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import dense


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "activations"
BY_DEGREE = ("ReLU", "x²", "x³")  # growth exponents 1, 2, 3
POLYNOMIALS = {"x²": 2, "x³": 3}
SHARE = 0.9  # a claim holds on at least nine of ten seeds
SPACE = 3  # coordinates of the Swiss roll
RANK_TOLERANCE = 1e-10  # of the largest eigenvalue of the covariance
METHOD = (
    "The Swiss roll in 20 dimensions (see swiss-roll); a network with two hidden layers learns the standardised angle "
    "and height from few or from many points, with each activation from the same initial weights. Latent dimension: "
    "participation ratio of S' of the middle layer in the data metric (complete graph) or of the weights alone, after "
    "training on many points. Span: the rank of the covariance of what the first hidden layer hands on, in float64."
)


@dataclass(frozen=True)
class Setup:
    """Sizes of the two training sets, of the held-out set, of the network and of its training."""

    few: int = 100
    many: int = 500
    held_out: int = 1000
    width: int = 64
    steps: int = 1500


@dataclass(frozen=True)
class Trial:
    """One seed and activation. `latent` of S' in the data metric, `weights` of S' alone, `span` a rank; mean squared
    errors on held-out points; `spectrum` S'/s₁ in the data metric."""

    latent: float
    weights: float
    span: int
    training_error_few: float
    error_few: float
    error_many: float
    spectrum: tuple[float, ...]


Trials = dict[str, list[Trial]]  # {activation: one a seed}


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train a network for every seed, activation and size of the training set; compare dimensions and errors."""
    cases = [(name, seed) for name in ACTIVATIONS for seed in seeds]
    done = iter(each(lambda case: _trial(*case, setup), cases, what=NAME))
    trials: Trials = {name: [next(done) for _ in seeds] for name in ACTIVATIONS}
    rows = [_row(name, trials[name], setup) for name in ACTIVATIONS]
    figures = {"activations": _figure(trials, setup)}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(trials), tuple(seeds), {"by activation": rows}, figures)


def judge(trials: Trials) -> tuple[Check, ...]:
    """The stated rules, applied to the numbers of ReLU, x² and x³."""
    spans = {name: sorted({t.span for t in trials[name]}) for name in POLYNOMIALS}
    expected = {name: math.comb(SPACE + degree, degree) - 1 for name, degree in POLYNOMIALS.items()}
    return (
        _grows("the latent dimension in the data metric", [[t.latent for t in trials[n]] for n in BY_DEGREE]),
        _grows("the latent dimension of the weights alone", [[t.weights for t in trials[n]] for n in BY_DEGREE]),
        _grows("the held-out error after few points", [[t.error_few for t in trials[n]] for n in BY_DEGREE], ".1e"),
        _grows("the held-out error after many points", [[t.error_many for t in trials[n]] for n in BY_DEGREE], ".1e"),
        Check(
            f"x^k raises what the first hidden layer spans from {SPACE} to C({SPACE} + k, k) − 1 dimensions: "
            f"{', '.join(f'{expected[name]} for {name}' for name in POLYNOMIALS)}, on every seed",
            ", ".join(f"{' or '.join(map(str, spans[name]))} for {name}" for name in POLYNOMIALS),
            all(spans[name] == [expected[name]] for name in POLYNOMIALS),
        ),
    )


def _grows(what: str, by_degree: Sequence[Sequence[float]], form: str = ".2f") -> Check:
    growing = [all(np.diff(values) > 0) for values in zip(*by_degree, strict=True)]
    means = ", ".join(f"{spread(values, form)} ({name})" for name, values in zip(BY_DEGREE, by_degree, strict=True))
    return Check(
        f"{what} grows with the degree, {' < '.join(BY_DEGREE)}, on at least {SHARE:.0%} of the seeds",
        f"{means}; in that order {counted(growing)}",
        sum(growing) >= SHARE * len(growing),
    )


def _trial(name: str, seed: int, setup: Setup) -> Trial:
    random = generator(f"{NAME}/data", seed)
    points, own = sample("swiss roll", setup.many + setup.held_out, random)
    x, y = (t.to(torch.float32) for t in (embed(standardised(points), 20, random), standardised(own)))
    held_x, held_y = x[setup.many :], y[setup.many :]
    start = perceptron((20, setup.width, setup.width, 2), generator(f"{NAME}/weights", seed), activation=name)
    few, many = copy.deepcopy(start), start
    training_error = fit(few, x[: setup.few], y[: setup.few], steps=setup.steps)
    fit(many, x[: setup.many], y[: setup.many], steps=setup.steps)
    inputs = layer_inputs(copy.deepcopy(many).to(torch.float64), held_x.to(torch.float64))[1]
    weight, covariance = linears(many)[1].weight.detach(), metric_matrix(inputs)
    latent = decompose(weight, input_metric=dense(covariance)).s_K.numpy()
    energies = torch.linalg.eigvalsh(covariance)
    return Trial(
        participation_ratio(latent) or 0.0,
        participation_ratio(decompose(weight).s_K.numpy()) or 0.0,
        int((energies > RANK_TOLERANCE * energies[-1]).sum()),
        training_error,
        _error(few, held_x, held_y),
        _error(many, held_x, held_y),
        tuple((latent / latent[0]).tolist()),
    )


@torch.no_grad()
def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return nn.functional.mse_loss(model(x), y).item()


def _row(name: str, trials: Sequence[Trial], setup: Setup) -> Row:
    activation = ACTIVATIONS[name]()
    return {
        "activation": name,
        "energy degree": energy_degree(activation),
        "effective degree": effective_degree(activation),
        **averaged("latent, data metric", [t.latent for t in trials]),
        **averaged("latent, weights", [t.weights for t in trials]),
        **averaged("span", [t.span for t in trials]),
        **averaged(f"training error, {setup.few} points", [t.training_error_few for t in trials]),
        **averaged(f"held-out error, {setup.few} points", [t.error_few for t in trials]),
        **averaged(f"held-out error, {setup.many} points", [t.error_many for t in trials]),
    }


def _figure(trials: Trials, setup: Setup) -> "Figure":
    figure, (spectra, dimensions, errors) = panels(("S' of the middle layer", "latent dimension", "held-out error"))
    for name, of_seeds in trials.items():
        mean = np.mean([t.spectrum for t in of_seeds], axis=0)
        spectra.plot(np.arange(1, len(mean) + 1), mean, label=name)
    spectra.set(yscale="log", xscale="log", xlabel="i", ylabel="sᵢ / s₁, mean over seeds", ylim=(1e-6, 1.5))
    spectra.legend(fontsize="small")
    dots(dimensions, "data metric", {name: [t.latent for t in trials[name]] for name in trials})
    dots(dimensions, "weights alone", {name: [t.weights for t in trials[name]] for name in trials})
    dots(errors, f"{setup.few} points", {name: [t.error_few for t in trials[name]] for name in trials})
    dots(errors, f"{setup.many} points", {name: [t.error_many for t in trials[name]] for name in trials})
    errors.set(yscale="log")
    for ax in (dimensions, errors):
        ax.legend(fontsize="small")
        ax.tick_params(axis="x", labelsize="small")
    return figure
