"""Eigenvalues by way of a band, and the subspace of the smallest ones, against LAPACK."""

import threading
import time

import numpy as np
import pytest
import torch

from lmd_hf.matrix import band, smallest


WIDTH = band.WIDTH
SIZES = [1, 2, 3, WIDTH - 1, WIDTH, WIDTH + 1, WIDTH + 2, 2 * WIDTH, 2 * WIDTH + 1, 3 * WIDTH + 5, band.ROWS + 70]


def symmetric(build, values):
    q = torch.linalg.qr(build(len(values), len(values)).double()).Q
    return (q * values.double() @ q.T).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_eigenvalues_equal_lapack_to_the_rounding_of_the_largest(build, size):
    for values in (torch.linspace(-1, 1, size), torch.logspace(0, -12, size), torch.ones(size), torch.zeros(size)):
        matrix = symmetric(build, values)
        found = band.eigenvalues(np.tril(matrix))
        assert (np.diff(found) >= 0).all()
        np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix), rtol=0, atol=1e-15 * (1 + size / 10))


def test_zeros_and_blocks_leave_reflectors_nothing_to_do():
    matrix = np.zeros((200, 200))
    matrix[:3, :3] = [[2, 1, 0], [1, 2, 0], [0, 0, 5]]
    np.testing.assert_allclose(band.eigenvalues(matrix)[-3:], [1, 3, 5], rtol=1e-15)


def test_the_band_has_the_width_and_the_matrix_is_not_the_same(build):
    """The first stage alone: what it leaves outside the band would be lost unseen."""
    matrix = symmetric(build, torch.linspace(1, 2, 150))
    stored = band._to_band(matrix.copy())
    whole = sum(
        np.diag(stored[: 150 - offset, offset], -offset) + np.diag(stored[: 150 - offset, offset], offset)
        for offset in range(1, WIDTH + 1)
    ) + np.diag(stored[:, 0])
    np.testing.assert_allclose(np.linalg.eigvalsh(whole), np.linalg.eigvalsh(matrix), rtol=1e-13)
    assert np.abs(np.tril(matrix, -WIDTH - 1)).max() > 1e-3


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("small", [[1e-9], [1e-7, 3e-8, 1e-12], [2e-7] * 4, [0.0, 0.0]])
def test_the_subspace_holds_the_smallest_eigenvectors(build, small, on_device, monkeypatch):
    """On a GPU the same steps run in torch: here on a tensor that stays on the CPU."""
    values = torch.cat([torch.linspace(1, 0.1, 300 - len(small)), torch.tensor(small)]).double()
    matrix = torch.from_numpy(symmetric(build, values))
    squares = values.sort(descending=True).values
    size = smallest.subspace_size(squares, len(small))
    assert size is not None
    if on_device:
        start = torch.randn(300, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        shifted = matrix + 1e-13 * torch.eye(300, dtype=torch.float64)
        q = smallest._iterate_on_device(shifted, start, 10)
    else:
        q = smallest.smallest_subspace(matrix.clone(), squares, len(small), size)
    torch.testing.assert_close(q.T @ q, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, : len(small)]
    torch.testing.assert_close(q @ (q.T @ vectors), vectors, rtol=0, atol=1e-11)


def test_a_subspace_that_would_be_wide_is_left_to_others():
    assert smallest.subspace_size(torch.logspace(0, -8, 60, dtype=torch.float64), 10) is None
    assert smallest.subspace_size(torch.ones(60, dtype=torch.float64), 2) is None


def test_no_factor_no_subspace(build):
    matrix = torch.from_numpy(symmetric(build, torch.linspace(1, -1, 60)))
    assert smallest.smallest_subspace(matrix.clone(), torch.linspace(1, 0, 60).double(), 1, 2) is None
    assert smallest._iterate_on_device(matrix, torch.randn(60, 2).double(), 2) is None


def test_other_threads_run_meanwhile():
    """SciPy's own functions would hold Python's lock for the whole reduction of the band."""
    a = torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    worker = threading.Thread(target=band.eigenvalues, args=(a,))
    worker.start()
    longest, last = 0.0, time.perf_counter()
    while worker.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < 0.5
