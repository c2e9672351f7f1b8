"""Eigenvalues in two stages, against LAPACK's one."""

import threading
import time

import numpy as np
import pytest

from lmd_hf.matrix import band


U = 2.0**-53


def symmetric(k, eigenvalues=None, seed=0):
    generator = np.random.default_rng(seed)
    if eigenvalues is None:
        a = generator.standard_normal((k, k))
        return (a + a.T) / 2
    q = np.linalg.qr(generator.standard_normal((k, k)))[0]
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2


@pytest.mark.parametrize("k", [1, 2, 3, 47, 48, 49, 50, 96, 97, 98, 255, 256, 257, 300, 513])
def test_every_size_around_a_panel_and_a_block(k):
    a = symmetric(k)
    expected = np.linalg.eigvalsh(a)
    found = band.eigenvalues(np.tril(a))  # nothing above the diagonal is read
    np.testing.assert_allclose(found, expected, rtol=0, atol=k * U * np.abs(expected).max() * 4)


SPECTRA = {
    "zero": np.zeros(200),
    "identity": np.ones(200),
    "graded": np.logspace(0, -14, 200),
    "one large": np.r_[1e6, np.ones(199)],
    "low rank": np.r_[np.zeros(190), np.arange(10)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_degenerate_spectra(spectrum):
    eigenvalues = SPECTRA[spectrum]
    found = band.eigenvalues(symmetric(200, eigenvalues))
    np.testing.assert_allclose(found, np.sort(eigenvalues), rtol=0, atol=800 * U * max(1e-300, eigenvalues.max()))


def test_a_large_matrix():
    a = symmetric(1100, np.linspace(1, 2, 1100))
    found = band.eigenvalues(a)
    np.testing.assert_allclose(found, np.linspace(1, 2, 1100), rtol=0, atol=1100 * U * 2)


def test_other_threads_run_meanwhile():
    """SciPy's own functions would hold Python's lock for the whole reduction of the band."""
    a = symmetric(1500)
    worker = threading.Thread(target=band.eigenvalues, args=(a,))
    worker.start()
    longest, last = 0.0, time.perf_counter()
    while worker.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < 0.5
