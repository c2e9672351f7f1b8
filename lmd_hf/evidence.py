"""The frozen values that say whether a training had converged, and how well it encodes. No logic, no I/O, no torch.

A verdict is `stable`, `unstable` or `unknown`.
"""

from dataclasses import dataclass, field


STABLE, UNSTABLE, UNKNOWN = VERDICTS = ("stable", "unstable", "unknown")


@dataclass(frozen=True)
class Thresholds:
    """Where a verdict turns. Each field is an option of the command line."""

    loss_change: float = field(
        default=0.01, metadata={"help": "largest stable change of the loss over its last tenth, of its mean there"}
    )
    spectrum_change: float = field(
        default=0.01, metadata={"help": "largest stable ‖ΔS'‖ / ‖S'‖ of a layer from one checkpoint to the next"}
    )
    subspace_cos2: float = field(
        default=0.99, metadata={"help": "least stable mean cos² between the leading subspaces of two checkpoints"}
    )
    untrained_share: float = field(
        default=0.9, metadata={"help": "least share of matrices like noise that makes a model look untrained"}
    )


@dataclass(frozen=True)
class LayerVerdict:
    """The verdict on one layer (`None`: what lies outside the numbered layers), and the numbers that gave it."""

    stack: str
    layer: int | None
    verdict: str
    numbers: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """One piece of evidence. `kind` is `loss curve`, `checkpoints` or `weights`, `source` says where it was found,
    `text` what was seen in words, `numbers` in figures, `thresholds` where its verdict turns. `layers` is empty where
    it speaks of the model as a whole."""

    kind: str
    source: str
    verdict: str
    text: str
    numbers: dict[str, float | None] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    layers: tuple[LayerVerdict, ...] = ()


@dataclass(frozen=True)
class Convergence:
    """The verdict on a model and on each of its layers: one unstable piece of evidence makes it unstable, else one
    stable one stable; without any it is unknown."""

    verdict: str = UNKNOWN
    evidence: tuple[Evidence, ...] = ()
    layers: tuple[LayerVerdict, ...] = ()


@dataclass(frozen=True)
class EncodingMargin:
    """How far a trained model f may be from its target g, and from what: ε = r + (L_f + L_g)·δ (`run.margin`).

    `residual` r and `observed` are measured. `covering_radius` δ and `target_slope` L_g err low on the domain, where
    `uncovered` is the share of its mass (at 95 %) that may lie farther off than δ; so there each ε is an estimate.
    `lipschitz_upper` is a bound on L_f, `None` where none is known (`lipschitz_reason` says why), `lipschitz_lower` the
    largest slope that was seen. `margin_upper`, from the first, bounds the error at the held-out points: a theorem;
    `margin_lower`, from the second, bounds nothing. `status` says the same of each number: `measured`, `bound`,
    `estimate` … Norms are Euclidean, on inputs and on outputs.
    """

    training: int
    held_out: int
    residual: float
    covering_radius: float
    uncovered: float
    lipschitz_upper: float | None
    lipschitz_reason: str
    lipschitz_lower: float
    target_slope: float
    margin_upper: float | None
    margin_lower: float
    observed: float
    status: dict[str, str] = field(default_factory=dict)
