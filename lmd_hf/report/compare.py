"""The comparison of two models: a frozen value that holds every number and renders itself."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd_hf import __version__
from lmd_hf.changes import Changes, Matching, MatrixChange, Unmatched, VectorChange
from lmd_hf.errors import FormatError
from lmd_hf.records import UNREAD, ModelIdentity, Settings
from lmd_hf.report.plain import checked, identity_from_dict, parse_object, plain, row_from_dict, row_to_dict, to_text


if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SCHEMA = "lmd-compare/1"


@dataclass(frozen=True)
class Comparison:
    """What changed from `base` to `tuned`, matrix by matrix: `MatrixChange` names every number.

    `coverage` counts the base's parameters: stored, and compared in matrices and vectors. `unmatched` lists every
    tensor of either model that was not compared, with the reason.
    """

    schema: str
    lmd_hf: str
    base: ModelIdentity
    tuned: ModelIdentity
    settings: dict[str, Any]
    coverage: dict[str, Any]
    matrices: tuple[MatrixChange, ...]
    vectors: tuple[VectorChange, ...]
    unmatched: tuple[Unmatched, ...]
    environment: dict[str, Any]
    timing: dict[str, float]

    def __str__(self) -> str:
        return f"{self.summary()}\n\n{self.table()}"

    @property
    def unread(self) -> tuple[Unmatched, ...]:
        """What was to be compared and could not be read, a fault of the network or of a file: run again for it."""
        return tuple(item for item in self.unmatched if item.reason.startswith(UNREAD))

    def summary(self) -> str:
        """What changed, in a few plain lines: coverage, key figures by role, vectors, and what was not compared."""
        from lmd_hf.report import compare_text

        return compare_text.summary(self)

    def table(self, *, limit: int | None = None) -> str:
        """One line a matrix, for a terminal; `limit` keeps the first lines and says how many follow."""
        from lmd_hf.report import compare_text

        return compare_text.table(self, limit=limit)

    def card(self) -> str:
        """The model-card section of the tuned model, Markdown."""
        from lmd_hf.report import compare_card

        return compare_card.section(self)

    def plot(self, folder: str | Path | None = None) -> dict[str, Figure]:
        """{name: figure}: `updates`, the spectra of ΔW by role and layer, and `changes`, layer × role; written as PNG
        if a folder is given."""
        from lmd_hf.report import plots

        figures = plots.comparison_figures(self)
        if folder is not None:
            from lmd_hf.report.files import write_folder

            write_folder(Path(folder), {f"{name}.png": plots.writer(figure) for name, figure in figures.items()})
        return figures

    def to_pandas(self) -> pandas.DataFrame:
        """One row a matrix, one column a number; `singular_values` (of ΔW) holds an array."""
        import pandas

        names = [field.name for field in dataclasses.fields(MatrixChange)]
        return pandas.DataFrame([{n: getattr(m, n) for n in names} for m in self.matrices], columns=names)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types, in the schema `lmd-compare/1`; spectra longer than 512 are thinned evenly."""
        values = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "matrices"
        }
        result = {**plain(values), "matrices": [row_to_dict(matrix) for matrix in self.matrices]}
        return {field.name: result[field.name] for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return to_text(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """The comparison back from its JSON types. `FormatError` if they are not of this schema."""
        if not isinstance(values, dict):
            raise FormatError(f"not a comparison but a {type(values).__name__}; give what `to_dict` returns")
        if values.get("schema") != SCHEMA:
            raise FormatError(
                f"schema is '{values.get('schema')}', this version reads '{SCHEMA}'; make the comparison again"
            )
        try:
            return checked(cls(**{**values, **_records(values)}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"not a complete {SCHEMA} comparison ({error}); make it again") from None

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison back from `to_json`."""
        return cls.from_dict(parse_object(text, "comparison"))

    def save(self, folder: str | Path) -> None:
        """Write `compare.json` and `compare.parquet` (with whole spectra); all or nothing. Raises `OutputError`."""
        from lmd_hf.report.files import comparison_writers, write_folder

        write_folder(Path(folder), comparison_writers(self))

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """The comparison that `save` wrote, with whole spectra if `compare.parquet` is there."""
        from lmd_hf.report.files import read_comparison

        return read_comparison(Path(folder))

    def _repr_html_(self) -> str:
        from lmd_hf.report import compare_text

        return compare_text.html(self)


def build_comparison(
    base: ModelIdentity, tuned: ModelIdentity, settings: Settings, matching: Matching, changes: Changes
) -> Comparison:
    """The comparison of two models; every pair of the matching is a row or is listed as not compared."""
    compared = sum(math.prod(m.shape) for m in changes.matrices if m.tied != "base")
    compared += sum(math.prod(v.shape) for v in changes.vectors)
    return Comparison(
        schema=SCHEMA,
        lmd_hf=__version__,
        base=base,
        tuned=tuned,
        settings={name: plain(getattr(settings, name)) for name in ("roles", "layers", "match", "device")},
        coverage={
            "parameters": matching.parameters,
            "compared": compared,
            "fraction": compared / matching.parameters if matching.parameters else 0.0,
            "notes": list(matching.notes),
        },
        matrices=changes.matrices,
        vectors=changes.vectors,
        unmatched=matching.unmatched + changes.unmatched,
        environment=changes.environment,
        timing={stage: round(seconds, 3) for stage, seconds in changes.timing.items()},
    )


def _records(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "base": identity_from_dict(values["base"]),
        "tuned": identity_from_dict(values["tuned"]),
        "matrices": tuple(row_from_dict(MatrixChange, matrix) for matrix in values["matrices"]),
        "vectors": tuple(VectorChange(**{**v, "shape": tuple(v["shape"])}) for v in values["vectors"]),
        "unmatched": tuple(Unmatched(**{**u, "shape": tuple(u["shape"])}) for u in values["unmatched"]),
    }
