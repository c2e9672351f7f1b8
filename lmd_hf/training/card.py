"""The section of a model card on a training: what became of each role's matrices, and the verdict."""

import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from lmd_hf.training.series import Point, latest


HEADERS = ("matrices", "count", "latent dim", "effective rank / k", "capacity, log₁₀", "cos² to the start")


def section(
    points: Sequence[Point], told: dict[str, Any], *, figure: str | None = None, loaded: int | None = None
) -> str:
    """Markdown; `told` is `LMDTracker.told`, `figure` the address of the picture from the card, `loaded` the step of
    the checkpoint that was loaded at the end as the best one."""
    first, last = latest(points[::-1]), latest(points)
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, point in last.items():
        groups.setdefault(" ".join(filter(None, (point.stack, point.block, point.role))), []).append(key)
    rows = [
        (
            role,
            len(keys),
            _change([first[k].latent_dim for k in keys], [last[k].latent_dim for k in keys], "g"),
            _change([_spread(first[k]) for k in keys], [_spread(last[k]) for k in keys], ".2f"),
            _change([first[k].capacity_log10 for k in keys], [last[k].capacity_log10 for k in keys], ".2f"),
            _median([last[k].subspace_cos2 for k in keys], ".3f"),
        )
        for role, keys in groups.items()
    ]
    steps = [point.step for point in points]
    verdict, skipped = told["convergence"], told["skipped"]
    lines = [
        "## Layer Matrix Decomposition during training",
        "",
        f"Medians over matrices, from step {min(steps):,} to step {max(steps):,}. The latent dimension counts singular "
        "values above the noise threshold; cos² compares the leading directions with those at the first step; capacity "
        "is a bound under a Hopfield model's assumptions. None of these numbers measures quality.",
        "",
        *([f"The weights kept are those of step {loaded:,}, the best checkpoint.", ""] if loaded is not None else []),
        tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True),
        "",
        *([f"![Latent dimension, drift and capacity by step]({figure})", ""] if figure else []),
        f"Convergence: **{verdict['verdict']}**.",
        "",
        *(f"- {piece['kind']}: {piece['verdict']}; {piece['text']}" for piece in verdict["evidence"]),
        "",
        f"{told['measured']} of {told['matrices']} matrices were measured, {told['points']} points, in "
        f"{told['share_of_training_time']:.1%} of the training's time.",
    ]
    if skipped:
        name, reason = next(iter(skipped.items()))
        which = f"{len(skipped)} could not be measured at the end, first `{name}` ({reason})"
        lines += ["", f"{which}; the table has what was seen of them before."]
    return "\n".join(lines) + "\n"


def _spread(point: Point) -> float | None:
    return None if point.effective_rank is None else point.effective_rank / point.short_side


def _change(before: Sequence[float | None], after: Sequence[float | None], form: str) -> str:
    old, new = _median(before, form), _median(after, form)
    return f"{old} → {new}"


def _median(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.median(known), form) if known else "–"
