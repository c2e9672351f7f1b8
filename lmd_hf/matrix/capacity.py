"""Memory capacity of a latent manifold, and the energy degree of an activation function.

Capacities are theoretical bounds under the cited model's assumptions (random patterns, its energy), not measurements.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


ATTENTION_DEGREE = 2  # a matrix outside an MLP, and bounded activations: the classical quadratic energy
_LARGE = 1e4  # where growth is read off: far enough that x·Φ(x) equals x, near enough that x⁴ stays exact
_REACH, _NODES = 12, 48  # N(0,1) beyond 12 is below 1e-31; 48 Gauss–Legendre nodes a unit panel


def capacity_log10(dimension: float | None, degree: int) -> float | None:
    """log₁₀ K, K = d^{a−1} / (2·(2a−3)!!·ln d): patterns stored without error by a polynomial energy of degree a.

    `dimension` d is the participation ratio of S', `degree` a an integer ≥ 2. `None` for d < 3 and where no capacity
    holds (a < 2). Source: Krotov & Hopfield 2016, eq. 6 (d = 100: 10.857, 361.91, 7238.24 for a = 2, 3, 4).
    """
    if dimension is None or dimension < 3 or degree < 2:
        return None
    odd_factorial = math.prod(range(1, 2 * degree - 2, 2))
    return (degree - 1) * math.log10(dimension) - math.log10(2 * odd_factorial * math.log(dimension))


def energy_degree(activation: Callable[[Tensor], Tensor] | None, *, gated: bool = False) -> int:
    """a = 1 + growth exponent of the activation at +∞, one more for a gate; bounded or no activation: 2.

    ReLU, GELU, SiLU and linear grow as x (a = 2), ReLU² and x² as x² (a = 3), SwiGLU as x² (a = 3).
    """
    if activation is None:
        return ATTENTION_DEGREE
    low, high = activation(torch.tensor([_LARGE, 2 * _LARGE], dtype=torch.float64)).abs().tolist()
    growth = round(math.log2(high / low)) if low > 0 and high > 0 else 0
    return max(1 + growth, ATTENTION_DEGREE) + (1 if gated else 0)


def effective_degree(activation: Callable[[Tensor], Tensor]) -> float | None:
    """Mean Hermite degree under N(0, 1): Σk·a_k²/Σa_k² (k ≥ 1) = E f'² / Var f.

    By Gauss–Legendre quadrature on unit panels over [−12, 12], so kinks at integers cost no accuracy: linear 1,
    ReLU π/(π−1) = 1.466942, GELU 1.318845, SiLU 1.212081, tanh 1.177807, x² 2 to six digits. `None` for a constant.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    left = np.arange(-_REACH, _REACH)
    x = torch.from_numpy((left[:, None] + (nodes + 1) / 2).ravel()).requires_grad_()
    density = np.tile(weights / 2, 2 * _REACH) * np.exp(-(x.detach().numpy() ** 2) / 2) / math.sqrt(2 * math.pi)
    y = activation(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    f, df = y.detach().numpy(), slope.numpy()
    variance = (density * f**2).sum() - (density * f).sum() ** 2
    return float((density * df**2).sum() / variance) if variance > 0 else None
