"""What was done to a model, as frozen values that travel with it in config.json. No torch."""

from dataclasses import dataclass
from typing import Any

from lmd_hf.records import Skipped


@dataclass(frozen=True)
class FactoredLayer:
    """One module that holds factors: its path, shape (out, in), `rank` axes, and the share `energy` of Σs'² that they
    carry in the `metric` (`identity` in place of `norm` where no norm feeds it). `transposed`: it was a Conv1D."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    energy: float
    metric: str
    bias: bool
    transposed: bool = False


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood, nats a token, of the model before and after, over so many tokens of a dataset."""

    dataset: str
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class Truncation:
    """`target` is what was asked for, {`ratio`, `energy` or `rank`: value}; `parameters` (before, after) count the
    whole model, a tied weight once, `selected` (before, after) the matrices that the target is about. `left` says what
    was not factorised, and why."""

    base: str
    commit: str | None
    metric: str
    target: dict[str, float]
    data: str | None
    parameters: tuple[int, int]
    selected: tuple[int, int]
    layers: tuple[FactoredLayer, ...]
    left: tuple[Skipped, ...]
    loss: Loss | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Truncation":
        """The record that `lmd_hf.report.plain.plain` wrote. Raises `KeyError` or `TypeError` for anything else."""
        lists = {
            "parameters": tuple(values["parameters"]),
            "selected": tuple(values["selected"]),
            "layers": tuple(FactoredLayer(**each | {"shape": tuple(each["shape"])}) for each in values["layers"]),
            "left": tuple(Skipped(**each | {"shape": tuple(each["shape"])}) for each in values["left"]),
            "loss": None if values["loss"] is None else Loss(**values["loss"]),
        }
        return cls(**values | lists)
