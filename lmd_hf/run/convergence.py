"""Whether a training had converged: evidence from its loss curve, from two checkpoints, from the weights alone.

The paper's theorem has stable convergence as its premise; how it is judged is this project's. No torch.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from scipy.special import stdtrit

from lmd_hf.errors import SettingsError
from lmd_hf.evidence import STABLE, UNKNOWN, UNSTABLE, Convergence, Evidence, LayerVerdict, Thresholds
from lmd_hf.matrix.noise import NOISE_FIT
from lmd_hf.records import MatrixReport
from lmd_hf.run.asked import NUMBER, check_type


LAST_SHARE, LEAST_POINTS = 0.1, 10  # of a loss curve: its last tenth, but no fewer points
LEAST_SIDE = 24  # the short side of a matrix whose spectrum can be told from noise's
NONE_JUDGED = f"no matrix has {LEAST_SIDE} rows and columns or more, and a bulk to compare with noise"
HUGE = 1e100  # a loss or a step beyond it is no number
Place = tuple[str, int | None]  # stack and layer


class Placed(Protocol):
    """A row of one matrix: where it is."""

    @property
    def stack(self) -> str:
        """The stack of blocks, "" where there is one."""
        ...

    @property
    def layer(self) -> int | None:
        """The index of the block."""
        ...


class Moving(Placed, Protocol):
    """A matrix from one checkpoint to the next, in the words of `MatrixChange`."""

    @property
    def identical(self) -> bool:
        """Whether no entry moved."""
        ...

    @property
    def base_norm(self) -> float:
        """‖S'‖ before."""
        ...

    @property
    def spectrum_drift(self) -> float | None:
        """‖ΔS'‖/‖S'‖."""
        ...

    @property
    def latent_dim(self) -> int | None:
        """The dimension of the subspaces."""
        ...

    @property
    def left_cos2(self) -> float | None:
        """The mean cos² of the principal angles between the left ones."""
        ...

    @property
    def right_cos2(self) -> float | None:
        """The same of the right ones."""
        ...

    @property
    def degenerate(self) -> bool:
        """Whether rounding alone may turn them."""
        ...


Row = TypeVar("Row", bound=Placed)


def check_thresholds(thresholds: Thresholds) -> None:
    """`SettingsError` for a threshold that is no finite number from 0 on."""
    check_type("thresholds", thresholds, (Thresholds, "a value of lmd_hf.Thresholds"))
    for name, value in vars(thresholds).items():
        check_type(f"the threshold {name}", value, NUMBER)
        if not 0 <= value < math.inf:
            raise SettingsError(f"the threshold {name} is {value}; give a number from 0 on")


def judge_loss(history: Sequence[dict[str, Any]], source: str, thresholds: Thresholds) -> Evidence:
    """Evidence from the `log_history` of a trainer.

    The training loss over the last tenth of its points, at least 10: stable if the change of the least-squares line
    across them is within 1 % (`loss_change`) of their mean, unstable if it is not, or if a loss is not finite. The
    change's 95 % half-width stands beside it. Fewer points, or a mean of 0, tell nothing. A schedule that takes the
    learning rate to 0 flattens any curve: what is stable then is this training, not every longer one.
    """
    logged = [e for e in history if _is_number(e.get("step")) and abs(e["step"]) < HUGE and _is_number(e.get("loss"))]
    curve = {entry["step"]: float(entry["loss"]) for entry in logged}
    steps = sorted(curve)
    last = steps[-max(LEAST_POINTS, math.ceil(LAST_SHARE * len(steps))) :]
    losses = np.array([curve[step] for step in last])
    limits = {"loss_change": thresholds.loss_change}

    def evidence(verdict: str, text: str, **numbers: float | None) -> Evidence:
        return Evidence("loss curve", source, verdict, text, {"points": len(last), **numbers}, limits)

    if not (np.abs(losses) < HUGE).all():
        return evidence(UNSTABLE, "the training loss is not finite")
    if len(steps) < LEAST_POINTS:
        return evidence(UNKNOWN, f"{len(steps)} points of the training loss, at least {LEAST_POINTS} are needed")
    mean = float(losses.mean())
    if mean == 0:
        return evidence(UNKNOWN, "the training loss is 0 on average, which tells no relative change")
    change, width = (float(value) / abs(mean) for value in _line(np.array(last, dtype=float), losses))
    verdict, within = (STABLE, "within") if abs(change) <= thresholds.loss_change else (UNSTABLE, "beyond")
    text = (
        f"the training loss changes by {change:+.2%} ± {width:.2%} of its mean over its last {len(last)} points (steps "
        f"{last[0]:,} to {last[-1]:,}), {within} the {thresholds.loss_change:.2g} that counts as stable"
    )
    if width > thresholds.loss_change:
        text += "; its noise is larger than that"
    numbers = {"change": change, "half_width": width, "mean": mean, "first_step": last[0], "last_step": last[-1]}
    return evidence(verdict, text, **numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < HUGE)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The change of the least-squares line from the first x to the last, and its 95 % half-width for independent
    errors."""
    span, centred = x[-1] - x[0], x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / (len(x) - 2) / float(centred @ centred))
    return slope * span, float(stdtrit(len(x) - 2, 0.975)) * error * span


def judge_change(matrices: Sequence[Moving], source: str, thresholds: Thresholds) -> Evidence:
    """Evidence from an earlier checkpoint of the same training, matrix by matrix compared with this one.

    A layer is stable if ‖ΔS'‖ ≤ 1 % of ‖S'‖ (`spectrum_change`; root sums of squares over its matrices) and the mean
    cos² of the principal angles between the top-n' subspaces, on both sides and over all of its axes, is at least 0.99
    (`subspace_cos2`); unstable if one fails; unknown if none of its matrices moved or no subspace can be told apart.
    Matrices whose cut falls between values that rounding alone may swap count for ΔS' only. One unstable layer makes
    the model unstable. Checkpoints that lie a few steps apart are near each other in any training
    (`lmd-hf reproduce convergence`): give one from long before.
    """
    limits = {"spectrum_change": thresholds.spectrum_change, "subspace_cos2": thresholds.subspace_cos2}
    layers = tuple(_moved(place, group, thresholds) for place, group in _by_layer(matrices))
    numbers = _movement(matrices)
    if not matrices:
        return Evidence("checkpoints", source, UNKNOWN, "no matrix in common", numbers, limits)
    if all(matrix.identical for matrix in matrices):
        return Evidence(
            "checkpoints", source, UNKNOWN, "the same weights: no training between", numbers, limits, layers
        )
    counts = {verdict: sum(layer.verdict == verdict for layer in layers) for verdict in (STABLE, UNSTABLE)}
    text = (
        f"S' moved by {_shown(numbers['spectrum_change'], '.2g')} of its norm, and the leading subspaces kept a mean "
        f"cos² of {_shown(numbers['subspace_cos2'], '.4f')}; {counts[STABLE]} of {len(layers)} layers are stable, "
        f"{counts[UNSTABLE]} are not"
    )
    return Evidence("checkpoints", source, _combined(layer.verdict for layer in layers), text, numbers, limits, layers)


def _moved(place: Place, matrices: Sequence[Moving], thresholds: Thresholds) -> LayerVerdict:
    numbers = _movement(matrices)
    moved, cos2 = numbers["spectrum_change"], numbers["subspace_cos2"]
    if all(matrix.identical for matrix in matrices):
        verdict = UNKNOWN
    elif (moved or 0.0) > thresholds.spectrum_change or (cos2 is not None and cos2 < thresholds.subspace_cos2):
        verdict = UNSTABLE
    else:
        verdict = UNKNOWN if moved is None or cos2 is None else STABLE
    return LayerVerdict(*place, verdict, numbers)


def _movement(matrices: Sequence[Moving]) -> dict[str, float | None]:
    """‖ΔS'‖/‖S'‖ and the mean cos² of some matrices together."""
    known = [(m.spectrum_drift * m.base_norm, m.base_norm) for m in matrices if m.spectrum_drift is not None]
    size = math.hypot(*(norm for _, norm in known))
    axes = [
        (m.latent_dim, (m.left_cos2 + m.right_cos2) / 2)
        for m in matrices
        if m.latent_dim and not m.degenerate and m.left_cos2 is not None and m.right_cos2 is not None
    ]
    count = sum(dim for dim, _ in axes)
    return {
        "spectrum_change": math.hypot(*(change for change, _ in known)) / size if size > 0 else None,
        "subspace_cos2": sum(dim * cos2 for dim, cos2 in axes) / count if count else None,
    }


def judge_weights(matrices: Sequence[MatrixReport], thresholds: Thresholds) -> Evidence:
    """Evidence from the weights alone, which can only be against: where 90 % of the matrices (`untrained_share`) of a
    layer, or of the model, cannot be told from i.i.d. noise, it looks untrained and is unstable; else unknown."""
    layers = tuple(_untrained(place, group, thresholds) for place, group in _by_layer(matrices))
    whole = _untrained(("", None), matrices, thresholds)
    raw, judged = whole.numbers["untrained"] or 0, whole.numbers["judged"] or 0
    text = f"{raw:.0f} of {judged:.0f} matrices cannot be told from i.i.d. noise, as at initialisation"
    text = text if judged else NONE_JUDGED
    if whole.verdict == UNKNOWN:
        text += "; weights alone cannot show that a training has converged"
    limits = {"untrained_share": thresholds.untrained_share}
    return Evidence("weights", "the weights", whole.verdict, text, whole.numbers, limits, layers)


def _untrained(place: Place, matrices: Sequence[MatrixReport], thresholds: Thresholds) -> LayerVerdict:
    judged = sum(map(can_look_untrained, matrices))
    raw = sum(looks_untrained(matrix) for matrix in matrices)
    verdict = UNSTABLE if judged and raw >= thresholds.untrained_share * judged else UNKNOWN
    return LayerVerdict(*place, verdict, {"untrained": raw, "judged": judged})


def can_look_untrained(matrix: MatrixReport) -> bool:
    """Whether `looks_untrained` says anything: below `LEAST_SIDE` hardly a spectrum is further than 6/k from
    Marchenko–Pastur, and up to 6 none can be."""
    return matrix.mp_fit_distance is not None and min(matrix.shape) >= LEAST_SIDE


def looks_untrained(matrix: MatrixReport) -> bool:
    """Indistinguishable from an i.i.d. matrix: no spikes, and a bulk closer to Marchenko–Pastur than 6/k; of a matrix
    that is too small to tell (`can_look_untrained`) never.

    Spikes are counted at 99 %, the error bar of their number, for at 95 % up to one noise matrix in eight shows one.
    Of a sketch this is said where the intervals leave room for it, for noise itself is never told apart by less.
    """
    intervals, distance, spikes = matrix.intervals or {}, matrix.mp_fit_distance, matrix.mp_spikes_99
    if distance is None or spikes is None or not can_look_untrained(matrix):
        return False
    least, fewest = (intervals.get(n, (v,))[0] for n, v in (("mp_fit_distance", distance), ("mp_spikes_99", spikes)))
    return fewest == 0 and least < NOISE_FIT / min(matrix.shape)


def conclude(evidence: Iterable[Evidence]) -> Convergence:
    """The verdicts on the model and on its layers. A layer has its own verdict of each piece of evidence that has one,
    else the one on the model."""
    evidence = tuple(evidence)
    places = dict.fromkeys((layer.stack, layer.layer) for piece in evidence for layer in piece.layers)
    layers = tuple(LayerVerdict(*place, _combined(_verdict(piece, place) for piece in evidence)) for place in places)
    return Convergence(_combined(piece.verdict for piece in evidence), evidence, layers)


def _verdict(evidence: Evidence, place: Place) -> str:
    if not evidence.layers:
        return evidence.verdict
    return next((each.verdict for each in evidence.layers if (each.stack, each.layer) == place), UNKNOWN)


def _combined(verdicts: Iterable[str]) -> str:
    """One unstable makes the whole unstable, else one stable stable."""
    verdicts = set(verdicts)
    return next((verdict for verdict in (UNSTABLE, STABLE) if verdict in verdicts), UNKNOWN)


def _by_layer(matrices: Sequence[Row]) -> list[tuple[Place, list[Row]]]:
    groups: dict[Place, list[Row]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.stack, matrix.layer), []).append(matrix)
    return list(groups.items())


def _shown(value: float | None, form: str) -> str:
    return "an unknown amount" if value is None else format(value, form)
