"""The encoding theorem, measured: how far a trained model may be from its target on a compact domain."""

import math
from collections.abc import Callable

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from lmd_hf.errors import SettingsError
from lmd_hf.evidence import EncodingMargin
from lmd_hf.run.lipschitz import NoBoundError, lipschitz_bound


Samples = tuple[Tensor, Tensor]  # inputs (N, …) and targets (N, …)
HELD_OUT = 0.2  # of the data, when no held-out points are given
NEIGHBOURS = 10  # k of the graph on which slopes are read
BATCH = 1024
STATUS = {
    "residual": "measured on the training points",
    "covering_radius": "measured on the held-out points; on the domain an estimate that errs low",
    "lipschitz_upper": "bound",
    "lipschitz_lower": "the largest slope that was seen; an estimate that errs low",
    "target_slope": "the largest slope that was seen; on the domain an estimate that errs low",
    "margin_upper": "bound on the error at the held-out points; on the domain an estimate",
    "margin_lower": "estimate, bounds nothing",
    "observed": "measured on the held-out points",
}


def encoding_margin(
    model: nn.Module | Callable[[Tensor], Tensor],
    data: Samples,
    *,
    held_out: Samples | float = HELD_OUT,
    neighbours: int = NEIGHBOURS,
    seed: int = 0,
) -> EncodingMargin:
    """ε = r + (L_f + L_g)·δ: on a compact domain sup‖f − g‖ is at most this, by the triangle inequality.

    `data` are the training points x_i and targets g(x_i), `held_out` other points of the domain with theirs, or the
    share of `data` to set aside for that (drawn by `seed`). With Euclidean norms over all axes but the first:
    r = max ‖f(x_i) − g(x_i)‖; δ = the largest distance of a held-out point to its nearest training point; L_g = the
    largest slope of the targets, L_f from below the largest slope of f, on the graph of the `neighbours` nearest
    training points and from every held-out point to its nearest ones; L_f from above `lipschitz_bound`.

    With the upper L_f, ε bounds the error at every held-out point: a theorem, as L_g has seen those slopes. On the
    domain it is an estimate, for δ and L_g err low: δ covers all but 3/h of its mass at 95 %, h held-out points. With
    the lower L_f it is no bound. The model is called in evaluation mode, `BATCH` points at once, and its graph
    is followed, during which no other thread may run a model. Raises
    `SettingsError` for too few points, NaN, and equal inputs with different targets, which no function has.
    Source: theorem 1 of arXiv 2309.05968 (Heine–Cantor); the quantities are this project's.
    """
    inputs, targets, away, away_targets = _split(data, held_out, neighbours, seed)
    seen, unseen = _evaluate(model, inputs), _evaluate(model, away)
    if not all(np.isfinite(each).all() for each in (seen, unseen)):
        raise SettingsError("the model gives NaN or infinity on this data; there is no margin")
    x, g, x_away, g_away = map(_flat, (inputs, targets, away, away_targets))
    if seen.shape != g.shape or unseen.shape != g_away.shape:
        raise SettingsError(f"the model gives {seen.shape[1]} numbers a point and the targets have {g.shape[1]}")
    middle = x.mean(0)
    x, x_away = x - middle, x_away - middle  # scikit-learn takes distances from squares, which round far from zero
    graph = NearestNeighbors(n_neighbors=neighbours).fit(x)
    inner, outer = graph.kneighbors(), graph.kneighbors(x_away)
    delta = float(outer[0][:, 0].max())
    residual, observed = (float(np.linalg.norm(f - t, axis=1).max()) for f, t in ((seen, g), (unseen, g_away)))
    target_slope = max(_slope(g, g, inner), _slope(g_away, g, outer))
    if math.isinf(target_slope):
        raise SettingsError("two equal inputs have different targets; no continuous function has both")
    lower = max(_slope(seen, seen, inner), _slope(unseen, seen, outer))
    upper, reason = _upper(model)
    return EncodingMargin(
        training=len(x),
        held_out=len(x_away),
        residual=residual,
        covering_radius=delta,
        uncovered=min(1.0, 3 / len(x_away)),
        lipschitz_upper=upper,
        lipschitz_reason=reason,
        lipschitz_lower=lower,
        target_slope=target_slope,
        margin_upper=None if upper is None else residual + (upper + target_slope) * delta,
        margin_lower=residual + (lower + target_slope) * delta,
        observed=observed,
        status=STATUS,
    )


def _split(
    data: Samples, held_out: Samples | float, neighbours: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and targets, held-out inputs and targets."""
    inputs, targets = _paired(data, "")
    if isinstance(held_out, (int, float)):
        if not 0 < held_out < 1:
            raise SettingsError(f"held_out is {held_out}; give a share between 0 and 1, or the points themselves")
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        aside, kept = order[: round(held_out * len(inputs))], order[round(held_out * len(inputs)) :]
        parts = inputs[kept], targets[kept], inputs[aside], targets[aside]
    else:
        away, away_targets = _paired(held_out, "held-out ")
        parts = inputs, targets, away, away_targets
    for x, least, what in ((parts[0], neighbours + 1, "training"), (parts[2], 1, "held-out")):
        if len(x) < least:
            raise SettingsError(f"{len(x)} {what} points; at least {least} are needed")
    return parts


def _paired(points: Samples, what: str) -> tuple[Tensor, Tensor]:
    inputs, targets = map(torch.as_tensor, points)
    if len(inputs) != len(targets):
        raise SettingsError(f"{len(inputs)} {what}inputs and {len(targets)} targets; each input needs its target")
    return inputs, targets


@torch.no_grad()
def _evaluate(model: nn.Module | Callable[[Tensor], Tensor], inputs: Tensor) -> np.ndarray:
    """f(x), one row a point; a module is left in the mode it was in."""
    parts = torch.split(inputs, BATCH)
    if not isinstance(model, nn.Module):
        return _flat(torch.cat([model(part) for part in parts]))
    training = model.training
    model.eval()
    try:
        return _flat(torch.cat([model(part) for part in parts]))
    finally:
        model.train(training)


def _flat(values: Tensor) -> np.ndarray:
    return values.detach().reshape(len(values), -1).to("cpu", torch.float64).numpy()


def _slope(values: np.ndarray, base: np.ndarray, near: tuple[np.ndarray, np.ndarray]) -> float:
    """max ‖v_i − b_j‖/d_ij over the neighbours j of each i; infinite where equal places have different values."""
    distances, places = near
    change = np.linalg.norm(values[:, None] - base[places], axis=2)
    moving = change > 0
    with np.errstate(divide="ignore"):
        return float((change[moving] / distances[moving]).max(initial=0.0))


def _upper(model: nn.Module | Callable[[Tensor], Tensor]) -> tuple[float | None, str]:
    """The bound on L_f, or why there is none."""
    if not isinstance(model, nn.Module):
        return None, "not a torch module"
    try:
        return lipschitz_bound(model), ""
    except NoBoundError as error:
        return None, str(error)
