"""The subspace of the smallest eigenvalues, against all eigenvectors by LAPACK."""

import numpy as np
import pytest
import torch

from lmd_hf.matrix.smallest import smallest_subspace, subspace_size


SPECTRA = {
    "noise": (400, lambda k: None, 3),
    "a few small": (400, lambda k: np.r_[np.linspace(1, 0.1, k - 2), 1e-4, 1e-6], 2),
    "one zero": (400, lambda k: np.r_[np.linspace(1, 0.1, k - 1), 0.0], 1),
    "repeated": (400, lambda k: np.r_[np.ones(k - 4), np.full(4, 1e-4)], 4),
}


def gram_of(k, sigma, seed=0):
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((k, k)) / k**0.5
    if sigma is not None:
        u, _, vh = np.linalg.svd(w)
        w = (u * sigma) @ vh
    return w, torch.from_numpy(w.T @ w)


@pytest.mark.parametrize("case", SPECTRA)
def test_the_subspace_holds_the_eigenvectors(case):
    k, make, count = SPECTRA[case]
    w, gram = gram_of(k, make(k))
    sigma = np.linalg.svd(w, compute_uv=False)
    squares = torch.from_numpy(sigma**2)
    size = subspace_size(squares, count)
    assert size is not None
    assert count <= size <= k / 16
    q = smallest_subspace(torch.tril(gram), squares, count, size).numpy()
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=1e-12)
    vectors = np.linalg.svd(w)[2][-count:].T
    outside = vectors - q @ (q.T @ vectors)
    bound = 1e-3 if case == "noise" else 1e-6  # of G's own rounding over its gap
    assert np.abs(outside).max() < bound
    found = np.linalg.svd(w @ q, compute_uv=False)[-count:]
    np.testing.assert_allclose(found, sigma[-count:], rtol=1e-7, atol=1e-12)


def test_no_subspace_where_nothing_sets_the_small_values_apart():
    squares = torch.linspace(1, 0.5, 400, dtype=torch.float64)
    assert subspace_size(squares, 3) is None


def test_a_matrix_that_has_no_cholesky_factor_is_left_to_others():
    squares = torch.cat([torch.ones(398, dtype=torch.float64), torch.full((2,), 1e-9, dtype=torch.float64)])
    assert smallest_subspace(-torch.eye(400, dtype=torch.float64), squares, 1, 2) is None
