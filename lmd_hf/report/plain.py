"""Records as JSON types and back, for every kind of report."""

import dataclasses
import json
from functools import cache
from typing import Any, TypeVar

import numpy as np

from lmd_hf.changes import MatrixChange
from lmd_hf.circuits import HeadReport
from lmd_hf.errors import FormatError
from lmd_hf.records import DataFigures, MatrixReport, ModelIdentity, WeightFile


KEPT_VALUES = 512  # singular values of a matrix in JSON; the parquet file has all of them
SPECTRA = {"singular_value_ranks": "singular_values", "topology_ranks": "topology_spectrum"}  # ranks: values
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "float": (float, int), "dict": (dict,), "np.ndarray": (np.ndarray,),
}  # fmt: skip
Row = TypeVar("Row", MatrixReport, MatrixChange)
T = TypeVar("T")


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
    """One matrix; spectra longer than 512 are thinned evenly, with both ends."""
    numbers = {
        field.name: plain(getattr(row, field.name))
        for field in dataclasses.fields(row)
        if field.name not in (*SPECTRA, *SPECTRA.values())
    }
    for ranks, values in SPECTRA.items():
        if hasattr(row, values):
            numbers[ranks], numbers[values] = _thinned(getattr(row, values), getattr(row, ranks))
    return numbers


def _thinned(values: np.ndarray | None, ranks: tuple[int, ...] | None) -> tuple[list[int] | None, list[float] | None]:
    """(1-based ranks of the values that are kept, `None` for all; the values)."""
    if values is None:
        return None, None
    if ranks is None and len(values) > KEPT_VALUES:
        ranks = tuple(int(rank) for rank in np.linspace(1, len(values), KEPT_VALUES).round())
        values = values[np.array(ranks) - 1]
    return None if ranks is None else list(ranks), values.tolist()


def row_from_dict(kind: type[Row], values: dict[str, Any]) -> Row:
    """The matrix back from `row_to_dict`. Raises `TypeError` or `ValueError` for a value of another type."""
    out, into = map(int, values["shape"])
    values = {**values, "shape": (out, into)}
    for ranks, name in SPECTRA.items():
        if values.get(name) is not None:
            spectrum = np.array(values[name], dtype=np.float64)
            if spectrum.ndim != 1:
                raise ValueError(f"{name} is no list of numbers")
            spectrum.flags.writeable = False
            values |= {name: spectrum, ranks: None if values[ranks] is None else tuple(values[ranks])}
    if values.get("intervals"):
        values["intervals"] = {name: tuple(ends) for name, ends in values["intervals"].items()}
    if values.get("data"):
        values["data"] = _data_from_dict(values["data"])
    return checked(kind(**values))


def _data_from_dict(values: dict[str, Any]) -> DataFigures:
    dimensions = {
        place: {name: None if found is None else tuple(found) for name, found in each.items()}
        for place, each in values["dimensions"].items()
    }
    return DataFigures(**{**values, "dimensions": dimensions})


def head_from_dict(values: dict[str, Any]) -> HeadReport:
    """A head back from its JSON types."""
    spectra = {name: tuple(values[name]) for name in ("qk_singular_values", "ov_singular_values")}
    return checked(HeadReport(**{**values, **spectra}))


def checked(record: T) -> T:
    """The record, whose simple fields are of the types that they are annotated with; else `TypeError`."""
    kind: Any = type(record)
    for name, types in _simple_fields(kind):
        if not isinstance(value := getattr(record, name), types):
            raise TypeError(f"{name} is of the type {type(value).__name__}")
    return record


@cache
def _simple_fields(kind: type) -> tuple[tuple[str, tuple[type, ...]], ...]:
    """(name, the types of its values) of the fields that are annotated with one of `TYPES`, or that and None."""
    simple = []
    for field in dataclasses.fields(kind):
        name, _, optional = str(field.type).partition(" | ")
        if (types := TYPES.get(name.partition("[")[0])) is not None:
            simple.append((field.name, (*types, type(None)) if optional else types))
    return tuple(simple)


def identity_from_dict(values: dict[str, Any]) -> ModelIdentity:
    """The model's identity back from its JSON types."""
    architectures, files = tuple(values["architectures"]), tuple(WeightFile(**file) for file in values["files"])
    return ModelIdentity(**{**values, "architectures": architectures, "files": files})


def to_text(values: dict[str, Any]) -> str:
    """JSON as it is written to disk."""
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in a text; `FormatError` if it is none, as with Python's NaN."""
    try:
        values = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise FormatError(f"not a {what}: invalid JSON ({error})") from None
    if not isinstance(values, dict):
        raise FormatError(f"not a {what}: the JSON is no object")
    return values


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
