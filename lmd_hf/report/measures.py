"""The measures that maps of a report or a comparison show, and the colours that all figures share. No figure is made
here."""

from collections.abc import Callable, Sequence

import numpy as np

from lmd_hf.changes import MatrixChange
from lmd_hf.records import MatrixReport
from lmd_hf.report.plain import Row


COLORMAP = "viridis"  # even in lightness, and readable without colour vision
SIGNED = "PuOr"  # for entries of either sign, likewise
SIGNAL, NOISE, CUT = "#0072B2", "#D55E00", "#009E73"  # Okabe & Ito 2008: told apart by every kind of eye
MEASURES: dict[str, Callable[[MatrixReport], float | None]] = {
    "effective rank / k": lambda m: None if m.effective_rank is None else m.effective_rank / min(m.shape),
    "latent dimension n'": lambda m: m.latent_dim,
    "stable rank": lambda m: m.stable_rank,
    "capacity, log₁₀ K": lambda m: m.capacity_log10,
    "spikes above noise": lambda m: m.mp_spikes,
}
ON_CARDS = ("effective rank / k", "latent dimension n'", "capacity, log₁₀ K")
CHANGES: dict[str, Callable[[MatrixChange], float | None]] = {
    "‖ΔW‖ / ‖W‖": lambda m: m.relative_update,
    "update rank / k": lambda m: m.update_rank / min(m.shape),
    "drift of S'": lambda m: m.spectrum_drift,
    "cos², top n'": lambda m: None if m.left_cos2 is None or m.right_cos2 is None else min(m.left_cos2, m.right_cos2),
}


def layer_grid(
    roles: Sequence[tuple[str, list[Row]]], layers: int, measure: Callable[[Row], float | None]
) -> np.ndarray:
    """Layer × role; a cell is the median over the matrices (experts) that share it, NaN where there is no number."""
    grid = np.full((layers, len(roles)), np.nan)
    for column, (_, group) in enumerate(roles):
        found: dict[int, list[float]] = {}
        for row in group:
            if row.layer is not None and (value := measure(row)) is not None:
                found.setdefault(row.layer, []).append(value)
        for layer, values in found.items():
            grid[layer, column] = np.median(values)
    return grid
