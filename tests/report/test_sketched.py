"""A report with sketched matrices: rows, round trips, schema, text, card, figures, findings, command line."""

import json
from dataclasses import replace
from importlib import resources

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmd_hf import Report, analyze
from lmd_hf.cli import run
from lmd_hf.errors import SettingsError
from lmd_hf.matrix.sketch import METHOD
from lmd_hf.report.text import with_error


SCHEMA = json.loads(resources.files("lmd_hf.report").joinpath("schema.json").read_text())
ESTIMATED = ("effective_rank", "participation_ratio", "stable_rank", "energy_rank_90", "latent_dim", "mp_edge")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two matrices large enough to be sketched, noise and one with planted directions, and a small one."""
    folder = tmp_path_factory.mktemp("sketched")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(820, 900, generator=generator) / 30
    planted = 3 * torch.linalg.qr(torch.randn(820, 10, generator=generator)).Q
    tensors = {
        "model.layers.0.mlp.up_proj.weight": noise,
        "model.layers.0.mlp.gate_proj.weight": noise.flip(1).contiguous()
        + planted @ torch.linalg.qr(torch.randn(900, 10, generator=generator)).Q.T,
        "model.layers.0.mlp.small_proj.weight": torch.randn(40, 60, generator=generator),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return analyze(folder, kernel="sketch", tolerance=0.03)


@pytest.fixture(scope="module")
def exact(folder):
    return {m.name: m for m in analyze(folder).matrices}


def sketched(report):
    return [m for m in report.matrices if m.method == METHOD]


def test_rows_say_what_was_asked_and_what_ran(report):
    assert {m.kernel for m in report.matrices} == {"sketch"}
    assert [m.method for m in report.matrices if min(m.shape) < 100] == ["gram"]
    assert len(sketched(report)) == 2


def test_intervals_hold_the_exact_numbers(report, exact):
    for matrix in sketched(report):
        true = exact[matrix.name]
        for name, (low, high) in matrix.intervals.items():
            assert low <= getattr(true, name) <= high, name
        assert set(ESTIMATED) <= set(matrix.intervals)
        assert matrix.frobenius_norm == pytest.approx(true.frobenius_norm, rel=1e-12)
        assert matrix.smallest_singular_value is None
        count = len(matrix.singular_values)
        assert matrix.singular_value_ranks == tuple(range(1, count + 1))
        error = np.abs(matrix.singular_values - true.singular_values[:count]) / true.singular_values[:count]
        assert error.max() <= matrix.error_bound <= 0.03


def test_the_same_matrix_in_another_run_has_the_same_numbers(report, folder):
    """To the rounding of float32 products, which changes with the number of BLAS threads; intervals are far wider."""
    again = analyze(folder, kernel="sketch", tolerance=0.03, match="*gate*").matrices[0]
    first = next(m for m in report.matrices if m.name == again.name)
    for name in ESTIMATED:
        assert getattr(again, name) == pytest.approx(getattr(first, name), rel=1e-6)
    np.testing.assert_allclose(again.singular_values[:5], first.singular_values[:5], rtol=1e-9)


def test_round_trips_schema_and_parquet(report, tmp_path):
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(report.to_json()))
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(report.to_json()).card() == report.card()
    report.save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded == report
    assert [len(m.singular_values) for m in loaded.matrices] == [len(m.singular_values) for m in report.matrices]


def test_text_card_and_figures_mark_estimates(report, tmp_path):
    assert "sketched: 2 of 3 matrices, with 95 % intervals; 1 ran exact" in report.summary()
    assert report.table().count(" ± ") >= 4
    assert "<table>" in report._repr_html_()
    card = report.card()
    assert "2 of 3 matrices are sketched" in card
    assert "--kernel sketch --tolerance 0.03" in card
    assert set(report.plot(tmp_path)) == {"spectra", "capacity", "heatmap"}


def test_intervals_in_cells(report):
    matrix = sketched(report)[0]
    middle = 100.0
    for half, shown in ((12.21, "12.3"), (0.001, "0.1"), (0.0, "0.0")):  # up: an estimate is not shown as exact
        told = replace(matrix, effective_rank=middle, intervals={"effective_rank": (middle - half, middle + half)})
        assert with_error(told, "effective_rank", 1) == f"100.0 ± {shown}"
    small = next(m for m in report.matrices if m.intervals is None)
    assert with_error(small, "effective_rank", 1) == f"{small.effective_rank:,.1f}"


def test_noise_is_still_seen_and_planted_directions_are_not_noise(report):
    found = {f.signature: f for f in report.findings}["not converged"]
    assert "model.layers.0.mlp.up_proj.weight" in found.matrices
    assert "model.layers.0.mlp.gate_proj.weight" not in found.matrices


def test_exact_rows_have_no_intervals(exact):
    assert all(m.intervals is None for m in exact.values())


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1])
def test_a_tolerance_is_relative(folder, tolerance):
    with pytest.raises(SettingsError, match="tolerance"):
        analyze(folder, kernel="sketch", tolerance=tolerance)


def test_the_command_line_takes_both(folder, capsys):
    assert run(["plan", str(folder), "--kernel", "sketch", "--tolerance", "0.05", "--json"]) == 0
    assert {m["kernel"] for m in json.loads(capsys.readouterr().out)["matrices"]} == {"sketch"}
    assert run(["plan", str(folder), "--tolerance", "much"]) == 2
