"""The five factors: they rebuild W, are isometries and metric maps, and are optimal in their metrics."""

import pytest
import torch

from lmd_hf.errors import SettingsError
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import column_signs, dense, identity, norm


O, I, K = 23, 17, 6  # noqa: E741 - the field's letters


def covariance(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x)


def metrics(size):
    gain = torch.linspace(-0.5, 2, size).double()
    return {"identity": identity(), "norm": norm(gain), "data": dense(covariance(size, size))}


PAIRS = [(x, y) for x in ("identity", "norm", "data") for y in ("identity", "norm", "data")]


def matrix_of(metric, size):
    return metric.power_times(1.0, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize(("x", "y"), PAIRS)
def test_full_rank_rebuilds_the_matrix(build, x, y):
    w = build(O, I)
    lmd = decompose(w, input_metric=metrics(I)[x], output_metric=metrics(O)[y])
    assert torch.linalg.norm(lmd.reconstruct() - w) / torch.linalg.norm(w) < 1e-12
    assert torch.linalg.norm(lmd.square().reconstruct() - w) / torch.linalg.norm(w) < 1e-12
    assert lmd.error_bound < 1e-12
    assert (lmd.input_metric, lmd.output_metric) == (x, y)


@pytest.mark.parametrize(("x", "y"), PAIRS)
def test_factors_are_isometries_and_metric_maps(build, x, y):
    m_x, m_y = metrics(I)[x], metrics(O)[y]
    lmd = decompose(build(O, I), input_metric=m_x, output_metric=m_y, rank=K)
    eye = torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(lmd.u.T @ lmd.u, torch.eye(lmd.u.shape[1], dtype=torch.float64))
    torch.testing.assert_close(lmd.v.T @ lmd.v, torch.eye(lmd.v.shape[1], dtype=torch.float64))
    torch.testing.assert_close(lmd.similarity @ matrix_of(m_x, I) @ lmd.similarity.T, eye)
    inverse = torch.linalg.inv(matrix_of(m_y, O))
    torch.testing.assert_close(lmd.projection.T @ inverse @ lmd.projection, eye)
    assert (lmd.s_K.diff() <= 0).all()
    assert (lmd.s_K >= 0).all()


@pytest.mark.parametrize(("x", "y"), PAIRS)
def test_truncation_is_the_eckart_young_optimum_in_the_metrics(build, x, y):
    w, m_x, m_y = build(O, I), metrics(I)[x], metrics(O)[y]
    full = decompose(w, input_metric=m_x, output_metric=m_y)
    lmd = decompose(w, input_metric=m_x, output_metric=m_y, rank=K)

    def error(candidate):
        left = m_y.power_times(-0.5, w - candidate)
        return torch.linalg.norm(m_x.power_times(0.5, left.T)).item()

    best = error(lmd.reconstruct())
    assert best == pytest.approx(torch.linalg.norm(full.s_K[K:]).item(), rel=1e-9)
    assert best == pytest.approx(lmd.error_bound, rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # no neighbour of rank K does better
        shaken = lmd.projection + 0.01 * torch.randn(O, K, generator=generator, dtype=torch.float64)
        assert error((shaken * lmd.s_K) @ lmd.similarity) > best


def test_the_three_hopfield_steps_are_the_layer(build):
    w = build(O, I)
    lmd = decompose(w, input_metric=metrics(I)["norm"], rank=K)
    x = torch.linspace(-1, 1, I).double()
    torch.testing.assert_close(lmd.projection @ (lmd.s_K * (lmd.similarity @ x)), lmd.reconstruct() @ x)


def test_a_decomposition_is_equal_to_itself_and_to_no_other():
    first, again = (decompose(torch.eye(3)) for _ in range(2))
    assert first == first
    assert first != again
    assert first in [again, first]


def test_identity_is_the_plain_svd(build):
    w = build(O, I)
    lmd = decompose(w, rank=K)
    torch.testing.assert_close(lmd.s_K, torch.linalg.svdvals(w)[:K])
    assert lmd.u.shape == (O, K)
    assert lmd.v.shape == (I, K)
    assert lmd.odist.equal(torch.eye(K, dtype=torch.float64))
    square = lmd.square()
    assert (square.u.shape, square.odist.shape, square.idist.shape, square.v.shape) == ((O, O), (O, K), (K, I), (I, I))


def test_norm_is_the_spectrum_of_w_times_the_gain(build):
    w, gain = build(O, I), torch.linspace(-1, 2, I).double()
    torch.testing.assert_close(decompose(w, input_metric=norm(gain)).s_K, torch.linalg.svdvals(w * gain))


def test_signs_are_fixed(build):
    w = build(O, I)
    for candidate in (w, w.clone().flip(0).flip(0)):
        assert (column_signs(decompose(candidate).projection) == 1).all()
    torch.testing.assert_close(decompose(-w).projection, decompose(w).projection)
    torch.testing.assert_close(decompose(-w).similarity, -decompose(w).similarity)


def test_transpose_swaps_the_sides_and_scale_moves_only_the_separation(build):
    w = build(O, I)
    lmd, other, scaled = decompose(w), decompose(w.T), decompose(3 * w)
    torch.testing.assert_close(other.s_K, lmd.s_K)
    signs = column_signs(lmd.similarity.T)
    torch.testing.assert_close(other.projection, lmd.similarity.T * signs)
    torch.testing.assert_close(scaled.s_K, 3 * lmd.s_K)
    torch.testing.assert_close(scaled.projection, lmd.projection)


def test_a_gain_with_a_zero_is_regularised_and_says_so(build):
    gain = torch.ones(I)
    gain[3] = 0
    lmd = decompose(build(O, I), input_metric=norm(gain))
    assert lmd.input_regularisation == pytest.approx(1e-10 * (I - 1) / I)
    assert torch.isfinite(lmd.idist).all()


@pytest.mark.parametrize("w", [torch.zeros(4, 3), torch.ones(1, 5), torch.ones(5, 1), torch.ones(3, 3)])
def test_degenerate_matrices(w):
    lmd = decompose(w)
    torch.testing.assert_close(lmd.reconstruct(), w.double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a whole number between"),
        ({"rank": 18}, "rank must be a whole number between"),
        ({"input_metric": norm(torch.ones(3))}, "input metric has size 3"),
        ({"output_metric": norm(torch.ones(3))}, "output metric has size 3"),
    ],
)
def test_bad_arguments_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        decompose(build(O, I), **arguments)


def test_bad_matrices_and_metrics_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        decompose(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="symmetric"):
        dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="semi-definite"):
        dense(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    with pytest.raises(ValueError, match="not all zero"):
        norm(torch.zeros(4))


@pytest.mark.parametrize("kernel", ["exact", "sketch"])
def test_8_bit_floats_are_numbers_as_others(build, kernel):
    w = build(O, I).to(torch.float8_e4m3fn)
    assert torch.equal(decompose(w, rank=K, kernel=kernel).s_K, decompose(w.double(), rank=K, kernel=kernel).s_K)
    w.view(torch.uint8)[0, 0] = 0x7F
    with pytest.raises(ValueError, match="not finite"):
        decompose(w)


def test_factors_keep_the_axes_apart(build):
    lmd = decompose(build(O, I), rank=K)
    assert (lmd.u.shape, lmd.s_K.shape, lmd.v.shape) == ((O, K), (K,), (I, K))
    assert (lmd.projection.shape, lmd.similarity.shape) == ((O, K), (K, I))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_a_sketch_gives_nearly_the_optimum_and_its_very_error(build, shape):
    w = build(*shape, torch.arange(1, 201, dtype=torch.float64) ** -0.7)
    best, near = decompose(w, rank=12), decompose(w, rank=12, kernel="sketch")
    torch.testing.assert_close(near.s_K, best.s_K, rtol=1e-4, atol=0)
    torch.testing.assert_close(near.reconstruct(), best.reconstruct(), rtol=0, atol=1e-3)
    assert near.error_bound == pytest.approx(torch.linalg.matrix_norm(w - near.reconstruct()).item(), rel=1e-9)
    assert best.error_bound * (1 - 1e-12) <= near.error_bound <= best.error_bound * (1 + 1e-6)
    eye = torch.eye(12, dtype=torch.float64)
    for factor in (near.projection, near.similarity.T):
        torch.testing.assert_close(factor.T @ factor, eye, rtol=0, atol=1e-12)


def test_a_sketch_works_in_metrics_and_gives_way_where_it_does_not_converge(build):
    w, gain = build(150, 120, torch.linspace(2, 1, 120)), torch.linspace(0.5, 2, 120)
    best, near = (decompose(w, input_metric=norm(gain), rank=5, kernel=kernel) for kernel in ("exact", "sketch"))
    torch.testing.assert_close(near.s_K, best.s_K, rtol=1e-4, atol=0)
    torch.testing.assert_close(decompose(w, kernel="sketch").s_K, decompose(w).s_K, rtol=1e-9, atol=0)
    with pytest.raises(SettingsError, match="no kernel 'magic'; known: exact, sketch"):
        decompose(w, kernel="magic")


@pytest.mark.parametrize(
    "w",
    [torch.ones(3, 3, dtype=torch.complex64), torch.ones(2, 3, 3), torch.ones(3), torch.eye(3).to_sparse(), [[1.0]]],
)
def test_what_is_no_dense_real_matrix_is_refused(w):
    with pytest.raises(ValueError, match="decompose takes a dense matrix of floating-point numbers"):
        decompose.__wrapped__(w)  # without the tests' type check
