"""lmd_hf: see every weight matrix of a Hugging Face model as five readable factors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lmd_hf.api import analyze, compare, plan
    from lmd_hf.errors import LmdError
    from lmd_hf.evidence import Thresholds
    from lmd_hf.hub.annotate import annotate
    from lmd_hf.hub.dataset import load_results, push_results
    from lmd_hf.matrix.capacity import required_degree
    from lmd_hf.matrix.lmd import decompose
    from lmd_hf.records import Settings
    from lmd_hf.report import interactive
    from lmd_hf.report.compare import Comparison
    from lmd_hf.report.plan_text import plan_to_dict
    from lmd_hf.report.report import Report
    from lmd_hf.run.lens import read_directions, read_matrix
    from lmd_hf.run.margin import encoding_margin
    from lmd_hf.run.progress import following
    from lmd_hf.weights.source import open_source

__version__ = "0.1.0"

_HOMES = {
    "analyze": "lmd_hf.api",
    "annotate": "lmd_hf.hub.annotate",
    "compare": "lmd_hf.api",
    "decompose": "lmd_hf.matrix.lmd",
    "encoding_margin": "lmd_hf.run.margin",
    "following": "lmd_hf.run.progress",
    "load_results": "lmd_hf.hub.dataset",
    "open_source": "lmd_hf.weights.source",
    "plan": "lmd_hf.api",
    "plan_to_dict": "lmd_hf.report.plan_text",
    "push_results": "lmd_hf.hub.dataset",
    "read_directions": "lmd_hf.run.lens",
    "read_matrix": "lmd_hf.run.lens",
    "required_degree": "lmd_hf.matrix.capacity",
    "Comparison": "lmd_hf.report.compare",
    "LmdError": "lmd_hf.errors",
    "Report": "lmd_hf.report.report",
    "Settings": "lmd_hf.records",
    "Thresholds": "lmd_hf.evidence",
}
__all__ = [
    "Comparison",
    "LmdError",
    "Report",
    "Settings",
    "Thresholds",
    "__version__",
    "analyze",
    "annotate",
    "compare",
    "decompose",
    "encoding_margin",
    "following",
    "interactive",
    "load_results",
    "open_source",
    "plan",
    "plan_to_dict",
    "push_results",
    "read_directions",
    "read_matrix",
    "required_degree",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded on first use: importing the package imports no torch."""
    if name == "interactive":  # a module: the figures of reports for a browser
        return import_module("lmd_hf.report.interactive")
    if name not in _HOMES:
        raise AttributeError(f"module 'lmd_hf' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
