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
    (roles that have one), `qk_norm` (norms of queries or keys; where Gemma has them, of values too), `soft_cap` on the
    scores, `rotary` positions.
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
    With data, over the `queries` that see n ≥ 32 tokens: the median `k90` of the number k of tokens that carry 90 % of
    the softmax, `k90_share` of k/n, and the class of that share (Ramsauer et al. 2020).
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
    k90_share: float | None = None
    queries: int | None = None
    hopfield_class: str | None = None


@dataclass(frozen=True)
class MlpRef:
    """One MLP, or one expert: keys are the rows of `up` (and of a `gate`), values the columns of `down`."""

    up: MatrixRef
    gate: MatrixRef | None
    down: MatrixRef


@dataclass(frozen=True)
class MlpReport:
    """The key–value reading of one MLP (Geva et al. 2021): neuron i writes its value vᵢ (column of down) as far as its
    key kᵢ (row of up) fits, through the activation, times its gate gᵢ where there is one.

    Norms are medians over the `neurons`, spreads their standard deviation over the mean. `key_value_cosine` is the
    mean of cos(kᵢ, vᵢ), `gate_value_cosine` that of cos(gᵢ, vᵢ): above 0, neurons write what they find (copying), below
    0 they take it away; of unrelated directions each is 0 ± `chance` = 1/√(width · neurons). `None` for no number.
    `keys` is the (name, part) of the up matrix; from its row in the report are `energy_degree` and `capacity_log10`,
    `None` where that matrix was not selected.
    """

    name: str
    stack: str
    layer: int | None
    block: str
    part: str
    neurons: int
    activation: str | None
    key_norm: float
    key_norm_spread: float
    gate_norm: float | None
    gate_norm_spread: float | None
    value_norm: float
    value_norm_spread: float
    key_value_cosine: float | None
    gate_value_cosine: float | None
    chance: float
    norm_folded: bool
    keys: tuple[str, str]
    energy_degree: int | None = None
    capacity_log10: float | None = None


@dataclass(frozen=True)
class Heads:
    """The heads and the MLPs of a run, in the order of the model, and why others are missing."""

    rows: tuple[HeadReport, ...]
    notes: tuple[str, ...]
    mlps: tuple[MlpReport, ...] = ()
