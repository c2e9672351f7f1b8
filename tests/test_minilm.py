"""A real model: all-MiniLM-L6-v2, 22.7 million parameters, fp32."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from lmd_hf import Report, analyze


CARD = Path(__file__).parents[1] / "model_cards" / "sentence-transformers--all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def report(minilm):
    return analyze(minilm)


def test_every_parameter_is_accounted_for(report, minilm):
    stored = load_file(minilm / "model.safetensors")
    assert report.coverage.parameters == sum(t.numel() for t in stored.values())
    skipped = sum(int(np.prod(s.shape)) for s in report.coverage.skipped)
    assert report.coverage.decomposed + skipped == report.coverage.parameters
    assert {s.reason for s in report.coverage.skipped} == {"vector"}
    assert Counter((m.block, m.role) for m in report.matrices) == {
        ("attention", "q"): 6,
        ("attention", "k"): 6,
        ("attention", "v"): 6,
        ("attention", "o"): 6,
        ("mlp", "up"): 6,
        ("mlp", "down"): 6,
        ("", "embed"): 3,
        ("", "other"): 1,
    }


def test_every_value_equals_lapack(report, minilm):
    stored = load_file(minilm / "model.safetensors")
    for matrix in report.matrices:
        reference = np.linalg.svd(stored[matrix.name].double().numpy(), compute_uv=False)
        trusted = reference > 1e-6 * reference[0]
        error = np.abs(matrix.singular_values - reference)[trusted] / reference[trusted]
        assert error.max() <= min(1e-7, matrix.error_bound)


def test_its_unused_pooler_is_seen_as_untrained(report):
    """sentence-transformers pools by the mean, so the pooler was never trained: the only matrix that is pure noise."""
    finding = next(f for f in report.findings if f.signature == "not converged")
    assert finding.matrices == ("pooler.dense.weight",)


def test_the_norm_metric_changes_what_a_norm_feeds(report, minilm):
    folded = {m.name: m for m in analyze(minilm, metric="norm").matrices}
    for matrix in report.matrices:
        fed = matrix.role in ("q", "k", "v", "up")
        assert folded[matrix.name].metric == ("norm" if fed else "identity")
        assert (folded[matrix.name].spectral_norm == matrix.spectral_norm) != fed


def test_the_committed_card_and_report_are_what_the_model_gives(report):
    committed = Report.load(CARD / "report.json")
    assert (CARD / "README.md").read_text() == committed.card()
    assert committed.coverage == report.coverage
    for old, new in zip(committed.matrices, report.matrices, strict=True):
        assert (old.name, old.latent_dim, old.mp_spikes) == (new.name, new.latent_dim, new.mp_spikes)
        assert old.effective_rank == pytest.approx(new.effective_rank, rel=1e-6)
    assert len(committed.heads) == 6 * 12
