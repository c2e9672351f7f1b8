"""Two-dimensional manifolds with their own coordinates, and their way into a space of more dimensions."""

import math
from collections.abc import Callable

import torch
from sklearn.datasets import make_swiss_roll
from torch import Tensor


def _plane(points: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    square = torch.rand(points, 2, generator=random, dtype=torch.float64) * 2 - 1
    return torch.cat([square, torch.zeros(points, 1, dtype=torch.float64)], dim=1), square


def _sphere(points: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    normal = torch.randn(points, 3, generator=random, dtype=torch.float64)
    p = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    return p, torch.stack([torch.atan2(p[:, 1], p[:, 0]), p[:, 2]], dim=1)


def _torus(points: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Radii 1 and ½, uniform in the two angles."""
    a, b = (torch.rand(points, 2, generator=random, dtype=torch.float64) * 2 * math.pi - math.pi).T
    ring = 1 + 0.5 * torch.cos(b)
    return torch.stack([ring * torch.cos(a), ring * torch.sin(a), 0.5 * torch.sin(b)], dim=1), torch.stack([a, b], 1)


def _swiss_roll(points: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    seed = int(torch.randint(2**31, (1,), generator=random))
    roll, angle = (torch.from_numpy(part) for part in make_swiss_roll(points, random_state=seed))
    return roll, torch.stack([angle, roll[:, 1]], dim=1)


MANIFOLDS: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "plane": _plane,
    "sphere": _sphere,
    "torus": _torus,
    "swiss roll": _swiss_roll,
}


def sample(name: str, points: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(points in space N × 3, their two own coordinates N × 2), float64: plane (position), sphere (azimuth, height),
    torus (its two angles), swiss roll (angle, height; scikit-learn's)."""
    return MANIFOLDS[name](points, random)


def standardised(columns_NI: Tensor) -> Tensor:
    """Each column with mean 0 and variance 1 (a constant one stays 0)."""
    scale = columns_NI.std(dim=0, correction=0)
    return (columns_NI - columns_NI.mean(dim=0)) / torch.where(scale > 0, scale, 1.0)


def embed(points_NI: Tensor, dimension: int, random: torch.Generator) -> Tensor:
    """The points in a space of more dimensions, through a random isometry (the Q of a Gaussian matrix)."""
    gaussian = torch.randn(dimension, points_NI.shape[1], generator=random, dtype=points_NI.dtype)
    return points_NI @ torch.linalg.qr(gaussian).Q.T
