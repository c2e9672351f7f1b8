"""Reports on disk: everything is written beside its place and renamed into it, so nothing is ever half there."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from lmd_hf.errors import FormatError, OutputError, SourceError, first_line
from lmd_hf.report.compare import Comparison
from lmd_hf.report.plain import SPECTRA, Row
from lmd_hf.report.report import Report


Writer = Callable[[Path], None]
JSON, PARQUET, HEADS_PARQUET = "report.json", "matrices.parquet", "heads.parquet"
COMPARE_JSON, COMPARE_PARQUET = "compare.json", "compare.parquet"


def write_folder(folder: Path, writers: Mapping[str, Writer], *, own: Iterable[str] = ()) -> None:
    """Run each writer on a path in a temporary folder beside `folder`, then rename the files into it. Of the names in
    `own` those that nothing is written to are removed: an earlier report's, of which this one has none.

    If anything fails (disk full, no permission), `folder` is as it was and `OutputError` says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".lmd-", dir=folder))
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}); choose another --out") from None
    try:
        for name, write in writers.items():
            write(scratch / name)
        for name in writers:
            os.replace(scratch / name, folder / name)
        for name in set(own) - set(writers):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder} ({error.strerror or error}); free some space or choose another --out"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def text_writer(text: str) -> Writer:
    """A writer of UTF-8 text."""
    return lambda path: _write_text(path, text)


def bytes_writer(data: bytes) -> Writer:
    """A writer of bytes as they are."""
    return lambda path: _write_bytes(path, data)


def report_writers(report: Report) -> dict[str, Writer]:
    """The files of a report: report.json, matrices.parquet and, where heads were read, heads.parquet."""
    writers = {JSON: text_writer(report.to_json()), PARQUET: lambda path: _write_parquet(report, path)}
    return writers | ({HEADS_PARQUET: lambda path: _write_heads(report, path)} if report.heads else {})


def comparison_writers(comparison: Comparison) -> dict[str, Writer]:
    """The two files of a comparison."""
    return {
        COMPARE_JSON: text_writer(comparison.to_json()),
        COMPARE_PARQUET: lambda path: _write_parquet(comparison, path),
    }


def read_report(folder: Path) -> Report:
    """Read a folder (or report.json itself); spectra come whole from matrices.parquet where it is there."""
    path = folder / JSON if folder.is_dir() else folder
    report = Report.from_json(_read_text(path, "report", "analyze MODEL"))
    return replace(report, matrices=_with_spectra(report.matrices, path.parent / PARQUET))


def read_comparison(folder: Path) -> Comparison:
    """Read a folder (or compare.json itself); spectra come whole from compare.parquet where it is there."""
    path = folder / COMPARE_JSON if folder.is_dir() else folder
    comparison = Comparison.from_json(_read_text(path, "comparison", "compare BASE TUNED"))
    return replace(comparison, matrices=_with_spectra(comparison.matrices, path.parent / COMPARE_PARQUET))


def is_written(folder: Path, report: Report) -> bool:
    """Whether a report is there, and not on a disk that only the machine which wrote it sees."""
    file = folder / JSON
    return file.is_file() and file.read_text(encoding="utf-8") == report.to_json()


def read_saved(path: Path) -> Report | Comparison | None:
    """The report or the comparison in a folder, or the one that `path` itself is; `None` where there is neither."""
    if path.name == COMPARE_JSON or ((path / COMPARE_JSON).is_file() and not (path / JSON).is_file()):
        return read_comparison(path)
    return read_report(path) if path.suffix == ".json" or (path / JSON).is_file() else None


def _read_text(path: Path, what: str, command: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path}: cannot read a {what} there ({error}); `lmd-hf {command} --out DIR` writes one"
        ) from None


def _with_spectra(matrices: tuple[Row, ...], table: Path) -> tuple[Row, ...]:
    """The matrices with their whole spectra, where the table has them. Raises `FormatError` for a file that is no such
    table."""
    if not table.is_file():
        return matrices
    try:
        held: list[str] = [name for name in SPECTRA.values() if name in pyarrow.parquet.read_schema(table).names]
        rows = pyarrow.parquet.read_table(table, columns=["name", "part", *held]).to_pylist()
        spectra = {(row["name"], row["part"]): row for row in rows}
        return tuple(_completed(matrix, spectra.get((_in_utf8(matrix.name), matrix.part), {})) for matrix in matrices)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError) as error:
        reason, remedy = first_line(error), "fetch it again (`git lfs pull`), or remove it"
        raise FormatError(
            f"{table}: not the table of these spectra ({reason}); {remedy}: shortened ones are kept too"
        ) from None


def _completed(matrix: Row, spectra: Mapping[str, Any]) -> Row:
    """A matrix whose thinned spectra are whole again; those of a sketch are not all there."""
    whole: dict[str, Any] = {}
    for ranks, name in SPECTRA.items():
        thinned, values = getattr(matrix, ranks, None), spectra.get(name)
        if thinned is not None and values is not None and len(thinned) < len(values) == thinned[-1]:
            whole |= {name: np.array(values, dtype=np.float64), ranks: None}
            whole[name].flags.writeable = False
    return replace(matrix, **whole) if whole else matrix


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # what UTF-8 cannot say, JSON writes so too


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_parquet(report: Report | Comparison, path: Path) -> None:
    rows = report.to_dict()["matrices"]
    for row, matrix in zip(rows, report.matrices, strict=True):
        for ranks, name in SPECTRA.items():
            if row.pop(ranks, None) is not None:
                row[name] = getattr(matrix, name).tolist()
    _write_rows(rows, path)


def _write_heads(report: Report, path: Path) -> None:
    _write_rows(report.to_dict()["heads"], path)


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    for row in rows:
        row |= {key: _in_utf8(value) for key, value in row.items() if isinstance(value, str)}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _in_utf8(text: str) -> str:
    """A text in which what UTF-8 cannot say is escaped."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
