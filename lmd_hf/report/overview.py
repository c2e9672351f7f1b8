"""A report in plain words and key figures, as HTML with every name escaped: the first thing that a reader sees."""

import html
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from lmd_hf.records import MatrixReport
from lmd_hf.report import heads
from lmd_hf.report.compare_text import ROLE_COLUMNS as CHANGE_COLUMNS
from lmd_hf.report.compare_text import headlines, identity, share, total_change
from lmd_hf.report.compare_text import role_row as change_row
from lmd_hf.report.text import ROLE_COLUMNS, by_role, convergence_lines, counted, percent, role_row


if TYPE_CHECKING:
    from lmd_hf.report.compare import Comparison
    from lmd_hf.report.report import Report

SKIPPED = 50  # tensors that the list of what was left out names
LATENT = "stand above the matrix’s own noise or, where none does, hold 90 % of its energy."
MARKS = {"found": "!", "not found": "✓", "not measured": "–"}


def overview(report: "Report") -> str:
    """Key figures, a reading in sentences, roles, findings, convergence and what was left out."""
    coverage = report.coverage
    tiles = [
        ("parameters", in_units(coverage.parameters)),
        ("decomposed", percent(coverage.fraction)),
        ("matrices", f"{len(report.matrices):,}"),
        ("effective rank, median share", _percent(_shares(report.matrices))),
        *([("attention heads", f"{len(report.heads):,}")] if report.heads else []),
        ("convergence", report.convergence.verdict),
    ]
    return (
        f'<section class="lmd-overview" aria-label="Overview">{_tiles(tiles)}'
        f"{''.join(f'<p>{sentence}</p>' for sentence in reading(report))}"
        f"<h3>By role</h3>{_table([role_row(*each) for each in by_role(report.matrices)], ROLE_COLUMNS)}"
        "<p class='lmd-note'>Median over the matrices of a role, with the least and the largest in brackets.</p>"
        f"<h3>Findings</h3>{_findings(report)}{_left_out(report)}</section>"
    )


def reading(report: "Report") -> list[str]:
    """What the numbers say, a sentence each, as HTML."""
    coverage, matrices = report.coverage, report.matrices
    shares = {role: value for role, group in by_role(matrices) if (value := _median(_shares(group))) is not None}
    told = [
        f"{counted(len(matrices), 'weight matrix holds', 'weight matrices hold')} {coverage.decomposed:,} of the "
        f"model’s {coverage.parameters:,} parameters."
    ]
    if matrices:
        told[0] += " Each is read as five factors: what it listens for, how sharply it separates, where it writes."
    if shares:
        told.append(f"A typical matrix spreads its weight over {_percent(_shares(matrices))} of its directions.")
    if len(shares) > 1:
        least, most = min(shares, key=lambda role: shares[role]), max(shares, key=lambda role: shares[role])
        told[-1] += (
            f" <b>{html.escape(least)}</b> is the most concentrated role ({shares[least]:.0%}), "
            f"<b>{html.escape(most)}</b> the most even one ({shares[most]:.0%})."
        )
    data = report.settings.get("data")
    cut = [m.latent_dim / min(m.shape) for m in matrices if m.latent_dim]
    if cut:
        told.append(
            f"Its latent dimension n' is {statistics.median(cut):.0%} of them: the directions that "
            + ("hold 90 % of the outputs’ energy over the data." if data else LATENT)
        )
    if report.heads:
        auto, copying = len(heads.auto_associative(report.heads)), len(heads.copiers(report.heads))
        told.append(
            f"Of {counted(len(report.heads), 'attention head', 'attention heads')}, {copying} mostly copy what they "
            f"read and {auto} look up their own kind (auto-associative)."
        )
    source = f"the weights and one dataset ({html.escape(data['dataset'])})" if data else "the weights"
    told.append(f"These numbers come from {source} alone; they say nothing about quality, safety or accuracy.")
    return told


def changes(comparison: "Comparison") -> str:
    """A comparison: key figures, what was compared, roles."""
    matrices = comparison.matrices
    ranks = [m.update_rank / min(m.shape) for m in matrices]
    tiles = [
        ("change as a whole", share(total_change(comparison))),
        ("matrices compared", f"{len(matrices):,}"),
        ("identical", f"{sum(m.identical for m in matrices):,}"),
        ("update rank, median share", _percent(ranks)),
    ]
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in headlines(comparison))
    names = f"{html.escape(identity(comparison.base))} → {html.escape(identity(comparison.tuned))}"
    return (
        f'<section class="lmd-overview" aria-label="Comparison"><p><b>{names}</b></p>{_tiles(tiles)}<ul>{lines}</ul>'
        f"<h3>By role</h3>{_table([change_row(*each) for each in by_role(matrices)], CHANGE_COLUMNS)}</section>"
    )


def _tiles(tiles: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="lmd-tiles">{cells}</dl>'


def _table(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    made = tabulate(rows, headers=columns, tablefmt="html", disable_numparse=True)
    region = '<div class="lmd-scroll" tabindex="0" role="region" aria-label="By role">'
    return f"{region}{made.replace('<th>', '<th scope=col>')}</div>"


def _findings(report: "Report") -> str:
    items = "".join(
        f"<li><span class='lmd-mark' aria-hidden='true'>{MARKS[each.status]}</span> "
        f"<b>{html.escape(each.signature)}</b>: "
        f"{each.status} ({html.escape(each.text)})</li>"
        for each in report.findings
    )  # fmt: skip
    verdict, *evidence = map(html.escape, convergence_lines(report.convergence))
    pieces = "".join(f"<li>{piece}</li>" for piece in evidence)
    return f"<ul class='lmd-findings'>{items}<li><b>convergence</b>: {verdict}<ul>{pieces}</ul></li></ul>"


def _left_out(report: "Report") -> str:
    skipped, notes = report.coverage.skipped, report.coverage.notes
    if not skipped and not notes:
        return ""
    items = [f"{s.name} ({' × '.join(map(str, s.shape))}): {s.reason}" for s in skipped[:SKIPPED]]
    if len(skipped) > SKIPPED:
        items.append(f"… and {len(skipped) - SKIPPED} more; report.json names them all")
    listed = "".join(f"<li>{html.escape(item)}</li>" for item in [*notes, *items])
    return f"<details><summary>Not decomposed: {len(skipped)} tensors, and why</summary><ul>{listed}</ul></details>"


def _shares(matrices: Iterable[MatrixReport]) -> list[float]:
    return [m.effective_rank / min(m.shape) for m in matrices if m.effective_rank is not None]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _percent(values: Sequence[float]) -> str:
    middle = _median(values)
    return "–" if middle is None else f"{middle:.0%}"


def in_units(count: int) -> str:
    """A count to three digits: `8.03 B`."""
    rounded = float(f"{count:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if rounded >= size:
            return f"{rounded / size:g} {unit}"
    return str(count)
