"""Figures of a report or a comparison: spectra by role and layer, heat maps layer × role and layer × head. No state,
no display."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lmd_hf.changes import MatrixChange
from lmd_hf.circuits import HeadReport
from lmd_hf.records import MatrixReport
from lmd_hf.report.heads import grids
from lmd_hf.report.measures import CHANGES, COLORMAP, MEASURES, ON_CARDS, layer_grid
from lmd_hf.report.plain import Row
from lmd_hf.report.plane import above, layer_bar, layer_color, plane
from lmd_hf.report.text import by_role


if TYPE_CHECKING:
    from lmd_hf.report.compare import Comparison
    from lmd_hf.report.report import Report

FIGURES = ("spectra.png", "capacity.png", "heatmap.png", "heads.png")  # the files of those that there may be
COMPARISON_FIGURES = ("updates.png", "changes.png")
COLUMNS = 4
SHOWN = 1e-5  # of the largest change of any matrix: what lies below is left out of the figure


def figures(report: "Report") -> dict[str, Figure]:
    """{name: figure}; without numbered layers there is no heat map, and without a capacity no plane of it."""
    result = {"spectra": spectra(report)}
    if (capacity := plane(report)) is not None:
        result["capacity"] = capacity
    if (layers := layer_map(report)) is not None:
        result["heatmap"] = layers
    if any(head.layer is not None for head in report.heads):
        result["heads"] = head_map(report.heads, report.model.id)
    return result


def layer_map(report: "Report") -> Figure | None:
    """The heat map layer × role of a report; `None` without numbered layers."""
    if all(matrix.layer is None for matrix in report.matrices):
        return None
    shown = {name: MEASURES[name] for name in ON_CARDS}
    return heatmap(report.matrices, shown, report.model.id)


def writer(figure: Figure) -> Callable[[Path], None]:
    """A function that saves the figure as PNG, the same bytes for the same report."""
    return lambda path: figure.savefig(path, dpi=150, metadata={"Software": None})


def comparison_figures(comparison: "Comparison") -> dict[str, Figure]:
    """{name: figure}; models without numbered layers have no heat map."""
    names = f"{comparison.base.id} → {comparison.tuned.id}"
    result = {"updates": updates(comparison.matrices, names)}
    if any(matrix.layer is not None for matrix in comparison.matrices):
        result["changes"] = heatmap(comparison.matrices, CHANGES, names)
    return result


def spectra(report: "Report") -> Figure:
    """σᵢ/σ₁ against i/k, one panel a role, one line a matrix, coloured from the first layer to the last."""
    figure, panels = _panels(report.matrices)
    for axes, matrices, color in panels:
        for matrix in matrices:
            _spectrum(axes, matrix, color(matrix))
        axes.set(yscale="log", ylim=(1e-4, 1.5), xlim=(0, 1))
    _label(figure, panels, "σᵢ / σ₁", "i / k")
    above(figure, f"Singular values of every matrix: {report.model.id}")
    return figure


def updates(matrices: tuple[MatrixChange, ...], names: str) -> Figure:
    """σᵢ(ΔW)/‖W‖_F against i, as `spectra` but on one scale; a dot marks the update rank: beyond it rounding explains
    the rest."""
    figure, panels = _panels(matrices)
    top = max((m.update_spectral_norm / m.base_norm for m in matrices if m.base_norm), default=0.0) or 1.0
    for axes, group, color in panels:
        for matrix in group:
            _update(axes, matrix, color(matrix))
        longest = max(min(matrix.shape) for matrix in group)
        axes.set(xscale="log", yscale="log", ylim=(top * SHOWN, top * 1.5), xlim=(0.9, 1.1 * longest))
        if all(matrix.identical for matrix in group):
            axes.text(0.5, 0.5, "identical", transform=axes.transAxes, ha="center", va="center", color="0.45")
    _label(figure, panels, "σᵢ(ΔW) / ‖W‖", "i")
    above(figure, f"What changed: {names} (dots: update rank)")
    return figure


Color = Callable[[MatrixReport | MatrixChange], Any]
Panels = list[tuple[Axes, list[Row], Color]]


def _panels(matrices: tuple[Row, ...]) -> tuple[Figure, Panels[Row]]:
    """An empty panel for each role, its matrices and their colours; a bar beside them tells the layer."""
    groups = by_role(matrices)
    rows = max(1, math.ceil(len(groups) / COLUMNS))
    figure = Figure(figsize=(3.0 * COLUMNS, 2.5 * rows + 0.6), layout="constrained")
    last = max((m.layer for m in matrices if m.layer is not None), default=0)
    panels: Panels[Row] = []
    for index, (role, group) in enumerate(groups):
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        axes.set_title(role, fontsize="medium")
        axes.grid(alpha=0.25)
        panels.append((axes, group, lambda matrix: layer_color(matrix.layer, last)))
    if last > 0 and groups:
        layer_bar(figure, figure.axes, last, shrink=0.8)
    return figure, panels


def _label(figure: Figure, panels: Panels[Row], vertical: str, horizontal: str) -> None:
    """Axis labels at the left and at the bottom only."""
    for index, (axes, _, _) in enumerate(panels):
        if index % COLUMNS == 0:
            axes.set_ylabel(vertical)
        if index >= len(panels) - COLUMNS:
            axes.set_xlabel(horizontal)


def heatmap(matrices: tuple[Row, ...], measures: dict[str, Callable[[Row], float | None]], title: str) -> Figure:
    """Layer × role, one panel a measure; a cell is the median over the matrices (experts) that share it."""
    placed = [matrix for matrix in matrices if matrix.layer is not None]
    roles = by_role(placed)
    layers = 1 + max(matrix.layer or 0 for matrix in placed)
    size = (1.6 + len(measures) * (0.55 * len(roles) + 1.6), 1.9 + 0.22 * max(layers, 6))
    figure = Figure(figsize=size, layout="constrained")
    for index, (name, measure) in enumerate(measures.items()):
        axes = figure.add_subplot(1, len(measures), index + 1)
        grid = layer_grid(roles, layers, measure)
        image = axes.imshow(grid, aspect="auto", cmap=COLORMAP, interpolation="nearest")
        axes.set_xticks(range(len(roles)), [role for role, _ in roles], rotation=60, ha="right", fontsize="small")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(name, fontsize="medium")
        if index == 0:
            axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes)
    above(figure, title)
    return figure


def head_map(heads: Sequence[HeadReport], title: str) -> Figure:
    """Layer × head, a row of panels for each stack and block, one panel a measure."""
    rows = grids(heads)
    tall = sum(0.8 + 0.2 * max(len(next(iter(panels.values()))), 4) for panels in rows.values())
    figure = Figure(figsize=(3.2 * COLUMNS, 1.2 + tall), layout="constrained")
    for row, (name, panels) in enumerate(rows.items()):
        for column, (measure, grid) in enumerate(panels.items()):
            axes = figure.add_subplot(len(rows), len(panels), row * len(panels) + column + 1)
            low = {"eigenvalue": -1, "copying": -1}.get(measure.split()[0], 0)
            high = None if measure.startswith("participation") else 1
            image = axes.imshow(grid, aspect="auto", cmap=COLORMAP, interpolation="nearest", vmin=low, vmax=high)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(measure, fontsize="medium")
            axes.set_xlabel("head")
            if column == 0:
                axes.set_ylabel(f"layer ({name})" if len(rows) > 1 else "layer")
            figure.colorbar(image, ax=axes)
    above(figure, f"Attention heads: {title}")
    return figure


def _spectrum(axes: Axes, matrix: MatrixReport, color: Any) -> None:
    values = matrix.singular_values
    if len(values) == 0 or values[0] == 0:
        return
    ranks = np.array(matrix.singular_value_ranks or np.arange(1, len(values) + 1))
    axes.plot(
        ranks / min(matrix.shape),
        values / values[0],
        color=color,
        linewidth=0.9,
        marker="." if len(values) == 1 else "",
    )


def _update(axes: Axes, matrix: MatrixChange, color: Any) -> None:
    if matrix.identical or not matrix.base_norm:
        return
    values = matrix.singular_values / matrix.base_norm
    ranks = np.array(matrix.singular_value_ranks or np.arange(1, len(values) + 1))
    axes.plot(ranks, values, color=color, linewidth=0.9, marker="." if len(values) == 1 else "")
    if matrix.update_rank:
        nearest = int(np.abs(ranks - matrix.update_rank).argmin())
        axes.plot(ranks[nearest], values[nearest], "o", color=color, markersize=3)
