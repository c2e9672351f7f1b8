"""Leading singular triplets: what the certificates promise, against float64 LAPACK."""

import itertools

import numpy as np
import pytest
import torch

from lmd_hf.matrix.krylov import Triplets, certificates, krylov, norm_bound, refined
from lmd_hf.matrix.products import times


pytestmark = pytest.mark.usefixtures("one_thread")

K = 200
SPECTRA = {
    "flat": np.ones(K),
    "slow": np.linspace(1, 0.5, K),
    "decaying": np.logspace(0, -8, K),
    "spiked": np.concatenate([np.linspace(9, 3, 12), np.linspace(1, 0.1, K - 12)]),
    "nearly equal leaders": np.concatenate([[5, 5 - 1e-9, 5 - 1e-6, 4.999], np.linspace(1, 0.1, K - 4)]),
    "low rank": np.concatenate([np.linspace(3, 1, 20), np.zeros(K - 20)]),
}


def leading(w, tolerance=1e-3, rounds=2, block=8):
    return list(itertools.islice(krylov(w, seed=0, tolerance=tolerance, block=block), rounds))[-1]


def remainder_norm(w, triplets):
    left, right = triplets.left, triplets.right
    w = w.double() - left @ (left.T @ w.double())
    return torch.linalg.matrix_norm(w - (w @ right) @ right.T, 2).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_value_is_within_its_certificate_and_below_the_true_one(build, spectrum, dtype):
    w = build(260, K, SPECTRA[spectrum]).to(dtype)
    exact = np.linalg.svd(w.double().numpy(), compute_uv=False)
    found = leading(w, rounds=1)
    bounds = certificates(found, remainder_norm(w, found), 1e-13 * exact[0])
    values = found.values.numpy()
    assert (np.abs(values - exact[: len(values)]) <= bounds).all()
    assert (values <= exact[: len(values)] * (1 + 1e-12)).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_triplets_are_orthonormal_and_their_residuals_true(build, spectrum):
    w = build(260, K, SPECTRA[spectrum])
    found = leading(w)
    eye = torch.eye(len(found.values), dtype=torch.float64)
    torch.testing.assert_close(found.right.T @ found.right, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(w @ found.right, found.left * found.values, rtol=0, atol=1e-12)
    true = torch.linalg.vector_norm(w.T @ found.left - found.right * found.values, dim=0)
    torch.testing.assert_close(found.residuals, true, rtol=1e-6, atol=1e-13)
    assert (found.values.diff() <= 0).all()
    near = np.linalg.svd(w.numpy(), compute_uv=False)[None, :] - found.values.numpy()[:, None]
    assert (np.abs(near).min(1) <= found.residuals.numpy() + 1e-13).all()


def test_a_missed_value_is_what_the_bound_on_the_rest_is_for(build):
    """Triplets 2 and 3 pass for 1 and 2 as far as residuals go; ‖R‖ widens the certificates to the truth."""
    w = build(60, 50, np.linspace(5, 1, 50))
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    wrong = Triplets(u[:, 1:3], s[1:3], vh[1:3].T, torch.zeros(2, dtype=torch.float64))
    assert (certificates(wrong, 0.0, 0.0) == 0).all()
    bounds = certificates(wrong, s[0].item(), 0.0)
    assert (np.abs(s[1:3].numpy() - s[:2].numpy()) <= bounds + 1e-12).all()


def test_a_gap_makes_the_certificate_quadratic():
    one = Triplets(
        torch.zeros(3, 1), torch.tensor([2.0], dtype=torch.float64), torch.zeros(3, 1), torch.tensor([1e-4]).double()
    )
    assert certificates(one, 1.0, 0.0)[0] == pytest.approx(1e-8, rel=1e-3)
    assert certificates(one, 2.0, 0.0)[0] == pytest.approx(1e-4)
    assert certificates(one, 2.5, 0.0)[0] == pytest.approx(0.5 + 1e-4)


def test_more_steps_find_more(build):
    w = build(700, 600).float()
    rounds = list(itertools.islice(krylov(w, seed=0, tolerance=1e-3, block=8), 3))
    assert len(rounds[0].values) <= len(rounds[1].values) < len(rounds[2].values)
    assert rounds[2].residuals[0] < rounds[0].residuals[0]


def test_the_space_ends_with_the_whole_of_it(build):
    w = build(60, 40)
    last = list(krylov(w, seed=0, tolerance=1e-9))[-1]
    np.testing.assert_allclose(last.values, np.linalg.svd(w.numpy(), compute_uv=False)[: len(last.values)], rtol=1e-12)


def test_the_same_seed_gives_the_same_triplets_and_another_does_not(build):
    w = build(200, 150)
    first, again, other = (next(iter(krylov(w, seed=seed, tolerance=1e-2, block=4))) for seed in (1, 1, 2))
    assert torch.equal(first.right, again.right)
    assert not torch.equal(first.right, other.right)


def test_norm_bound_holds_and_says_nothing_after_too_few_steps(build):
    assert norm_bound(1.0, 10_000, 1, 5) == np.inf
    assert 1 < norm_bound(1.0, 10_000, 32, 24) < 1.01
    assert norm_bound(1.0, 10_000, 32, 48) < norm_bound(1.0, 10_000, 32, 24)


def test_products_keep_to_the_type_of_the_matrix_unless_exact_is_asked(build, monkeypatch):
    w = build(70, 50).float()
    x = build(50, 4, seed=1)
    monkeypatch.setattr("lmd_hf.matrix.products.CHUNK_ENTRIES", 130)
    reference = w.double() @ x
    torch.testing.assert_close(times(w, x, exact=True), reference, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(times(w.T.contiguous().T, x, exact=True), reference, rtol=1e-14, atol=1e-14)
    rounded = (times(w, x) - reference).abs().max().item()
    assert 1e-9 < rounded < 1e-5


def test_refining_keeps_the_space(build):
    w = build(80, 60, np.linspace(3, 1, 60))
    _, s, vh = torch.linalg.svd(w, full_matrices=False)
    turned = vh[:5].T @ torch.linalg.qr(build(5, 5, seed=3)).Q
    torch.testing.assert_close(refined(w, turned).values, s[:5], rtol=1e-12, atol=0)
