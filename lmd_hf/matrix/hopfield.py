"""The Hopfield reading of an attention head: z = P · sep(sim(M, q)) (Millidge et al. 2022, arXiv 2202.04557).

Shapes: I = width of the stream that asks (queries), J = of the one that is asked (keys, values), O = of the one written
to; d = width of the head in queries and keys, e = in values. A circuit is a product of thin factors and never formed:

    QK: B = s·W_Kᵀ W_Q (J × I), a query x and a memory x' score x'ᵀB x, s the model's own scale;
    OV: W_O W_V (O × J), what a memory writes (Elhage et al. 2021; their W_QK is Bᵀ/s).

Both cost O(n d²). All numbers survive rotations of the stream, not gains: fold γ in first to see a normalised one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmd_hf.matrix.kernels import of_triangles, triangles
from lmd_hf.records import Factored


CLASSES = ((1 / 2, "I"), (1 / 8, "II"), (1 / 32, "III"), (0.0, "IV"))  # of Ramsauer et al. 2020, by k/n above
LEAST_TOKENS = 32  # that a query must see to count: below, class IV is empty


@dataclass(frozen=True)
class Circuit:
    """What a product of thin factors is as a map of a stream: all of its singular values that can differ from 0
    (descending, float64, no more than the inner width), `symmetric_energy` and `eigenvalue_score` (`None` for the zero
    map, and where it maps between different streams). `error_bound` is that of `kernels.thin`."""

    values: Float[Tensor, " k"]
    symmetric_energy: float | None
    eigenvalue_score: float | None
    error_bound: float


@dataclass(frozen=True)
class Core:
    """What is left of s·L·R once its long sides are gone, all float64 on the CPU: A (d × d) and B of L = Q₁A and
    Rᵀ = Q₂B, so that s·A·Bᵀ has its singular values, and s·R·L (d × d), which has its eigenvalues that differ from 0,
    `None` where it maps between different streams."""

    a: Float[Tensor, "_ d"]
    b: Float[Tensor, "_ d"]
    scale: float
    inner: Float[Tensor, "d d"] | None


def qk_circuit(w_q_DI: Float[Tensor, "D I"], w_k_DJ: Float[Tensor, "D J"], scale: float) -> Factored:
    """B = s·W_Kᵀ W_Q as a product of its thin factors."""
    return Factored(w_k_DJ.T, w_q_DI, scale)


def ov_circuit(w_o_OE: Float[Tensor, "O E"], w_v_EJ: Float[Tensor, "E J"]) -> Factored:
    """W_O W_V as a product of its thin factors."""
    return Factored(w_o_OE, w_v_EJ, 1.0)


def fold(w_OI: Float[Tensor, "O I"], gain_I: Float[Tensor, " I"] | None) -> Float[Tensor, "O I"]:
    """W·diag(γ), float64: W as it acts on a normalised stream; W itself without a gain."""
    w_OI = w_OI.to(torch.float64)
    return w_OI if gain_I is None else w_OI * gain_I.to(w_OI)


def core_of(product: Factored, *, one_stream: bool) -> Core:
    """The core of B = s·L·R, its triangles by Householder's QR on the CPU; `one_stream` where B maps a stream to
    itself. Raises `ValueError` for NaN, infinity, empty factors, and `one_stream` where B is not square."""
    a, b = triangles(product)
    if not one_stream:
        return Core(a, b, product.scale, None)
    left_ND, right_DN = product.left.cpu().to(torch.float64), product.right.cpu().to(torch.float64)
    if left_ND.shape[0] != right_DN.shape[1]:
        raise ValueError(f"a map from {right_DN.shape[1]} to {left_ND.shape[0]} dimensions is not of one stream")
    return Core(a, b, product.scale, product.scale * (right_DN @ left_ND))


def read_core(core: Core) -> Circuit:
    """The spectrum of B = s·L·R, and how far it is a symmetric, attracting form.

    Singular values from the triangles, with the error bound of `kernels.thin`. Of one stream, from the d × d matrix
    s·R·L, whose eigenvalues are those of B that differ from 0:
    `symmetric_energy` ‖(B + Bᵀ)/2‖²/‖B‖² = ½(1 + tr B²/‖B‖²): 1 symmetric, ½ unrelated, 0 antisymmetric;
    `eigenvalue_score` Σ Re λ/Σ|λ|: 1 where it attracts along every axis, −1 where it repels. Of QK, both near 1 make
    an auto-associative memory; of OV, the second is the copying score.
    """
    spectrum = of_triangles(core.a, core.b, core.scale)
    values = spectrum.values
    energy = float((values**2).sum())
    if core.inner is None or energy == 0:
        return Circuit(values, None, None, spectrum.error_bound)
    trace = float((core.inner * core.inner.T).sum())  # tr(RL·RL) = tr B²
    eigenvalues = torch.linalg.eigvals(core.inner)
    size = float(eigenvalues.abs().sum())
    score = float(eigenvalues.real.sum()) / size if size > 0 else None
    return Circuit(values, min(max((1 + trace / energy) / 2, 0.0), 1.0), score, spectrum.error_bound)


def token_norm(w_DI: Float[Tensor, "D I"]) -> float:
    """‖W‖_F: the rms length of W·x for inputs x of independent entries with mean square 1, which is what a norm
    leaves; with γ folded in, the rms length of a head's queries or keys on a normalised stream."""
    return float(torch.linalg.vector_norm(w_DI.to(torch.float64)))


def tokens_in_mass(attention_QN: Float[Tensor, "*Q N"], mass: float = 0.9) -> Int[Tensor, "*Q"]:
    """k of every query: the smallest number of tokens that carry `mass` of its softmax, which is taken to sum to 1 over
    the tokens. Up to 1e-6 of the mass may be lacking, what float32 leaves; k₉₀ of the theory by default."""
    shares = attention_QN.to(torch.float64).sort(dim=-1, descending=True).values
    carried = (shares / shares.sum(-1, keepdim=True)).cumsum(-1)
    return (carried < mass - 1e-6).sum(-1) + 1


def hopfield_class(share: float) -> str:
    """The class of Ramsauer et al. 2020, §4, of a head whose median k/n is `share`: I global averaging (> 1/2), II
    (> 1/8), III (> 1/32), IV one or a few tokens."""
    return next(name for above, name in CLASSES if share > above or name == "IV")
