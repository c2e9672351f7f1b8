"""The series of a training: one point a matrix and step, their means for a tracker, and the table on disk."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from lmd_hf.errors import FormatError
from lmd_hf.records import MatrixReport
from lmd_hf.training.views import Moved


LISTS = ("singular_value_ranks", "singular_values")
KEPT_VALUES = 64  # of a spectrum in a point, evenly spaced, with both ends


@dataclass(frozen=True)
class Point:
    """One matrix at one step, in the words of `MatrixReport`. `spectrum_drift` and `subspace_cos2` are against the
    first step at which it was measured (`since`): ‖ΔS'‖/‖S'‖, and the mean cos² of the principal angles between the
    leading min(n', 32) directions, both sides. `seconds` is what measuring took."""

    step: int
    name: str
    part: str
    stack: str
    block: str
    role: str
    layer: int | None
    short_side: int
    spectral_norm: float
    frobenius_norm: float
    effective_rank: float | None
    participation_ratio: float | None
    latent_dim: int | None
    capacity_log10: float | None
    expressivity: float | None
    mp_spikes: int | None
    since: int
    spectrum_drift: float | None
    subspace_cos2: float | None
    seconds: float
    singular_value_ranks: tuple[int, ...]
    singular_values: tuple[float, ...]


def to_point(step: int, row: MatrixReport, moved: Moved, seconds: float) -> Point:
    """The point of a matrix from its numbers, and how far it has moved since it was first measured."""
    ranks = np.linspace(1, len(row.singular_values), min(KEPT_VALUES, len(row.singular_values))).round().astype(int)
    return Point(
        step=step,
        name=row.name,
        part=row.part,
        stack=row.stack,
        block=row.block,
        role=row.role,
        layer=row.layer,
        short_side=min(row.shape),
        spectral_norm=float(row.singular_values[0]),
        frobenius_norm=row.frobenius_norm,
        effective_rank=row.effective_rank,
        participation_ratio=row.participation_ratio,
        latent_dim=row.latent_dim,
        capacity_log10=row.capacity_log10,
        expressivity=row.expressivity,
        mp_spikes=row.mp_spikes,
        since=moved.since,
        spectrum_drift=moved.spectrum_drift,
        subspace_cos2=moved.cos2,
        seconds=seconds,
        singular_value_ranks=tuple(ranks.tolist()),
        singular_values=tuple(row.singular_values[ranks - 1].tolist()),
    )


def latest(points: Sequence[Point]) -> dict[tuple[str, str], Point]:
    """The last point of each matrix."""
    return {(point.name, point.part): point for point in points}


def summary(last: Collection[Point], step: int) -> dict[str, float]:
    """What goes to the trackers: means over the last point of each matrix, so that which of them were measured now
    does not move the curves, and how many were."""
    columns: dict[str, list[int | float | None]] = {
        "latent_dim": [p.latent_dim for p in last],
        "effective_rank_share": [None if p.effective_rank is None else p.effective_rank / p.short_side for p in last],
        "capacity_log10": [p.capacity_log10 for p in last],
        "spectrum_drift": [p.spectrum_drift for p in last],
        "subspace_cos2": [p.subspace_cos2 for p in last],
    }
    known = {name: [v for v in values if v is not None] for name, values in columns.items()}
    means = {f"lmd/{name}": math.fsum(values) / len(values) for name, values in known.items() if values}
    return means | {"lmd/measured": float(sum(p.step == step for p in last)), "lmd/step": float(step)}


def write_series(points: Sequence[Point], path: Path) -> None:
    """The points as Parquet, a row each."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dataclasses.asdict(point) for point in points]), path)


def read_series(path: Path) -> list[Point]:
    """The points that `write_series` wrote. `FormatError` if they are none."""
    try:
        return [_to_point(row) for row in pyarrow.parquet.read_table(path).to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path}: no series of a training ({error}); move it away to begin anew") from None


def _to_point(row: dict[str, Any]) -> Point:
    lists: dict[str, Any] = {name: tuple(row[name]) for name in LISTS}
    return Point(**(row | lists))
