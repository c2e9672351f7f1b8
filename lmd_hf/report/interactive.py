"""Figures of a report for a browser, in plotly: the colours and the reading of `plots`, to hover over and to zoom.

Backgrounds are transparent and lines readable on white and on black, so that the page around them decides the mode.
Needs plotly (`pip install 'lmd-hf[space]'`).
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from lmd_hf.changes import MatrixChange
from lmd_hf.circuits import HeadReport
from lmd_hf.matrix.noise import mp_density
from lmd_hf.records import MatrixReport
from lmd_hf.report.findings import label as matrix_key
from lmd_hf.report.grid import STYLE, head_grid, head_key, layer_table
from lmd_hf.report.heads import MEASURES as HEAD_MEASURES
from lmd_hf.report.measures import CHANGES, CUT, MEASURES, NOISE, SIGNAL
from lmd_hf.report.overview import changes, overview
from lmd_hf.report.pictures import Factors, pictures
from lmd_hf.report.plane import points
from lmd_hf.report.text import matrix_label


if TYPE_CHECKING:
    from lmd_hf.report.report import Report

__all__ = [
    "CHANGES",
    "HEAD_MEASURES",
    "MEASURES",
    "STYLE",
    "Factors",
    "changes",
    "circuit",
    "density",
    "energy",
    "energy_shares",
    "head_grid",
    "head_key",
    "head_title",
    "layer_table",
    "matrix_key",
    "overview",
    "pictures",
    "plane",
    "spectrum",
    "title",
    "update",
]
GREY = "#808080"  # of axes: 4 : 1 on white and 5 : 1 on black
HEIGHT = 320
BINS = 48
MARKERS = ("circle", "square", "diamond", "triangle-down", "triangle-up", "triangle-left", "triangle-right", "star")


def title(matrix: MatrixReport | MatrixChange) -> str:
    """`layer 3, attention q`, with the part where one tensor holds several."""
    where = matrix_label(matrix) if matrix.layer is None else f"layer {matrix.layer}, {matrix_label(matrix)}"
    return f"{where} ({matrix.part})" if matrix.part and matrix.part not in where else where


def head_title(head: HeadReport) -> str:
    """`layer 3, attention head 2`."""
    where = " ".join(filter(None, (head.stack, head.block, f"head {head.head}")))
    return where if head.layer is None else f"layer {head.layer}, {where}"


def spectrum(matrix: MatrixReport, *, log: bool = True) -> go.Figure:
    """σᵢ against i, with the Marchenko–Pastur edge (what noise of this shape reaches) and the cut at n'."""
    values = matrix.singular_values
    figure = _figure("i", "σᵢ", log=log)
    figure.add_scatter(x=_ranks(matrix), y=values, mode="lines", name="σᵢ", line={"color": SIGNAL, "width": 2.5})
    if matrix.mp_edge is not None and matrix.metric == "identity":
        _level(figure, matrix.mp_edge, "noise edge")
    if matrix.latent_dim:
        _cut(figure, matrix.latent_dim)
    return figure


def density(matrix: MatrixReport) -> go.Figure | None:
    """How many singular values lie where, beside what noise with this bulk would have (Marchenko & Pastur 1967).

    p(σ) = 2σ/v · f(σ²/v), v the noise level of the bulk. `None` where noise has no such law: in another metric, or in
    a sketch, which holds the leading values alone.
    """
    if matrix.mp_edge is None or matrix.metric != "identity" or matrix.intervals is not None or not matrix.mp_edge:
        return None
    beta = min(matrix.shape) / max(matrix.shape)
    level = (matrix.mp_edge / (1 + math.sqrt(beta))) ** 2
    sigma = np.linspace(0, 1.05 * max(matrix.mp_edge, float(matrix.singular_values[0])), 400)
    shares, edges = np.histogram(matrix.singular_values, bins=BINS, density=True)
    figure = _figure("σ", "density")
    figure.add_bar(
        x=(edges[1:] + edges[:-1]) / 2, y=shares, width=np.diff(edges), name="this matrix", marker_color=SIGNAL
    )
    law = 2 * sigma / level * mp_density(sigma**2 / level, beta)
    figure.add_scatter(x=sigma, y=law, mode="lines", name="noise", line={"color": NOISE, "width": 2.5})
    figure.update_layout(bargap=0.02)
    return figure


def energy_shares(matrix: MatrixReport) -> np.ndarray:
    """Σσ² of the leading i singular values as a share of all."""
    ranks, values = np.array(_ranks(matrix), dtype=float), matrix.singular_values**2
    steps = np.diff(ranks, prepend=0.0)  # of a thinned spectrum each value stands for those before it
    if matrix.intervals is not None and matrix.frobenius_norm:
        return np.cumsum(steps * values) / matrix.frobenius_norm**2
    return np.cumsum(steps * values) / max(float((steps * values).sum()), 1e-300)


def energy(matrix: MatrixReport) -> go.Figure:
    """Σσ² of the leading i singular values as a share of all, with the cut at n'."""
    figure = _figure("i", "share of the energy")
    figure.add_scatter(
        x=_ranks(matrix), y=energy_shares(matrix), mode="lines", name="energy", line={"color": SIGNAL, "width": 2.5}
    )
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    if matrix.latent_dim:
        _cut(figure, matrix.latent_dim)
    return figure


def circuit(head: HeadReport) -> go.Figure:
    """The spectra of a head's QK (which memories it finds) and OV (what it writes)."""
    figure = _figure("i", "σᵢ", log=True)
    for name, values, color in (("QK", head.qk_singular_values, SIGNAL), ("OV", head.ov_singular_values, NOISE)):
        ranks = list(range(1, len(values) + 1))
        dash = "solid" if name == "QK" else "dash"
        figure.add_scatter(
            x=ranks, y=list(values), mode="lines", name=name, line={"color": color, "width": 2.5, "dash": dash}
        )
    return figure


def update(matrix: MatrixChange) -> go.Figure:
    """σᵢ(ΔW) against i, with the cut at the update rank: beyond it rounding explains the rest."""
    figure = _figure("i", "σᵢ of the difference", log=True)
    shown = [(rank, value) for rank, value in zip(_ranks(matrix), matrix.singular_values, strict=True) if value > 0]
    figure.add_scatter(
        x=[rank for rank, _ in shown], y=[value for _, value in shown], mode="lines", name="σᵢ(ΔW)",
        line={"color": SIGNAL, "width": 2.5},
    )  # fmt: skip
    if matrix.update_rank:
        _cut(figure, matrix.update_rank, f"update rank {matrix.update_rank:,}")
    return figure


def plane(report: "Report") -> go.Figure | None:
    """log₁₀ K against expressivity, one mark a matrix or a head: shape for the role, colour for the layer."""
    groups = {
        role: [point for point in group if None not in point[1:]] for role, group in points(report).items()
    }  # (layer, expressivity, log₁₀ K)
    if not any(groups.values()):
        return None
    last = max((layer for group in groups.values() for layer, _, _ in group if layer is not None), default=0)
    figure = _figure("expressivity: entropy / ln k (colour: layer, the first dark)", "capacity, log₁₀ K")
    for index, (role, group) in enumerate(groups.items()):
        layers = [layer for layer, _, _ in group]
        marker = {
            "symbol": MARKERS[index % len(MARKERS)],
            "size": 9,
            "color": [-1 if layer is None else layer for layer in layers],
            "colorscale": "Viridis",
            "cmin": 0,
            "cmax": max(last, 1),
            "line": {"width": 1, "color": GREY},
        }
        figure.add_scatter(
            x=[x for _, x, _ in group], y=[y for _, _, y in group], mode="markers", name=role, marker=marker,
            text=["" if layer is None else f"layer {layer}" for layer in layers],
            hovertemplate="%{text} %{x:.3f}, %{y:.2f}",
        )  # fmt: skip
    figure.update_layout(height=HEIGHT + 120, showlegend=True)
    return figure


def _ranks(row: MatrixReport | MatrixChange) -> tuple[int, ...]:
    return row.singular_value_ranks or tuple(range(1, len(row.singular_values) + 1))


def _figure(horizontal: str, vertical: str, *, log: bool = False) -> go.Figure:
    axis: dict[str, Any] = {
        "gridcolor": "rgba(128,128,128,0.25)",
        "zeroline": False,
        "linecolor": GREY,
        "fixedrange": True,
    }
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": GREY, "family": "system-ui, sans-serif", "size": 13},
            "height": HEIGHT,
            "margin": {"l": 64, "r": 16, "t": 28, "b": 48},
            "hovermode": "closest",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "xaxis": {"title": {"text": horizontal}, **axis},
            "yaxis": {
                "title": {"text": vertical}, "type": "log" if log else "linear", "exponentformat": "power", **axis,
            },
        }
    )  # fmt: skip


def _level(figure: go.Figure, value: float, label: str) -> None:
    """A horizontal line, named in the legend: plotly misplaces annotations on logarithmic axes."""
    ends = figure.data[0].x
    figure.add_scatter(
        x=[ends[0], ends[-1]], y=[value, value], mode="lines", name=label,
        line={"color": NOISE, "dash": "dash", "width": 2},
    )  # fmt: skip
    figure.update_layout(showlegend=True)


def _cut(figure: go.Figure, rank: int, label: str = "") -> None:
    figure.add_vline(
        x=rank, line={"color": CUT, "dash": "dot", "width": 2.5}, annotation_text=label or f"n' = {rank:,}",
        annotation_position="top right" if rank < 0.8 * max(figure.data[0].x[-1], 1) else "top left",
    )  # fmt: skip
