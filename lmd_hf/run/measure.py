"""All numbers of one matrix: the only place where `weights` and `matrix` meet."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmd_hf.matrix import capacity, dimension, noise
from lmd_hf.matrix.activation import ATTENTION_DEGREE, effective_degree, energy_degree
from lmd_hf.matrix.kernels import spectrum_of
from lmd_hf.matrix.metrics import norm
from lmd_hf.matrix.spectrum import Spectrum, interval_of, variants
from lmd_hf.records import DataFigures, Factored, MatrixRef, MatrixReport, Work
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
SPIKES = ("mp_spikes", "mp_spikes_99")
RANKS = ("effective_rank", "effective_rank_energy", "stable_rank", "participation_ratio")  # and counts: of k at most
NOISE = ("mp_edge", *SPIKES, "mp_fit_distance")
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Spectra:
    """What is computed of one matrix: σ(W), S' in the metric asked for where that is another, and how coarsely W was
    stored. In the metric `data` also what the data say, or, as `note`, why the metric is another."""

    raw: Spectrum
    used: Spectrum | None
    rounding: Rounding
    metric: str = "norm"
    data: DataFigures | None = None
    topology: np.ndarray | None = None
    note: str | None = None


def read_metric(source: Source, ref: MatrixRef, metric: str) -> torch.Tensor | None:
    """The gain γ whose metric is asked for; `None` where that is the identity, or no norm feeds the matrix. Raises
    `ValueError` for one that does not fit."""
    return None if metric == "identity" or ref.stored == "lora" else read_gain(source, ref)


def procedure(work: Work) -> str:
    """What decides, beside its entries, how the spectrum of a matrix comes out: the kernel and, of a sketch, its
    tolerance and seed. The seed is drawn from which entries the matrix has, so that neither the order nor the number of
    processes matters."""
    if work.kernel != "sketch":
        return work.kernel
    return f"{work.kernel} {work.tolerance!r} {work.ref.name}|{work.ref.expert}|{work.ref.rows}"


def measure(work: Work, stored: Stored, gain: torch.Tensor | None, *, gram: torch.Tensor | None = None) -> Spectra:
    """The spectra of W, by the planned kernel; `gram` is W's Gram matrix where other ranks have summed it. Raises
    `ValueError` for NaN and infinity, in W or in the gain."""
    w_OI = stored.matrix
    raw = spectrum(work, w_OI) if gram is None else spectrum_of(w_OI, work.kernel, gram=gram)
    if gain is None or isinstance(w_OI, Factored):
        return Spectra(raw, None, stored.rounding)
    scaled = norm(gain.to(w_OI.device)).power_times(0.5, w_OI.to(torch.float64).T).T
    return Spectra(raw, spectrum(work, scaled), stored.rounding)


def spectrum(work: Work, w: torch.Tensor | Factored) -> Spectrum:
    """The singular values of `w` by the planned kernel."""
    if work.kernel != "sketch":
        return spectrum_of(w, work.kernel)
    seed = int.from_bytes(hashlib.sha256(procedure(work).encode()).digest()[:8], "big")
    return spectrum_of(w, work.kernel, seed=seed, tolerance=work.tolerance)


def to_row(ref: MatrixRef, spectra: Spectra, *, kernel: str) -> MatrixReport:
    """Every number of theory for a matrix, from its spectra."""
    used, raw, rounding = spectra.used or spectra.raw, spectra.raw, spectra.rounding
    metric = "identity" if spectra.used is None else spectra.metric
    s = used.values.numpy()
    s.flags.writeable = False
    degree, effective = _degrees(ref.activation if ref.block in ("mlp", "moe") else None, ref.gated)
    ranks, norm = None, float(np.sqrt((s**2).sum()))
    product = len(s) < min(ref.shape)  # of thin factors: the other values are exactly 0, and no noise fills them
    smallest: float | None = 0.0 if product else float(s[-1])
    numbers, intervals = _estimated(ref, used, raw, rounding, metric, degree)
    if used.sketch is not None:
        ranks, norm, smallest = tuple(range(1, len(used.sketch.certified) + 1)), used.sketch.norm, None
        s = s[: len(ranks)]
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
        method=used.method,
        error_bound=used.error_bound,
        frobenius_norm=norm,
        smallest_singular_value=smallest,
        energy_degree=degree,
        effective_degree=effective,
        metric=metric,
        singular_value_ranks=ranks,
        singular_values=s,
        intervals=intervals,
        metric_note=spectra.note,
        data=spectra.data,
        topology_spectrum=spectra.topology,
        **numbers,
    )


def _estimated(
    ref: MatrixRef, spectrum: Spectrum, raw: Spectrum, rounding: Rounding, metric: str, degree: int
) -> tuple[Numbers, dict[str, tuple[float, float]] | None]:
    """Every number that is a function of the spectra, and the intervals of those that a sketch estimates."""
    pairs = list(zip(*_paired(spectrum, raw), strict=False))  # no more replicas than both have
    found = [_numbers(ref, s, r, rounding, metric, degree) for s, r in pairs]
    known = len(raw.values if raw.sketch is None else raw.sketch.certified)
    intervals = {}
    for name, value in found[0].items():
        if isinstance(value, (int, float)) and len(found) > 1:
            values = [each[name] for each in found]
            most = float(min(ref.shape)) if isinstance(value, int) or name in RANKS else math.inf
            interval = interval_of(values, _grain(name, ref), _least(name, values, known), most)
            if interval is not None:
                intervals[name] = interval
    distance = found[0]["mp_fit_distance"]
    if distance is None or not noise.bulk_is_mp_like(
        distance, min(ref.shape)
    ):  # not noise: a count of spikes says nothing
        for name in SPIKES:
            found[0][name] = None
            intervals.pop(name, None)
    return found[0], intervals or None


def _paired(*spectra: Spectrum) -> list[list[np.ndarray]]:
    """The variants of each spectrum, side by side; an exact one beside a sketch stays as it is."""
    found = [[s.values.numpy()] if s.sketch is None else variants(s.values.numpy(), s.sketch) for s in spectra]
    longest = max(map(len, found))
    return [each * longest if len(each) == 1 else each for each in found]


def _grain(name: str, ref: MatrixRef) -> float:
    """The distance of two distribution functions moves in steps of one value; counts have their own grain."""
    return 1 / min(ref.shape) if name == "mp_fit_distance" else 0.0


def _least(name: str, values: list[Any], known: int) -> float:
    """Logarithms go below 0, all other numbers do not. A spike that is one of the `known` leading values, which carry a
    certificate, and stands above noise in every variant is sure, however widely the tail's counts vary."""
    if name in SPIKES and None not in values:
        return float(min(known, *values))
    return -math.inf if name in ("log_volume", "capacity_log10") else 0.0


def _numbers(ref: MatrixRef, s: np.ndarray, raw: np.ndarray, rounding: Rounding, metric: str, degree: int) -> Numbers:
    """The numbers of S' = `s` and of σ(W) = `raw`."""
    product = len(s) < min(ref.shape)
    latent, rule = dimension.latent_dimension(s, raw, max(ref.shape), "product" if product else metric)
    participation = dimension.participation_ratio(s)
    return {
        "spectral_norm": float(s[0]),
        "stable_rank": dimension.stable_rank(s),
        "participation_ratio": participation,
        "effective_rank": dimension.effective_rank(s),
        "effective_rank_energy": dimension.effective_rank_energy(s),
        "energy_rank_90": dimension.energy_rank(s, 0.90),
        "energy_rank_95": dimension.energy_rank(s, 0.95),
        "energy_rank_99": dimension.energy_rank(s, 0.99),
        "numerical_rank": dimension.numerical_rank(raw, max(ref.shape), rounding.relative, rounding.absolute),
        "latent_dim": latent,
        "latent_dim_rule": rule,
        "capacity_log10": capacity.capacity_log10(participation, degree),
        "expressivity": dimension.expressivity(s, min(ref.shape)),
        "log_volume": dimension.log_volume(s, latent),
        **(_noise(raw, max(ref.shape)) if not product else dict.fromkeys(NOISE)),
    }


def _noise(raw: np.ndarray, n: int) -> Numbers:
    """The Marchenko–Pastur figures of σ(W)."""
    if n < 2 or noise.noise_level(raw, n) <= 0:
        return dict.fromkeys(NOISE)
    return {
        "mp_edge": noise.mp_edge(raw, n),
        "mp_spikes": noise.spikes(raw, n),
        "mp_spikes_99": noise.spikes(raw, n, noise.TRACY_WIDOM_99),
        "mp_fit_distance": noise.mp_fit_distance(raw, n),
    }


@lru_cache(maxsize=256)
def _degrees(activation: str | None, gated: bool) -> tuple[int, float | None]:
    """(energy degree, effective degree) of an MLP's activation; those of the classical network elsewhere.

    An activation with parameters of its own (PReLU, xIELU) has the growth of any value of theirs, and no effective
    degree that its name alone would tell.
    """
    function = None if activation is None else ACTIVATIONS.get(activation) or _imported(activation)
    if function is None:
        return ATTENTION_DEGREE, None
    learned = isinstance(function, nn.Module) and any(True for _ in function.parameters())
    return energy_degree(function, gated=gated), None if learned else effective_degree(function)


def _imported(activation: str) -> Callable[[Tensor], Tensor] | None:
    from transformers.activations import ACT2FN

    if activation not in ACT2FN:
        return None
    return ACT2FN[activation]  # not `get`: looking up makes the function
