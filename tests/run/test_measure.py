"""Rows from spectra: two metrics, exact and sketched."""

from dataclasses import replace

import pytest
import torch

from lmd_hf import analyze
from lmd_hf.records import Work
from lmd_hf.run.convergence import looks_untrained
from lmd_hf.run.measure import Spectra, measure, to_row
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import Rounding, Stored


STORED = Rounding(2.0**-24, 0.0)


@pytest.fixture(scope="module")
def work(save):
    """Work on a query projection that is said to be 820 × 900."""
    ref = next(r for r in list_matrices(open_source(save("mixtral"))).selected if r.role == "q")
    return Work(replace(ref, shape=(820, 900)), "sketch", 1.0, 1, tolerance=0.05)


@pytest.fixture(scope="module")
def matrix():
    return torch.randn(820, 900, generator=torch.Generator().manual_seed(1))


def spectrum(work, w):
    return measure(work, Stored(w, STORED), None).raw


def test_each_number_has_the_interval_of_its_own_spectrum(work, matrix):
    """Noise figures are those of W in every metric, ranks those of the metric's spectrum."""
    raw, scaled = spectrum(work, matrix), spectrum(work, matrix * torch.linspace(0.2, 2, 900))
    plain, folded = (to_row(work.ref, Spectra(raw, s, STORED), kernel="sketch") for s in (raw, scaled))
    assert folded.intervals["mp_edge"] == plain.intervals["mp_edge"]
    assert folded.intervals["effective_rank"][1] < plain.intervals["effective_rank"][0]


def test_a_sketch_beside_an_exact_spectrum(work, matrix):
    exact = spectrum(replace(work, kernel="exact"), matrix)
    sketched = spectrum(work, matrix * torch.linspace(0.2, 2, 900))
    row = to_row(work.ref, Spectra(exact, sketched, STORED), kernel="sketch")
    low, high = row.intervals["mp_edge"]
    assert low == high == row.mp_edge
    low, high = row.intervals["effective_rank"]
    assert low < row.effective_rank < high


def test_seeds_come_from_which_entries_the_matrix_has(work, matrix):
    again = replace(work, ref=replace(work.ref, role="k", layer=7, part="k"))
    other = replace(work, ref=replace(work.ref, rows=((0, 820, 1),)))
    first = spectrum(work, matrix).values
    assert torch.equal(first, spectrum(again, matrix).values)
    assert not torch.equal(first, spectrum(other, matrix).values)


def test_no_count_and_no_rank_passes_the_short_side(work, matrix):
    row = to_row(work.ref, Spectra(spectrum(work, matrix), None, STORED), kernel="sketch")
    counts = {name: high for name, (_, high) in row.intervals.items() if isinstance(getattr(row, name), int)}
    assert counts["numerical_rank"] == row.numerical_rank == 820
    assert max(counts.values()) <= 820
    assert row.intervals["effective_rank"][1] <= 820


def test_an_interval_of_a_logarithm_goes_below_zero(work, matrix):
    scale = 1e-3 * torch.linspace(0.2, 2, 900)
    row = to_row(work.ref, Spectra(spectrum(work, matrix * scale), None, STORED), kernel="sketch")
    low, high = row.intervals["log_volume"]
    assert low <= row.log_volume <= high < 0


@pytest.mark.parametrize("planted", [0, 2])
def test_certified_spikes_are_sure_however_widely_the_tail_s_count_varies(work, matrix, planted):
    """One that is far above noise cannot be called noise, whatever the estimate of the bulk leaves open."""
    left, right = (torch.linalg.qr(matrix[:side, :2]).Q for side in (820, 800))
    w = matrix.clone()
    w[:, :800] += 200 * left[:, :planted] @ right[:, :planted].T
    row = to_row(work.ref, Spectra(spectrum(work, w), None, STORED), kernel="sketch")
    assert row.intervals["mp_spikes_99"][0] == row.intervals["mp_spikes"][0] == planted
    assert looks_untrained(row) is (planted == 0)


@pytest.mark.parametrize("size", [1e200, 1e-200, 1.7e308])
def test_numbers_whose_squares_do_not_fit_are_refused(size):
    module = torch.nn.Linear(30, 20, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(module.weight, size)
    report = analyze(module)
    assert not report.matrices
    assert "float64 does not hold the squares" in report.coverage.skipped[0].reason
