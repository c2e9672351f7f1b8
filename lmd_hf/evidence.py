"""The frozen values that say whether a training had converged. No logic, no I/O, no torch.

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
