"""The metric of samples: both graphs, their limits, the optimum in expected error, the topology spectrum."""

import numpy as np
import pytest
import torch

from lmd_hf.matrix.graph import covariance, knn_graph, metric_matrix, scatter, topology_spectrum
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import dense


N, I, O, K = 120, 7, 5, 3  # noqa: E741 - the field's letters


def samples(count=N, size=I, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + 2


def layer(seed=9):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(O, I, generator=generator, dtype=torch.float64)
    return w, torch.randn(O, generator=generator, dtype=torch.float64)


def laplacian_metric(x, adjacency):
    """XᵀLX/ΣA, written out."""
    degree = torch.diag(adjacency.sum(1))
    return x.T @ (degree - adjacency) @ x / adjacency.sum()


def textbook_knn(x, k):
    distances = torch.cdist(x, x).fill_diagonal_(float("inf"))
    adjacency = torch.zeros(len(x), len(x), dtype=torch.float64)
    adjacency.scatter_(1, distances.topk(k, largest=False).indices, 1.0)
    return torch.maximum(adjacency, adjacency.T)


def test_the_complete_graph_is_the_covariance():
    x = samples()
    every = torch.ones(N, N, dtype=torch.float64)
    torch.testing.assert_close(covariance(x), torch.from_numpy(np.cov(x.numpy().T, bias=True)))
    torch.testing.assert_close(covariance(x), laplacian_metric(x, every))
    torch.testing.assert_close(covariance(x, centred=False), x.T @ x / N)
    assert metric_matrix(x).equal(covariance(x))


def test_knn_is_the_textbook_graph():
    x = samples()
    graph = knn_graph(x, 10)
    adjacency = textbook_knn(x, 10)
    assert (graph.adjacency.toarray() == adjacency.numpy()).all()
    assert graph.adjacency.diagonal().sum() == 0
    torch.testing.assert_close(scatter(x, graph), laplacian_metric(x, adjacency))
    assert metric_matrix(x, "knn").equal(scatter(x, graph))


def test_knn_with_all_others_is_the_covariance_with_divisor_n_minus_1():
    x = samples()
    graph = knn_graph(x, N - 1)
    assert graph.components == 1
    torch.testing.assert_close(scatter(x, graph), torch.from_numpy(np.cov(x.numpy().T)))


def test_scatter_is_half_the_mean_squared_difference_over_edges():
    x = samples()
    graph = knn_graph(x, 4)
    first, second = graph.adjacency.nonzero()
    differences = x[first] - x[second]
    torch.testing.assert_close(scatter(x, graph), differences.T @ differences / (2 * len(first)))


def test_components_are_counted():
    x = torch.cat([samples(40), samples(40) + 1000, samples(40) - 1000])
    assert knn_graph(x, 5).components == 3


@pytest.mark.parametrize("graph", ["complete", "knn"])
def test_input_metric_is_white_in_latent_coordinates(graph):
    metric = dense(metric_matrix(samples(), graph))
    lmd = decompose(layer()[0], input_metric=metric, rank=K)
    white = lmd.idist @ torch.diag(metric.eigenvalues) @ lmd.idist.T
    torch.testing.assert_close(white, torch.eye(K, dtype=torch.float64))


def test_truncation_is_optimal_in_expected_squared_output_error():
    """Its error, with b' = b + (W − W')x̄, is Σ s'² of what was cut; no neighbour does better, the old bias worse."""
    x, (w, b) = samples(), layer()
    metric = dense(covariance(x))
    full, kept = decompose(w, input_metric=metric), decompose(w, input_metric=metric, rank=K)
    y, mean = x @ w.T + b, x.mean(0)

    def error(candidate, bias):
        return ((x @ candidate.T + bias - y) ** 2).sum(1).mean().item()

    best = kept.reconstruct()
    new_bias = b + (w - best) @ mean
    assert error(best, new_bias) == pytest.approx((full.s_K[K:] ** 2).sum().item(), rel=1e-7)
    extra = torch.linalg.vector_norm((w - best) @ mean).item() ** 2
    assert error(best, b) == pytest.approx(error(best, new_bias) + extra, rel=1e-7)
    plain = decompose(w, rank=K).reconstruct()
    assert error(best, new_bias) < error(plain, b + (w - plain) @ mean)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        shaken = kept.projection + 0.01 * torch.randn(O, K, generator=generator, dtype=torch.float64)
        other = (shaken * kept.s_K) @ kept.similarity
        assert error(other, b + (w - other) @ mean) > error(best, new_bias)


def test_without_a_bias_the_second_moments_are_optimal():
    x, (w, _) = samples(), layer()
    metric = dense(covariance(x, centred=False))
    best = decompose(w, input_metric=metric, rank=K).reconstruct()
    cut = decompose(w, input_metric=metric).s_K[K:]
    assert ((x @ (best - w).T) ** 2).sum(1).mean().item() == pytest.approx((cut**2).sum().item(), rel=1e-7)


@pytest.mark.parametrize("graph", ["complete", "knn"])
def test_both_metrics_together_are_optimal_in_theirs(graph):
    x, (w, b) = samples(), layer()
    m_x, m_y = dense(metric_matrix(x, graph)), dense(metric_matrix(x @ w.T + b, graph))
    full = decompose(w, input_metric=m_x, output_metric=m_y)
    best = decompose(w, input_metric=m_x, output_metric=m_y, rank=K).reconstruct()
    error = torch.linalg.norm(m_x.power_times(0.5, m_y.power_times(-0.5, w - best).T)).item()
    assert error == pytest.approx(torch.linalg.norm(full.s_K[K:]).item(), rel=1e-7)


def test_topology_spectrum_is_s_squared_with_both_data_metrics():
    x, (w, b) = samples(), layer()
    y = x @ w.T + b
    of_x, of_y = knn_graph(x), knn_graph(y)
    both = decompose(w, input_metric=dense(scatter(x, of_x)), output_metric=dense(scatter(y, of_y)))
    torch.testing.assert_close(topology_spectrum(y, of_x, of_y), both.s_K**2, rtol=1e-7, atol=0)
    torch.testing.assert_close(topology_spectrum(y + 100, of_x, of_y), both.s_K**2, rtol=1e-7, atol=0)


def test_topology_is_one_where_the_graphs_agree():
    x, (w, _) = samples(), layer()
    y = x @ w.T
    same = topology_spectrum(y, knn_graph(x), knn_graph(x))
    torch.testing.assert_close(same, torch.ones(O, dtype=torch.float64))
    every = topology_spectrum(y, knn_graph(x, N - 1), knn_graph(y, N - 1))
    torch.testing.assert_close(every, torch.ones(O, dtype=torch.float64))


def test_topology_sees_neighbours_pulled_apart():
    """A disc folded onto a line brings far points together: the input's neighbours are no longer the nearest."""
    generator = torch.Generator().manual_seed(3)
    disc = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    line = disc[:, :1]
    assert topology_spectrum(line, knn_graph(disc), knn_graph(line)).item() > 5
    torch.testing.assert_close(topology_spectrum(line, knn_graph(4 * line), knn_graph(line)).item(), 1.0)


def test_topology_keeps_to_the_range_of_the_outputs():
    x, (w, _) = samples(), layer()
    flat = x @ w.T @ torch.diag(torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64))
    assert len(topology_spectrum(flat, knn_graph(x), knn_graph(flat))) == 3
    assert len(topology_spectrum(torch.zeros(N, O), knn_graph(x), knn_graph(x))) == 0
    twelve_times = torch.cat([flat[:10] * (1 + 1e-14 * i) for i in range(12)])  # all neighbours equal but for rounding
    assert len(topology_spectrum(twelve_times, knn_graph(x), knn_graph(twelve_times))) == 0
    wide = samples(30, 12) @ torch.randn(12, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    few = topology_spectrum(wide, knn_graph(samples(30, 12)), knn_graph(wide))
    assert len(few) == 12
    assert few.min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"graph": "ring"}, "no graph 'ring'; known: complete, knn"),
        ({"graph": "knn", "neighbours": N}, "120 samples have no 120 neighbours each; 121 are needed"),
        ({"graph": "knn", "neighbours": 0}, "neighbours"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        metric_matrix(samples(), **arguments)
