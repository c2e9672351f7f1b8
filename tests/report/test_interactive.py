"""Figures and pages for a browser: what they show is what the report holds."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_trapezoid

from lmd_hf import Report, decompose, interactive
from lmd_hf.matrix.noise import mp_cdf, mp_density
from lmd_hf.report.grid import short
from lmd_hf.report.overview import in_units, reading
from lmd_hf.report.pictures import SIDE


@pytest.fixture(scope="module")
def report():
    from pathlib import Path

    return Report.load(Path(__file__).parents[2] / "model_cards" / "lmd-hf--stdlib-llama-1m" / "report.json")


def test_the_density_is_the_derivative_of_the_distribution():
    for beta in (0.2, 0.5, 1.0):
        x = np.linspace(0.05, 5, 50_001)
        summed = cumulative_trapezoid(mp_density(x, beta), x, initial=0)
        assert np.allclose(summed, mp_cdf(x, beta) - mp_cdf(x[:1], beta), atol=1e-4)


def test_a_map_has_a_button_for_every_place(report):
    name = "effective rank / k"
    table = interactive.layer_table(report.matrices, name, interactive.MEASURES[name])
    keys = set(re.findall(r'data-key="([^"]+)"', table))
    assert keys == {interactive.matrix_key(m) for m in report.matrices}
    labels = re.findall(r'aria-label="(layer [^"]+)"', table)
    first = next(m for m in report.matrices if m.layer == 0)
    assert f"layer 0, attention q: {first.effective_rank / min(first.shape):.2f}" in labels


def test_heads_have_their_grid(report):
    grid = interactive.head_grid(report.heads, "copying score of OV")
    assert (
        len(re.findall("data-key", grid)) == len(report.heads) == len({interactive.head_key(h) for h in report.heads})
    )


def test_figures_hold_the_numbers(report):
    matrix = report.matrices[3]
    assert np.allclose(interactive.spectrum(matrix).data[0].y, matrix.singular_values)
    shares = np.array(interactive.energy(matrix).data[0].y)
    expected = np.cumsum(matrix.singular_values**2) / matrix.frobenius_norm**2
    assert np.allclose(shares, expected)
    law = interactive.density(matrix).data[1]
    assert np.trapezoid(law.y, law.x) == pytest.approx(1, abs=0.02)


def test_names_of_a_repository_are_inert(report):
    bad = '"><script>alert(1)</script>'
    row = dataclasses.replace(report.matrices[0], name=bad, block="", layer=None)
    evil = dataclasses.replace(
        report, matrices=(row, *report.matrices[1:]), model=dataclasses.replace(report.model, id=bad)
    )
    name = "stable rank"
    for text in (
        interactive.layer_table(evil.matrices, name, interactive.MEASURES[name]),
        interactive.overview(evil),
        evil.page(),
    ):
        assert "<script>alert" not in text


def test_the_reading_says_where_its_numbers_come_from(report):
    alone = " ".join(reading(report))
    assert "the matrix’s own noise" in alone
    assert "come from the weights alone" in alone
    data = dataclasses.replace(report, settings={**report.settings, "metric": "data", "data": {"dataset": "a<b"}})
    told = " ".join(reading(data))
    assert "hold 90 % of the outputs’ energy over the data" in told
    assert "own noise" not in told
    assert "come from the weights and one dataset (a&lt;b) alone" in told


def test_the_reading_of_one_role_and_of_none_is_whole(report):
    one = reading(dataclasses.replace(report, matrices=report.matrices[:1], heads=report.heads[:1]))
    assert one[0].startswith("1 weight matrix holds ")
    assert one[1].startswith("A typical matrix spreads its weight over ")
    assert one[2].startswith("Its latent dimension n' is ")
    assert one[3].startswith("Of 1 attention head, ")
    none = reading(dataclasses.replace(report, matrices=(), heads=()))
    assert len(none) == 2
    assert "Each is read" not in none[0]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999, "999"), (1_000, "1 k"), (999_885_952, "1 B"), (999_499, "999 k"), (8_030_261_248, "8.03 B")],
)
def test_a_count_of_parameters_is_short(count, shown):
    assert in_units(count) == shown


def test_pictures_of_block_means_are_those_of_the_matrix():
    w = torch.randn(300, 130, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lmd = decompose(w)
    factors = interactive.Factors.of(w, lmd)
    assert factors.w_PQ.shape == (SIDE, SIDE)
    rebuilt = (factors.projection_PK * factors.s_K) @ factors.similarity_KQ
    assert np.allclose(rebuilt, factors.w_PQ, atol=1e-12)
    for cut in (1, 50, 130):
        lost = w - (lmd.projection[:, :cut] * lmd.s_K[:cut]) @ lmd.similarity[:cut]
        assert factors.error(cut) == pytest.approx((lost.norm() / w.norm()).item(), abs=1e-6)
    again = interactive.Factors.from_dict(factors.to_dict())
    assert np.allclose(again.w_PQ, factors.w_PQ, rtol=1e-6)
    assert interactive.pictures(again, 20).count("<img ") == 8


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "–"), (3.0, "3"), (0.456, "0.46"), (-0.001, "0.00"), (123.4, "123")]
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_the_page_stands_alone(report):
    page = report.page()
    assert "@@" not in page.split("/* plotly.js")[0]
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', page)
    assert all(interactive.title(m) in page for m in report.matrices)
