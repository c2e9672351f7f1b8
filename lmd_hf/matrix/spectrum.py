"""The spectrum of one matrix as a kernel hands it on, exact or sketched, and the interval of any number taken from it.

Shapes: k = the short side of the matrix, r = how many leading values a sketch certifies, P = its probes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor


TRUNCATION = 1.5  # times the largest change from fewer Lanczos steps


@dataclass(frozen=True)
class Sketch:
    """What a sketch knows beside its best guess of the spectrum.

    `certified` (r) bounds |σ̂ᵢ − σᵢ| of the leading values (`krylov.certificates` says how surely). `replicas` (P × k)
    are the spectrum with the share of one probe after the other raised by 1/√P, `coarse` (3 × k) those from half, five
    eighths and three quarters of the Lanczos steps, and `shift` (k) is how far a value may be off for other reasons:
    the certificate of a leading one, the rounding of the products for the rest. `norm` is ‖W‖_F, exact in float64.
    """

    certified: Float[np.ndarray, " r"]
    replicas: Float[np.ndarray, "P k"]
    coarse: Float[np.ndarray, "3 k"]
    shift: Float[np.ndarray, " k"]
    norm: float


@dataclass(frozen=True)
class Spectrum:
    """Singular values (k, float64, CPU, descending) and how well they are known.

    `error_bound` bounds |σ̂ᵢ − σᵢ| / σᵢ over the values above 1e-6 · σ₁ of an exact kernel, and over the certified
    leading values of a sketch, whose other values are quantiles of an estimated distribution. `method` says which route
    ran: `gram`, `gram+ritz`, `svd`, `qr` for a product of thin factors, `krylov+quadrature` for a sketch.
    """

    values: Float[Tensor, " k"]
    error_bound: float
    method: str
    sketch: Sketch | None = None


def variants(values: Float[np.ndarray, " k"], sketch: Sketch) -> list[Float[np.ndarray, " k"]]:
    """The spectrum, then all that `interval_of` compares with it: moved up, moved down, three coarse, P replicas."""
    return [values, values + sketch.shift, np.maximum(values - sketch.shift, 0), *sketch.coarse, *sketch.replicas]


def error_parts(found: Sequence[float | int | None]) -> tuple[float, float, float] | None:
    """What a 95 % interval is made of, from the numbers of the `variants`: sampling, truncation, everything else.

    * t · √(Σₚ(θₚ − θ̄)²/(P−1)) over the replicas: a jackknife that raises each probe by 1/√P, a step of the size of the
      error itself, so that counts, which move in whole steps, are resolved as well as smooth numbers. t is Student's
      99.5 % quantile with P−1 degrees of freedom: what this part has to spare covers what the other two do not see.
    * 1.5 · max |θ − θ_coarse| for the truncation of the recursion: covers an error that falls like 1/m or faster.
    * the largest change under ± `shift`.

    `None` where the number does not exist for one of them.
    """
    if any(each is None for each in found):
        return None
    theta, up, down, *others = np.array(found, dtype=np.float64)
    coarse, replicas = np.array(others[:3]), np.array(others[3:])
    sampling = student_quantile(len(replicas) - 1) * float(np.std(replicas, ddof=1))
    return sampling, TRUNCATION * float(np.abs(coarse - theta).max()), float(max(abs(up - theta), abs(down - theta)))


def interval_of(
    found: Sequence[float | int | None], grain: float = 0.0, least: float = 0.0, most: float = math.inf
) -> tuple[float, float] | None:
    """The number ± the sum of its `error_parts` and `grain`, the step in which it moves; within `least` and `most`.

    A count, which is an `int`, has a grain of 1 and whole ends.
    """
    theta, parts = found[0], error_parts(found)
    if theta is None or parts is None:
        return None
    half = sum(parts) + grain
    if isinstance(theta, int):
        return max(math.floor(theta - half) - 1.0, least), min(math.ceil(theta + half) + 1.0, most)
    return max(float(theta) - half, least), min(float(theta) + half, most)


def student_quantile(degrees: int) -> float:
    """The 99.5 % quantile of Student's t, to 0.1 % from 31 degrees of freedom (Abramowitz & Stegun 1964, 26.7.5)."""
    z = 2.575829
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + g1 / degrees + g2 / degrees**2
