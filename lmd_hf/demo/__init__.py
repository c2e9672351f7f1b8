"""The embedded model: a one-million-parameter LLaMA trained on Python's standard library, and its analysis."""

from dataclasses import replace
from importlib import resources
from pathlib import Path

from lmd_hf.report.report import Report


MODEL_ID = "lmd-hf/stdlib-llama-1m"


def model_folder() -> Path:
    """The folder that holds the embedded model, in Hub layout."""
    return Path(str(resources.files("lmd_hf.demo").joinpath("model")))


def analyze_demo() -> Report:
    """The report of the embedded model, under its own name whatever folder it is installed in."""
    from lmd_hf.api import analyze

    report = analyze(model_folder())
    return replace(report, model=replace(report.model, id=MODEL_ID))
