"""A report as one interactive page that stands alone: no server, no network, nothing beside the file."""

import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly
from plotly.offline import get_plotlyjs

from lmd_hf.circuits import HeadReport
from lmd_hf.records import MatrixReport
from lmd_hf.report import interactive
from lmd_hf.report.heads import MEASURES as HEAD_MEASURES
from lmd_hf.report.measures import CUT, MEASURES, NOISE, SIGNAL
from lmd_hf.report.plain import plain
from lmd_hf.report.text import COLUMNS, matrix_row


if TYPE_CHECKING:
    from lmd_hf.report.report import Report

POINTS = 128  # of each spectrum: enough for a line on any screen
DIGITS = 5


def page(report: "Report") -> str:
    """The whole report: overview, maps, spectra of the cells that are clicked, heads, capacity, a table to search."""
    places = files("lmd_hf.report")
    plane = interactive.plane(report)
    data = {
        "layouts": _layouts(report),
        "matrices": {interactive.matrix_key(m): _spectrum(m) for m in report.matrices},
        "heads": {interactive.head_key(h): _circuit(h) for h in report.heads},
        "plane": None if plane is None else json.loads(plane.to_json()),
        "colors": {"signal": SIGNAL, "noise": NOISE, "cut": CUT},
    }
    maps = {name: interactive.layer_table(report.matrices, name, measure) for name, measure in MEASURES.items()}
    heads = {name: interactive.head_grid(report.heads, name) for name in HEAD_MEASURES} if report.heads else {}
    filled = {
        "TITLE": html.escape(f"{report.model.id}: Layer Matrix Decomposition"),
        "MODEL": html.escape(report.model.id),
        "COMMIT": html.escape(f"commit {report.model.commit[:12]}, " if report.model.commit else ""),
        "VERSION": html.escape(report.lmd_hf),
        "STYLE": interactive.STYLE + (places / "page.css").read_text(encoding="utf-8"),
        "OVERVIEW": interactive.overview(report),
        "MAPS": _choices("measure", maps),
        "HEADS": _choices("head-measure", heads),
        "TABLE": _table(report),
        "DATA": json.dumps(data).replace("<", "\\u003c"),  # no name may end the script
        "SCRIPT": (places / "page.js").read_text(encoding="utf-8"),
        "PLOTLY": get_plotlyjs(),
        "PLOTLY_VERSION": plotly.__version__,
    }
    template = (places / "page.html").read_text(encoding="utf-8")
    pieces = template.split("@@")  # text, name, text, name, … text
    return "".join(filled[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _spectrum(matrix: MatrixReport) -> dict[str, Any]:
    ranks = np.array(matrix.singular_value_ranks or range(1, len(matrix.singular_values) + 1))
    kept = np.unique(np.linspace(0, len(ranks) - 1, min(POINTS, len(ranks))).round().astype(int))
    return {
        "title": interactive.title(matrix),
        "ranks": ranks[kept].tolist(),
        "values": _round(matrix.singular_values[kept]),
        "energy": _round(interactive.energy_shares(matrix)[kept]),
        "edge": matrix.mp_edge if matrix.metric == "identity" else None,
        "cut": matrix.latent_dim,
        "told": f"{matrix.shape[0]:,} × {matrix.shape[1]:,}; " + ", ".join(
            f"{name} {value}" for name, value in zip(COLUMNS[3:], matrix_row(matrix)[3:], strict=True)
        ),
    }  # fmt: skip


def _round(values: Any) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in plain(list(values))]


def _layouts(report: "Report") -> dict[str, Any]:
    """The layout of each kind of figure, without what belongs to one matrix."""
    figures: dict[str, Any] = {}
    if report.matrices:
        first = report.matrices[0]
        figures |= {"spectrum": interactive.spectrum(first), "energy": interactive.energy(first)}
    if report.heads:
        figures["circuit"] = interactive.circuit(report.heads[0])
    own = ("shapes", "annotations", "template")
    layouts = {name: json.loads(figure.to_json())["layout"] for name, figure in figures.items()}
    return {name: {k: v for k, v in layout.items() if k not in own} for name, layout in layouts.items()}


def _circuit(head: HeadReport) -> dict[str, Any]:
    return {
        "title": interactive.head_title(head),
        "qk": _round(head.qk_singular_values),
        "ov": _round(head.ov_singular_values),
    }


def _choices(name: str, tables: dict[str, str]) -> str:
    """A list to choose from, and one table that shows at a time."""
    if not tables:
        return ""
    options = "".join(f"<option>{html.escape(label)}</option>" for label in tables)
    shown = "".join(
        f'<div data-measure="{html.escape(label)}"{" hidden" if index else ""}>{table}</div>'
        for index, (label, table) in enumerate(tables.items())
    )
    return f'<label>Measure <select id="{name}">{options}</select></label><div class="lmd-maps">{shown}</div>'


def _table(report: "Report") -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in (*COLUMNS, "name"))
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in (*matrix_row(m), interactive.matrix_key(m)))}</tr>"
        for m in report.matrices
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
