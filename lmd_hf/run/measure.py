"""All numbers of one matrix: the only place where `weights` and `matrix` meet."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lmd_hf.matrix import capacity, dimension, noise
from lmd_hf.matrix.kernels import Spectrum, get_kernel, spectrum_of
from lmd_hf.matrix.metrics import norm
from lmd_hf.records import Factored, MatrixRef, MatrixReport
from lmd_hf.weights.source import Source
from lmd_hf.weights.stored import Rounding, Stored, read_gain


# the usual ones under transformers' names, whose own module imports for a second
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}
NOISE = ("mp_edge", "mp_spikes", "mp_spikes_99", "mp_fit_distance")


@dataclass(frozen=True)
class Spectra:
    """What is computed of one matrix: σ(W), S' in the metric asked for where that is another, and how coarsely W was
    stored."""

    raw: Spectrum
    used: Spectrum | None
    rounding: Rounding


def read_metric(source: Source, ref: MatrixRef, metric: str) -> torch.Tensor | None:
    """The gain γ whose metric is asked for; `None` where that is the identity, or no norm feeds the matrix."""
    plain = metric == "identity" or ref.norm is None or ref.stored == "lora"
    return None if plain or ref.norm is None else read_gain(source, ref.norm)


def measure(stored: Stored, gain: torch.Tensor | None, kernel: str) -> Spectra:
    """The spectra of W. Raises `ValueError` for NaN and infinity, in W or in the gain."""
    w_OI = stored.matrix
    raw = spectrum_of(w_OI, kernel)
    if gain is None or isinstance(w_OI, Factored):
        return Spectra(raw, None, stored.rounding)
    scaled = norm(gain.to(w_OI.device)).power_times(0.5, w_OI.to(torch.float64).T).T
    return Spectra(raw, get_kernel(kernel)(scaled), stored.rounding)


def to_row(ref: MatrixRef, spectra: Spectra, *, kernel: str) -> MatrixReport:
    """Every number of theory for a matrix, from its spectra."""
    spectrum, rounding = spectra.used or spectra.raw, spectra.rounding
    metric = "identity" if spectra.used is None else "norm"
    s, raw = spectrum.values.numpy(), spectra.raw.values.numpy()
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
    function = ACTIVATIONS.get(activation) or _imported(activation)
    if function is None:
        return capacity.energy_degree(None), None
    return capacity.energy_degree(function, gated=gated), capacity.effective_degree(function)


def _imported(activation: str) -> Callable[[Tensor], Tensor] | None:
    from transformers.activations import ACT2FN

    if activation not in ACT2FN:
        return None
    return ACT2FN[activation]  # not `get`: looking up makes the function
