"""Ranks and dimensions: closed forms on pure noise (theory, §3) and the spectra of known answer."""

import numpy as np
import pytest
import torch

from lmd_hf.matrix import dimension as d
from lmd_hf.matrix.kernels import exact
from lmd_hf.matrix.noise import noise_level


# β: stable rank, participation ratio, effective rank on λ, effective rank on σ, each over m
CLOSED_FORMS = {
    1.0: (0.25, 0.5, 0.606531, 0.805041),
    0.5: (0.343146, 0.666667, 0.778801, 0.926053),
    0.25: (0.444444, 0.8, 0.882497, 0.966222),
}


def noise(m, n, seed=0):
    return np.linalg.svd(np.random.default_rng(seed).standard_normal((m, n)) / n**0.5, compute_uv=False)


@pytest.mark.parametrize("beta", CLOSED_FORMS)
def test_noise_has_the_ranks_of_theory(beta):
    m = 600
    sigma = noise(m, int(m / beta))
    stable, participation, on_energy, on_sigma = CLOSED_FORMS[beta]
    assert d.stable_rank(sigma) / m == pytest.approx(stable, rel=0.025)  # finite size: Tracy–Widom moves the edge
    assert d.participation_ratio(sigma) / m == pytest.approx(participation, rel=3e-3)
    assert d.effective_rank_energy(sigma) / m == pytest.approx(on_energy, rel=3e-3)
    assert d.effective_rank(sigma) / m == pytest.approx(on_sigma, rel=3e-3)
    assert on_energy == pytest.approx(np.exp(-beta / 2), abs=1e-6)


def test_equal_values_have_full_rank_in_every_sense():
    ones = np.ones(7)
    for rank in (d.stable_rank, d.participation_ratio, d.effective_rank, d.effective_rank_energy):
        assert rank(ones) == pytest.approx(7)
    assert d.expressivity(ones) == pytest.approx(1)
    assert [d.energy_rank(ones, share) for share in (0.9, 0.95, 0.99)] == [7, 7, 7]


def test_one_value_has_rank_one_in_every_sense():
    one = np.array([3.0, 0.0, 0.0])
    for rank in (d.stable_rank, d.participation_ratio, d.effective_rank, d.effective_rank_energy):
        assert rank(one) == pytest.approx(1)
    assert d.expressivity(one) == 0
    assert d.energy_rank(one, 0.99) == 1


def test_stable_rank_from_norms():
    sigma = np.array([4.0, 3.0])  # ‖W‖_F = 5, ‖W‖₂ = 4
    assert d.stable_rank(sigma) == 1.5625


def test_energy_rank_counts_to_the_share():
    sigma = np.sqrt(np.array([80.0, 10.0, 5.0, 4.0, 1.0]))
    assert [d.energy_rank(sigma, share) for share in (0.8, 0.90, 0.95, 0.99)] == [1, 2, 3, 4]


def test_scaling_changes_no_rank():
    sigma = noise(50, 80)
    for rank in (d.stable_rank, d.participation_ratio, d.effective_rank, d.effective_rank_energy, d.expressivity):
        assert rank(1e6 * sigma) == pytest.approx(rank(sigma), rel=1e-12)
    assert d.numerical_rank(1e6 * sigma, 80, 2**-24) == d.numerical_rank(sigma, 80, 2**-24)


def test_the_zero_matrix_has_no_effective_rank():
    zero = np.zeros(4)
    for rank in (d.stable_rank, d.participation_ratio, d.effective_rank, d.effective_rank_energy, d.expressivity):
        assert rank(zero) is None
    assert d.energy_rank(zero, 0.9) is None
    assert d.numerical_rank(zero, 6, 2**-24) == 0
    assert d.latent_dimension(zero, zero, 6, "identity") == (None, None)


@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16", "float16"])
def test_numerical_rank_sees_through_the_rounding_of_storage(stored):
    """A 200 × 300 product of rank 5 has rank 5 in every format; float64's epsilon alone would say 200."""
    import torch

    from lmd_hf.matrix.kernels import exact

    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in ((200, 5), (5, 300))]
    w = (factors[0] @ factors[1]).to(getattr(torch, stored))
    sigma = exact(w).values.numpy()
    roundoff = torch.finfo(w.dtype).eps / 2
    assert d.numerical_rank(sigma, 300, roundoff) == 5
    if stored != "float64":
        assert d.numerical_rank(sigma, 300, 2.0**-53) > 5


def test_gavish_donoho_keeps_the_planted_signal():
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.standard_normal((200, 3)))[0], np.linalg.qr(rng.standard_normal((400, 3)))[0]
    w = (u * [5, 4, 3]) @ v.T + rng.standard_normal((200, 400)) / 20
    sigma = np.linalg.svd(w, compute_uv=False)
    assert d.gavish_donoho(sigma, 400) == 3
    assert d.latent_dimension(sigma, sigma, 400, "identity") == (3, "gavish-donoho")
    assert d.latent_dimension(sigma, sigma, 400, "data")[1] == "energy-0.90"


def test_pure_noise_falls_back_to_energy():
    sigma = noise(100, 200)
    assert d.gavish_donoho(sigma, 200) == 0
    assert d.latent_dimension(sigma, sigma, 200, "norm") == (d.energy_rank(sigma, 0.9), "energy-0.90")


def test_a_single_value_has_no_expressivity():
    assert d.expressivity(np.array([2.0])) is None
    assert d.latent_dimension(np.array([2.0]), np.array([2.0]), 9, "identity")[0] == 1


def test_log_volume_is_the_determinant_of_the_kept_axes():
    sigma = np.array([4.0, 2.0, 0.5, 0.0])
    assert d.log_volume(sigma, 3) == pytest.approx(np.log(np.prod(sigma[:3])))
    assert d.log_volume(sigma, 1) == pytest.approx(np.log(4))
    assert d.log_volume(sigma, 4) is None  # a flattened axis
    assert d.log_volume(sigma, None) is None
    assert d.log_volume(sigma * np.e, 3) == pytest.approx(d.log_volume(sigma, 3) + 3)


@pytest.mark.parametrize(
    ("w", "rank"),
    [
        (torch.ones(20, 30), 1),
        (torch.arange(40.0)[:, None] * torch.arange(60.0) % 3, None),
        (torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16().repeat_interleave(4, 0), 16),
    ],
)
def test_zeros_that_are_rounded_are_zeros(w, rank):
    """Where half of the values are exactly 0 the median is 0, whatever small numbers a solver makes of it."""
    sigma, n = exact(w).values.numpy(), max(w.shape)
    rank = rank or int(torch.linalg.matrix_rank(w.double()))
    assert d.gavish_donoho(sigma, n) == rank
    assert noise_level(sigma, n) == 0
