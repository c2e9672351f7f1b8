"""Degrees of an activation function: the growth that sets an energy's degree, and its mean Hermite degree.

An activation is any function of tensors that acts on each entry alone. Modules are taken as they are, in evaluation
mode, with the parameters that they hold (PReLU's slope, xIELU's curvature).
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn


Activation = Callable[[Tensor], Tensor]

ATTENTION_DEGREE = 2  # a matrix outside an MLP, and bounded activations: the classical quadratic energy
_LARGE = 2.0**60  # where growth is read off: a logarithm counts for 0.02 there, and x¹⁶ still fits
_REACH, _NODES = 12, 24  # N(0,1) beyond 12 is below 1e-31; Gauss–Legendre nodes of a panel
_CONSTANT, _JUMP = 1e-12, 1e-5  # of E f²: no variance; of √Var f: a jump (xIELU's rounding of 0 leaves 8e-7)
_TOLERANCE, _DEPTH = 1e-13, 48  # of a panel, against the whole; a kink is cornered to 2⁻⁴⁸


def growth_exponent(activation: Activation) -> float:
    """p where |f(x)| grows as x^p for x → +∞, to one decimal: 0 for bounded, vanishing and logarithmic functions,
    infinity for what outgrows every power (read off between 2⁶⁰ and 2⁶¹). Raises `ValueError` as `effective_degree`."""
    with torch.no_grad():
        low, high = _ready(activation)(torch.tensor([_LARGE, 2 * _LARGE], dtype=torch.float64)).abs().tolist()
    if math.isinf(high):
        return math.inf
    return max(0.0, round(math.log2(high / low), 1)) if low > 0 and high > 0 else 0.0


def energy_degree(activation: Activation | None, *, gated: bool = False) -> int:
    """a = 1 + growth exponent of the activation at +∞ (its whole part), one more for a gate; at least 2, which is also
    that of no activation.

    ReLU, GELU, SiLU and linear grow as x (a = 2), ReLU² and x² as x² (a = 3), SwiGLU as x² (a = 3). Raises `ValueError`
    for a function that outgrows every power: its memory is that of softmax, and no polynomial's.
    """
    if activation is None:
        return ATTENTION_DEGREE
    growth = growth_exponent(activation)
    if math.isinf(growth):
        raise ValueError("the activation outgrows every power: no polynomial energy has its capacity")
    return max(1 + math.floor(growth), ATTENTION_DEGREE) + (1 if gated else 0)


def effective_degree(activation: Activation, *, spread: float = 1.0) -> float | None:
    """Mean Hermite degree under N(0, s²), s = `spread`: Σk·a_k²/Σa_k² (k ≥ 1) = s²·E f'² / Var f.

    By Gauss–Legendre quadrature on panels that are halved until they agree with their halves, so that kinks cost no
    accuracy wherever they lie. Linear 1, ReLU π/(π−1) = 1.466942, GELU 1.318845, SiLU 1.212081, tanh 1.177807, x² 2,
    x³ 1.8, to nine digits. `None` where there is no such number: for a constant, and where the mean is infinite, for a
    function that jumps or whose slope has no mean square. f has to be finite on ±12 s, or `ValueError` is raised, and
    differentiable by torch. `ValueError` too if it does not act on each entry alone.
    """
    rows, unsettled = _integrate(_ready(activation), spread)
    mean, square, slope = rows[:, :3].sum(0).tolist()
    variance = square - mean**2
    if variance <= _CONSTANT * square or rows[:, 3].max() > _JUMP * math.sqrt(variance) or unsettled > _JUMP * slope:
        return None
    return float(spread**2 * slope / variance)


def _integrate(activation: Activation, spread: float) -> tuple[Float[np.ndarray, "P 4"], float]:
    """`_moments` of panels that agree with their halves, and the share of E f'² in those that still do not."""
    panels = np.arange(-_REACH, _REACH)[:, None] + np.array([[0.0, 1.0]])
    whole = _moments(activation, panels, spread)
    kept: list[np.ndarray] = []
    for _ in range(_DEPTH):
        halves = np.stack([panels[:, 0], panels.mean(1), panels.mean(1), panels[:, 1]], axis=1).reshape(-1, 2)
        parts = _moments(activation, halves, spread)
        pairs = parts.reshape(-1, 2, 4)
        scale = sum((np.abs(each[:, :3]).sum(0) for each in kept), np.abs(pairs[:, :, :3]).sum((0, 1)))
        rough = (np.abs(pairs.sum(1) - whole)[:, :3] > _TOLERANCE * scale).any(1)
        kept.append(pairs[~rough].reshape(-1, 4))
        panels, whole = (
            each.reshape(-1, 2, each.shape[1])[rough].reshape(-1, each.shape[1]) for each in (halves, parts)
        )
        if len(panels) == 0:
            break
    return np.concatenate([*kept, whole]), float(whole[:, 2].sum())


def _moments(activation: Activation, panels: Float[np.ndarray, "P 2"], spread: float) -> Float[np.ndarray, "P 4"]:
    """The share of each panel in E f, E f² and E f'² under N(0, s²), and what f' does not explain of f's change across
    it, times the density there."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    left, width = panels[:, :1], np.diff(panels)
    inside = left + width * (nodes + 1) / 2
    x = torch.from_numpy(spread * np.concatenate([inside, panels], axis=1)).requires_grad_()
    y = activation(x)
    slope = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)
    f, df = y.detach().numpy(), slope.numpy()[:, :_NODES]
    if not (np.isfinite(f).all() and np.isfinite(df).all()):
        raise ValueError(f"the activation is not finite on ±{_REACH * spread:g}")
    measure = weights * width / 2
    density = np.exp(-(inside**2) / 2) / math.sqrt(2 * math.pi)
    inner, ends = f[:, :_NODES], f[:, _NODES:]
    unexplained = np.abs(ends[:, 1] - ends[:, 0] - spread * (measure * df).sum(1))
    nearest = np.clip(0, panels[:, 0], panels[:, 1])
    jump = unexplained * np.exp(-(nearest**2) / 2) / math.sqrt(2 * math.pi)
    return np.stack([*((measure * density * each).sum(1) for each in (inner, inner**2, df**2)), jump], axis=1)


def _ready(activation: Activation) -> Activation:
    """The activation in float64 and evaluation mode; `ValueError` if it does not act on each entry alone."""
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).double().eval()
    probe = torch.linspace(-2, 2, 6, dtype=torch.float64)
    with torch.no_grad():
        whole = activation(probe)
        alone = whole.shape == probe.shape and torch.allclose(whole[:3], activation(probe[:3]), equal_nan=True)
    if not alone:
        raise ValueError("not an activation: it does not act on each entry alone")
    return activation
