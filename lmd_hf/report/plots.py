"""Figures of a report: spectra by role and layer, and heat maps layer × role. No global state, no display."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lmd_hf.records import MatrixReport
from lmd_hf.report.text import by_role


if TYPE_CHECKING:
    from lmd_hf.report.report import Report

COLORMAP = "viridis"  # even in lightness, and readable without colour vision
COLUMNS = 4
MEASURES: dict[str, Callable[[MatrixReport], float | None]] = {
    "effective rank / k": lambda m: None if m.effective_rank is None else m.effective_rank / min(m.shape),
    "latent dimension n'": lambda m: m.latent_dim,
    "capacity, log₁₀ K": lambda m: m.capacity_log10,
}


def figures(report: "Report") -> dict[str, Figure]:
    """{name: figure}; a report without numbered layers has no heat map."""
    result = {"spectra": spectra(report)}
    if any(matrix.layer is not None for matrix in report.matrices):
        result["heatmap"] = heatmap(report)
    return result


def writer(figure: Figure) -> Callable[[Path], None]:
    """A function that saves the figure as PNG, the same bytes for the same report."""
    return lambda path: figure.savefig(path, dpi=150, metadata={"Software": None})


def spectra(report: "Report") -> Figure:
    """σᵢ/σ₁ against i/k, one panel a role, one line a matrix, coloured from the first layer to the last."""
    groups = by_role(report.matrices)
    rows = max(1, math.ceil(len(groups) / COLUMNS))
    figure = Figure(figsize=(3.0 * COLUMNS, 2.5 * rows + 0.6), layout="constrained")
    last = max((m.layer for m in report.matrices if m.layer is not None), default=0)
    shade = ScalarMappable(Normalize(0, max(last, 1)), COLORMAP)
    for index, (role, matrices) in enumerate(groups):
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        for matrix in matrices:
            _spectrum(axes, matrix, _color(matrix, last))
        axes.set(yscale="log", ylim=(1e-4, 1.5), xlim=(0, 1))
        axes.set_title(role, fontsize="medium")
        axes.grid(alpha=0.25)
        if index % COLUMNS == 0:
            axes.set_ylabel("σᵢ / σ₁")
        if index >= len(groups) - COLUMNS:
            axes.set_xlabel("i / k")
    if last > 0 and groups:
        figure.colorbar(shade, ax=figure.axes, label="layer", shrink=0.8, ticks=MaxNLocator(integer=True))
    figure.suptitle(f"Singular values of every matrix: {report.model.id}", fontsize="medium")
    return figure


def heatmap(report: "Report") -> Figure:
    """Layer × role, one panel a measure; a cell is the median over the matrices (experts) that share it."""
    placed = [matrix for matrix in report.matrices if matrix.layer is not None]
    roles = by_role(placed)
    layers = range(1 + max(matrix.layer or 0 for matrix in placed))
    size = (1.6 + len(MEASURES) * (0.55 * len(roles) + 1.6), 1.9 + 0.22 * max(len(layers), 6))
    figure = Figure(figsize=size, layout="constrained")
    for index, (title, measure) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(1, len(MEASURES), index + 1)
        grid = np.full((len(layers), len(roles)), np.nan)
        for column, (_, matrices) in enumerate(roles):
            for layer in layers:
                values = [v for m in matrices if m.layer == layer and (v := measure(m)) is not None]
                grid[layer, column] = np.median(values) if values else np.nan
        image = axes.imshow(grid, aspect="auto", cmap=COLORMAP, interpolation="nearest")
        axes.set_xticks(range(len(roles)), [role for role, _ in roles], rotation=60, ha="right", fontsize="small")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize="medium")
        if index == 0:
            axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes)
    figure.suptitle(report.model.id, fontsize="medium")
    return figure


def _color(matrix: MatrixReport, last: int) -> Any:
    """A shade from the first layer to the last; grey outside the layers."""
    return "0.45" if matrix.layer is None else matplotlib.colormaps[COLORMAP](matrix.layer / max(last, 1))


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
