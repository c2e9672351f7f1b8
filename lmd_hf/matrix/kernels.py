"""Spectrum kernels: every singular value of one matrix, with an error bound.

Shapes: O = out, I = in, k = min(O, I) the short side, L = max(O, I) the long one.
Each kernel is a plain function in `KERNELS`: it takes W (O × I, any floating dtype, on any device) and returns a
`Spectrum`. All arithmetic is float64 with unit roundoff u = 2⁻⁵³.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.errors import SettingsError
from lmd_hf.matrix import band, smallest
from lmd_hf.matrix.cost import exact_flops
from lmd_hf.matrix.sketch import TOLERANCE, attempt
from lmd_hf.matrix.spectrum import Spectrum
from lmd_hf.records import Factored


UNIT_ROUNDOFF = 2.0**-53
CHUNK_ENTRIES = 2**20  # entries of W converted to float64 at a time: 8 MiB, past which speed is flat, or
CHUNK_ROWS = 2048  # so many rows, so that adding k × k products up is a few per cent of making them
GRAM_BLOCK = 1024  # rows of the Gram matrix made at a time: its lower triangle is half of the work
BAND_FROM = 2560  # short sides from which two stages find the eigenvalues sooner: benchmarks/exact.py measures both
ACCURACY = 1e-7  # relative accuracy that every value above FLOOR · σ₁ must keep, else the kernel refines
FLOOR = 1e-6
RITZ_CUT = (
    1 / 2000
)  # values below RITZ_CUT · σ₁ are refined: there the Gram route still has 9 digits, so the cut is safe
SMALLEST = 1e-140  # σ₁ from which figures can be taken, and the inverse of the greatest
SMALL_SHARE = 1 / 4  # refining more than this share of the values costs more than a whole SVD
UNFIT = "the factors hold NaN or infinity"
TOO_LARGE = "the product of the factors passes the largest float64"
TALL = 2  # so does taking all eigenvectors, unless W is more than twice as long as wide


def exact(w_OI: Float[Tensor, "O I"], *, gram: Float[Tensor, "k k"] | None = None) -> Spectrum:
    """All singular values from the eigenvalues of the float64 Gram matrix of the short side.

    G = WᵀW (or WWᵀ, whichever is k × k) and σᵢ = √λᵢ(G). An eigenvalue's absolute error is some u·λ₁ (backward
    stability of the product and of the symmetric eigensolver: Higham 2002, §3.5; LAPACK Users' Guide 1999, §4.7), so
    the relative error of σᵢ is taken as 8u·((σ₁/σᵢ)² + √k). Where that passes 1e-7, the small values are refined:
    with Q the eigenvectors of G below (σ₁/2000)², the singular values of W·Q have absolute error 8u·√k·σ₁
    (Rayleigh–Ritz on an invariant subspace, Parlett 1998, §11). Where many values are small, the SVD of W itself is
    cheaper and runs instead, with the same bound. The constant 8 is calibrated against LAPACK's SVD,
    with room to spare on every case of `tests/matrix/test_kernels.py`; the provable constants grow with k and are far
    too large to be of use.

    `gram` is G where it is known already, its lower triangle at least, of a W that is not float64 (such a W is scaled).

    Raises `ValueError` if W has no entries or holds NaN or infinity.
    """
    if w_OI.numel() == 0:
        raise ValueError(f"empty matrix of shape {tuple(w_OI.shape)}")
    w_LK = w_OI if w_OI.shape[0] >= w_OI.shape[1] else w_OI.T
    scale = power_of_two(w_LK)
    gram = lower_gram(w_LK, scale) if gram is None else gram.to(w_LK.device)
    if not torch.isfinite(gram.diagonal()).all():  # where one NaN or infinity in W arrives
        raise ValueError("the matrix holds NaN or infinity")
    values = _eigenvalues(gram).flip(0).clamp_min(0).sqrt()
    if gram_error(values) <= ACCURACY:
        return Spectrum(values * scale, gram_error(values), "gram")
    small = int((values < RITZ_CUT * values[0]).sum())
    refined = _ritz_values(w_LK, values, small, scale)
    if refined is not None:
        values[len(values) - small :] = refined
        values = values.sort(descending=True).values
        method = "gram+ritz"
    else:
        values = _singular_values(w_LK.to(torch.float64) / scale)
        method = "svd"
    return Spectrum(values * scale, _refined_error(values, method), method)


def thin(product: Factored) -> Spectrum:
    """The r singular values of s · L · R that can differ from 0, L (O × r) and R (r × I), never multiplied out.

    L = Q₁·A and Rᵀ = Q₂·B by QR, so that they are those of the r × r matrix s·A·Bᵀ. Backward stable in the factors
    (Higham 2002, §19.3): σᵢ has an absolute error of some u·√r·‖A‖₂·‖B‖₂·s, with the constant 8 as in `exact`. Raises
    `ValueError` for NaN, infinity and empty factors.
    """
    return of_triangles(*triangles(product), product.scale)


def triangles(product: Factored) -> tuple[Tensor, Tensor]:
    """A and B of `thin`, on the CPU. Raises `ValueError` as it does."""
    left_OR, right_IR = product.left.cpu().to(torch.float64), product.right.cpu().to(torch.float64).T
    if left_OR.numel() == 0 or right_IR.numel() == 0:
        raise ValueError(f"empty factors of shape {tuple(left_OR.shape)} and {tuple(right_IR.T.shape)}")
    if not (torch.isfinite(left_OR).all() and torch.isfinite(right_IR).all()):
        raise ValueError(UNFIT)
    return torch.linalg.qr(left_OR, mode="r").R, torch.linalg.qr(right_IR, mode="r").R


def of_triangles(a: Tensor, b: Tensor, scale: float) -> Spectrum:
    """The singular values of s·A·Bᵀ, with the bound of `thin`. Raises `ValueError` where they overflow."""
    product = a @ b.T
    if not torch.isfinite(product).all() or not torch.isfinite(values := _singular_values(product) * abs(scale)).all():
        raise ValueError(TOO_LARGE)
    if values[0] == 0:
        return Spectrum(values, 0.0, "qr")
    sizes = _singular_values(a)[0].item() * _singular_values(b)[0].item() * abs(scale)
    smallest = values[values > FLOOR * values[0]][-1].item()
    return Spectrum(values, 8 * UNIT_ROUNDOFF * math.sqrt(len(values)) * sizes / smallest, "qr")


def sketch(w_OI: Float[Tensor, "O I"], *, seed: int = 0, tolerance: float = TOLERANCE) -> Spectrum:
    """Certified leading values and an estimated distribution of the others (`sketch.attempt`), or else `exact`.

    Exact runs where the matrix is too small for a sketch to pay, and where the sketch misses `tolerance` at the cost of
    the exact kernel; `method` tells which ran. Raises `ValueError` as `exact` does.
    """
    limit = exact_flops(max(w_OI.shape), min(w_OI.shape))
    return attempt(w_OI, seed=seed, tolerance=tolerance, limit=limit) or exact(w_OI)


def spectrum_of(w: Tensor | Factored, kernel: str, **options: Any) -> Spectrum:
    """The spectrum of a matrix by the kernel of that name and with its options, or of a product of thin factors, which
    needs none. Raises `ValueError` as they do, and where float64 does not hold sums of σ²."""
    found = thin(w) if isinstance(w, Factored) else get_kernel(kernel)(w, **options)
    first = float(found.values[0])
    if first > 0 and not SMALLEST < first < 1 / SMALLEST:
        raise ValueError(f"its largest singular value is {first:.0e}, and float64 does not hold the squares of such")
    return found


KERNELS: dict[str, Callable[..., Spectrum]] = {"exact": exact, "sketch": sketch}


def get_kernel(name: str) -> Callable[..., Spectrum]:
    """The kernel called `name`; `SettingsError` lists the known ones."""
    if name not in KERNELS:
        raise SettingsError(f"no kernel '{name}'; known: {', '.join(sorted(KERNELS))}")
    return KERNELS[name]


def count_unfit(w: Tensor) -> int:
    """How many entries are NaN or infinity. torch cannot tell of 8-bit floats, which float32 holds exactly."""
    return int(w.numel() - torch.isfinite(w.float() if w.element_size() == 1 else w).sum().item())


def power_of_two(w: Tensor) -> float:
    """A power of two near max|W|, so that squares of float64 entries neither overflow nor vanish; 1 for shorter types,
    whose squares always fit."""
    if w.dtype != torch.float64:
        return 1.0
    largest = w.abs().max().item()
    return 2.0 ** min(math.frexp(largest)[1], 1023) if 0 < largest < math.inf else 1.0


def _chunks(w_LK: Tensor, scale: float) -> Iterator[Tensor]:
    """W in float64, a few rows at a time; every chunk is the same memory, so use it before asking for the next."""
    rows = max(CHUNK_ROWS, CHUNK_ENTRIES // w_LK.shape[1])
    buffer = w_LK.new_empty(min(rows, w_LK.shape[0]), w_LK.shape[1], dtype=torch.float64)
    for start in range(0, w_LK.shape[0], rows):
        chunk = buffer[: min(rows, w_LK.shape[0] - start)].copy_(w_LK[start : start + rows])
        yield chunk if scale == 1 else chunk.div_(scale)


def lower_gram(w_LK: Tensor, scale: float = 1.0) -> Tensor:
    """Σ over chunks of the long side of chunkᵀ·chunk, in float64 on W's device (where TF32 does not apply); on the CPU
    only its lower triangle, which is all that LAPACK reads."""
    gram = w_LK.new_zeros(w_LK.shape[1], w_LK.shape[1], dtype=torch.float64)
    add = _add_lower if gram.device.type == "cpu" else _add_whole
    for chunk in _chunks(w_LK, scale):
        add(gram, chunk)
    return gram


def _add_whole(gram: Tensor, chunk: Tensor) -> None:
    gram.addmm_(chunk.T, chunk)


def _add_lower(gram: Tensor, chunk: Tensor) -> None:
    """By blocks of rows: left of the diagonal a general product, on it AᵀA, for which numpy calls dsyrk."""
    sums, rows = gram.numpy(), chunk.numpy()
    for start in range(0, len(sums), GRAM_BLOCK):
        stop = start + GRAM_BLOCK
        if start:
            sums[start:stop, :start] += rows[:, start:stop].T @ rows[:, :start]
        sums[start:stop, start:stop] += rows[:, start:stop].T @ rows[:, start:stop]


def _eigenvalues(gram: Tensor) -> Tensor:
    """Ascending, on the CPU, where a large Gram matrix is overwritten. numpy's LAPACK lets other threads run, and is
    the faster one on most CPUs."""
    if gram.device.type != "cpu":
        return torch.linalg.eigvalsh(gram).cpu()
    if len(gram) >= BAND_FROM:
        return torch.from_numpy(band.eigenvalues(gram.numpy()))
    return torch.from_numpy(np.linalg.eigvalsh(gram.numpy()))


def _singular_values(w: Tensor) -> Tensor:
    """Descending, on the CPU, from LAPACK's divide and conquer (cuSOLVER on a GPU)."""
    if w.device.type == "cpu":
        return torch.from_numpy(np.linalg.svd(w.numpy(), compute_uv=False))
    return torch.linalg.svdvals(w).cpu()


def _ritz_values(w_LK: Tensor, values: Tensor, count: int, scale: float) -> Tensor | None:
    """The `count` smallest singular values: those of W·Q, Q an orthonormal basis of the eigenvectors of the Gram matrix
    that belong to them, or of a subspace that holds these. `None` where the SVD of W costs less."""
    size = smallest.subspace_size(values**2, count)
    tall = w_LK.shape[0] > TALL * w_LK.shape[1]
    if size is None and not (tall and count <= SMALL_SHARE * len(values)):
        return None
    gram = lower_gram(w_LK, scale)  # again: its eigenvalues may have been found in its place
    q: Tensor | None
    if size is not None:
        q = smallest.smallest_subspace(gram, values**2, count, size)
    elif gram.device.type == "cpu":
        q = torch.from_numpy(np.linalg.eigh(gram.numpy())[1][:, :count])
    else:
        q = torch.linalg.eigh(gram).eigenvectors[:, :count]
    return None if q is None else _singular_values(torch.cat([chunk @ q for chunk in _chunks(w_LK, scale)]))[-count:]


def gram_error(values: Tensor) -> float:
    """8u·((σ₁/σᵢ)² + √k) at the smallest value; one below FLOOR counts at FLOOR, where the Gram route must be left."""
    if values[0] == 0:
        return 0.0
    ratio = max(values[-1].item() / values[0].item(), FLOOR)
    return _gram_bound(ratio, len(values))


def _gram_bound(ratio: float, k: int) -> float:
    return 8 * UNIT_ROUNDOFF * (ratio**-2 + math.sqrt(k))


def _refined_error(values: Tensor, method: str) -> float:
    smallest = values[values > FLOOR * values[0]][-1].item() / values[0].item()
    bound = 8 * UNIT_ROUNDOFF * math.sqrt(len(values)) / smallest
    if method == "gram+ritz":  # the values above the cut still come from the Gram matrix
        bound = max(bound, _gram_bound(RITZ_CUT, len(values)))
    return bound
