"""What the kernels cost, from a shape alone: floating-point operations, bytes, and which kernel pays. Pure, no torch.

L = long side, k = short side.
"""

EIGEN_FLOPS = 4 / 3  # reduction of a k × k symmetric matrix to tridiagonal form: 4/3 k³ (Golub & Van Loan, §8.3.1)
EXACT_SIDE = 8192  # `auto` is exact up to this short side: minutes, not hours

BLOCK, STEPS = 32, 16  # Krylov: 32 columns cost little more than one (W is read once), 16 steps resolve noise's edge
PROBES, LANCZOS = 32, 24  # quadrature: 32 probes give Student's t its meaning, 24 steps every spectrum of two decades
MOST = 128  # leading triplets that are refined and reported at most


def gram_flops(long: int, short: int) -> float:
    """Half of the Gram product: it is symmetric."""
    return float(long) * short**2


def eigen_flops(short: int) -> float:
    """The eigenvalues of a k × k matrix."""
    return EIGEN_FLOPS * short**3


def exact_flops(long: int, short: int) -> float:
    """Cost of the exact kernel."""
    return gram_flops(long, short) + eigen_flops(short)


def krylov_flops(long: int, short: int, steps: int = STEPS) -> float:
    """Products with W and Wᵀ, two passes of orthogonalisation, R of the image, and the refined triplets."""
    space = BLOCK * steps
    return 4.0 * long * short * (space + MOST) + 4 * short * space**2 + 2 * long * space**2


def quadrature_flops(long: int, short: int, probes: int = PROBES, steps: int = LANCZOS) -> float:
    """Products with W and Wᵀ, two passes of orthogonalisation a side, and of deflation."""
    return probes * (4.0 * long * short * steps + 4 * (long + short) * steps**2 + 8 * short * MOST * steps)


def sketch_flops(long: int, short: int) -> float:
    """Cost of a sketch that meets its tolerance in the first round; of the exact kernel where that runs instead."""
    if not sketch_pays(short):
        return exact_flops(long, short)
    return krylov_flops(long, short) + quadrature_flops(long, short)


def exact_bytes(short: int) -> int:
    """Memory of the exact kernel beside W: the Gram matrix, and two more where small values are refined."""
    return 3 * 8 * short**2


def sketch_bytes(long: int, short: int, entry: int) -> int:
    """Memory beside W: the largest of the Krylov basis with its two images and a copy while they grow, in float64, of
    the bases of the probes, and of the exact kernel, which runs where the sketch misses its tolerance: a process that
    runs out of memory then would lose more than workers that it could have had beside."""
    krylov = 8 * BLOCK * STEPS * (2 * long + 2 * short)
    probes = entry * PROBES * (LANCZOS + 1) * (long + short)
    return max(krylov + 2 * 8 * MOST * (long + short), probes + 2 * 8 * MOST * (long + short), exact_bytes(short))


def sketch_pays(short: int) -> bool:
    """Whether the short side is longer than the vectors that the probes would build from it."""
    return short > PROBES * LANCZOS
