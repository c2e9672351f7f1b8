"""The frozen values of a comparison of two models. No logic, no I/O, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmd_hf.records import MatrixRef


@dataclass(frozen=True)
class Pair:
    """One matrix in two models. `matched` says by what: `name`, `prefix` (the names differ by one), `place` (stack,
    block, role and layer). `tied` is the side, `base` or `tuned`, that does not store it but ties it to another tensor.
    `shape` is what they have in common: of two vocabularies the first min(V) tokens."""

    base: MatrixRef
    tuned: MatrixRef
    matched: str
    tied: str
    shape: tuple[int, int]
    flops: float
    bytes: int


@dataclass(frozen=True)
class Unmatched:
    """A tensor that was not compared, and why. `side` is the model that it is in: `base`, `tuned` or `both`."""

    side: str
    name: str
    part: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Matching:
    """Two models laid side by side, from headers alone. `vectors` are names (base, tuned) of equally long vectors,
    `parameters` is what the base stores."""

    pairs: tuple[Pair, ...]
    vectors: tuple[tuple[str, str], ...]
    unmatched: tuple[Unmatched, ...]
    parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class MatrixChange:
    """All numbers of one matrix in two models; `matrix.change` says what they are.

    `name`, `part` and places are the base's; `matched` and `tied` are the `Pair`'s. `tokens_added` is how much longer
    the tuned model's vocabulary is (negative: shorter); the tokens in common are compared. The `update_…` and
    `singular_values` are those of ΔW = W_tuned − W_base, the `left_…` and `right_…` those of the principal angles
    between the top-n' subspaces, n' the base's `latent_dim`. `identical` matrices have zeros throughout and cos² = 1.
    """

    name: str
    part: str
    tuned_name: str
    tuned_part: str
    matched: str
    tied: str
    stack: str
    block: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    tokens_added: int
    dtype: str
    tuned_dtype: str
    identical: bool
    base_norm: float
    update_norm: float
    relative_update: float | None
    update_spectral_norm: float
    update_floor: float
    update_rank: int
    update_energy: float
    update_stable_rank: float
    update_effective_rank: float
    update_energy_rank_90: int
    update_energy_rank_95: int
    update_energy_rank_99: int
    spectrum_drift: float | None
    latent_dim: int | None
    latent_dim_rule: str | None
    left_cos2: float | None
    left_angle: float | None
    right_cos2: float | None
    right_angle: float | None
    gap: float | None
    degenerate: bool
    error_bound: float
    singular_value_ranks: tuple[int, ...] | None
    singular_values: np.ndarray = field(compare=False, repr=False)


@dataclass(frozen=True)
class VectorChange:
    """A norm's gain, a bias or another vector in two models: the largest change of an entry, and of the whole."""

    name: str
    tuned_name: str
    shape: tuple[int, ...]
    largest_change: float
    relative_change: float | None


@dataclass(frozen=True)
class Changes:
    """What comparing hands to the report: rows in the order of the matching, and what turned out to be no row."""

    matrices: tuple[MatrixChange, ...]
    vectors: tuple[VectorChange, ...]
    unmatched: tuple[Unmatched, ...]
    environment: dict[str, Any]
    timing: dict[str, float]
