"""Records as JSON types and back, for every kind of report."""

import dataclasses
import json
from typing import Any, TypeVar

import numpy as np

from lmd_hf.changes import MatrixChange
from lmd_hf.errors import FormatError
from lmd_hf.records import HeadReport, MatrixReport, ModelIdentity, WeightFile


KEPT_VALUES = 512  # singular values of a matrix in JSON; the parquet file has all of them
Row = TypeVar("Row", MatrixReport, MatrixChange)


def plain(value: Any) -> Any:
    """Records as dictionaries and tuples as lists, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def row_to_dict(row: MatrixReport | MatrixChange) -> dict[str, Any]:
    """One matrix; a spectrum longer than 512 is thinned evenly, with both ends."""
    values, ranks = row.singular_values, row.singular_value_ranks
    if ranks is None and len(values) > KEPT_VALUES:
        ranks = tuple(int(rank) for rank in np.linspace(1, len(values), KEPT_VALUES).round())
        values = values[np.array(ranks) - 1]
    numbers = {
        field.name: plain(getattr(row, field.name))
        for field in dataclasses.fields(row)
        if not field.name.startswith("singular_value")
    }
    return {
        **numbers,
        "singular_value_ranks": None if ranks is None else list(ranks),
        "singular_values": values.tolist(),
    }


def row_from_dict(kind: type[Row], values: dict[str, Any]) -> Row:
    """The matrix back from `row_to_dict`."""
    ranks = values["singular_value_ranks"]
    spectrum = np.array(values["singular_values"], dtype=np.float64)
    spectrum.flags.writeable = False
    shape = tuple(values["shape"])
    kept = None if ranks is None else tuple(ranks)
    if values.get("intervals"):
        values = {**values, "intervals": {name: tuple(ends) for name, ends in values["intervals"].items()}}
    return kind(**{**values, "shape": shape, "singular_value_ranks": kept, "singular_values": spectrum})


def head_from_dict(values: dict[str, Any]) -> HeadReport:
    """A head back from its JSON types."""
    spectra = {name: tuple(values[name]) for name in ("qk_singular_values", "ov_singular_values")}
    return HeadReport(**{**values, **spectra})


def identity_from_dict(values: dict[str, Any]) -> ModelIdentity:
    """The model's identity back from its JSON types."""
    architectures, files = tuple(values["architectures"]), tuple(WeightFile(**file) for file in values["files"])
    return ModelIdentity(**{**values, "architectures": architectures, "files": files})


def to_text(values: dict[str, Any]) -> str:
    """JSON as it is written to disk."""
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in a text; `FormatError` if it is none."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise FormatError(f"not a {what}: invalid JSON ({error})") from None
    if not isinstance(values, dict):
        raise FormatError(f"not a {what}: the JSON is no object")
    return values
