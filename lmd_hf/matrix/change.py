"""What changed between two versions of one matrix: the update Δ = W_tuned − W_base, the spectra and the subspaces.

Shapes: O = out, I = in, k = min(O, I) the short side, L = max(O, I) the long one, K = n' the latent dimension of the
base. σ(·) are singular values, descending. A stored format has a unit roundoff (bf16 2⁻⁸, fp16 2⁻¹¹, fp32 2⁻²⁴).
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.matrix import dimension
from lmd_hf.matrix.kernels import CHUNK_ENTRIES, UNIT_ROUNDOFF, spectrum_of
from lmd_hf.matrix.subspaces import leading_subspaces, principal_angles


@dataclass(frozen=True)
class Side:
    """A matrix and the largest error that storing made: `relative` to each entry (floats: the unit roundoff u), or
    `absolute` (integers and codebooks: a, half a step, root mean square)."""

    matrix: Float[Tensor, "O I"]
    relative: float
    absolute: float = 0.0


@dataclass(frozen=True)
class Update:
    """The spectrum of Δ and its numbers. `base_norm` = ‖W_base‖_F, `norm` = ‖Δ‖_F, `relative` their quotient (`None`
    where the base is 0). `rank` counts the values above `floor`, `energy` is their share of ‖Δ‖_F²."""

    base_norm: float
    norm: float
    relative: float | None
    spectral_norm: float
    floor: float
    rank: int
    energy: float
    stable_rank: float
    effective_rank: float
    energy_rank_90: int
    energy_rank_95: int
    energy_rank_99: int
    error_bound: float
    singular_values: Float[np.ndarray, " k"] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Drift:
    """How far spectrum and leading subspaces moved. `None` where a number does not exist.

    `spectrum` = ‖σ(W_tuned) − σ(W_base)‖₂/‖σ(W_base)‖₂. For the top-n' singular subspaces of the two, `left` the span
    of what the layer writes and `right` of what it listens for: the mean of cos²θ over the principal angles θ, and the
    largest θ in degrees. `gap` is the smaller (σ_n' − σ_n'+1)/σ₁ of the two. `degenerate`: on one side σ_n' − σ_n'+1
    is within the rounding of its storage, so that rounding alone may turn the last directions of the subspace.
    """

    spectrum: float | None
    latent_dim: int | None
    latent_dim_rule: str | None
    left_cos2: float | None = None
    left_angle: float | None = None
    right_cos2: float | None = None
    right_angle: float | None = None
    gap: float | None = None
    degenerate: bool = False


UNMOVED = Drift(0.0, None, None, 1.0, 0.0, 1.0, 0.0)


def measure_change(base: Side, tuned: Side) -> tuple[Update, Drift]:
    """Every number of a pair of matrices of one shape; Δ is formed in float64, whatever the two storage formats.

    Spectra come from the kernel `exact`, with its error bound. Equal entries give zeros, cos² = 1 and angles of 0,
    exactly and without any decomposition (so the floor is 0 and n' is `None`). NaN or infinity raises `ValueError`.

    >>> import torch
    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> t = w + torch.diag(torch.tensor([0.0, 0.0, 0.5]))
    >>> update, _ = measure_change(Side(w, 2.0**-24), Side(t, 2.0**-24))
    >>> update.rank, update.norm
    (1, 0.5)
    """
    base_OI, tuned_OI = base.matrix, tuned.matrix
    if not (torch.isfinite(base_OI).all() and torch.isfinite(tuned_OI).all()):
        raise ValueError("the matrix holds NaN or infinity")
    base_norm = float(torch.linalg.vector_norm(base_OI, dtype=torch.float64))
    if base_OI.dtype != tuned_OI.dtype or not torch.equal(base_OI, tuned_OI):
        delta_OI = tuned_OI.to(torch.float64, copy=True).sub_(base_OI)
        if delta_OI.any():  # else the same numbers in two formats
            errors = [rounding_errors(side) for side in (base, tuned)]
            update = measure_update(delta_OI, rounding_floor(*errors), base_norm)
            del delta_OI  # its memory serves the subspaces
            return update, measure_drift(base_OI, tuned_OI, [rounding_floor(each) for each in errors])
    zeros = np.zeros(min(base_OI.shape))
    zeros.flags.writeable = False
    return Update(base_norm, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0.0, zeros), UNMOVED


def measure_update(delta_OI: Float[Tensor, "O I"], stored_floor: float, base_norm: float) -> Update:
    """`Update` of a Δ ≠ 0. The floor is that of storage plus the arithmetic's own max(O, I)·2⁻⁵³·σ₁(Δ)."""
    spectrum = spectrum_of(delta_OI, "exact")
    s = spectrum.values.numpy()
    s.flags.writeable = False
    floor = stored_floor + max(delta_OI.shape) * UNIT_ROUNDOFF * float(s[0])
    unit = s / s[0]  # ranks do not depend on the scale, and squares of a tiny update would vanish
    rank = int((s > floor).sum())
    norm = float(s[0] * np.linalg.norm(unit))
    return Update(
        base_norm=base_norm,
        norm=norm,
        relative=norm / base_norm if base_norm > 0 else None,
        spectral_norm=float(s[0]),
        floor=floor,
        rank=rank,
        energy=float((unit[:rank] ** 2).sum() / (unit**2).sum()),
        stable_rank=dimension.stable_rank(unit) or 0.0,
        effective_rank=dimension.effective_rank(unit) or 0.0,
        energy_rank_90=dimension.energy_rank(unit, 0.90) or 0,
        energy_rank_95=dimension.energy_rank(unit, 0.95) or 0,
        energy_rank_99=dimension.energy_rank(unit, 0.99) or 0,
        error_bound=spectrum.error_bound,
        singular_values=s,
    )


def rounding_errors(side: Side) -> tuple[Tensor, Tensor]:
    """Σ over each row, and over each column, of (u·w_ij)² + a²: squares of the largest errors that storing made."""
    step = max(1, CHUNK_ENTRIES // side.matrix.shape[1])
    rows, columns = [], torch.zeros(side.matrix.shape[1], dtype=torch.float64, device=side.matrix.device)
    for start in range(0, side.matrix.shape[0], step):
        chunk = side.matrix[start : start + step]
        squares = chunk.to(torch.float64).square().mul_(side.relative**2).add_(side.absolute**2)
        rows.append(squares.sum(1))
        columns += squares.sum(0)
    return torch.cat(rows), columns


def rounding_floor(*errors: tuple[Tensor, Tensor]) -> float:
    """A spectral norm that the rounding errors of stored matrices, added up, do not reach.

    √(max over rows of Σ_j d²_ij) + √(max over columns of Σ_i d²_ij), d²_ij the squared errors of all the matrices at
    that entry (`rounding_errors`), taken as independent. For entries of one size this is the δ(√O + √I) of
    `dimension.numerical_rank`; but real matrices have rows and columns that stand out, and the norm of independent
    errors follows those (Bandeira & van Handel 2016, Theorem 3.1). On all-MiniLM-L6-v2 rounded to bf16 and to fp16 the
    errors reach 0.40 of this floor at most, and 1.5 of δ(√O + √I).
    """
    return sum(math.sqrt(float(torch.stack(sums).sum(0).max())) for sums in zip(*errors, strict=True))


def measure_drift(base_OI: Float[Tensor, "O I"], tuned_OI: Float[Tensor, "O I"], floors: list[float]) -> Drift:
    """`Drift` from one matrix to another, `floors` the rounding of each; n' is the base's default."""
    spectra = [spectrum_of(w, "exact").values.numpy() for w in (base_OI, tuned_OI)]
    (s_base, s_tuned), size = spectra, float(np.linalg.norm(spectra[0]))
    moved = float(np.linalg.norm(s_tuned - s_base)) / size if size > 0 else None
    count, rule = dimension.latent_dimension(s_base, s_base, max(base_OI.shape), "identity")
    if count is None or s_tuned[0] == 0:
        return Drift(moved, count, rule)
    sides = zip(leading_subspaces(base_OI, count), leading_subspaces(tuned_OI, count), strict=True)
    left, right = (principal_angles(b, t) for b, t in sides)
    gaps = [float(s[count - 1] - (s[count] if count < len(s) else 0.0)) for s in spectra]
    gap = min(gap / float(s[0]) for gap, s in zip(gaps, spectra, strict=True))
    degenerate = any(gap <= floor for gap, floor in zip(gaps, floors, strict=True))
    return Drift(moved, count, rule, *left, *right, gap, degenerate)
