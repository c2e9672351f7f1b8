"""The paper's failure signatures, each with its measure, its threshold and the matrices that show it.

The paper (arXiv 2309.05968) names three; the measures and thresholds are this project's, calibrated on pure noise.
"""

from lmd_hf.changes import MatrixChange
from lmd_hf.matrix.noise import NOISE_FIT
from lmd_hf.records import Finding, MatrixReport
from lmd_hf.run.convergence import NONE_JUDGED, can_look_untrained, looks_untrained


EXTREMES = 3
KEPT = 1.0  # dimensions of the input for each that S' keeps at 90 % of the energy
SLOW_DECAY = 0.9  # of the participation ratio of an i.i.d. matrix of the same shape, k/(1+β)


def find(
    matrices: tuple[MatrixReport, ...], *, verdict: str = "unknown", slow_decay: float = SLOW_DECAY
) -> tuple[Finding, ...]:
    """All signatures, found or not. `verdict` is that on convergence: where other evidence shows a training that is
    stable, matrices like noise are named but are no sign of the opposite. `slow_decay` is the share of noise's
    participation ratio that counts as slow."""
    ratios = [(m, ratio) for m in matrices if (ratio := noise_ratio(m)) is not None]
    slow = tuple(label(m) for m, ratio in ratios if ratio >= slow_decay)
    even = f"{len(slow)} of {len(ratios)} matrices spread their energy almost as evenly as noise"
    if not ratios:
        of_data = any(m.metric == "data" for m in matrices)
        compared = "no matrix that could be compared with noise"
        even = "in the metric of data noise has another participation ratio" if of_data else compared
    raw = tuple(label(m) for m in matrices if looks_untrained(m))
    judged = sum(map(can_look_untrained, matrices))
    like_noise = f"{len(raw)} of {judged} matrices cannot be told from i.i.d. noise, as at initialisation"
    if not judged:
        like_noise = NONE_JUDGED
    if verdict == "stable" and raw:
        like_noise = f"the training is stable; {like_noise}"
    return (
        Finding(
            "slow decay",
            "not measured" if not ratios else "found" if slow else "not found",
            even,
            "participation ratio / that of i.i.d. noise of the same shape, k/(1+β)",
            slow_decay,
            slow,
        ),
        _high_dimension(matrices),
        Finding(
            "not converged",
            "not measured" if not judged else "found" if raw and verdict != "stable" else "not found",
            like_noise,
            "no spikes beyond noise at 99 %, and Kolmogorov–Smirnov distance to Marchenko–Pastur below threshold / k",
            NOISE_FIT,
            raw,
        ),
    )


def extremes(matrices: tuple[MatrixReport, ...]) -> tuple[list[tuple[float, MatrixReport]], ...]:
    """(most, least compressed): three each of (`noise_ratio`, matrix); none where there are fewer than six."""
    ranked = sorted(((ratio, m) for m in matrices if (ratio := noise_ratio(m)) is not None), key=lambda item: item[0])
    if len(ranked) < 2 * EXTREMES:
        return [], []
    return ranked[:EXTREMES], ranked[: -EXTREMES - 1 : -1]


def _high_dimension(matrices: tuple[MatrixReport, ...]) -> Finding:
    """Inputs that fill more dimensions than the layer keeps, by more than two standard errors."""
    signature, measure = "high intrinsic dimension", "intrinsic dimension of the input"
    known = [
        (m, found[0] - 2 * found[1])
        for m in matrices
        if m.data is not None and m.latent_dim and (found := m.data.dimensions["input"]["maximum_likelihood"])
    ]
    if not known:
        told = "needs activations; weights alone do not tell the dimension of the data"
        return Finding(signature, "not measured", told, measure, None, ())
    high = tuple(label(m) for m, least in known if least > KEPT * (m.latent_dim or 0))
    text = f"the inputs of {len(high)} of {len(known)} matrices fill more dimensions than the layer keeps"
    measure += " (maximum likelihood, less two standard errors) / n'"
    return Finding(signature, "found" if high else "not found", text, measure, KEPT, high)


def noise_ratio(matrix: MatrixReport) -> float | None:
    """Participation ratio over k/(1+β), what i.i.d. noise of the same shape has; `None` where a single direction has as
    much (one singular value, 2 × 2), and in the metric of data, where noise would have another."""
    short, long = min(matrix.shape), max(matrix.shape)
    if matrix.participation_ratio is None or short * long <= short + long or matrix.metric == "data":
        return None
    return matrix.participation_ratio * (1 + short / long) / short


def label(matrix: MatrixReport | MatrixChange) -> str:
    """Name and part: what tells one row from every other."""
    return f"{matrix.name} [{matrix.part}]" if matrix.part else matrix.name
