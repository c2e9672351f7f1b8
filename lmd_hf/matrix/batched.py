"""Spectra of many small matrices of one shape at once, for devices that one of them does not fill.

Shapes: B matrices O × I, k = min(O, I) the short side, L = max(O, I) the long one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.matrix.kernels import ACCURACY, CHUNK_ENTRIES, exact, gram_error, power_of_two
from lmd_hf.matrix.spectrum import Spectrum


def exact_each(matrices: Sequence[Float[Tensor, "O I"]]) -> list[Spectrum | ValueError]:
    """What `kernels.exact` gives for each, or the error that it raises: float64 Gram matrices and their eigenvalues for
    all at once, and `exact` itself for those whose small values want refining. All matrices are on one device and have
    one shape; the numbers are those of `exact` up to rounding, with its bound."""
    tall = matrices[0].shape[0] >= matrices[0].shape[1]
    w_BLK = [w if tall else w.T for w in matrices]
    scales = [power_of_two(w) for w in w_BLK]
    gram = _grams(w_BLK, scales)
    finite = torch.isfinite(gram.diagonal(dim1=1, dim2=2)).all(dim=1)
    gram[~finite] = 0  # one that holds NaN or infinity must not keep the eigensolver from the others
    values_BK = _eigenvalues(gram).flip(1).clamp_min(0).sqrt()
    found: list[Spectrum | ValueError] = []
    for w, values, scale, good in zip(matrices, values_BK, scales, finite.tolist(), strict=True):
        if good and gram_error(values) <= ACCURACY:
            found.append(Spectrum(values * scale, gram_error(values), "gram"))
        else:
            found.append(_alone(w))
    return found


def _grams(w_BLK: list[Tensor], scales: list[float]) -> Float[Tensor, "B k k"]:
    """Σ over chunks of the long side, as in `kernels.lower_gram`."""
    long, short = w_BLK[0].shape
    divisors = w_BLK[0].new_tensor(scales, dtype=torch.float64)[:, None, None]
    gram = w_BLK[0].new_zeros(len(w_BLK), short, short, dtype=torch.float64)
    rows = max(1, 4 * CHUNK_ENTRIES // (len(w_BLK) * short))
    for start in range(0, long, rows):
        chunk = torch.stack([w[start : start + rows] for w in w_BLK]).double() / divisors
        gram.baddbmm_(chunk.mT, chunk)
    return gram


def _eigenvalues(gram: Tensor) -> Float[Tensor, "B k"]:
    """Ascending, on the CPU."""
    if gram.device.type == "cpu":
        return torch.from_numpy(np.linalg.eigvalsh(gram.numpy()))
    return torch.linalg.eigvalsh(gram).cpu()


def _alone(w_OI: Tensor) -> Spectrum | ValueError:
    try:
        return exact(w_OI)
    except ValueError as error:
        return error
