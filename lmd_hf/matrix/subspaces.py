"""Leading singular subspaces and the angles between them.

Shapes: O = out, I = in, L = max(O, I) the long side, k = min(O, I) the short one, K the dimension of a subspace, N any.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def leading_subspaces(w_OI: Float[Tensor, "O I"], count: int) -> tuple[Float[Tensor, "O K"], Float[Tensor, "I K"]]:
    """Orthonormal bases, float64, of the top-`count` left and right singular subspaces of W ≠ 0.

    The short side's from the eigenvectors of the Gram matrix, the long side's by QR of W times them. Their angle to the
    exact subspace is some 8·2⁻⁵³·σ₁²/(σ_K² − σ_{K+1}²) (Davis & Kahan 1970): the gap decides what they mean.
    """
    tall = w_OI.shape[0] >= w_OI.shape[1]
    w_LK = (w_OI if tall else w_OI.T).to(torch.float64)
    if w_OI.dtype == torch.float64:  # squares of shorter types always fit
        w_LK = w_LK / w_LK.abs().max()
    w, linalg = _native(w_LK)
    short = linalg.eigh(w.T @ w)[1][:, -count:]
    long = linalg.qr(w @ short)[0]
    bases = torch.as_tensor(long), torch.as_tensor(short)
    return bases if tall else bases[::-1]


def principal_angles(a_NK: Float[Tensor, "N K"], b_NK: Float[Tensor, "N K"]) -> tuple[float, float]:
    """(mean of cos²θ, largest θ in degrees) over the principal angles θ between the spans of two orthonormal bases.

    From the sines, which tell angles near 0 apart where the cosines round to 1: sin²θ are the eigenvalues of RᵀR with
    R = B − A·AᵀB (Björck & Golub 1973). Angles near 90° are good to 1e-6 degrees.
    """
    (a, linalg), (b, _) = _native(a_NK), _native(b_NK)
    residual = b - a @ (a.T @ b)
    squares = torch.as_tensor(linalg.eigvalsh(residual.T @ residual)).clamp(0, 1)
    return float(1 - squares.mean()), float(torch.rad2deg(torch.asin(squares[-1].sqrt())))


def _native(x: Tensor) -> tuple[Any, Any]:
    """The array and the library that works on it: on the CPU numpy, whose LAPACK keeps to its share of the cores (a
    worker thread of torch takes them all); the two agree in every name used here."""
    return (x.numpy(), np.linalg) if x.device.type == "cpu" else (x, torch.linalg)
