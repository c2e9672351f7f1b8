"""The model-card section: Markdown made from the report alone."""

import dataclasses
import re
import shlex
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lmd_hf.records import Data, MatrixReport, Settings
from lmd_hf.report import heads
from lmd_hf.report.findings import extremes
from lmd_hf.report.sparkline import sparklines
from lmd_hf.report.text import (
    DATA_COLUMNS,
    DATA_LEGEND,
    ROLE_COLUMNS,
    bound,
    by_role,
    convergence_lines,
    coverage_line,
    data_rows,
    matrix_label,
    role_row,
    rounded,
)


if TYPE_CHECKING:
    from lmd_hf.report.report import Report

LATENT = {
    False: "how many of those directions stand above the matrix's own noise (where none does: how many hold 90 % of "
    "its energy)",
    True: "how many of those directions hold 90 % of the outputs' energy over the data",
}
NO_RESULT = ("device", "rank")  # where it runs, and factors that are written beside the report
DEFAULTS = {field.name: field.default for record in (Settings, Data) for field in dataclasses.fields(record)}


def section(report: "Report", *, figure: str | None = None) -> str:
    """The whole section, from its heading to what it does not say; ends with a newline. `figure` is the address of the
    layer × role map, shown with its numbers as text."""
    parts = [
        "## Layer Matrix Decomposition",
        _reading(report),
        f"**Coverage:** {escape(coverage_line(report.coverage))}.",
        "".join(f"- {escape(note)}\n" for note in report.coverage.notes),
        _roles(report),
        _layers(report, figure),
        _of_data(report),
        _extremes(report),
        heads.section(report.heads),
        _findings(report),
        _reproduce(report),
        f"**What this does not say.** These numbers come from {_evidence(report)}. They do not measure quality, "
        "safety or accuracy, and a capacity is a theoretical bound under its model's assumptions (random patterns, a "
        "polynomial energy), not a count of what the model remembers.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Text from a repository as inert Markdown: no HTML, no links, no table cells, no line breaks, no markers."""
    flat = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", flat)


def command(*words: str) -> str:
    """A command to paste into a shell, each word quoted where a shell would take it apart. Nothing in it may leave the
    code span that it stands in."""
    return re.sub(r"[`<>|\s]+", " ", shlex.join(words))


def options(settings: dict[str, Any]) -> list[str]:
    """The options of a command line that change a result, for the settings that are not as by default."""
    words: list[str] = []
    for name, value in settings.items():
        if not value or value == DEFAULTS.get(name) or name in NO_RESULT:
            continue
        option, text = f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)
        words += [option] if value is True else [f"{option}={text}"] if text.startswith("-") else [option, text]
    return words


def _reading(report: "Report") -> str:
    count = len(report.matrices)
    metric = report.settings["metric"]
    spectrum = "its singular values" if metric == "identity" else f"its singular values in the `{metric}` metric"
    return (
        f"Each of {count} weight matrices is read as five factors, `W = U · Odist · S' · Idist · Vᵀ` "
        "([arXiv 2309.05968](https://arxiv.org/abs/2309.05968)): what it listens for (V), how sharply it separates "
        f"(S', here {spectrum}) and where it writes (U). The latent dimension is {LATENT[metric == 'data']}, and the "
        "effective rank how many carry weight at all."
    )


def _roles(report: "Report") -> str:
    rows = [[escape(cell) for cell in role_row(*item)] for item in by_role(report.matrices)]
    return tabulate(rows, headers=ROLE_COLUMNS, tablefmt="pipe", disable_numparse=True) + (
        "\n\nMedian over the matrices of a role, with the least and the largest in brackets."
    )


def _layers(report: "Report", figure: str | None) -> str:
    """The picture, and under it (or alone) the same as text."""
    drawn = sparklines(report.matrices)
    if not drawn:
        return ""
    title = "Effective rank over the short side, from the first layer to the last"
    picture = "" if figure is None else f"![{title}; latent dimension; capacity]({figure})\n\n"
    return f"{picture}{title} (▁ 0, █ 1):\n\n```text\n{drawn}\n```"


def _of_data(report: "Report") -> str:
    rows = [[escape(cell) for cell in row] for row in data_rows(report.matrices)]
    return (
        f"{tabulate(rows, headers=DATA_COLUMNS, tablefmt='pipe', disable_numparse=True)}\n\n{DATA_LEGEND}"
        if rows
        else ""
    )


def _evidence(report: "Report") -> str:
    data = report.settings.get("data")
    return "the weights alone" if not data else f"the weights and one dataset ({escape(data['dataset'])}) alone"


def _extremes(report: "Report") -> str:
    most, least = extremes(report.matrices)
    if not most:
        return ""
    return (
        f"**Most compressed** (participation ratio, against noise of the same shape): {_listed(most)}.  \n"
        f"**Least compressed:** {_listed(least)}."
    )


def _listed(items: list[tuple[float, MatrixReport]]) -> str:
    return ", ".join(
        f"{escape(_where(matrix))} ({rounded(1)(matrix.participation_ratio)} of {min(matrix.shape)})"
        for _, matrix in items
    )


def _where(matrix: MatrixReport) -> str:
    label = matrix_label(matrix)
    return label if matrix.layer is None else f"layer {matrix.layer} {label}"


def _findings(report: "Report") -> str:
    lines = [
        f"- *{finding.signature}*: {finding.status}"
        + ("" if finding.status == "not found" else f" — {escape(finding.text)}")
        + (
            ""
            if finding.threshold is None
            else f" (measure: {escape(finding.measure)}; threshold {finding.threshold:g})"
        )
        for finding in report.findings
    ]
    verdict, *evidence = map(escape, convergence_lines(report.convergence))
    return "\n".join([*lines, f"- *convergence*: {verdict}", *(f"  - {piece}" for piece in evidence)])


def _reproduce(report: "Report") -> str:
    model, settings = report.model, report.settings
    chosen = options({**settings, **(settings.get("data") or {}), "data": None})
    told = {"--revision": model.commit, "--subfolder": model.subfolder, "--base": model.base}
    where = [word for name, value in told.items() if value for word in (name, value)]
    line = command("lmd-hf", "analyze", model.id, *where, *chosen)
    return f"**Reproduce:** `{line}` (lmd_hf {report.lmd_hf}). {_accuracy(report.matrices)}"


def _accuracy(matrices: tuple[MatrixReport, ...]) -> str:
    exact = max((m.error_bound for m in matrices if m.intervals is None), default=0.0)
    sketched = [m for m in matrices if m.intervals is not None]
    if not sketched:
        return (
            f"Every singular value above 10⁻⁶ of the largest is within {bound(exact)} of its exact value, relatively."
        )
    told = (
        f"{len(sketched)} of {len(matrices)} matrices are sketched: their leading singular values are within "
        f"{bound(max(m.error_bound for m in sketched))} of the exact ones, relatively, and their other numbers are "
        "estimates whose 95 % intervals stand in the report."
    )
    if len(sketched) == len(matrices):
        return told
    return f"{told} In all others every singular value above 10⁻⁶ of the largest is within {bound(exact)}."
