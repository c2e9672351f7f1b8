"""lmd_hf: see every weight matrix of a Hugging Face model as five readable factors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lmd_hf.api import analyze, compare, plan
    from lmd_hf.callback import LMDCallback
    from lmd_hf.errors import LmdError
    from lmd_hf.evidence import Thresholds
    from lmd_hf.hub.annotate import annotate
    from lmd_hf.hub.dataset import load_results, push_results
    from lmd_hf.layers.linear import LMDLinear
    from lmd_hf.matrix.capacity import required_degree
    from lmd_hf.matrix.lmd import decompose
    from lmd_hf.recipes.extract import extract
    from lmd_hf.recipes.freeze import freeze, freeze_recipe
    from lmd_hf.recipes.lora import lora_config, lora_recipe
    from lmd_hf.records import Settings
    from lmd_hf.report import interactive
    from lmd_hf.report.compare import Comparison
    from lmd_hf.report.plan_text import plan_to_dict
    from lmd_hf.report.report import Report
    from lmd_hf.run.lens import read_directions, read_matrix
    from lmd_hf.run.margin import encoding_margin
    from lmd_hf.run.progress import following
    from lmd_hf.training.tracker import LMDTracker
    from lmd_hf.truncated.model import LMDModel
    from lmd_hf.truncated.truncate import truncate
    from lmd_hf.weights.source import open_source

__version__ = "0.1.0"

_HOMES = {
    "analyze": "lmd_hf.api",
    "annotate": "lmd_hf.hub.annotate",
    "compare": "lmd_hf.api",
    "decompose": "lmd_hf.matrix.lmd",
    "encoding_margin": "lmd_hf.run.margin",
    "extract": "lmd_hf.recipes.extract",
    "following": "lmd_hf.run.progress",
    "freeze": "lmd_hf.recipes.freeze",
    "freeze_recipe": "lmd_hf.recipes.freeze",
    "load_results": "lmd_hf.hub.dataset",
    "lora_config": "lmd_hf.recipes.lora",
    "lora_recipe": "lmd_hf.recipes.lora",
    "open_source": "lmd_hf.weights.source",
    "plan": "lmd_hf.api",
    "plan_to_dict": "lmd_hf.report.plan_text",
    "push_results": "lmd_hf.hub.dataset",
    "read_directions": "lmd_hf.run.lens",
    "read_matrix": "lmd_hf.run.lens",
    "required_degree": "lmd_hf.matrix.capacity",
    "truncate": "lmd_hf.truncated.truncate",
    "Comparison": "lmd_hf.report.compare",
    "LMDCallback": "lmd_hf.callback",
    "LMDTracker": "lmd_hf.training.tracker",
    "LMDLinear": "lmd_hf.layers.linear",
    "LMDModel": "lmd_hf.truncated.model",
    "LmdError": "lmd_hf.errors",
    "Report": "lmd_hf.report.report",
    "Settings": "lmd_hf.records",
    "Thresholds": "lmd_hf.evidence",
}
__all__ = [
    "Comparison",
    "LMDCallback",
    "LMDLinear",
    "LMDModel",
    "LMDTracker",
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
    "extract",
    "following",
    "freeze",
    "freeze_recipe",
    "interactive",
    "load_results",
    "lora_config",
    "lora_recipe",
    "open_source",
    "plan",
    "plan_to_dict",
    "push_results",
    "read_directions",
    "read_matrix",
    "required_degree",
    "truncate",
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
