"""The nearest neighbours of samples: one search serves their graph and their intrinsic dimensions."""

from typing import NamedTuple

from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor


NEIGHBOURS = 10  # k where none is named


class Nearest(NamedTuple):
    """Of every sample the Euclidean distances to its k nearest others, ascending, and which those are."""

    distances_Nk: Float[ndarray, "N k"]
    indices_Nk: Int[ndarray, "N k"]

    def first(self, neighbours: int) -> "Nearest":
        """The nearest of them only."""
        return Nearest(self.distances_Nk[:, :neighbours], self.indices_Nk[:, :neighbours])


def nearest(x_NI: Float[Tensor, "N I"] | Float[ndarray, "N I"], neighbours: int = NEIGHBOURS) -> Nearest:
    """Euclidean, no sample is its own neighbour. Raises `ValueError` for N ≤ k, NaN and infinity."""
    from sklearn.neighbors import NearestNeighbors  # late: it imports for seconds, and weights alone do not need it

    if not 0 < neighbours < len(x_NI):
        raise ValueError(f"{len(x_NI)} samples have no {neighbours} neighbours each; {neighbours + 1} are needed")
    x = x_NI.cpu().numpy() if isinstance(x_NI, Tensor) else x_NI
    return Nearest(*NearestNeighbors(n_neighbors=neighbours).fit(x).kneighbors())
