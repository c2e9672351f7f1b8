"""The embedded model: real, trained, small, and the first entry of model_cards/."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lmd_hf import Report, analyze
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


CARD = Path(__file__).parents[1] / "model_cards" / EMBEDDED_ID.replace("/", "--")


@pytest.fixture(scope="module")
def fresh():
    return analyze(EMBEDDED_ID)


def test_it_is_small_and_in_bf16(fresh):
    assert sum(p.stat().st_size for p in EMBEDDED_FOLDER.iterdir()) < 3e6
    assert {m.dtype for m in fresh.matrices} == {"BF16"}
    assert 0.9e6 < fresh.coverage.parameters < 1.1e6


def test_its_loss_curve_is_stable():
    """theory §6: least-squares change over the last 10 %, at least 10 points, within 1 % of their mean."""
    history = json.loads((EMBEDDED_FOLDER / "trainer_state.json").read_text())["log_history"]
    curve = [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]
    last = curve[-max(10, len(curve) // 10) :]
    steps, losses = np.array(last).T
    slope = np.polyfit(steps, losses, 1)[0]
    assert abs(slope * (steps[-1] - steps[0])) <= 0.01 * losses.mean()
    assert losses.mean() < 0.4 * curve[0][1]


def test_it_beats_gzip_and_a_trigram_model():
    bits = json.loads((EMBEDDED_FOLDER / "evaluation.json").read_text())["bits_per_byte"]
    assert bits["model"] < bits["gzip"] < bits["byte_trigram"]


def test_its_bits_per_byte_can_be_measured_again():
    """On a text of its own kind that ships with every Python: better than gzip of that text."""
    import textwrap
    import this  # noqa: F401 - any module of the standard library that is a file

    from transformers import AutoTokenizer, LlamaForCausalLM

    from lmd_hf.demo.train import bits_per_byte

    text = Path(textwrap.__file__).read_text()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    model = LlamaForCausalLM.from_pretrained(EMBEDDED_FOLDER).eval()
    data = text.encode()
    assert bits_per_byte(model, [text], tokenizer) < 8 * len(gzip.compress(data, 9)) / len(data)


def test_the_committed_report_is_what_the_model_gives(fresh):
    committed = Report.load(CARD / "report.json")
    assert committed.model == fresh.model
    assert committed.coverage == fresh.coverage
    assert [m.name for m in committed.matrices] == [m.name for m in fresh.matrices]
    for old, new in zip(committed.matrices, fresh.matrices, strict=True):
        np.testing.assert_allclose(old.singular_values, new.singular_values, rtol=1e-9)
        for name in ("latent_dim", "latent_dim_rule", "numerical_rank", "mp_spikes", "energy_rank_95"):
            assert getattr(old, name) == getattr(new, name)
        for name in ("stable_rank", "effective_rank", "capacity_log10", "expressivity", "mp_fit_distance"):
            assert getattr(old, name) == pytest.approx(getattr(new, name), rel=1e-6)


def test_the_committed_card_is_made_from_the_committed_report():
    assert (CARD / "README.md").read_text() == Report.load(CARD / "report.json").card()
    assert {"spectra.png", "heatmap.png"} <= {p.name for p in CARD.iterdir()}


def test_training_shows(fresh):
    """A trained network is no noise: nearly every matrix of its blocks has spikes or a bulk that is not noise-like."""
    finding = next(f for f in fresh.findings if f.signature == "not converged")
    assert len(finding.matrices) <= 0.1 * len(fresh.matrices)


def test_the_demo_command_is_quick_and_offline(tmp_path):
    started = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-m", "lmd_hf", "demo", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=60, env={"PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert time.monotonic() - started < 60
    assert "parameters decomposed" in answer.stdout
    assert {p.name for p in tmp_path.iterdir()} >= {"report.json", "matrices.parquet", "card.md", "spectra.png"}
