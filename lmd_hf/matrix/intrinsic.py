"""How many dimensions samples really fill, from distances to their nearest neighbours: two published estimators."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from lmd_hf.matrix.neighbours import NEIGHBOURS, Nearest, nearest


FEWEST = 20  # distinct samples below which no dimension is told
DISCARDED = 0.1  # of the largest ratios: Facco et al.'s guard against outliers
GROUPS = 20  # of the jackknife
SAME = 1e-5  # float32 activations of one token differ by so much of their spread at most, from batch to batch


class Dimension(NamedTuple):
    """An intrinsic dimension and its standard error: a jackknife over 20 groups of samples, times √2, as a distance
    counts for both samples that it joins.

    It is the scatter from sample to sample alone. What both estimators miss in high dimensions, where few samples see
    no small distances, is not in it: their values are then too low (d = 10 from 2,000 normal samples: 9.6 and 9.3).
    """

    value: float
    error: float


def neighbour_distances(
    x_NI: Float[Tensor, "N I"], neighbours: int = NEIGHBOURS, found: Nearest | None = None
) -> Float[ndarray, "M k"] | None:
    """Euclidean distances, ascending, of every distinct sample to its k nearest others; `None` where fewer than
    max(20, k + 1) samples are distinct. Samples closer than 1e-5 of their root mean square distance from the mean are
    the same one but for rounding, and count once. A search for at least k neighbours that is done already may be
    `found`. Raises `ValueError` for NaN and infinity."""
    from scipy import sparse  # late: it imports for seconds, and weights alone do not need it
    from scipy.sparse.csgraph import connected_components

    every = x_NI.float().cpu().numpy() if x_NI.dtype != torch.float64 else x_NI.cpu().numpy()
    x, places = np.unique(every, axis=0, return_index=True)
    same = SAME * float(np.sqrt(x.var(axis=0, dtype=np.float64).sum()))
    if found is not None and len(every) == len(x) >= FEWEST:
        distances = found.distances_Nk[places, :neighbours]
        if (distances > same).all():
            return distances.astype(np.float64)
    while len(x) >= max(FEWEST, neighbours + 1):
        distances, indices = nearest(x, neighbours)
        points, places = np.nonzero(distances <= same)
        if not len(points):
            return distances.astype(np.float64)
        pairs = sparse.coo_array((np.ones(len(points)), (points, indices[points, places])), shape=(len(x), len(x)))
        x = x[np.unique(connected_components(pairs, directed=False)[1], return_index=True)[1]]
    return None


def two_nn(distances_Mk: Float[ndarray, "M k"] | None) -> Dimension | None:
    """TwoNN: P(r₂/r₁ > μ) = μ^−d, so d is the slope through the origin of −ln(1 − F(μ)) over ln μ, without the largest
    tenth. Source: Facco, d'Errico, Rodriguez & Laio 2017 (Sci. Rep. 7:12140). `None` where there is no slope."""
    if distances_Mk is None:
        return None
    return _jackknife(np.log(distances_Mk[:, 1] / distances_Mk[:, 0]), _slope)


def maximum_likelihood(distances_Mk: Float[ndarray, "M k"] | None) -> Dimension | None:
    """d = 1/mean of ln(T_k/T_j) over all j < k and samples: the likelihood of Levina & Bickel 2004, averaged as MacKay
    & Ghahramani 2005 show it has to be. `None` where all neighbours are equally far."""
    if distances_Mk is None:
        return None
    logs = np.log(distances_Mk[:, -1:] / distances_Mk[:, :-1]).mean(axis=1)
    return _jackknife(logs, lambda values: float(1 / values.mean()) if values.mean() > 0 else None)


def intrinsic_dimensions(
    x_NI: Float[Tensor, "N I"], found: Nearest | None = None
) -> tuple[Dimension | None, Dimension | None]:
    """(TwoNN, maximum likelihood) of samples, from one search for neighbours, which may be `found` already."""
    distances = neighbour_distances(x_NI, found=found)
    return two_nn(distances), maximum_likelihood(distances)


def _slope(logs: ndarray) -> float | None:
    count = len(logs)
    x = np.sort(logs)[: int(count * (1 - DISCARDED))]
    y = -np.log1p(-np.arange(1, len(x) + 1) / count)
    return float(x @ y / (x @ x)) if x[-1] > 0 else None


def _jackknife(values: ndarray, estimate: Callable[[ndarray], float | None]) -> Dimension | None:
    """The estimate from all values, and its standard error from leaving out one group after the other."""
    whole = estimate(values)
    groups = np.arange(len(values)) % GROUPS
    parts = [estimate(values[groups != group]) for group in range(GROUPS)]
    found = np.array([part for part in parts if part is not None])
    if whole is None or len(found) < GROUPS:
        return None
    return Dimension(whole, float(np.sqrt(2 * (GROUPS - 1) * found.var())))
