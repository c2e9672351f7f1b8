"""The metric of samples through a graph on them, M = XᵀLX/ΣA, and what a layer does to neighbourhoods.

Shapes: N = samples (rows), I = in, O = out, k = neighbours. L = D − A is the graph's Laplacian, so that M is half the
mean squared difference over the edges. The complete graph's is the covariance, the k-nearest-neighbour graph's the
locality-preserving scatter of He & Niyogi 2003.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.matrix.neighbours import NEIGHBOURS, Nearest, nearest


GRAPHS = ("complete", "knn")
RANGE = 1e-10  # of the second metric's top eigenvalue: below lies rounding, not data


@dataclass(frozen=True)
class Graph:
    """A symmetric 0/1 graph on N samples without loops: adjacency (N × N, scipy's `csr_array`), and how many pieces it
    falls into."""

    adjacency: Any
    components: int


def covariance(x_NI: Float[Tensor, "N I"], *, centred: bool = True) -> Float[Tensor, "I I"]:
    """XᵀLX/ΣA of the complete graph A = 11ᵀ: the covariance with divisor N, in float64.

    With `centred=False` the second moments XᵀX/N: the metric of a layer that has no bias to take up the mean.
    """
    x_NI = x_NI.to(torch.float64)
    if centred:
        x_NI = x_NI - x_NI.mean(0)
    return x_NI.T @ x_NI / len(x_NI)


def knn_graph(x_NI: Float[Tensor, "N I"], neighbours: int = NEIGHBOURS) -> Graph:
    """The symmetrised k-nearest-neighbour graph max(A, Aᵀ): Euclidean, no sample is its own neighbour.

    Raises `ValueError` for N ≤ k, NaN and infinity.
    """
    return graph_of(nearest(x_NI, neighbours))


def graph_of(found: Nearest) -> Graph:
    """The same, from a search that is done."""
    from scipy import sparse  # late: it imports for seconds, and weights alone do not need it
    from scipy.sparse.csgraph import connected_components

    count, neighbours = found.indices_Nk.shape
    starts = np.arange(0, count * neighbours + 1, neighbours)
    directed = sparse.csr_array((np.ones(count * neighbours), found.indices_Nk.ravel(), starts), shape=(count, count))
    adjacency = sparse.csr_array(directed.maximum(directed.T))
    return Graph(adjacency, int(connected_components(adjacency, directed=False, return_labels=False)))


def scatter(x_NI: Float[Tensor, "N I"], graph: Graph) -> Float[Tensor, "I I"]:
    """XᵀLX/ΣA of a graph on the samples: half the mean squared difference over its edges, in float64. With k = N − 1
    neighbours it is the covariance with divisor N − 1."""
    x = x_NI.to(device="cpu", dtype=torch.float64).numpy()
    x = x - x.mean(0)  # L·1 = 0: the same, without what a large mean costs in rounding
    degrees = graph.adjacency.sum(axis=1)
    m = x.T @ (degrees[:, None] * x - graph.adjacency @ x) / degrees.sum()
    return torch.from_numpy(np.asarray((m + m.T) / 2))


def metric_matrix(
    x_NI: Float[Tensor, "N I"], graph: str = "complete", *, neighbours: int = NEIGHBOURS, centred: bool = True
) -> Float[Tensor, "I I"]:
    """The metric of samples: `covariance` for the complete graph, `scatter` for knn (where `centred` is no question).

    `metrics.dense` makes a `Metric` of it. Raises `ValueError` for another graph, and what `knn_graph` does.
    """
    if graph not in GRAPHS:
        raise ValueError(f"no graph '{graph}'; known: {', '.join(GRAPHS)}")
    if graph == "complete":
        return covariance(x_NI, centred=centred)
    return scatter(x_NI, knn_graph(x_NI, neighbours))


def topology_spectrum(y_NO: Float[Tensor, "N O"], of_x: Graph, of_y: Graph) -> Float[Tensor, " R"]:
    """τ: the eigenvalues, descending, of the pencil (YᵀL_X Y/ΣA_X, YᵀL_Y Y/ΣA_Y) on the range of the second (above
    1e-10 of its top eigenvalue), in float64; R ≤ min(O, N) of them, none where outputs and their neighbours are equal.

    The squared differences of the outputs over the edges of the input's graph, in units of those over the output's own:
    τ = 1 where the graphs agree, τ > 1 where neighbours of the input are pulled apart. At full rank it is s'² with both
    data metrics, whatever the bias; after an activation it is not.
    """
    y_NO = y_NO.to(device="cpu", dtype=torch.float64)
    y_NO = y_NO - y_NO.mean(0)
    if y_NO.shape[0] < y_NO.shape[1]:  # the same samples in an orthonormal basis of what they span
        y_NO = torch.linalg.qr(y_NO.T, mode="r").R.T
    first, second = scatter(y_NO, of_x), scatter(y_NO, of_y)
    values, basis = torch.linalg.eigh(second)
    if values[-1] <= RANGE * (y_NO**2).sum() / len(y_NO):  # what is left is rounding
        return values[:0]
    kept = values > RANGE * values[-1]
    whitened = basis[:, kept] / values[kept].sqrt()
    return torch.linalg.eigvalsh(whitened.T @ first @ whitened).flip(0)
