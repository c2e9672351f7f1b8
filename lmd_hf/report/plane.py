"""The plane of capacity and expressivity, and the colours of layers that every figure shares."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lmd_hf.circuits import HeadReport
from lmd_hf.matrix.dimension import expressivity
from lmd_hf.report import heads
from lmd_hf.report.measures import COLORMAP
from lmd_hf.report.text import by_role
from lmd_hf.visible import visible


if TYPE_CHECKING:
    from lmd_hf.report.report import Report

TITLE = 40  # characters of a model's name above a narrow figure: of a path, the last
MARKERS = "osD^v<>PX*phd8"  # one a role, over again after the last
Point = tuple[int | None, float | None, float | None]  # layer, expressivity, log₁₀ K


def layer_color(layer: int | None, last: int) -> Any:
    """A shade from the first layer to the last; grey outside the layers."""
    return "0.45" if layer is None else matplotlib.colormaps[COLORMAP](layer / max(last, 1))


def layer_bar(figure: Figure, axes: Axes | Sequence[Axes], last: int, *, shrink: float = 1.0) -> None:
    """The bar that tells the layer of a colour."""
    shade = ScalarMappable(Normalize(0, max(last, 1)), COLORMAP)
    figure.colorbar(shade, ax=axes, label="layer", shrink=shrink, ticks=MaxNLocator(integer=True))


def above(figure: Figure, title: str) -> None:
    """The title of a figure, in which the name of a model is no formula (`$`) and holds nothing that no font can be
    given."""
    figure.suptitle(visible(title), fontsize="medium", parse_math=False)


def plane(report: "Report") -> Figure | None:
    """log₁₀ K against expressivity, one mark a matrix (and a head: softmax capacity and entropy of its QK spectrum).

    Its shape tells the role, its colour the layer. To the upper right a layer can hold many patterns and spreads its
    energy over all of its directions. `None` where nothing has both.
    """
    groups = points(report)
    if not any(_known(group) for group in groups.values()):
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    last = max((layer for group in groups.values() for layer, _, _ in group if layer is not None), default=0)
    roles = []
    for index, (role, group) in enumerate(groups.items()):
        known = _known(group)
        label = f"{role} ({len(known)}{f' of {len(group)}' if len(known) < len(group) else ''})"
        style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "label": label}
        roles.append(Line2D([], [], linestyle="", color="0.3", markersize=5, **style))
        layers, horizontal, vertical = zip(*known, strict=True) if known else ((), (), ())
        colors = [layer_color(layer, last) for layer in layers]
        axes.scatter(horizontal, vertical, c=colors, s=26, linewidths=0, alpha=0.85, **style)
    axes.set(xlabel="expressivity: entropy of the energies / ln k", ylabel="capacity, log₁₀ K")
    axes.grid(alpha=0.25)
    figure.legend(handles=roles, loc="outside right center", fontsize="small", frameon=False)
    if last > 0:
        layer_bar(figure, axes, last)
    above(figure, f"Capacity and expressivity: {report.model.id[-TITLE:]}")
    return figure


def points(report: "Report") -> dict[str, list[Point]]:
    """{role, and `heads` of each stack and block: its points}."""
    found = {
        role: [(m.layer, m.expressivity, m.capacity_log10) for m in group] for role, group in by_role(report.matrices)
    }
    for place, group in heads.groups(report.heads).items():
        found[f"{place} heads"] = [(head.layer, _spread(head), head.capacity_log10) for head in group]
    return found


def _spread(head: HeadReport) -> float | None:
    return expressivity(np.array(head.qk_singular_values)) if head.qk_singular_values else None


def _known(group: Sequence[Point]) -> list[Point]:
    return [point for point in group if None not in point[1:]]
