"""A report as plain text and as HTML."""

import html as markup
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import ROUND_CEILING, Context
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate

from lmd_hf.changes import MatrixChange
from lmd_hf.evidence import Convergence, LayerVerdict
from lmd_hf.records import Coverage, MatrixReport, Skipped
from lmd_hf.report.plain import Row
from lmd_hf.visible import visible


if TYPE_CHECKING:
    from lmd_hf.report.report import Report

COLUMNS = (
    "layer",
    "matrix",
    "shape",
    "effective rank",
    "latent dim",
    "stable rank",
    "spikes",
    "capacity",
    "error bound",
)
SHOWN_LAYERS = 12
EXPERT = re.compile(r"\bexperts\.(\d+)\.")
ONE_DIGIT_UP = Context(prec=1, rounding=ROUND_CEILING)


def summary(report: "Report") -> str:
    """Coverage, key figures by role, findings and convergence."""
    reused, published = report.environment.get("reused", 0), report.environment.get("published")
    lines = [
        visible(f"{report.model.id}{f' @ {report.model.commit[:12]}' if report.model.commit else ''}"),
        visible(coverage_line(report.coverage)),
        *(visible(f"note: {note}") for note in report.coverage.notes),
        *([f"spectra from an earlier run: {reused:,} (`lmd-hf cache clear` removes them)"] if reused else []),
        *([f"published result, from {published}"] if published else []),
        *filter(None, (kernels_line(report.matrices),)),
        "",
        tabulate([role_row(*item) for item in by_role(report.matrices)], headers=ROLE_COLUMNS, disable_numparse=True),
        "",
        *_of_data(report.matrices),
        *(visible(f"{f.signature}: {f.status} ({f.text})") for f in report.findings),
        *(visible(f"{'  ' if i else 'convergence: '}{t}") for i, t in enumerate(convergence_lines(report.convergence))),
    ]
    return "\n".join(lines)


def convergence_lines(convergence: Convergence) -> list[str]:
    """The verdict with the layers that have another, then a line for each piece of evidence."""
    pieces = []
    for piece in convergence.evidence:
        where = "" if piece.source.endswith(piece.kind) else f" ({piece.source})"
        pieces.append(f"{piece.kind}{where}: {piece.verdict}, {piece.text}")
    return [f"{convergence.verdict}{_odd_layers(convergence)}", *(pieces or ["no evidence was found"])]


def _odd_layers(convergence: Convergence) -> str:
    odd: dict[str, list[LayerVerdict]] = {}
    for each in convergence.layers:
        if each.verdict != convergence.verdict:
            odd.setdefault(each.verdict, []).append(each)
    return "".join(f"; {verdict} by themselves: {_places(layers)}" for verdict, layers in odd.items())


def _places(layers: list[LayerVerdict]) -> str:
    """`layers 0, 1 and 2 more, and what lies outside the layers`."""
    names = [f"{each.stack} {each.layer}".strip() for each in layers if each.layer is not None]
    more = f" and {len(names) - SHOWN_LAYERS} more" if len(names) > SHOWN_LAYERS else ""
    listed = f"layer{'s' if len(names) > 1 else ''} {', '.join(names[:SHOWN_LAYERS])}{more}" if names else ""
    outside = "what lies outside the layers" if len(names) < len(layers) else ""
    return ", and ".join(filter(None, (listed, outside)))


def _of_data(matrices: tuple[MatrixReport, ...]) -> list[str]:
    rows = data_rows(matrices)
    return [tabulate(rows, headers=DATA_COLUMNS, disable_numparse=True), DATA_LEGEND, ""] if rows else []


def coverage_line(coverage: Coverage) -> str:
    """How many of the stored parameters were decomposed, and why the others were not."""
    line = f"{coverage.decomposed:,} of {coverage.parameters:,} parameters decomposed ({percent(coverage.fraction)})"
    again = sum(math.prod(alias.shape) for alias in coverage.aliases if alias.stored)
    if coverage.skipped:
        size = coverage.parameters - coverage.decomposed - again
        line += f"; skipped {size:,}: {reasons(coverage.skipped)}"
    if coverage.aliases:
        line += f"; tied: {', '.join(f'{a.name} = {a.of}' for a in coverage.aliases)}"
        line += f", stored again: {again:,}" if again else ""
    return line


def reasons(skipped: Iterable[Skipped], most: int = 4) -> str:
    """`64 vector, 2 not selected, …`, the commonest first."""
    counts = Counter(_short(item.reason) for item in skipped).most_common()
    shown = ", ".join(f"{count} {reason}" for reason, count in counts[:most])
    return shown if len(counts) <= most else f"{shown}, {sum(c for _, c in counts[most:])} for other reasons"


def _short(reason: str) -> str:
    return "companion" if reason.startswith("companion of ") else reason


def counted(count: int, one: str, many: str) -> str:
    """`1 matrix`, `1,200 matrices`."""
    return f"{count:,} {one if count == 1 else many}"


def percent(fraction: float) -> str:
    """A share that says 100 % only when nothing is missing."""
    return "100 %" if fraction == 1 else f"{min(fraction * 100, 99.99):.2f} %"


DATA_COLUMNS = (
    *("role", "matrices", "energy in n'", "of plain SVD"),
    *("input dimension", "latent", "output", "topology τ"),
)
DATA_LEGEND = (
    "Energy in n': of the outputs' mean square, along the n' leading axes of S'; of plain SVD: along as many of W's "
    "own. Dimension: intrinsic, by maximum likelihood. Topology: median τ, 1 where neighbours stay neighbours. Median "
    "over the matrices of a role, with the least and the largest in brackets; standard errors and a second estimator "
    "(TwoNN) stand in report.json."
)
ESTIMATOR = "maximum_likelihood"
ROLE_COLUMNS = ("role", "matrices", "effective rank", "latent dim", "stable rank", "capacity (log10)")


def by_role(matrices: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Matrices grouped by stack, block and role, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for matrix in matrices:
        groups.setdefault(" ".join(filter(None, (matrix.stack, matrix.block, matrix.role))), []).append(matrix)
    return list(groups.items())


def role_row(role: str, matrices: list[MatrixReport]) -> tuple[str, ...]:
    """Median and range over the matrices of one role."""
    return (
        role,
        str(len(matrices)),
        spread([m.effective_rank for m in matrices], rounded(1)),
        spread([m.latent_dim for m in matrices], rounded(0)),
        spread([m.stable_rank for m in matrices], rounded(1)),
        spread([m.capacity_log10 for m in matrices], rounded(2)),
    )


def data_rows(matrices: Iterable[MatrixReport]) -> list[tuple[str, ...]]:
    """A row for each role that was measured in the metric of the data."""
    return [_data_row(role, rows) for role, rows in by_role(m for m in matrices if m.data is not None)]


def _data_row(role: str, matrices: list[MatrixReport]) -> tuple[str, ...]:
    figures = [m.data for m in matrices if m.data is not None]
    dimensions = [
        spread([found[0] for each in figures if (found := each.dimensions[place][ESTIMATOR])], rounded(1))
        for place in ("input", "latent", "output")
    ]
    return (
        role,
        str(len(matrices)),
        spread([each.metric_share for each in figures], _share),
        spread([each.weights_share for each in figures], _share),
        *dimensions,
        spread([_median(m.topology_spectrum) for m in matrices], rounded(2)),
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _median(values: np.ndarray | None) -> float | None:
    return None if values is None or len(values) == 0 else float(np.median(values))


def spread(values: Iterable[float | None], show: Callable[[float | None], str]) -> str:
    """`median (least–most)`, `–` where there is no number at all."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle = show(statistics.median(known))
    return middle if len(known) == 1 else f"{middle} ({show(min(known))}–{show(max(known))})"


def rounded(digits: int) -> Callable[[float | None], str]:
    """A formatter with that many decimals, one of a half between two whole numbers; `–` for no number."""
    return lambda value: "–" if value is None else f"{value:,.{digits or int(value % 1 == 0.5)}f}"


def bound(value: float) -> str:
    """A bound with one digit, rounded up: what is printed bounds too."""
    return f"{float(ONE_DIGIT_UP.create_decimal(repr(value))):.0e}"


def table(report: "Report", *, limit: int | None = None) -> str:
    """One line a matrix."""
    shown = report.matrices[:limit] if limit is not None else report.matrices
    text = tabulate([matrix_row(m) for m in shown], headers=COLUMNS, disable_numparse=True)
    rest = len(report.matrices) - len(shown)
    return f"{text}\n… and {rest} more" if rest else text


def matrix_row(matrix: MatrixReport) -> tuple[str, ...]:
    """The cells of `COLUMNS`."""
    return (
        "" if matrix.layer is None else str(matrix.layer),
        matrix_label(matrix),
        f"{matrix.shape[0]} × {matrix.shape[1]}",
        with_error(matrix, "effective_rank", 1),
        with_error(matrix, "latent_dim", 0),
        with_error(matrix, "stable_rank", 1),
        with_error(matrix, "mp_spikes", 0),
        "–" if matrix.capacity_log10 is None else f"10^{matrix.capacity_log10:.2f}",
        bound(matrix.error_bound),
    )


def with_error(matrix: MatrixReport, name: str, digits: int) -> str:
    """The number; of a sketched matrix with its interval, `6,595.2 ± 12.3` or, where it is lopsided, `2 (0–9)`."""
    value, ends = getattr(matrix, name), (matrix.intervals or {}).get(name)
    show = rounded(digits)
    if value is None or ends is None:
        return show(value) if matrix.intervals is None or value is None else f"≈ {show(value)}"
    above, below = ends[1] - value, value - ends[0]
    return (
        f"{show(value)} ± {show(math.ceil(above * 10**digits) / 10**digits)}"  # up: no estimate is shown as exact
        if math.isclose(above, below)
        else f"{show(value)} ({show(ends[0])}–{show(ends[1])})"
    )


def kernels_line(matrices: tuple[MatrixReport, ...]) -> str:
    """Which matrices are estimates, and which were to be sketched and ran exact; empty where all were planned exact."""
    asked = [m for m in matrices if m.kernel == "sketch"]
    sketched = sum(m.intervals is not None for m in asked)
    exact = f"; {len(asked) - sketched} ran exact, being small or beyond the tolerance" if sketched < len(asked) else ""
    return f"sketched: {sketched} of {len(matrices)} matrices, with 95 % intervals{exact}" if asked else ""


def matrix_label(matrix: MatrixReport | MatrixChange) -> str:
    """`attention q`, `moe up expert 3`; outside the blocks the tensor's own name."""
    if not matrix.block:
        return visible(matrix.name.removesuffix(".weight"))
    expert = matrix.part if matrix.part.startswith("expert") else ""
    expert = " ".join(word for word in expert.split() if word not in ("gate", "up"))
    if not expert and (own := EXPERT.search(matrix.name)) is not None:  # each in a tensor of its own
        expert = f"expert {own[1]}"
    return " ".join(filter(None, (matrix.stack, matrix.block, matrix.role, expert)))


def html(report: "Report") -> str:
    """For notebooks: the coverage line, the roles and every matrix, all names escaped."""
    roles = tabulate(
        [role_row(*i) for i in by_role(report.matrices)], headers=ROLE_COLUMNS, tablefmt="html", disable_numparse=True
    )
    rows = tabulate([matrix_row(m) for m in report.matrices], headers=COLUMNS, tablefmt="html", disable_numparse=True)
    return (
        f"<h4>{markup.escape(report.model.id)}</h4><p>{markup.escape(coverage_line(report.coverage))}</p>{roles}"
        f"<details><summary>{len(report.matrices)} matrices</summary>{rows}</details>"
    )
