"""The model-card section of a comparison: Markdown made from the comparison alone."""

from typing import TYPE_CHECKING

from tabulate import tabulate

from lmd_hf.changes import MatrixChange
from lmd_hf.report.card import command, escape, options
from lmd_hf.report.compare_text import ROLE_COLUMNS, headlines, identity, role_row, share, unmatched_lines
from lmd_hf.report.text import by_role, matrix_label


if TYPE_CHECKING:
    from lmd_hf.report.compare import Comparison

MOST, LISTED = 3, 10


def section(comparison: "Comparison") -> str:
    """The whole section, from its heading to what it does not say; ends with a newline."""
    parts = [
        "## What changed in the weights",
        f"Every weight matrix of {escape(identity(comparison.tuned))} against the same one of "
        f"{escape(identity(comparison.base))}, as {_kinds()}",
        "\n".join(f"- {escape(line)}" for line in [*headlines(comparison), *comparison.coverage["notes"]]),
        _roles(comparison),
        _most_changed(comparison),
        "\n".join(f"- {escape(line)}" for line in unmatched_lines(comparison, LISTED)),
        _reproduce(comparison),
        "**What this does not say.** These numbers come from the weights alone. A large change is not a better or a "
        "worse model, and a small one may matter: they do not measure quality, safety or accuracy.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _kinds() -> str:
    return (
        "the difference `ΔW = W_tuned − W_base`, the drift of the singular values S' and the angles between the "
        "leading singular subspaces. The update rank counts the directions of ΔW that rounding both models to their "
        "storage format cannot explain, and `90 % energy` those that hold nine tenths of ‖ΔW‖². cos² is 1 where the "
        "top n' directions that a matrix writes to (out) or listens for (in) span the same space as before."
    )


def _roles(comparison: "Comparison") -> str:
    if not comparison.matrices:
        return ""
    rows = [[escape(cell) for cell in role_row(*item)] for item in by_role(comparison.matrices)]
    return tabulate(rows, headers=ROLE_COLUMNS, tablefmt="pipe", disable_numparse=True) + (
        "\n\nMedian over the matrices of a role, with the least and the largest in brackets."
    )


def _most_changed(comparison: "Comparison") -> str:
    """The matrices that moved most, relatively to their size."""
    changed = [(m.relative_update, m) for m in comparison.matrices if m.relative_update]
    ranked = sorted(changed, key=lambda item: -item[0])[:MOST]
    if not ranked:
        return ""
    return f"**Changed most:** {', '.join(f'{escape(_where(m))} ({share(size)})' for size, m in ranked)}."


def _where(matrix: MatrixChange) -> str:
    label = matrix_label(matrix)
    return label if matrix.layer is None else f"layer {matrix.layer} {label}"


def _reproduce(comparison: "Comparison") -> str:
    base, tuned = comparison.base, comparison.tuned
    sides = (("base", base), ("tuned", tuned))
    pinned = [word for side, model in sides if model.commit for word in (f"--{side}-revision", model.commit)]
    line = command("lmd-hf", "compare", base.id, tuned.id, *pinned, *options(comparison.settings))
    return f"**Reproduce:** `{line}` (lmd_hf {comparison.lmd_hf})."
