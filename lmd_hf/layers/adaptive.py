"""Training in factors: orthonormal ones stay so, S' is a parameter, and its spectrum decides how many axes a layer has.

    layers = [orthonormal(layer, rank=16) for layer in …]     LMDLinear with more axes than 16, in identity metrics
    …train…; grow(layers, 4); …train…; adapt(layers, budget)  as often as wanted
    plain(layer)                                              the axes that are left, as an ordinary LMDLinear

While U = `projection` and V = `similarity`ᵀ are orthonormal, U·S'·Vᵀ is a singular value decomposition at every step:
n' can be read off |S'| without computing anything, and to cut the least is the best cut there is (Eckart–Young).
Adapting ranks while training by cutting after the factors were extended is due to Ceruti, Kusch & Lubich (2022, BIT 62,
1149) and Schotthöfer et al. (2022, NeurIPS); here what is cut where follows from equal marginal loss over the layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmd_hf.errors import SettingsError
from lmd_hf.layers.linear import LMDLinear
from lmd_hf.matrix.allocation import Curve, within_budget


class Orthonormal(nn.Module):
    """X ↦ Q of X = Q·R with R upper triangular and its diagonal positive, by Cholesky of XᵀX; of a wide X by its rows.

    Ten times faster than the Householder form of `torch.nn.utils.parametrizations.orthogonal` for thin matrices on a
    CPU, and safe under weight decay: Q does not feel the length of X's columns, where that form loses its signs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Q, of X's shape."""
        tall = x if x.shape[0] >= x.shape[1] else x.mT
        lower = torch.linalg.cholesky(tall.mT @ tall)
        q = torch.linalg.solve_triangular(lower, tall.mT, upper=False).mT
        return q if tall is x else q.mT

    def right_inverse(self, q: Tensor) -> Tensor:
        """What gives Q: itself."""
        return q


class Switched(nn.Module):
    """S' = scale · z, 0 on the axes that are switched off, which learn nothing.

    Steps of Adam are about as long in every parameter. One of length η in each entry of W moves it by η·√(O·I) in all,
    one in each of K singular values by η·√K: with scale = √(O·I/K) S' moves as fast as it does in a dense layer.
    """

    on: Tensor
    scale: Tensor

    def __init__(self, on: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("on", on)
        self.register_buffer("scale", torch.full_like(on[0], scale))  # z means nothing without it

    def forward(self, z: Tensor) -> Tensor:
        """S' of z."""
        return self.scale * z * self.on

    def right_inverse(self, s: Tensor) -> Tensor:
        """z of S'."""
        return s / self.scale


def orthonormal(layer: LMDLinear, *, rank: int | None = None) -> LMDLinear:
    """The same layer, trained with orthonormal factors, its first `rank` axes on (by default all), the others spare.

    Nothing changes in what the axes that are on compute. Weight decay makes sense for `s` alone, which it acts on as on
    W itself. Raises `SettingsError` for factors that are not orthonormal, such as those of another metric than the
    identity, and for a rank outside 1…K.
    """
    rank = layer.rank if rank is None else rank
    if not 1 <= rank <= layer.rank:
        raise SettingsError(f"rank is {rank}; the layer has 1 to {layer.rank} axes")
    eye = torch.eye(layer.rank).to(layer.s)
    for factor in (layer.projection.mT, layer.similarity):
        if (factor @ factor.mT - eye).abs().max() > 100 * torch.finfo(eye.dtype).eps ** 0.5:
            raise SettingsError("the factors are not orthonormal; take those of decompose(W) in identity metrics")
    parametrize.register_parametrization(layer, "projection", Orthonormal())
    parametrize.register_parametrization(layer, "similarity", Orthonormal())
    on = torch.zeros_like(layer.s).detach()
    on[:rank] = 1
    scale = math.sqrt(layer.out_features * layer.in_features / rank)
    parametrize.register_parametrization(layer, "s", Switched(on, scale), unsafe=True)
    return layer


def latent_spectrum(layer: LMDLinear) -> Tensor:
    """S' of the axes that are on, descending: the singular values of W'."""
    return layer.s.detach()[_on(layer) > 0].abs().sort(descending=True).values


@torch.no_grad()
def grow(layers: Sequence[LMDLinear], axes: int) -> None:
    """Switch on up to so many spare axes of every layer, with S' = 0 there: what the layers compute stays the same."""
    for layer in layers:
        spare = (_on(layer) == 0).nonzero()[:axes, 0]
        _raw(layer, "s")[spare] = 0
        _on(layer)[spare] = 1


@torch.no_grad()
def adapt(layers: Sequence[LMDLinear], budget: int) -> tuple[int, ...]:
    """Switch off the axes with the least S' until at most `budget` parameters are left in the factors of all layers, by
    equal marginal loss (`lmd_hf.matrix.allocation`, without a slope); how many each keeps, at least one. Raises
    `SettingsError` for a budget below that."""
    curves = []
    for layer in layers:
        s = latent_spectrum(layer).double()
        curves.append(Curve((layer.out_features, layer.in_features), (s**2).cpu().numpy(), 0.0))
    ranks = tuple(rank or 1 for rank in within_budget(curves, budget, whole=False))
    for layer, rank in zip(layers, ranks, strict=True):
        order = (layer.s.abs() - (1 - _on(layer))).argsort(descending=True)  # what is off comes last
        _on(layer)[order[rank:]] = 0
        for name in ("projection", "similarity"):  # Q itself, before X can become ill-conditioned
            _raw(layer, name).copy_(getattr(layer, name))
    return ranks


def plain(layer: LMDLinear) -> LMDLinear:
    """The axes that are on, S' descending and not negative, as a layer of that rank."""
    s = layer.s.detach()
    kept = s.abs().argsort(descending=True)[: int(_on(layer).sum())]
    projection = layer.projection.detach()[:, kept] * torch.where(s[kept] < 0, -1.0, 1.0).to(s)
    return LMDLinear.from_factors(
        projection, s[kept].abs(), layer.similarity.detach()[kept], bias=layer.bias, dtype=s.dtype
    )


def _on(layer: LMDLinear) -> Tensor:
    switch: Any = layer.parametrizations.s[0]  # type: ignore[union-attr, index]
    return switch.on


def _raw(layer: LMDLinear, name: str) -> Tensor:
    held: Any = layer.parametrizations
    return held[name].original
