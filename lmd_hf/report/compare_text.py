"""A comparison as plain text and as HTML."""

import html as markup
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from lmd_hf.changes import MatrixChange, Unmatched
from lmd_hf.records import ModelIdentity
from lmd_hf.report.text import by_role, matrix_label, percent, rounded, spread
from lmd_hf.visible import visible


if TYPE_CHECKING:
    from lmd_hf.report.compare import Comparison

COLUMNS = (
    "layer",
    "matrix",
    "shape",
    "ΔW / W",
    "update rank",
    "90 % energy",
    "drift of S'",
    "n'",
    "cos² out",
    "cos² in",
)
ROLE_COLUMNS = (
    "role",
    "matrices",
    "changed",
    "ΔW / W",
    "update rank",
    "90 % energy",
    "drift of S'",
    "cos² out",
    "cos² in",
)
WELL_DEFINED = "~ cos² of subspaces that rounding alone may turn: nearly equal singular values at n'"
LISTED = 20  # tensors without a partner that the summary names


def summary(comparison: "Comparison") -> str:
    """The two models, coverage, the change as a whole, key figures by role, and what was not compared."""
    roles = [role_row(*item) for item in by_role(comparison.matrices)]
    lines = [
        visible(f"{identity(comparison.base)} → {identity(comparison.tuned)}"),
        *map(visible, headlines(comparison)),
        *(visible(f"note: {note}") for note in comparison.coverage["notes"]),
        "",
        tabulate(roles, headers=ROLE_COLUMNS, disable_numparse=True),
        *(["", WELL_DEFINED] if any(m.degenerate for m in comparison.matrices) else []),
        *(["", *map(visible, unmatched_lines(comparison, LISTED))] if comparison.unmatched else []),
    ]
    return "\n".join(lines)


def identity(model: ModelIdentity) -> str:
    """`org/model @ 0123456789ab`."""
    return f"{model.id} @ {model.commit[:12]}" if model.commit else model.id


def headlines(comparison: "Comparison") -> list[str]:
    """What was compared, how much changed as a whole, and the vectors."""
    coverage, matrices, vectors = comparison.coverage, comparison.matrices, comparison.vectors
    same = sum(matrix.identical for matrix in matrices)
    lines = [
        f"{len(matrices)} matrices and {len(vectors)} vectors compared: {coverage['compared']:,} of "
        f"{coverage['parameters']:,} parameters of the base ({percent(coverage['fraction'])}); identical: {same}"
    ]
    if matrices:
        lines.append(f"change as a whole: ‖ΔW‖ is {share(total_change(comparison))} of ‖W‖, over all matrices")
    if renamed := [m for m in matrices if m.matched != "name"]:
        lines.append(f"{len(renamed)} matched by prefix or place, first {renamed[0].name} = {renamed[0].tuned_name}")
    if tied := [m for m in matrices if m.tied]:
        lines.append(f"tied in one model only: {', '.join(f'{m.name} (in the {m.tied})' for m in tied)}")
    lines += [f"{m.name}: {abs(m.tokens_added):,} rows {'added' if m.tokens_added > 0 else 'removed'}, "
              f"the first {_tokens(m):,} compared" for m in matrices if m.tokens_added]  # fmt: skip
    if changed := [v for v in vectors if v.largest_change > 0]:
        most = max(changed, key=lambda vector: vector.largest_change)
        lines.append(
            f"{len(changed)} of {len(vectors)} vectors changed, most {most.name} (by {most.largest_change:.2g})"
        )
    elif vectors:
        lines.append(f"0 of {len(vectors)} vectors changed")
    return lines


def total_change(comparison: "Comparison") -> float | None:
    """√Σ‖ΔW‖² / √Σ‖W‖² over all matrices; `None` if the base is all zero."""
    size = math.hypot(*(matrix.base_norm for matrix in comparison.matrices))
    return math.hypot(*(matrix.update_norm for matrix in comparison.matrices)) / size if size > 0 else None


def unmatched_lines(comparison: "Comparison", most: int) -> list[str]:
    """A line for each tensor that was not compared, the first `most` of them."""
    items = comparison.unmatched
    lines = [f"not compared ({item.side}): {label(item)}: {item.reason}" for item in items[:most]]
    return [*lines, f"… and {len(items) - most} more not compared"] if len(items) > most else lines


def label(item: Unmatched) -> str:
    """`name [part] (32 × 60)`."""
    return f"{item.name}{f' [{item.part}]' if item.part else ''} ({' × '.join(map(str, item.shape)) or 'scalar'})"


def role_row(role: str, matrices: list[MatrixChange]) -> tuple[str, ...]:
    """The cells of `ROLE_COLUMNS`: median and range over the matrices of one role."""
    return (
        role,
        str(len(matrices)),
        str(sum(not m.identical for m in matrices)),
        _range([m.relative_update for m in matrices], share),
        _range([m.update_rank for m in matrices], rounded(0)),
        _range([m.update_energy_rank_90 for m in matrices], rounded(0)),
        _range([m.spectrum_drift for m in matrices], share),
        _range([m.left_cos2 for m in matrices], overlap),
        _range([m.right_cos2 for m in matrices], overlap),
    )


def _range(values: Sequence[float | None], show: Callable[[float | None], str]) -> str:
    """`spread`, in one word where all are shown alike."""
    shown = {show(value) for value in values if value is not None}
    return shown.pop() if len(shown) == 1 else spread(values, show)


def table(comparison: "Comparison", *, limit: int | None = None) -> str:
    """One line a matrix."""
    shown = comparison.matrices[:limit] if limit is not None else comparison.matrices
    text = tabulate([change_row(m) for m in shown], headers=COLUMNS, disable_numparse=True)
    rest = len(comparison.matrices) - len(shown)
    return f"{text}\n… and {rest} more" if rest else text


def change_row(matrix: MatrixChange) -> tuple[str, ...]:
    """The cells of `COLUMNS`; `~` stands before cos² where the subspaces are not well defined."""
    about = "~" if matrix.degenerate else ""
    return (
        "" if matrix.layer is None else str(matrix.layer),
        matrix_label(matrix),
        f"{matrix.shape[0]} × {matrix.shape[1]}",
        share(matrix.relative_update),
        rounded(0)(matrix.update_rank),
        rounded(0)(matrix.update_energy_rank_90),
        share(matrix.spectrum_drift),
        rounded(0)(matrix.latent_dim),
        about + overlap(matrix.left_cos2),
        about + overlap(matrix.right_cos2),
    )


def share(value: float | None) -> str:
    """A part of a whole to two digits, `0` only for exactly none."""
    if value is None or value == 0:
        return "–" if value is None else "0"
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:,.0f} %"


def overlap(value: float | None) -> str:
    """A mean cos², `1` only for exactly one."""
    return "–" if value is None else "1" if value == 1 else f"{min(value, 0.9999):.4f}"


def _tokens(matrix: MatrixChange) -> int:
    return matrix.shape[1] if matrix.role == "embed" else matrix.shape[0]


def html(comparison: "Comparison") -> str:
    """For notebooks: the headlines, the roles and every matrix, all names escaped."""

    def page(rows: list[tuple[str, ...]], headers: tuple[str, ...]) -> str:
        return tabulate(rows, headers=headers, tablefmt="html", disable_numparse=True)

    title = markup.escape(f"{identity(comparison.base)} → {identity(comparison.tuned)}")
    lines = "".join(f"<p>{markup.escape(line)}</p>" for line in headlines(comparison))
    missing = "".join(f"<li>{markup.escape(line)}</li>" for line in unmatched_lines(comparison, LISTED))
    return (
        f"<h4>{title}</h4>{lines}{page([role_row(*i) for i in by_role(comparison.matrices)], ROLE_COLUMNS)}"
        f"<ul>{missing}</ul><details><summary>{len(comparison.matrices)} matrices</summary>"
        f"{page([change_row(m) for m in comparison.matrices], COLUMNS)}</details>"
    )
