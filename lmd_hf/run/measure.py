"""All numbers of one matrix: the only place where `weights` and `matrix` meet."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lmd_hf.matrix import capacity, dimension, noise
from lmd_hf.matrix.kernels import get_kernel, spectrum_of
from lmd_hf.matrix.metrics import norm
from lmd_hf.matrix.spectrum import Spectrum
from lmd_hf.records import Factored, MatrixRef, MatrixReport
from lmd_hf.weights.source import Source
from lmd_hf.weights.stored import Rounding, Stored, read_gain


NOISE = ("mp_edge", "mp_spikes", "mp_spikes_99", "mp_fit_distance")


def measure(source: Source, ref: MatrixRef, stored: Stored, *, metric: str, kernel: str) -> MatrixReport:
    """Spectrum and every number of theory for W, in the metric asked for (`identity` where no norm feeds W)."""
    w_OI = stored.matrix
    spectrum = spectrum_of(w_OI, kernel)
    raw = spectrum.values.numpy()
    used = "identity"
    if metric == "norm" and ref.norm is not None and not isinstance(w_OI, Factored):
        gain = norm(read_gain(source, ref.norm).to(w_OI.device))
        spectrum = get_kernel(kernel)(gain.power_times(0.5, w_OI.to(torch.float64).T).T)
        used = "norm"
    return to_row(ref, spectrum, stored.rounding, raw, metric=used, kernel=kernel)


def to_row(
    ref: MatrixRef,
    spectrum: Spectrum,
    rounding: Rounding,
    raw: np.ndarray | None = None,
    *,
    metric: str = "identity",
    kernel: str,
) -> MatrixReport:
    """Every number of theory for a matrix, from its spectrum in a metric and `raw`, σ(W), where that is another."""
    s = spectrum.values.numpy()
    raw = s if raw is None else raw
    s.flags.writeable = False
    product = len(s) < min(ref.shape)  # of thin factors: the other values are exactly 0, and no noise fills them
    latent, rule = dimension.latent_dimension(s, raw, max(ref.shape), "product" if product else metric)
    participation = dimension.participation_ratio(s)
    degree, effective = _degrees(ref.activation if ref.block in ("mlp", "moe") else None, ref.gated)
    return MatrixReport(
        name=ref.name,
        part=ref.part,
        stack=ref.stack,
        block=ref.block,
        role=ref.role,
        layer=ref.layer,
        shape=ref.shape,
        dtype=ref.dtype,
        stored=ref.stored,
        kernel=kernel,
        method=spectrum.method,
        error_bound=spectrum.error_bound,
        frobenius_norm=float(np.sqrt((s**2).sum())),
        spectral_norm=float(s[0]),
        smallest_singular_value=0.0 if product else float(s[-1]),
        stable_rank=dimension.stable_rank(s),
        participation_ratio=participation,
        effective_rank=dimension.effective_rank(s),
        effective_rank_energy=dimension.effective_rank_energy(s),
        energy_rank_90=dimension.energy_rank(s, 0.90),
        energy_rank_95=dimension.energy_rank(s, 0.95),
        energy_rank_99=dimension.energy_rank(s, 0.99),
        numerical_rank=dimension.numerical_rank(raw, max(ref.shape), rounding.relative, rounding.absolute),
        latent_dim=latent,
        latent_dim_rule=rule,
        **(_noise(raw, max(ref.shape)) if not product else dict.fromkeys(NOISE)),
        energy_degree=degree,
        effective_degree=effective,
        capacity_log10=capacity.capacity_log10(participation, degree),
        expressivity=dimension.expressivity(s, min(ref.shape)),
        metric=metric,
        singular_value_ranks=None,
        singular_values=s,
    )


def _noise(raw: np.ndarray, n: int) -> dict[str, Any]:
    """The Marchenko–Pastur figures of σ(W). No spike count where the bulk does not look like noise at all."""
    if n < 2 or np.median(raw) <= 0:
        return dict.fromkeys(NOISE)
    distance = noise.mp_fit_distance(raw, n)
    fits = noise.bulk_is_mp_like(distance, len(raw))
    return {
        "mp_edge": noise.mp_edge(raw, n),
        "mp_spikes": noise.spikes(raw, n) if fits else None,
        "mp_spikes_99": noise.spikes(raw, n, noise.TRACY_WIDOM_99) if fits else None,
        "mp_fit_distance": distance,
    }


@lru_cache(maxsize=256)
def _degrees(activation: str | None, gated: bool) -> tuple[int, float | None]:
    """(energy degree, effective degree) of an MLP's activation; those of the classical network elsewhere."""
    if activation is None:
        return capacity.energy_degree(None), None
    from transformers.activations import ACT2FN

    if activation not in ACT2FN:
        return capacity.energy_degree(None), None
    function = ACT2FN[activation]
    return capacity.energy_degree(function, gated=gated), capacity.effective_degree(function)
