"""A small picture in text: one line a role, one character a layer."""

import statistics
from collections.abc import Iterable
from itertools import pairwise

from lmd_hf.records import MatrixReport
from lmd_hf.report.text import by_role


LEVELS = "▁▂▃▄▅▆▇█"
WIDEST = 48  # characters: the layers of a deeper model are joined, evenly


def sparklines(matrices: Iterable[MatrixReport]) -> str:
    """Effective rank as a share of the short side, layer by layer, from 0 (▁) to 1 (█).

    Roles without numbered layers have no line; "" where none has.
    """
    lines = []
    for role, group in by_role(matrices):
        shares = list(rank_shares(group).values())
        if len(shares) > 1:
            lines.append((role, "".join(map(_level, _joined(shares)))))
    width = max((len(role) for role, _ in lines), default=0)
    return "\n".join(f"{role:{width}}  {drawn}" for role, drawn in lines)


def rank_shares(matrices: Iterable[MatrixReport]) -> dict[int, float]:
    """{layer: effective rank over the short side, the median of its matrices}, from the first layer to the last."""
    layers: dict[int, list[float]] = {}
    for matrix in matrices:
        if matrix.layer is not None and matrix.effective_rank is not None:
            layers.setdefault(matrix.layer, []).append(matrix.effective_rank / min(matrix.shape))
    return {layer: statistics.median(layers[layer]) for layer in sorted(layers)}


def _level(share: float) -> str:
    return LEVELS[min(int(share * len(LEVELS)), len(LEVELS) - 1)]


def _joined(values: list[float]) -> list[float]:
    count = min(len(values), WIDEST)
    bounds = [round(index * len(values) / count) for index in range(count + 1)]
    return [statistics.median(values[start:stop]) for start, stop in pairwise(bounds)]
