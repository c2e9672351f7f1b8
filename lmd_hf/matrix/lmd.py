"""Layer Matrix Decomposition of one matrix: W ≈ U · Odist · S' · Idist · Vᵀ (arXiv 2309.05968).

Shapes: O = out, I = in, K = n' the latent dimension kept. W acts as y = W·x, so W is O × I. The paper names the five
factors; their construction for a pair of metrics is this project's (README, "The mathematics").
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.errors import SettingsError
from lmd_hf.matrix.cost import BLOCK
from lmd_hf.matrix.krylov import krylov
from lmd_hf.matrix.metrics import Metric, column_signs, identity
from lmd_hf.records import Factored


SKETCHED = 1e-3  # relative residual of every triplet of a sketch
ROUNDS = 4  # of Krylov steps, after which a whole decomposition is the better way


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class LMD:
    """The five factors, float64.

    `u` (O × O, or O × K where the output metric is the identity), `odist` (· × K), `s_K` (descending, ≥ 0), `idist`
    (K × ·), `v` (I × I or I × K, columns). `error_bound` = ‖M_Y^{-1/2}(W − W')M_X^{1/2}‖_F, the least that any matrix
    of rank K reaches; `input_metric` and `output_metric` name M_X and M_Y, with what was added to regularise them.
    """

    u: Tensor
    odist: Tensor
    s_K: Float[Tensor, " K"]
    idist: Tensor
    v: Tensor
    input_metric: str
    output_metric: str
    error_bound: float
    input_regularisation: float = 0.0
    output_regularisation: float = 0.0

    @property
    def similarity(self) -> Float[Tensor, "K I"]:
        """Idist·Vᵀ: the latent coordinates of a query, in the input metric."""
        return self.idist @ self.v.T

    @property
    def projection(self) -> Float[Tensor, "O K"]:
        """U·Odist: where each latent axis writes."""
        return self.u @ self.odist

    def reconstruct(self) -> Float[Tensor, "O I"]:
        """W' = U·Odist·S'·Idist·Vᵀ."""
        return (self.projection * self.s_K) @ self.similarity

    def square(self) -> "LMD":
        """The same decomposition with U and V completed to square isometries (Odist and Idist padded with zeros)."""
        u, odist = _completed(self.u, self.odist)
        v, idist_t = _completed(self.v, self.idist.T)
        return LMD(
            u,
            odist,
            self.s_K,
            idist_t.T,
            v,
            self.input_metric,
            self.output_metric,
            self.error_bound,
            self.input_regularisation,
            self.output_regularisation,
        )


def decompose(
    w_OI: Float[Tensor, "O I"],
    *,
    input_metric: Metric | None = None,
    output_metric: Metric | None = None,
    rank: int | None = None,
    kernel: str = "exact",
) -> LMD:
    """Factor W in a pair of metrics; the identity on a side where none is given.

    C = M_Y^{-1/2}·W·M_X^{1/2} ≈ P·S'·Qᵀ (truncated SVD, float64 on W's device), Odist = Λ_Y^{1/2}UᵀP,
    Idist = QᵀVΛ_X^{-1/2}. At full rank ‖W' − W‖/‖W‖ is rounding times √(cond M_X · cond M_Y); at rank K, W' is the
    Eckart–Young optimum in the two metrics. Signs: the first entry of largest magnitude in each column of P is
    positive. `kernel="sketch"` takes P, S', Q from a block Krylov space (`krylov`, float64 products): orthonormal and
    C·Q = P·S' to rounding, residuals ‖Cᵀp − s·q‖ ≤ 1e-3·s; `error_bound` is then the exact error of this W', near the
    optimum but not it. A rank that does not converge runs exact. Raises `ValueError` for a rank outside 1…min(O, I), an
    empty W, NaN or infinity, and metrics whose size does not fit, `SettingsError` for an unknown kernel.

    >>> import torch
    >>> decompose(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2).s_K
    tensor([3., 2.], dtype=torch.float64)
    """
    if not isinstance(w_OI, Tensor) or w_OI.ndim != 2 or not w_OI.is_floating_point() or w_OI.layout != torch.strided:
        raise ValueError(
            f"decompose takes a dense matrix of floating-point numbers as a torch tensor, not {_kind(w_OI)}"
        )
    w_OI = w_OI.detach().to(torch.float64)
    m_x, m_y = input_metric or identity(), output_metric or identity()
    full = min(w_OI.shape)
    rank = full if rank is None else rank
    if full == 0 or not torch.isfinite(w_OI).all():
        raise ValueError(f"cannot decompose a matrix of shape {tuple(w_OI.shape)} that is empty or not finite")
    if rank not in range(1, full + 1):
        raise ValueError(f"rank must be a whole number between 1 and {full}, got {rank}")
    for metric, size, side in ((m_x, w_OI.shape[1], "input"), (m_y, w_OI.shape[0], "output")):
        if metric.eigenvalues is not None and len(metric.eigenvalues) != size:
            raise ValueError(f"the {side} metric has size {len(metric.eigenvalues)}, the matrix needs {size}")
    core_OI = m_x.power_times(0.5, m_y.power_times(-0.5, w_OI).T).T
    if kernel not in FACTORS:
        raise SettingsError(f"no kernel '{kernel}'; known: {', '.join(FACTORS)}")
    p_OK, s_K, q_IK, error = FACTORS[kernel](core_OI, rank)
    signs = column_signs(p_OK)
    p_OK, q_IK = p_OK * signs, q_IK * signs
    u, odist = _side(p_OK, m_y, 0.5)
    v, idist_t = _side(q_IK, m_x, -0.5)
    return LMD(
        u,
        odist,
        s_K,
        idist_t.T,
        v,
        m_x.name,
        m_y.name,
        error,
        m_x.regularisation,
        m_y.regularisation,
    )


def _kind(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def decompose_product(product: Factored, *, rank: int | None = None) -> LMD:
    """Factor s · L · R of thin factors, L (O × r) and R (r × I), which is never multiplied out; identity metrics.

    With L = Q₁A and Rᵀ = Q₂B by QR, the SVD of s·A·Bᵀ (r × r) gives U and V as Q₁ and Q₂ times its own; the rest is as
    in `decompose`. Raises `ValueError` for a rank outside 1…min(r, O, I), NaN or infinity.
    """
    left_OR, right_IR = product.left.to(torch.float64), product.right.to(torch.float64).T
    (q_left, a), (q_right, b) = torch.linalg.qr(left_OR), torch.linalg.qr(right_IR)
    small = decompose(product.scale * a @ b.T, rank=rank)
    u_OK, v_IK = q_left @ small.u, q_right @ small.v
    signs = column_signs(u_OK)
    return replace(small, u=u_OK * signs, v=v_IK * signs)


Factors = tuple[Tensor, Tensor, Tensor, float]  # P (O × K), S' (K), Q (I × K), ‖C − P·S'·Qᵀ‖_F


def _exact(core_OI: Tensor, rank: int) -> Factors:
    p, s, qh = torch.linalg.svd(core_OI, full_matrices=False)
    return p[:, :rank], s[:rank], qh[:rank].T, torch.linalg.vector_norm(s[rank:]).item()


def _sketched(core_OI: Tensor, rank: int) -> Factors:
    """The top-`rank` triplets of a Krylov space; the error is that of these very factors."""
    wide = core_OI.shape[0] < core_OI.shape[1]
    core_LS = core_OI.T if wide else core_OI
    spaces = krylov(core_LS, seed=0, tolerance=SKETCHED, most=rank, block=min(max(BLOCK, rank // 4), core_LS.shape[1]))
    for found, _ in zip(spaces, range(ROUNDS), strict=False):
        if len(found.values) == rank and bool((found.residuals <= SKETCHED * found.values).all()):
            left, right = (found.right, found.left) if wide else (found.left, found.right)
            error = torch.linalg.vector_norm(core_OI - (left * found.values) @ right.T).item()
            return left, found.values, right, error
    return _exact(core_OI, rank)


FACTORS: dict[str, Callable[[Tensor, int], Factors]] = {"exact": _exact, "sketch": _sketched}


def _side(latent_NK: Tensor, metric: Metric, exponent: float) -> tuple[Tensor, Tensor]:
    """(isometry, metric transformation) of one side; an identity metric takes the latent basis itself as isometry."""
    k = latent_NK.shape[1]
    if metric.eigenvalues is None:
        return latent_NK, torch.eye(k, dtype=latent_NK.dtype, device=latent_NK.device)
    scale_N1 = metric.eigenvalues.to(latent_NK.device)[:, None] ** exponent
    if metric.basis is None:
        return torch.eye(len(latent_NK), dtype=latent_NK.dtype, device=latent_NK.device), scale_N1 * latent_NK
    basis = metric.basis.to(latent_NK.device)
    return basis, scale_N1 * (basis.T @ latent_NK)


def _completed(isometry_NK: Tensor, transform_KJ: Tensor) -> tuple[Tensor, Tensor]:
    n, k = isometry_NK.shape
    if n == k:
        return isometry_NK, transform_KJ
    complement = torch.linalg.qr(isometry_NK, mode="complete").Q[:, k:]
    return torch.cat([isometry_NK, complement], dim=1), torch.cat(
        [transform_KJ, transform_KJ.new_zeros(n - k, transform_KJ.shape[1])]
    )
