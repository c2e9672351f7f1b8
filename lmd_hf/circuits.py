"""The frozen values of attention heads: where their factors lie, and what was read from them. No logic, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmd_hf.records import MatrixRef


@dataclass(frozen=True)
class HeadRows:
    """Rows start…stop of a matrix W (of an o: columns), which one head has to itself. With `after`, a low-rank pair: W
    is applied to what those rows of another matrix give."""

    ref: MatrixRef
    start: int
    stop: int
    after: HeadRows | None = None


@dataclass(frozen=True)
class HeadRef:
    """One attention head: W_Q and W_K (the parts of `q` and `k`, one below the other, in the same order), W_V, W_O.

    `scale` multiplies the scores. `name` is that of the tensor with its queries. What the model does beside: `biases`
    (roles that have one), `qk_norm` (norms of queries or keys), `soft_cap` on the scores, `rotary` positions.
    """

    name: str
    stack: str
    layer: int | None
    block: str
    head: int
    kv_head: int
    q: tuple[HeadRows, ...]
    k: tuple[HeadRows, ...]
    v: HeadRows
    o: HeadRows
    scale: float
    biases: tuple[str, ...]
    qk_norm: bool
    soft_cap: float | None
    rotary: bool


@dataclass(frozen=True)
class HeadReport:
    """The Hopfield reading of one attention head. A number that does not apply is `None`.

    QK is B = s·W_Kᵀ W_Q, OV is W_O W_V; `qk_…` and `ov_…` describe their spectra, `inverse_temperature` is σ₁(B).
    `qk_symmetric_energy`, `qk_eigenvalue_score` and `copying_score` (that of OV) are `None` between two streams.
    `error_bound` is relative, for the singular values above 10⁻⁶ of the largest. `conventions` says what was done
    (`scale`, `norm_folded` and which `norm`) and what the weights alone leave out (`biases`, `qk_norm`, `soft_cap`; of
    `rotary` positions they are the zero-offset form).
    """

    name: str
    stack: str
    layer: int | None
    block: str
    head: int
    kv_head: int
    qk_singular_values: tuple[float, ...]
    ov_singular_values: tuple[float, ...]
    qk_participation_ratio: float | None
    ov_participation_ratio: float | None
    qk_symmetric_energy: float | None
    qk_eigenvalue_score: float | None
    inverse_temperature: float
    copying_score: float | None
    capacity_log10: float | None
    error_bound: float
    conventions: dict[str, Any]
    k90: float | None = None
    hopfield_class: str | None = None


@dataclass(frozen=True)
class Heads:
    """The heads of a run, in the order of the model, and why others are missing."""

    rows: tuple[HeadReport, ...]
    notes: tuple[str, ...]
