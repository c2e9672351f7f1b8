"""The report: a frozen value that holds every number and renders itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd_hf.circuits import HeadReport, MlpReport
from lmd_hf.errors import FormatError
from lmd_hf.evidence import Convergence, Evidence, LayerVerdict
from lmd_hf.records import UNREAD, Alias, Coverage, Finding, MatrixReport, ModelIdentity, Skipped
from lmd_hf.report.plain import (
    checked,
    head_from_dict,
    identity_from_dict,
    parse_object,
    plain,
    row_from_dict,
    row_to_dict,
    to_text,
)


if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SCHEMA = "lmd-report/1"


@dataclass(frozen=True)
class Report:
    """Everything that was measured on one model. The only truth: text, tables, figures and cards read nothing else."""

    schema: str
    lmd_hf: str
    model: ModelIdentity
    settings: dict[str, Any]
    coverage: Coverage
    matrices: tuple[MatrixReport, ...]
    heads: tuple[HeadReport, ...]
    findings: tuple[Finding, ...]
    convergence: Convergence
    environment: dict[str, Any]
    timing: dict[str, float]
    mlps: tuple[MlpReport, ...] = ()

    def __str__(self) -> str:
        return f"{self.summary()}\n\n{self.table()}"

    @property
    def unread(self) -> tuple[Skipped, ...]:
        """The matrices that were to be done and could not be read: a fault of the network or of a file, none of theirs.

        A report with any is incomplete; running again does the rest.
        """
        return tuple(skipped for skipped in self.coverage.skipped if skipped.reason.startswith(UNREAD))

    def summary(self) -> str:
        """What was found, in a few plain lines: coverage, key figures by role, findings, convergence, heads."""
        from lmd_hf.report import heads, text

        return "\n".join([text.summary(self), *heads.summary(self.heads), *heads.mlp_lines(self.mlps)])

    def table(self, *, limit: int | None = None) -> str:
        """One line a matrix, and one a head; `limit` keeps the first of each and says how many follow."""
        from lmd_hf.report import heads, text

        matrices = text.table(self, limit=limit)
        return f"{matrices}\n\n{heads.table(self.heads, limit=limit)}" if self.heads else matrices

    def card(self, *, figure: str | None = None) -> str:
        """The model-card section, Markdown; with the address of its figure, the picture and the same as text."""
        from lmd_hf.report import card

        return card.section(self, figure=figure)

    def plot(self, folder: str | Path | None = None) -> dict[str, Figure]:
        """{name: figure}: `spectra` by role and layer, `heatmap` layer × role, `capacity` against expressivity; written
        as PNG if a folder is given."""
        from lmd_hf.report import plots

        figures = plots.figures(self)
        if folder is not None:
            from lmd_hf.report.files import write_folder

            write_folder(Path(folder), {f"{name}.png": plots.writer(figure) for name, figure in figures.items()})
        return figures

    def page(self) -> str:
        """One interactive HTML page that stands alone: maps to click, spectra, heads, a table to search. Some 5 MB, for
        plotly is in it; needs `pip install 'lmd-hf[space]'`."""
        from lmd_hf.report.page import page

        return page(self)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a matrix, one column a number; `singular_values` holds an array."""
        import pandas

        names = [field.name for field in dataclasses.fields(MatrixReport)]
        return pandas.DataFrame([{n: getattr(m, n) for n in names} for m in self.matrices], columns=names)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, in the schema `lmd-report/1`; spectra longer than 512 are thinned evenly."""
        result = {
            field.name: plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "matrices"
        }
        result["matrices"] = [row_to_dict(matrix) for matrix in self.matrices]
        return {field.name: result[field.name] for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return to_text(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report back from its JSON types. `FormatError` if they are not of this schema."""
        if not isinstance(values, dict):
            raise FormatError(f"not a report but a {type(values).__name__}; give what `to_dict` returns")
        if values.get("schema") != SCHEMA:
            raise FormatError(
                f"schema is '{values.get('schema')}', this version reads '{SCHEMA}'; make the report again"
            )
        try:
            return checked(cls(**{**values, **_records(values)}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"not a complete {SCHEMA} report ({error}); make it again") from None

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report back from `to_json`."""
        return cls.from_dict(parse_object(text, "report"))

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and `matrices.parquet` (with whole spectra); all or nothing. Raises `OutputError`."""
        from lmd_hf.report.files import HEADS_PARQUET, report_writers, write_folder

        write_folder(Path(folder), report_writers(self), own=[HEADS_PARQUET])

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report that `save` wrote, with whole spectra if `matrices.parquet` is there."""
        from lmd_hf.report.files import read_report

        return read_report(Path(folder))

    def _repr_html_(self) -> str:
        from lmd_hf.report import text

        return text.html(self)


def _records(values: dict[str, Any]) -> dict[str, Any]:
    model, coverage = values["model"], values["coverage"]
    return {
        "model": identity_from_dict(model),
        "coverage": Coverage(
            **{
                **coverage,
                "skipped": tuple(Skipped(**{**s, "shape": tuple(s["shape"])}) for s in coverage["skipped"]),
                "aliases": tuple(Alias(**{**a, "shape": tuple(a["shape"])}) for a in coverage["aliases"]),
                "notes": tuple(coverage["notes"]),
            }
        ),
        "matrices": tuple(row_from_dict(MatrixReport, matrix) for matrix in values["matrices"]),
        "heads": tuple(head_from_dict(head) for head in values["heads"]),
        "convergence": _convergence(values["convergence"]),
        "mlps": tuple(MlpReport(**{**mlp, "keys": tuple(mlp["keys"])}) for mlp in values.get("mlps", ())),
        "findings": tuple(Finding(**{**f, "matrices": tuple(f["matrices"])}) for f in values["findings"]),
    }


def _convergence(values: dict[str, Any]) -> Convergence:
    return Convergence(
        values["verdict"],
        tuple(Evidence(**{**piece, "layers": _layers(piece["layers"])}) for piece in values["evidence"]),
        _layers(values.get("layers", [])),  # reports of the first versions have none
    )


def _layers(values: list[dict[str, Any]]) -> tuple[LayerVerdict, ...]:
    return tuple(LayerVerdict(**layer) for layer in values)
