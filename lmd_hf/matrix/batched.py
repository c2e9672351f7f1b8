"""Many small matrices of one shape at once, for devices that one of them does not fill: spectra, and cores of heads.

Shapes: B matrices O × I, k = min(O, I) the short side, L = max(O, I) the long one; of heads, N long and d wide.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.matrix.hopfield import Core
from lmd_hf.matrix.kernels import ACCURACY, CHUNK_ENTRIES, UNFIT, exact, gram_error, power_of_two
from lmd_hf.matrix.spectrum import Spectrum
from lmd_hf.records import Factored


NEAR = 0.1  # ‖QᵀQ − 1‖_F of a first Q from which a second round gives a whole one


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


def cores_each(products: Sequence[Factored], *, one_stream: bool) -> list[Core | ValueError]:
    """What `hopfield.core_of` gives for each, or the error that it raises: products and triangles of all at once, on
    the device that they are on. All have one shape."""
    left = torch.stack([product.left for product in products]).to(torch.float64)
    right = torch.stack([product.right for product in products]).to(torch.float64).mT
    good = torch.isfinite(left).flatten(1).all(1) & torch.isfinite(right).flatten(1).all(1)
    left[~good], right[~good] = 0, 0  # a NaN must not reach a solver
    a, b = triangles_each(left).cpu(), triangles_each(right).cpu()
    scales = left.new_tensor([product.scale for product in products])[:, None, None]
    inner = (scales * (right.mT @ left)).cpu() if one_stream else None
    return [
        Core(a[i], b[i], product.scale, None if inner is None else inner[i]) if fit else ValueError(UNFIT)
        for i, (product, fit) in enumerate(zip(products, good.tolist(), strict=True))
    ]


def triangles_each(x_BNd: Float[Tensor, "B N d"]) -> Float[Tensor, "B _ d"]:
    """R of each X = QR, up to the signs of its rows, by Cholesky factors of Gram matrices in two rounds (CholeskyQR2:
    Yamamoto, Nakatsukasa, Yanagisawa & Fukaya, ETNA 44, 2015): products, where Householder's QR has many small steps.

    Backward stable, as Householder's is, where the first Q is nearly orthonormal: the rows of Q solve triangular
    systems, and so QR is X to rounding whatever the condition (Higham 2002, §8.1). Where it is not, Householder's.
    """
    if x_BNd.shape[1] < x_BNd.shape[2]:
        return torch.linalg.qr(x_BNd, mode="r").R
    first, failed = torch.linalg.cholesky_ex(x_BNd.mT @ x_BNd)
    q = torch.linalg.solve_triangular(first.mT, x_BNd, upper=True, left=False)
    gram = q.mT @ q
    second, failed_again = torch.linalg.cholesky_ex(gram)
    off = torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1]).to(gram))
    found = second.mT @ first.mT
    for index in ((failed != 0) | (failed_again != 0) | ~(off <= NEAR)).nonzero()[:, 0].tolist():
        found[index] = torch.linalg.qr(x_BNd[index], mode="r").R
    return found
