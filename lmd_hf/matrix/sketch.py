"""The kernel `sketch`: certified leading values by block Krylov iteration, the others' distribution by quadrature.

Shapes: O = out, I = in, L = max(O, I), S = k = min(O, I), r = leading triplets, P = probes.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmd_hf.matrix import dimension
from lmd_hf.matrix.cost import LANCZOS, PROBES, krylov_flops, quadrature_flops, sketch_pays
from lmd_hf.matrix.krylov import UNIT_ROUNDOFF, Triplets, certificates, krylov, norm_bound, refined
from lmd_hf.matrix.products import CHUNK_ENTRIES, times
from lmd_hf.matrix.quadrature import bidiagonalise, largest, quantiles, rules
from lmd_hf.matrix.spectrum import Sketch, Spectrum, error_parts, variants


TOLERANCE = 0.01  # relative half-width of effective rank's interval, and relative certificate of every listed value
CONVERGED = 1 / 4  # of the tolerance: residuals of the triplets that are taken out before the probes
KRYLOV_ROUNDS = 3
COARSE = (1 / 2, 5 / 8, 3 / 4)  # of the Lanczos steps, to see what truncation does
EMPTY_REST = 1e-8  # share of ‖W‖_F² below which the difference ‖W‖_F² − Σσ̂² has no digits, and products need float64
USUAL_EXPONENT = 40  # entries between 2⁻⁴⁰ and 2⁴⁰ are taken as they are
CLIPPINGS = 3  # scaling lifts values above the last leading one, and cutting them lowers the energy: they settle
METHOD = "krylov+quadrature"


def attempt(w_OI: Float[Tensor, "O I"], *, seed: int, tolerance: float, limit: float) -> Spectrum | None:
    """The sketched spectrum; `None` where W is too small for one, or `tolerance` is missed within `limit` operations.

    The leading triplets with a residual below `tolerance`/4 · σ̂ are taken out (at least one, else `None`); probes on
    what they leave give the distribution of the others (`quadrature`), scaled so that Σσ² = ‖W‖_F², which is exact in
    float64. As long as the 95 % interval of the effective rank is wider than ± `tolerance`, or σ₁'s certificate is, the
    probes or the steps double, whichever has the larger part in it. Products run in float32 unless W is
    float64 or little is left beside the leading values. The same seed gives the same result, to the rounding of these
    products, which depends on the number of BLAS threads (1e-9 of the effective rank). Raises `ValueError` for NaN or
    infinity.
    """
    if not sketch_pays(min(w_OI.shape)):
        return None
    w_LS, scale, energy = prepared(w_OI)
    if energy == 0:
        return Spectrum(torch.zeros(w_LS.shape[1], dtype=torch.float64), 0.0, METHOD)
    leading = _lead(w_LS, energy, seed, tolerance)
    long, short = w_LS.shape
    probes, steps, spent = PROBES, LANCZOS, krylov_flops(long, short)
    while leading is not None:
        spent += quadrature_flops(long, short, probes, steps)
        if spent > limit and (probes, steps) != (PROBES, LANCZOS):
            break
        spectrum = _measured(w_LS, leading, energy, probes=probes, steps=steps, seed=seed)
        missed = _missed(spectrum, tolerance)
        if missed is None:
            return _listed(spectrum, tolerance, scale)
        probes, steps = (2 * probes, steps) if missed == "probes" else (probes, 2 * steps)
    return None


def prepared(w_OI: Float[Tensor, "O I"]) -> tuple[Float[Tensor, "L S"], float, float]:
    """(W/c with the long side first, c, ‖W/c‖_F² in float64): float64 as it is, any other type as float32.

    c is 1, or a power of two where squares would overflow or vanish. A square matrix is turned by which of its first
    row and column is longer, so that W and Wᵀ give the same numbers. Raises `ValueError` for NaN or infinity.
    """
    sides: tuple[float, ...] = tuple(w_OI.shape)
    if sides[0] == sides[1]:
        sides = tuple(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (w_OI[0], w_OI[:, 0]))
    w_LS = w_OI if sides[0] >= sides[1] else w_OI.T
    w_LS = w_LS if w_LS.dtype == torch.float64 else w_LS.to(torch.float32)
    top = max(abs(float(end)) for end in torch.aminmax(_as_stored(w_LS)))
    if not math.isfinite(top):
        raise ValueError("the matrix holds NaN or infinity")
    exponent = math.frexp(top)[1]
    scale = 2.0**exponent if abs(exponent) > USUAL_EXPONENT else 1.0
    if scale != 1:
        w_LS = (w_LS.to(torch.float64) / scale).to(w_LS.dtype)
    return w_LS, scale, _energy(w_LS)


def _as_stored(w_LS: Tensor) -> Tensor:
    """W or Wᵀ, whichever has its rows together in memory: what reads all entries reads them in their order."""
    return w_LS if w_LS.stride(0) >= w_LS.stride(1) else w_LS.T


def _energy(w_LS: Tensor) -> float:
    """‖W‖_F² in float64, a few rows at a time, which stay in the cache."""
    stored = _as_stored(w_LS)
    pieces = torch.split(stored, max(1, CHUNK_ENTRIES // stored.shape[1]))
    norms = torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces])
    return math.fsum((norms**2).tolist())


def _lead(w_LS: Tensor, energy: float, seed: int, tolerance: float) -> Triplets | None:
    """The triplets to take out; `None` where not even the first converges in three rounds.

    Where they are nearly all of W, what float32 products left of their directions, ‖W‖·2⁻²⁴, would pass for the rest:
    one more step in float64 removes it.
    """
    for triplets, _ in zip(
        krylov(w_LS, seed=seed, tolerance=CONVERGED * tolerance), range(KRYLOV_ROUNDS), strict=False
    ):
        if triplets.residuals[0] <= CONVERGED * tolerance * triplets.values[0]:
            whole = energy - float((triplets.values**2).sum()) < EMPTY_REST * energy
            return refined(w_LS, times(w_LS.T, triplets.left, exact=True)) if whole else triplets
    return None


def _measured(w_LS: Tensor, leading: Triplets, energy: float, *, probes: int, steps: int, seed: int) -> Spectrum:
    """One round: quadrature below the leading triplets, their certificates, and the whole spectrum with its errors."""
    remains = energy - float((leading.values**2).sum())
    precise = w_LS.dtype == torch.float64 or remains < EMPTY_REST * energy
    run = bidiagonalise(w_LS, leading.right, probes=probes, steps=steps, seed=seed + 1, precise=precise)
    rounding = math.sqrt(energy) * (UNIT_ROUNDOFF if precise else 2.0**-24)
    rest = norm_bound(largest(run) + rounding, w_LS.shape[1], probes, steps)
    certified = certificates(leading, rest, 8 * UNIT_ROUNDOFF * math.sqrt(w_LS.shape[1] * energy))
    count = w_LS.shape[1] - len(certified)
    equal, own = np.full((1, probes), 1 / probes), np.eye(probes)
    shares = np.vstack([equal, equal + (own - equal) / math.sqrt(probes)])
    tails = [quantiles(*rules(run), shares, count)]
    tails += [quantiles(*rules(run.first(int(part * steps))), equal, count) for part in COARSE]
    known = remains if remains >= EMPTY_REST * energy else None
    whole = _completed(leading, np.vstack(tails), known)
    shift = np.concatenate([certified, np.full(count, rounding)])
    sketch = Sketch(certified, whole[1 : 1 + probes], whole[1 + probes :], shift, math.sqrt(energy))
    return Spectrum(torch.from_numpy(whole[0]), 0.0, METHOD, sketch)


def _completed(leading: Triplets, tails: np.ndarray, energy: float | None) -> np.ndarray:
    """Whole spectra, the tails scaled to the energy that the leading values leave (as they are, where that is lost in
    rounding) and kept below the last of those."""
    s = leading.values.cpu().numpy()
    for _ in range(CLIPPINGS if energy is not None else 1):
        sizes = np.linalg.norm(tails, axis=1, keepdims=True)
        if energy is not None:
            tails = tails * np.divide(math.sqrt(energy), sizes, out=np.ones_like(sizes), where=sizes > 0)
        tails = np.minimum(tails, s[-1])
    return np.hstack([np.broadcast_to(s, (len(tails), len(s))), tails])


def _missed(spectrum: Spectrum, tolerance: float) -> str | None:
    """What has to grow, `probes` or `steps`; `None` where the tolerance is met."""
    values, sketch = spectrum.values.numpy(), spectrum.sketch
    assert sketch is not None
    if sketch.certified[0] > tolerance * values[0]:
        return "steps"
    parts = error_parts([dimension.effective_rank(each) for each in variants(values, sketch)])
    if parts is None or sum(parts) <= tolerance * (dimension.effective_rank(values) or 0.0):
        return None
    return "probes" if parts[0] > parts[1] else "steps"


def _listed(spectrum: Spectrum, tolerance: float, scale: float) -> Spectrum:
    """The spectrum of W itself, with the certificates of the leading values that keep to the tolerance."""
    values, sketch = spectrum.values.numpy(), spectrum.sketch
    assert sketch is not None
    relative = sketch.certified / values[: len(sketch.certified)]
    count = int(np.cumprod(relative <= tolerance).sum())
    scaled = Sketch(
        certified=scale * sketch.certified[:count],
        replicas=scale * sketch.replicas,
        coarse=scale * sketch.coarse,
        shift=scale * sketch.shift,
        norm=scale * sketch.norm,
    )
    return Spectrum(spectrum.values * scale, float(relative[:count].max()), METHOD, scaled)
