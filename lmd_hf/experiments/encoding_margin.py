"""Encoding margin: the bound of the encoding theorem, ε = r + (L_f + L_g)·δ, against the errors of trained networks.

The theorem is the paper's (its theorem 1, Heine–Cantor); how its quantities are measured is this project's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmd_hf.evidence import EncodingMargin
from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import panels
from lmd_hf.experiments.images import PIXELS, digits
from lmd_hf.experiments.manifolds import embed, sample, standardised
from lmd_hf.experiments.networks import fit, perceptron
from lmd_hf.experiments.outcome import Check, Outcome, Row, averaged, counted
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.run.margin import Samples, encoding_margin


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "encoding-margin"
DIMENSION = 20
SHARE = 0.9  # a claim holds on at least nine of ten seeds
METHOD = (
    "ReLU and GELU networks with two hidden layers (Adam, rate 1e-3, L2 penalty 1e-4, squared error) learn "
    "standardised angle and height of the Swiss roll in 20 dimensions from more and more points, and scikit-learn's "
    "digits, one-hot. r is the largest training error, δ the largest distance of a held-out point to its nearest "
    "training point, L_g the largest slope of the targets over the 10 nearest neighbours, held-out points included, "
    "L_f the product of the layers' spectral norms and activations' constants (upper) or the largest slope seen "
    "(lower). At the held-out points the upper ε is a theorem. Fresh points, of which δ and L_g know nothing, stand "
    "for the rest of the domain, where it is an estimate. Errors are Euclidean norms, the largest over the points."
)


@dataclass(frozen=True)
class Setup:
    """Training points of the Swiss roll and of the digits, points of each test set, the network and its training."""

    points: tuple[int, ...] = (250, 500, 1000, 2000)
    digits: int = 1200
    tests: int = 290
    width: int = 64
    steps: int = 600


@dataclass(frozen=True)
class Trial:
    """One network: its margin, and the largest error at fresh points."""

    margin: EncodingMargin
    fresh: float


Case = tuple[str, str, int]  # data, activation, training points


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train a network for each case and seed, and compare its margins with its errors."""
    cases: list[Case] = [("swiss roll", a, n) for a in ("ReLU", "GELU") for n in setup.points]
    cases.append(("digits", "ReLU", setup.digits))
    work = [(case, seed) for case in cases for seed in seeds]
    trained = each(lambda item: _trained(*item, setup), work, what=NAME)
    found = [_measured(*parts) for parts in trained]  # following a model's graph is no work for threads
    trials = {case: found[place * len(seeds) : (place + 1) * len(seeds)] for place, case in enumerate(cases)}
    tables: dict[str, Sequence[Row]] = {"by case": [_row(case, group) for case, group in trials.items()]}
    figures = {"margins": _figure(trials)}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(trials), tuple(seeds), tables, figures)


def judge(trials: Mapping[Case, Sequence[Trial]]) -> tuple[Check, ...]:
    """The stated rules, applied to the margins and the errors."""
    every = [trial for group in trials.values() for trial in group]
    held = [t.margin.observed <= (t.margin.margin_upper or 0.0) for t in every]
    fresh = [t.fresh <= (t.margin.margin_upper or 0.0) for t in every]
    lower = [t.margin.observed <= t.margin.margin_lower for t in every]
    loose = sorted((t.margin.margin_upper or 0.0) / t.margin.observed for t in every)
    tight = sorted(t.margin.margin_lower / t.margin.observed for t in every)
    return (
        Check(
            "the upper ε bounds the error at the held-out points of every network (a theorem)",
            f"{counted(held)}; ε is {loose[0]:.0f} to {loose[-1]:.0f} times the error, in the middle "
            f"{loose[len(loose) // 2]:.0f}",
            all(held),
        ),
        Check(
            f"it also bounds the error at fresh points, as an estimate, of at least {SHARE:.0%} of the networks",
            counted(fresh),
            sum(fresh) >= SHARE * len(fresh),
        ),
        Check(
            f"ε with the slope that was seen, no bound, is above the error of at least {SHARE:.0%} of the networks",
            f"{counted(lower)}; {tight[0]:.1f} to {tight[-1]:.1f} times the error",
            sum(lower) >= SHARE * len(lower),
            decides=False,
        ),
        *(_shrinks(trials, activation) for activation in ("ReLU", "GELU")),
    )


def _shrinks(trials: Mapping[Case, Sequence[Trial]], activation: str) -> Check:
    """Whether more points bring δ and the margin down, from the fewest to the most."""
    groups = [group for (data, name, _), group in trials.items() if (data, name) == ("swiss roll", activation)]
    pairs = list(zip(groups[0], groups[-1], strict=True))
    radius = [last.margin.covering_radius < first.margin.covering_radius for first, last in pairs]
    upper = [(last.margin.margin_upper or 0.0) < (first.margin.margin_upper or 0.0) for first, last in pairs]
    return Check(
        f"Swiss roll, {activation}: δ and the upper ε are smaller with the most points than with the fewest, on at "
        f"least {SHARE:.0%} of the seeds",
        f"δ {counted(radius)}, ε {counted(upper)}",
        min(sum(radius), sum(upper)) >= SHARE * len(pairs),
    )


def _trained(case: Case, seed: int, setup: Setup) -> tuple[nn.Module, Samples, Samples, Samples]:
    """The network, and its training, held-out and fresh points."""
    data, activation, points = case
    x, y = _roll(seed, points + 2 * setup.tests) if data == "swiss roll" else _digits(seed)
    train, held_out, fresh = ((x[part], y[part]) for part in _parts(points, setup.tests))
    sizes = (x.shape[1], setup.width, setup.width, y.shape[1])
    model = perceptron(sizes, generator(f"{NAME}/{data}/weights", seed), activation=activation)
    fit(model, *train, steps=setup.steps, loss=_squared)
    return model, train, held_out, fresh


def _measured(model: nn.Module, train: Samples, held_out: Samples, fresh: Samples) -> Trial:
    with torch.no_grad():
        error = float(torch.linalg.vector_norm(model(fresh[0]) - fresh[1], dim=1).max())
    return Trial(encoding_margin(model, train, held_out=held_out), error)


def _parts(points: int, tests: int) -> tuple[slice, slice, slice]:
    return slice(2 * tests, 2 * tests + points), slice(tests), slice(tests, 2 * tests)


def _squared(found: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.mse_loss(found, wanted, reduction="sum") / len(wanted)


def _roll(seed: int, count: int) -> tuple[Tensor, Tensor]:
    random = generator(f"{NAME}/swiss roll", seed)
    points, own = sample("swiss roll", count, random)
    x, y = embed(standardised(points), DIMENSION, random), standardised(own)
    return x.to(torch.float32), y.to(torch.float32)


def _digits(seed: int) -> tuple[Tensor, Tensor]:
    images, labels = digits(generator(f"{NAME}/digits", seed))
    assert images.shape[1] == PIXELS
    return images.to(torch.float32), nn.functional.one_hot(labels, 10).to(torch.float32)


def _row(case: Case, trials: Sequence[Trial]) -> Row:
    margins = [trial.margin for trial in trials]
    return {
        "data": case[0],
        "activation": case[1],
        "points": case[2],
        **averaged("r", [m.residual for m in margins]),
        **averaged("δ", [m.covering_radius for m in margins]),
        **averaged("L_g", [m.target_slope for m in margins]),
        **averaged("L_f upper", [m.lipschitz_upper or 0.0 for m in margins]),
        **averaged("L_f lower", [m.lipschitz_lower for m in margins]),
        **averaged("ε upper", [m.margin_upper or 0.0 for m in margins]),
        **averaged("ε lower", [m.margin_lower for m in margins]),
        **averaged("error, held out", [m.observed for m in margins]),
        **averaged("error, fresh", [t.fresh for t in trials]),
    }


def _figure(trials: Mapping[Case, Sequence[Trial]]) -> "Figure":
    figure, axes = panels(("Swiss roll, ReLU", "Swiss roll, GELU", "digits"))
    places = {("swiss roll", "ReLU"): 0, ("swiss roll", "GELU"): 1, ("digits", "ReLU"): 2}
    for (data, activation, points), group in trials.items():
        ax = axes[places[data, activation]]
        for label, color, values in (
            ("ε, upper L_f", "tab:red", [t.margin.margin_upper or 0.0 for t in group]),
            ("ε, slope seen", "tab:orange", [t.margin.margin_lower for t in group]),
            ("error, held out", "tab:blue", [t.margin.observed for t in group]),
            ("error, fresh", "tab:green", [t.fresh for t in group]),
        ):
            shown = None if ax.get_legend_handles_labels()[1][3:] else label
            ax.plot([points] * len(values), values, ".", color=color, markersize=4, alpha=0.7, label=shown)
    for ax in axes:
        ax.set(yscale="log", xlabel="training points", xscale="log")
    axes[0].legend(fontsize="x-small")
    return figure
