"""Figures of the experiments: panels side by side, dots for seeds around their mean. No state, no display."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter


WIDTH, HEIGHT = 3.4, 3.0  # of a panel, inches


def panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A row of panels with these titles."""
    figure = Figure(figsize=(WIDTH * len(titles), HEIGHT), layout="constrained")
    axes = [figure.add_subplot(1, len(titles), place + 1) for place in range(len(titles))]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize="medium")
        ax.grid(alpha=0.25)
    return figure, axes


def dots(axes: Axes, label: str, groups: Mapping[Any, Sequence[float]]) -> None:
    """The mean of each group, joined by a line where the groups are numbers, and a small dot for every seed."""
    style = "o" if any(isinstance(name, str) for name in groups) else "-"
    means = [statistics.fmean(values) for values in groups.values()]
    (line,) = axes.plot(list(groups), means, style, label=label, markersize=5)
    for place, values in groups.items():
        axes.plot([place] * len(values), list(values), ".", color=line.get_color(), markersize=3, alpha=0.5)


def doublings(axes: Axes) -> None:
    """A logarithmic vertical axis labelled 1, 2, 4, 8 …"""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([2.0**power for power in range(11)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
