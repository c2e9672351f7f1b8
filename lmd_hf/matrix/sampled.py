"""What samples say of one layer's outputs: the energy that subspaces carry, and how sure such numbers are.

Shapes: N = samples, O = out, I = in, R = min(O, I), K = n'. G (R × R) = W·M·Wᵀ is the metric of the outputs in R
orthonormal coordinates; its eigenvalues are s'².
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmd_hf.matrix.graph import Graph


def compact(w_OI: Float[Tensor, "O I"]) -> Float[Tensor, "R I"]:
    """W in min(O, I) orthonormal coordinates of its outputs: lengths, distances and angles of W·x are the same."""
    w_OI = w_OI.to(torch.float64)
    return w_OI if w_OI.shape[0] <= w_OI.shape[1] else torch.linalg.qr(w_OI, mode="r").R


def leading_axes(gram_RR: Float[Tensor, "R R"], count: int) -> Float[Tensor, "R K"]:
    """Eigenvectors of the `count` largest eigenvalues, the largest first."""
    return torch.linalg.eigh(gram_RR).eigenvectors.flip(1)[:, :count]


def energy_share(gram_RR: Float[Tensor, "R R"], axes_RK: Float[Tensor, "R K"]) -> float | None:
    """Σ_k uₖᵀGuₖ / tr G: how much of the outputs' energy lies along some orthonormal axes; 1 − it is the relative error
    of what is cut to them. `None` where there is no energy."""
    total = gram_RR.trace().item()
    return ((axes_RK.T @ gram_RR) * axes_RK.T).sum().item() / total if total > 0 else None


def energy_errors(
    y_NR: Float[Tensor, "N R"], gram_RR: Float[Tensor, "R R"], groups_N: Int[Tensor, " N"], graph: Graph | None = None
) -> tuple[float | None, float | None]:
    """Standard errors of the energy E = Σs'² (relative) and of the participation ratio E²/Σs'⁴ (absolute).

    To first order in the sampling error of G (λ moves by uᵀ·δG·u): the sums over each group of samples, such as the
    tokens of one text, are taken as independent, so that likeness within a group is counted. With these N samples; from
    more of the same groups G is known no worse. `y_NR` are centred where G is. With a `graph` a sample stands for all
    of its edges, each of which counts at both ends: as if it were left out. `None` for a single group, or no energy.
    What the first order misses: the ratio itself is low, by about its share of N.
    """
    energy, squares = gram_RR.trace().item(), (gram_RR**2).sum().item()
    names, places = np.unique(groups_N.cpu().numpy(), return_inverse=True)
    if energy <= 0 or len(names) < 2:
        return None, None
    y_NR = y_NR.to("cpu", torch.float64)
    turned = y_NR @ gram_RR.to(y_NR)
    weight = np.ones(len(y_NR)) if graph is None else np.asarray(graph.adjacency.sum(axis=1))
    ends = 1 if graph is None else 2
    of_energy = _products(y_NR, y_NR, graph) / energy - weight
    of_squares = _products(y_NR, turned, graph) / squares - weight

    def error(influence: np.ndarray) -> float:
        sums = np.bincount(places, influence)
        return float(ends * np.sqrt((sums**2).sum() * len(names) / (len(names) - 1)) / weight.sum())

    return error(of_energy), energy**2 / squares * error(2 * of_energy - 2 * of_squares)


def _products(a_NR: Tensor, b_NR: Tensor, graph: Graph | None) -> np.ndarray:
    """aᵢ·bᵢ of every sample; with a graph half of Σⱼ Aᵢⱼ (aᵢ − aⱼ)·(bᵢ − bⱼ)."""
    a, b = a_NR.numpy(), b_NR.numpy()
    own = (a * b).sum(axis=1)
    if graph is None:
        return own
    adjacency = graph.adjacency
    crossed = (a * (adjacency @ b)).sum(axis=1) + (b * (adjacency @ a)).sum(axis=1)
    return (adjacency.sum(axis=1) * own + adjacency @ own - crossed) / 2
