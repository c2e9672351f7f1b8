"""`lmd/summary.json`: every number of a report's card section, for machines, small enough for a model's repository."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmd_hf.circuits import HeadReport
from lmd_hf.records import MatrixReport
from lmd_hf.report import heads
from lmd_hf.report.findings import extremes
from lmd_hf.report.plain import plain, to_text
from lmd_hf.report.sparkline import rank_shares
from lmd_hf.report.text import by_role


if TYPE_CHECKING:
    from lmd_hf.report.report import Report

SCHEMA = "lmd-summary/1"
MEASURES = ("effective_rank", "effective_rank_energy", "latent_dim", "stable_rank", "capacity_log10", "error_bound")
HEAD_MEASURES = (
    "qk_participation_ratio",
    "qk_symmetric_energy",
    "qk_eigenvalue_score",
    "inverse_temperature",
    "copying_score",
)
PROVENANCE = ("lmd_hf", "model")  # what may change while every number stays


def summarise(report: "Report") -> dict[str, Any]:
    """The numbers of the section as JSON types: coverage, by role (median, least, largest; and the median of each
    layer), the most and least compressed matrices, findings, convergence, heads."""
    coverage = report.coverage
    most, least = extremes(report.matrices)
    return {
        "schema": SCHEMA,
        "lmd_hf": report.lmd_hf,
        "model": {"id": report.model.id, "commit": report.model.commit},
        "metric": report.settings["metric"],
        "coverage": {
            "parameters": coverage.parameters,
            "decomposed": coverage.decomposed,
            "fraction": coverage.fraction,
            "skipped": len(coverage.skipped),
            "notes": list(coverage.notes),
        },
        "roles": [_role(role, matrices) for role, matrices in by_role(report.matrices)],
        "most_compressed": [_extreme(ratio, matrix) for ratio, matrix in most],
        "least_compressed": [_extreme(ratio, matrix) for ratio, matrix in least],
        "findings": [
            {"signature": f.signature, "status": f.status, "threshold": f.threshold, "matrices": len(f.matrices)}
            for f in report.findings
        ],
        "matrices": len(report.matrices),
        "convergence": plain(report.convergence),
        "heads": _heads(report.heads),
    }


def summary_text(report: "Report") -> str:
    """`summarise` as it is written to disk."""
    return to_text(summarise(report))


def numbers_digest(report: "Report") -> str:
    """16 hexadecimal digits that change when a number of the section does, at the six digits that it could show."""
    kept = {key: value for key, value in summarise(report).items() if key not in PROVENANCE}
    return hashlib.sha256(json.dumps(_coarse(kept), sort_keys=True).encode()).hexdigest()[:16]


def _role(role: str, matrices: list[MatrixReport]) -> dict[str, Any]:
    return {
        "role": role,
        "matrices": len(matrices),
        **{name: _spread([getattr(matrix, name) for matrix in matrices]) for name in MEASURES},
        "effective_rank_share_by_layer": {str(k): v for k, v in rank_shares(matrices).items()},
    }


def _heads(found: Sequence[HeadReport]) -> dict[str, Any] | None:
    if not found:
        return None
    return {
        "heads": len(found),
        **{name: _spread([getattr(head, name) for head in found]) for name in HEAD_MEASURES},
        "auto_associative": len(heads.auto_associative(found)),
        "copying": len(heads.copiers(found)),
        "conventions": heads.conventions(found),
    }


def _spread(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "least": min(known), "largest": max(known)} if known else None


def _extreme(ratio: float, matrix: MatrixReport) -> dict[str, Any]:
    return {
        "name": matrix.name,
        "part": matrix.part,
        "participation_ratio": matrix.participation_ratio,
        "of": min(matrix.shape),
        "against_noise": ratio,
    }


def _coarse(value: Any) -> Any:
    """Floats to six digits: another machine's last bit is no other number."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return {key: _coarse(item) for key, item in value.items() if key != "error_bound"}
    return [_coarse(item) for item in value] if isinstance(value, list) else value
