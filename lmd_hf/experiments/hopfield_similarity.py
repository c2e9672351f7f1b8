"""Hopfield similarity: which similarity finds a stored digit again from a noisy or a half hidden one?

After Universal Hopfield Networks (Millidge et al. 2022, arXiv 2202.04557, §4), which the paper builds its reading of a
layer on: distances retrieve better than dot products there, Manhattan best of all. Separation is max, the limit of the
softmax, so that no temperature favours one similarity.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import dots, panels
from lmd_hf.experiments.images import SIDE, digits
from lmd_hf.experiments.outcome import Cell, Check, Outcome, Row, averaged, counted, spread
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.layers.hopfield import UniversalHopfield


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "hopfield-similarity"
SIMILARITIES = ("dot", "cosine", "euclidean", "manhattan")
SHARE = 0.9  # a claim holds on at least nine of ten seeds
METHOD = (
    "Digits of scikit-learn (8 × 8, values 0…1), as many as are stored drawn at random, are the memories of a "
    "UniversalHopfield network with max separation that writes what it stores. Each is asked for once at every level: "
    "with Gaussian noise of that standard deviation, or with that share of its columns, from the left, set to 0. It is "
    "found again if the answer is that very memory. Judged is the mean share over the levels above 0."
)


@dataclass(frozen=True)
class Setup:
    """How many digits are stored, and the levels: standard deviations of the noise, columns that are hidden."""

    stored: int = 300
    noise: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    hidden: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)


Shares = dict[str, dict[float, dict[str, float]]]  # {damage: {level: {similarity: share found again}}}


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Store and ask for digits with every similarity, damage and level."""
    shares = each(lambda seed: _shares(seed, setup), seeds, what=NAME)
    tables = {f"found again under {damage}": _rows(damage, shares) for damage in shares[0]}
    figures = {"found_again": _figure(shares)}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(shares), tuple(seeds), tables, figures)


def judge(shares: Sequence[Shares]) -> tuple[Check, ...]:
    """The stated rules, applied to the shares found again."""
    checks = []
    for damage in shares[0]:
        means = [{s: _mean(of_seed[damage], s) for s in SIMILARITIES} for of_seed in shares]
        checks += [
            _more(damage, means, "both distances find more digits than the dot product", _distances_beat_dot),
            _more(damage, means, "Manhattan finds more digits than any other", _manhattan_is_best),
        ]
    return tuple(checks)


def _distances_beat_dot(means: dict[str, float]) -> bool:
    return min(means["euclidean"], means["manhattan"]) > means["dot"]


def _manhattan_is_best(means: dict[str, float]) -> bool:
    return means["manhattan"] > max(means[s] for s in SIMILARITIES if s != "manhattan")


def _more(
    damage: str, means: Sequence[dict[str, float]], claim: str, holds: Callable[[dict[str, float]], bool]
) -> Check:
    held = list(map(holds, means))
    found = ", ".join(f"{s} {spread([m[s] for m in means], '.3f')}" for s in SIMILARITIES)
    return Check(
        f"under {damage} {claim}, on at least {SHARE:.0%} of the seeds",
        f"{found}; so {counted(held)}",
        sum(held) >= SHARE * len(held),
    )


def _mean(levels: dict[float, dict[str, float]], similarity: str) -> float:
    return statistics.fmean(shares[similarity] for level, shares in levels.items() if level > 0)


def _shares(seed: int, setup: Setup) -> Shares:
    memory = digits(generator(f"{NAME}/data", seed))[0][: setup.stored]
    noise = torch.randn(memory.shape, generator=generator(f"{NAME}/noise", seed), dtype=memory.dtype)
    return {
        "noise": {level: _found(memory, memory + level * noise) for level in setup.noise},
        "masking": {columns / SIDE: _found(memory, _masked(memory, columns)) for columns in setup.hidden},
    }


def _masked(images: Tensor, columns: int) -> Tensor:
    square = images.clone().view(-1, SIDE, SIDE)
    square[:, :, :columns] = 0
    return square.flatten(1)


def _found(memory: Tensor, queries: Tensor) -> dict[str, float]:
    """The share of the queries that each similarity answers with the memory of the same row."""
    answers = {s: UniversalHopfield(s, "max", memory=memory)(queries) for s in SIMILARITIES}
    return {s: (answer == memory).all(dim=1).to(torch.float64).mean().item() for s, answer in answers.items()}


def _rows(damage: str, shares: Sequence[Shares]) -> list[Row]:
    rows: list[Row] = []
    for level in shares[0][damage]:
        found: dict[str, Cell] = {}
        for similarity in SIMILARITIES:
            found |= averaged(similarity, [of_seed[damage][level][similarity] for of_seed in shares])
        rows.append({"level": level, **found})
    return rows


def _figure(shares: Sequence[Shares]) -> "Figure":
    figure, axes = panels([f"found again under {damage}" for damage in shares[0]])
    for ax, damage in zip(axes, shares[0], strict=True):
        for s in SIMILARITIES:
            dots(ax, s, {level: [of_seed[damage][level][s] for of_seed in shares] for level in shares[0][damage]})
        ax.set_xlabel({"noise": "standard deviation", "masking": "share hidden"}[damage])
    axes[0].set_ylabel("share of the stored digits")
    axes[0].legend(fontsize="small")
    return figure
