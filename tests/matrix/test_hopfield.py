"""QK and OV circuits against dense float64 products."""

import pytest
import torch

from lmd_hf.matrix.hopfield import (
    core_of,
    fold,
    hopfield_class,
    ov_circuit,
    qk_circuit,
    read_core,
    token_norm,
    tokens_in_mass,
)
from lmd_hf.records import Factored


D, N = 5, 40


def dense(product):
    return product.scale * product.left.double() @ product.right.double()


def read_circuit(product, *, one_stream):
    return read_core(core_of(product, one_stream=one_stream))


def score(matrix):
    """Σ Re λ / Σ|λ| of a whole n × n matrix."""
    eigenvalues = torch.linalg.eigvals(matrix)
    return (eigenvalues.real.sum() / eigenvalues.abs().sum()).item()


def symmetric(matrix):
    return (((matrix + matrix.T) / 2).square().sum() / matrix.square().sum()).item()


@pytest.fixture
def product(build):
    return qk_circuit(build(D, N, seed=1), build(D, N, seed=2), 0.25)


def test_the_circuit_scores_queries_against_memories(build):
    w_q, w_k, x, memory = build(D, N, seed=1), build(D, N, seed=2), build(N, 1, seed=3), build(N, 1, seed=4)
    torch.testing.assert_close(memory.T @ dense(qk_circuit(w_q, w_k, 0.3)) @ x, 0.3 * (w_k @ memory).T @ (w_q @ x))
    w_o, w_v = build(N, D, seed=5), build(D, N, seed=6)
    torch.testing.assert_close(dense(ov_circuit(w_o, w_v)) @ memory, w_o @ (w_v @ memory))


def test_numbers_are_those_of_the_dense_matrix(product):
    b, found = dense(product), read_circuit(product, one_stream=True)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(b)[:D], rtol=1e-12, atol=0)
    assert found.symmetric_energy == pytest.approx(symmetric(b), rel=1e-12)
    assert found.eigenvalue_score == pytest.approx(score(b), rel=1e-6)  # n − d eigenvalues of B are rounding


@pytest.mark.parametrize(("kind", "energy", "attraction"), [(1, 1.0, 1.0), (-1, 1.0, -1.0)])
def test_symmetric_forms_attract_or_repel(build, kind, energy, attraction):
    w = build(D, N)
    found = read_circuit(qk_circuit(w, kind * w, 1.0), one_stream=True)
    assert found.symmetric_energy == pytest.approx(energy, abs=1e-12)
    assert found.eigenvalue_score == pytest.approx(attraction, abs=1e-12)


def test_an_antisymmetric_form_has_no_symmetric_energy(build):
    w = build(4, N)
    turn = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1], [0, 0, -1, 0]], dtype=torch.float64)
    found = read_circuit(qk_circuit(w, turn @ w, 1.0), one_stream=True)
    assert found.symmetric_energy == pytest.approx(0, abs=1e-12)
    assert found.eigenvalue_score == pytest.approx(0, abs=1e-12)


def test_unrelated_factors_have_half_the_energy(build):
    found = read_circuit(qk_circuit(build(4, 2000, seed=1), build(4, 2000, seed=2), 1.0), one_stream=True)
    assert found.symmetric_energy == pytest.approx(0.5, abs=0.01)


def test_rotations_of_the_stream_change_nothing(build, product):
    turn = torch.linalg.qr(build(N, N, seed=9)).Q
    before = read_circuit(product, one_stream=True)
    after = read_circuit(Factored(turn @ product.left, product.right @ turn.T, product.scale), one_stream=True)
    torch.testing.assert_close(after.values, before.values, rtol=1e-12, atol=0)
    assert after.symmetric_energy == pytest.approx(before.symmetric_energy, rel=1e-12)
    assert after.eigenvalue_score == pytest.approx(before.eigenvalue_score, rel=1e-9)


def test_a_gain_is_folded_into_both_sides(build):
    gain, w_q, w_k = torch.linspace(0.5, 2, N), build(D, N, seed=1), build(D, N, seed=2)
    b = dense(qk_circuit(fold(w_q, gain), fold(w_k, gain), 1.0))
    torch.testing.assert_close(b, torch.diag(gain.double()) @ w_k.T @ w_q @ torch.diag(gain.double()))
    assert torch.equal(fold(w_q, None), w_q)


def test_two_streams_have_a_spectrum_alone(build):
    between = qk_circuit(build(D, 30, seed=1), build(D, N, seed=2), 1.0)
    found = read_circuit(between, one_stream=False)
    assert (found.symmetric_energy, found.eigenvalue_score) == (None, None)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(dense(between))[:D], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="from 30 to 40 dimensions is not of one stream"):
        read_circuit(between, one_stream=True)


def test_a_head_wider_than_the_stream_has_no_more_values_than_the_stream(build):
    wide = qk_circuit(build(60, N, seed=1), build(60, N, seed=2), 1.0)
    found = read_circuit(wide, one_stream=True)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(dense(wide)), rtol=1e-9, atol=0)
    assert found.symmetric_energy == pytest.approx(symmetric(dense(wide)), rel=1e-12)
    assert found.eigenvalue_score == pytest.approx(score(dense(wide)), rel=1e-6)


def test_nothing_and_bad_numbers():
    found = read_circuit(qk_circuit(torch.zeros(D, N), torch.ones(D, N), 1.0), one_stream=True)
    assert (found.values.max(), found.symmetric_energy, found.eigenvalue_score) == (0, None, None)
    with pytest.raises(ValueError, match="NaN or infinity"):
        read_circuit(qk_circuit(torch.full((D, N), float("nan")), torch.ones(D, N), 1.0), one_stream=True)


def test_token_norm_is_the_rms_length_of_what_a_unit_stream_becomes(build):
    w = build(D, N)
    x = torch.randn(N, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert token_norm(w) == pytest.approx((w @ x).square().sum(0).mean().sqrt().item(), rel=0.01)


def test_tokens_that_carry_nine_tenths():
    rows = torch.tensor(
        [[0.9, 0.1, 0, 0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.05, 0.85, 0.05, 0.05], [0.0, 0, 0, 1]]
    )
    assert tokens_in_mass(rows).tolist() == [1, 3, 4, 2, 1]
    assert tokens_in_mass(torch.full((1, 40), 1 / 40)).tolist() == [36]  # whatever float32 makes of 36/40
    assert tokens_in_mass(torch.full((1, 40), 1 / 80)).tolist() == [36]  # half of the mass on a sink
    assert tokens_in_mass(torch.eye(3), mass=0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("share", "name"),
    [(1.0, "I"), (0.51, "I"), (0.5, "II"), (0.126, "II"), (0.125, "III"), (0.04, "III"), (1 / 32, "IV"), (0.001, "IV")],
)
def test_classes_of_ramsauer(share, name):
    assert hopfield_class(share) == name
