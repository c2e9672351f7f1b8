"""The kernel `sketch`: its intervals and certificates against float64 LAPACK, refusals, and when it gives way."""

import itertools

import numpy as np
import pytest
import torch

from lmd_hf.matrix import dimension, noise
from lmd_hf.matrix.cost import LANCZOS, PROBES, sketch_pays
from lmd_hf.matrix.kernels import KERNELS, exact, sketch
from lmd_hf.matrix.sketch import METHOD, _lead, _measured, prepared
from lmd_hf.matrix.spectrum import interval_of, variants


pytestmark = pytest.mark.usefixtures("one_thread")

K = PROBES * LANCZOS + 32  # the least that is sketched, near enough
SPECTRA = {
    "noise": None,
    "to zero": np.linspace(1, 0.001, K),
    "power": np.arange(1, K + 1) ** -0.5,
    "spiked": np.concatenate([np.linspace(9, 3, 20), np.linspace(1, 0.1, K - 20)]),
    "two clusters": np.repeat([1, 0.1], [500, K - 500]),
}
NUMBERS = {
    "stable rank": dimension.stable_rank,
    "participation ratio": dimension.participation_ratio,
    "effective rank": dimension.effective_rank,
    "effective rank, energy": dimension.effective_rank_energy,
    "energy rank 0.90": lambda s: dimension.energy_rank(s, 0.90),
    "energy rank 0.99": lambda s: dimension.energy_rank(s, 0.99),
    "numerical rank": lambda s: dimension.numerical_rank(s, 1000, 2.0**-9),
    "noise edge": lambda s: noise.mp_edge(s, 1000),
    "spikes": lambda s: noise.spikes(s, 1000),
}


def interval(number, values, sketch):
    return interval_of([number(each) for each in variants(values, sketch)])


def one_round(w, seed, *, probes=PROBES, steps=LANCZOS):
    """The first round of a sketch, whether it met its tolerance or not."""
    w_LS, _, energy = prepared(w)
    return _measured(w_LS, _lead(w_LS, energy, seed, 0.01), energy, probes=probes, steps=steps, seed=seed)


def count_hits(w, seeds, **options):
    """How many of the seeds give an interval that holds the true number, for each number; and all certificates."""
    true = np.linalg.svd(w.double().numpy(), compute_uv=False)
    hits, held = dict.fromkeys(NUMBERS, 0), 0
    for seed in seeds:
        found = one_round(w, seed, **options)
        count = len(found.sketch.certified)
        held += bool((np.abs(found.values.numpy() - true)[:count] <= found.sketch.certified).all())
        for name, number in NUMBERS.items():
            low, high = interval(number, found.values.numpy(), found.sketch)
            hits[name] += low <= number(true) <= high
    return hits, held


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_leading_values_keep_their_certificates_and_numbers_their_intervals(build, spectrum):
    w = build(1000, K, SPECTRA[spectrum]).float()
    true = np.linalg.svd(w.double().numpy(), compute_uv=False)
    found = sketch(w, tolerance=0.03)
    values, count = found.values.numpy(), len(found.sketch.certified)
    assert found.method == METHOD
    assert count >= 1
    assert (np.abs(values - true)[:count] <= found.sketch.certified).all()
    assert (found.sketch.certified <= 0.03 * values[:count]).all()
    assert found.error_bound == pytest.approx((found.sketch.certified / values[:count]).max())
    assert np.sum(values**2) == pytest.approx(np.sum(true**2), rel=1e-3)
    assert (np.diff(values) <= 0).all()
    assert dimension.effective_rank(values) == pytest.approx(dimension.effective_rank(true), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_storage_type_tall_and_wide(build, dtype):
    w = build(1100, K, np.linspace(2, 1, K)).to(dtype)
    values = sketch(w if dtype.itemsize > 2 else w.T).values
    assert values.dtype == torch.float64
    assert dimension.effective_rank(values.numpy()) == pytest.approx(K * 0.98, rel=0.02)


@pytest.mark.slow
def test_intervals_hold_on_ten_seeds(build):
    """Of 10 intervals that hold with 95 % each, 7 or fewer do with a probability of 1 %; certificates always hold."""
    hits, held = count_hits(build(1000, K).float(), range(10))
    assert held == 10
    assert min(hits.values()) >= 8, hits


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_intervals_hold_on_a_hundred_seeds(build, spectrum):
    hits, held = count_hits(build(1000, K, SPECTRA[spectrum]).float(), range(100))
    assert held == 100
    assert min(hits.values()) >= 93, hits


@pytest.mark.slow
def test_intervals_hold_on_a_real_matrix(minilm):
    from safetensors.torch import load_file

    w = load_file(minilm / "model.safetensors")["encoder.layer.3.intermediate.dense.weight"]
    hits, held = count_hits(w, range(100), steps=16)
    assert held == 100
    assert min(hits.values()) >= 93, hits


def test_a_low_rank_matrix_has_that_rank_and_nothing_below(build):
    low = build(1000, K, np.concatenate([np.linspace(3, 1, 20), np.zeros(K - 20)])).float()
    found = sketch(low)
    np.testing.assert_allclose(found.values[:20], np.linspace(3, 1, 20), rtol=1e-6)
    assert found.values[20] < 1e-6
    assert dimension.numerical_rank(found.values.numpy(), 1000, 2.0**-24) == 20
    assert dimension.effective_rank(found.values.numpy()) == pytest.approx(
        dimension.effective_rank(exact(low).values.numpy()), rel=1e-3
    )


def test_the_zero_matrix_needs_no_estimate():
    found = sketch(torch.zeros(1000, K))
    assert found.sketch is None
    assert found.values.shape == (K,)
    assert not found.values.any()


def test_small_matrices_run_exact(build):
    assert not sketch_pays(PROBES * LANCZOS)
    found = KERNELS["sketch"](build(90, 60, np.linspace(1, 0.1, 60)))
    assert (found.method, found.sketch) == ("gram", None)


def test_a_missed_tolerance_runs_exact(build):
    w = build(1000, K, SPECTRA["to zero"]).float()
    assert sketch(w, tolerance=0.05).method == METHOD
    given_up = sketch(w, tolerance=1e-4)
    assert given_up.sketch is None
    torch.testing.assert_close(given_up.values, exact(w).values)


def test_a_missed_tolerance_first_takes_more_probes(build, monkeypatch):
    """With room for several rounds the interval narrows until it fits."""
    from lmd_hf.matrix import kernels

    monkeypatch.setattr(kernels, "exact_flops", lambda *_: np.inf)
    w = build(1000, K).float()
    wide, narrow = sketch(w, tolerance=0.02), sketch(w, tolerance=0.004)
    assert len(narrow.sketch.replicas) > len(wide.sketch.replicas)
    low, high = interval(dimension.effective_rank, narrow.values.numpy(), narrow.sketch)
    assert high - low <= 2 * 0.004 * dimension.effective_rank(narrow.values.numpy())


def test_the_same_seed_gives_the_same_spectrum(build):
    w = build(900, K).float()
    first, again, other = sketch(w, seed=3), sketch(w, seed=3), sketch(w, seed=4)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)


def test_transposing_scaling_and_permuting_change_no_more_than_the_interval(build):
    w = build(1000, K, SPECTRA["spiked"])
    base = sketch(w)
    torch.testing.assert_close(sketch(w.T).values, base.values, rtol=1e-12, atol=0)
    torch.testing.assert_close(sketch(8 * w).values, 8 * base.values, rtol=1e-9, atol=0)
    generator = torch.Generator().manual_seed(0)
    shuffled = w[torch.randperm(1000, generator=generator)][:, torch.randperm(K, generator=generator)]
    low, high = interval(dimension.effective_rank, base.values.numpy(), base.sketch)
    other = interval(dimension.effective_rank, sketch(shuffled).values.numpy(), base.sketch)
    assert low <= other[1]
    assert other[0] <= high


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_extreme_float64_scales_neither_overflow_nor_vanish(build, scale):
    w = build(K, K, np.linspace(2, 1, K))
    np.testing.assert_allclose(sketch(w * scale).values / scale, sketch(w).values, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad, dtype):
    w = torch.ones(K, K, dtype=dtype)
    w[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        sketch(w)


def test_empty_matrices_are_refused():
    with pytest.raises(ValueError, match="empty"):
        sketch(torch.zeros(0, 3))


def test_where_nothing_converges_there_is_no_sketch(build, monkeypatch):
    monkeypatch.setattr("lmd_hf.matrix.sketch.krylov", lambda *_, **__: itertools.repeat(None, 0))
    assert sketch(build(K, K)).sketch is None
