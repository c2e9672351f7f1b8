"""Figures of a training: how S', latent dimension, subspaces and capacity went."""

from collections import defaultdict
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lmd_hf.report.measures import COLORMAP
from lmd_hf.report.plane import MARKERS
from lmd_hf.training.series import Point


COLUMNS = 4
LINES = 12  # spectra in a panel, from the first step to the last
CURVES = {
    "latent_dim": "latent dimension n'",
    "subspace_cos2": "cos² to the first step",
    "spectrum_drift": "drift of S' from the first step",
    "capacity_log10": "capacity, log₁₀ K",
}


def figures(points: Sequence[Point]) -> dict[str, Figure]:
    """{name: figure}: `spectra` and `evolution`; none before the first point."""
    return {"spectra": spectra(points), "evolution": evolution(points)} if points else {}


def spectra(points: Sequence[Point]) -> Figure:
    """σᵢ against i/k, one panel a role, one line a step: the median over the role's matrices of one size."""
    roles = _by_role(points)
    rows = -(-len(roles) // COLUMNS)
    figure = Figure(figsize=(3.0 * min(COLUMNS, len(roles)) + 1.0, 2.5 * rows + 0.6), layout="constrained")
    last = max(point.step for point in points)
    shades = matplotlib.colormaps[COLORMAP]
    for index, (role, group) in enumerate(roles.items()):
        axes = figure.add_subplot(rows, min(COLUMNS, len(roles)), index + 1)
        sizes = [(p.short_side, p.singular_value_ranks) for p in group]
        size = max(set(sizes), key=sizes.count)
        by_step = _by_step([p for p in group if (p.short_side, p.singular_value_ranks) == size])
        shown = np.unique(np.linspace(0, len(by_step) - 1, min(LINES, len(by_step))).round().astype(int))
        for step in np.array(list(by_step))[shown]:
            values = np.median([p.singular_values for p in by_step[int(step)]], axis=0)
            axes.plot(np.array(size[1]) / size[0], values, color=shades(step / max(last, 1)), linewidth=0.9)
        axes.set_title(role, fontsize="medium")
        axes.set(xlim=(0, 1))
        axes.grid(alpha=0.25)
    figure.colorbar(ScalarMappable(Normalize(0, last), COLORMAP), ax=figure.axes, label="step", shrink=0.8)
    figure.suptitle("S' during training: σᵢ against i / k, median of each role", fontsize="medium")
    return figure


def evolution(points: Sequence[Point]) -> Figure:
    """One panel a measure, one line a role: the median over its matrices, each at its last point so far."""
    figure = Figure(figsize=(3.4 * len(CURVES), 3.4), layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    for number, (role, group) in enumerate(_by_role(points).items()):
        for axes, name in zip(panels, CURVES, strict=True):
            steps, medians = _curve(group, name)
            marker = MARKERS[number % len(MARKERS)] if len(steps) < LINES else ""
            axes.plot(steps, medians, linewidth=1.0, marker=marker, markersize=3, label=role)
    for axes, title in zip(panels, CURVES.values(), strict=True):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    return figure


def _curve(group: Sequence[Point], name: str) -> tuple[list[int], list[float]]:
    """The median over matrices at each step at which one was measured."""
    known: dict[tuple[str, str], float] = {}
    medians = {}
    for step, measured in _by_step(group).items():
        known |= {(p.name, p.part): getattr(p, name) for p in measured if getattr(p, name) is not None}
        if known:
            medians[step] = float(np.median(list(known.values())))
    return list(medians), list(medians.values())


def _by_role(points: Sequence[Point]) -> dict[str, list[Point]]:
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        groups[" ".join(word for word in (point.stack, point.block, point.role) if word)].append(point)
    return groups


def _by_step(points: Sequence[Point]) -> dict[int, list[Point]]:
    groups: dict[int, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.step].append(point)
    return dict(sorted(groups.items()))
