"""A linear layer that holds its weight in factors: W' = U·Odist · S' · Idist·Vᵀ, two thin matrices around a diagonal.

Shapes: O = out, I = in, K = n', the latent dimension that is kept; leading axes of what goes in are batches.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmd_hf.errors import SettingsError
from lmd_hf.matrix.lmd import LMD, decompose
from lmd_hf.matrix.metrics import Metric


class LMDLinear(nn.Module):
    """y = projection · (s ∘ (similarity · x)) + bias, in place of y = W·x + bias.

    `projection` (O × K) is U·Odist, `s` (K) the diagonal of S', `similarity` (K × I) Idist·Vᵀ: the three steps of the
    Hopfield reading, and K·(O + I + 1) parameters where W has O·I. Where the output metric is the identity, as in
    `lmd_hf.truncate`, `projection` has orthonormal columns; where the input metric is too, so has `similarity` rows.
    A new layer draws both orthonormal and uniformly (Haar), with all of S' equal and ‖W'‖_F as `nn.Linear` has it on
    average, √(O/3). Raises `SettingsError` for a rank outside 1…min(O, I).
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            most = min(in_features, out_features)
            raise SettingsError(f"rank is {rank}; a layer of {out_features} × {in_features} has 1 to {most} axes")
        self.in_features, self.out_features = in_features, out_features
        self.projection = nn.Parameter(torch.empty(out_features, rank, dtype=dtype))
        self.s = nn.Parameter(torch.empty(rank, dtype=dtype))
        self.similarity = nn.Parameter(torch.empty(rank, in_features, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew."""
        for factor in (self.projection, self.similarity):
            wide = torch.empty_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32))  # as QR needs it
            factor.data.copy_(nn.init.orthogonal_(wide))
        nn.init.constant_(self.s, math.sqrt(self.out_features / (3 * len(self.s))))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_factors(
        cls,
        projection: Tensor,
        s: Tensor,
        similarity: Tensor,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "LMDLinear":
        """The layer of these factors (O × K, K and K × I), in `dtype` and where they are."""
        with torch.device("meta"):  # nothing is drawn that would be written over
            layer = cls(similarity.shape[1], projection.shape[0], len(s), bias=bias is not None)
        for name, value in {"projection": projection, "s": s, "similarity": similarity, "bias": bias}.items():
            if value is not None:
                setattr(layer, name, nn.Parameter(value.detach().to(s.device, dtype, copy=True).contiguous()))
        return layer

    @classmethod
    def from_lmd(cls, lmd: LMD, *, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> "LMDLinear":
        """The layer of a decomposed matrix."""
        return cls.from_factors(lmd.projection, lmd.s_K, lmd.similarity, bias=bias, dtype=dtype)

    @property
    def rank(self) -> int:
        """K = n'."""
        return len(self.s)

    @property
    def weight(self) -> Tensor:
        """W' (O × I), multiplied out."""
        return (self.projection * self.s) @ self.similarity

    def forward(self, x: Tensor) -> Tensor:
        """W'·x + b (… × O) of inputs (… × I); W' itself is never formed."""
        return functional.linear(functional.linear(x, self.similarity) * self.s, self.projection, self.bias)

    @torch.no_grad()
    def factors(self, *, input_metric: Metric | None = None, output_metric: Metric | None = None) -> LMD:
        """The five factors of W' in a pair of metrics (the identity where none is given), float64, of rank K.

        In the metrics that the layer was cut in they are the factors that it was made of, to the rounding of `dtype`;
        a metric of data is not stored with the layer, since it is as large as W, and has to be given again. Raises
        what `decompose` does.
        """
        wide = (self.projection.double() * self.s.double()) @ self.similarity.double()
        return decompose(wide, input_metric=input_metric, output_metric=output_metric, rank=self.rank)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"
