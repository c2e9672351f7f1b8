"""Convergence: stochastic gradient descent, stopped early and run long, with and without a decaying rate, against the
verdicts that `lmd_hf` gives on each.

The paper takes stable convergence as a premise; the evidence, its thresholds and this experiment are this project's.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmd_hf.api import analyze, compare
from lmd_hf.evidence import STABLE, UNSTABLE, Evidence, Thresholds
from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import panels
from lmd_hf.experiments.manifolds import embed, sample, standardised
from lmd_hf.experiments.networks import perceptron
from lmd_hf.experiments.outcome import Cell, Check, Outcome, Row, averaged, counted
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.run.convergence import conclude, judge_change, judge_loss, judge_weights


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "convergence"
EARLY, LONG = "stopped early", "run long"
RATES = ("constant", "decaying")
RATE, MOMENTUM, DECAY, NOISE = 0.01, 0.9, 1e-4, 0.1
BATCH, HIDDEN, DIMENSION = 100, 64, 20
SHARE = 0.9  # a claim holds on at least nine of ten seeds
KINDS = ("loss curve", "from nine tenths", "from half", "weights", "together")
METHOD = (
    "A ReLU network (20-64-64-2) learns standardised angle and height of the Swiss roll, turned into 20 dimensions, "
    "with noise of deviation 0.1 on the targets, by stochastic gradient descent (batches of 100 of 2,000 points, "
    "momentum 0.9, L2 penalty 1e-4, rate 0.01: constant, or falling linearly to 0), for 20 epochs (stopped early) "
    "or 200 (run long). The loss is logged once an epoch, as its mean over all points. Verdicts at the default "
    "thresholds: from the loss curve, from checkpoints at nine tenths and at half of the steps, from the weights, "
    "and together, from loss curve, nine tenths and weights. `loss left` is the last training loss over that of the "
    "long run with a decaying rate: above 1 there was more to learn."
)


@dataclass(frozen=True)
class Setup:
    """How many points there are, and the epochs of both kinds of run."""

    points: int = 2000
    early: int = 20
    long: int = 200


@dataclass(frozen=True)
class Run:
    """One training: its loss by epoch, the loss that was left, and the evidence of each kind; verdicts by kind."""

    losses: tuple[float, ...]
    left: float
    evidence: dict[str, Evidence]
    verdicts: dict[str, str]


@dataclass(frozen=True)
class Trial:
    """One seed: the runs by (length, rate), and the verdict on the weights before any training."""

    runs: dict[tuple[str, str], Run]
    untrained: str


Log = list[dict[str, Any]]  # as a trainer writes it
Kept = dict[str, nn.Module]  # checkpoints by kind of evidence
Trained = tuple[nn.Module, dict[tuple[str, str], tuple[nn.Module, Log, Kept, float]]]  # before, and the runs


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Train four networks a seed, stop them, and judge each."""
    trials = [_judged(trained) for trained in each(lambda seed: _trained(seed, setup), seeds, what=NAME)]
    tables: dict[str, Sequence[Row]] = {"by kind of run": [_row(case, trials) for case in trials[0].runs]}
    figures = {"convergence": _figure(trials)}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(trials), tuple(seeds), tables, figures)


def judge(trials: Sequence[Trial]) -> tuple[Check, ...]:
    """The stated rules, applied to the verdicts."""
    checks = [
        _check(trials, kind, length, rate, wanted)
        for kind in ("loss curve", "from nine tenths", "from half", "together")
        for length, wanted in ((EARLY, UNSTABLE), (LONG, STABLE))
        for rate in RATES
    ]
    noise = [trial.untrained == UNSTABLE for trial in trials]
    quiet = [all(r.verdicts["weights"] != UNSTABLE for c, r in t.runs.items() if c[0] == LONG) for t in trials]
    return (
        *checks,
        Check(
            f"weights alone: unstable before any training, on at least {SHARE:.0%} of the seeds",
            counted(noise),
            sum(noise) >= SHARE * len(trials),
        ),
        Check(
            f"weights alone: nothing against the runs that were long, on at least {SHARE:.0%} of the seeds",
            counted(quiet),
            sum(quiet) >= SHARE * len(trials),
        ),
    )


def _check(trials: Sequence[Trial], kind: str, length: str, rate: str, wanted: str) -> Check:
    holds = [trial.runs[length, rate].verdicts[kind] == wanted for trial in trials]
    return Check(
        f"{length}, {rate} rate, {kind}: {wanted} on at least {SHARE:.0%} of the seeds",
        counted(holds),
        sum(holds) >= SHARE * len(trials),
        decides=kind != "from half",  # the rule of the verdicts says nothing of how far apart checkpoints lie
    )


def _trained(seed: int, setup: Setup) -> Trained:
    random = generator(f"{NAME}/data", seed)
    points, own = sample("swiss roll", setup.points, random)
    x, y = (t.to(torch.float32) for t in (embed(standardised(points), DIMENSION, random), standardised(own)))
    y = y + NOISE * torch.randn(y.shape, generator=random)
    start = perceptron((DIMENSION, HIDDEN, HIDDEN, 2), generator(f"{NAME}/weights", seed))
    runs: dict[tuple[str, str], tuple[nn.Module, Log, Kept, float]] = {}
    for length, epochs in ((EARLY, setup.early), (LONG, setup.long)):
        for rate in RATES:
            model = copy.deepcopy(start)
            history, kept = _train(model, x, y, epochs, rate == "decaying", seed)
            runs[length, rate] = model, history, kept, _loss(model, x, y)
    return start, runs


def _judged(trained: Trained) -> Trial:
    start, runs = trained
    reference = runs[LONG, "decaying"][-1]
    found = {case: _verdicts(model, log, kept, loss / reference) for case, (model, log, kept, loss) in runs.items()}
    return Trial(found, judge_weights(analyze(start).matrices, Thresholds()).verdict)


def _train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, decaying: bool, seed: int) -> tuple[Log, Kept]:
    """Train in place; the log of the loss, as a trainer writes it, and the checkpoints by kind of evidence."""
    random = generator(f"{NAME}/batches", seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    batches = len(x) // BATCH
    history, kept = [], {}
    for epoch in range(epochs):
        total = 0.0
        for batch, rows in enumerate(torch.randperm(len(x), generator=random).chunk(batches)):
            if decaying:
                optimizer.param_groups[0]["lr"] = RATE * (1 - (epoch * batches + batch) / (epochs * batches))
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(rows)
        history.append({"step": (epoch + 1) * batches, "loss": total / len(x)})
        for kind, done in (("from half", epochs // 2), ("from nine tenths", epochs * 9 // 10)):
            if epoch + 1 == done:
                kept[kind] = copy.deepcopy(model)
    return history, kept


@torch.no_grad()
def _loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return nn.functional.mse_loss(model(x), y).item()


def _verdicts(model: nn.Module, history: Log, kept: Kept, left: float) -> Run:
    limits = Thresholds()
    evidence = {"loss curve": judge_loss(history, "the log", limits)}
    evidence |= {kind: judge_change(compare(before, model).matrices, kind, limits) for kind, before in kept.items()}
    evidence["weights"] = judge_weights(analyze(model).matrices, limits)
    together = conclude(piece for kind, piece in evidence.items() if kind != "from half")
    verdicts = {kind: piece.verdict for kind, piece in evidence.items()} | {"together": together.verdict}
    return Run(tuple(entry["loss"] for entry in history), left, evidence, verdicts)


def _row(case: tuple[str, str], trials: Sequence[Trial]) -> Row:
    runs = [trial.runs[case] for trial in trials]
    row: dict[str, Cell] = {"run": case[0], "rate": case[1], **averaged("loss left", [run.left for run in runs])}
    row |= averaged("change of the loss", [run.evidence["loss curve"].numbers["change"] or 0.0 for run in runs])
    for kind in ("from nine tenths", "from half"):
        moved = [run.evidence[kind].numbers["spectrum_change"] or 0.0 for run in runs]
        row |= averaged(f"change of S' {kind}", moved)
        row |= averaged(f"cos² {kind}", [run.evidence[kind].numbers["subspace_cos2"] or 0.0 for run in runs])
    for kind in KINDS:
        counts = [sum(run.verdicts[kind] == verdict for run in runs) for verdict in (STABLE, UNSTABLE)]
        row[f"{kind}: stable, unstable"] = f"{counts[0]}, {counts[1]}"
    return row


def _figure(trials: Sequence[Trial]) -> "Figure":
    figure, axes = panels((EARLY, LONG))
    for ax, length in zip(axes, (EARLY, LONG), strict=True):
        for rate, color in zip(RATES, ("tab:blue", "tab:orange"), strict=True):
            for place, trial in enumerate(trials):
                losses = trial.runs[length, rate].losses
                label = f"{rate} rate" if place == 0 else None
                ax.plot(range(1, len(losses) + 1), losses, color=color, linewidth=0.7, alpha=0.6, label=label)
        ax.set(yscale="log", xlabel="epoch")
    axes[0].set_ylabel("training loss")
    axes[0].legend(fontsize="small")
    return figure
