"""`lmd_hf.truncate`: a smaller model, of weights in factors."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd_hf.errors import SettingsError
from lmd_hf.matrix.allocation import Curve, by_energy, within_budget
from lmd_hf.records import Data, Settings, Skipped
from lmd_hf.run.asked import NUMBER, check_type, texts
from lmd_hf.run.batches import load_batches
from lmd_hf.truncated.base import Base, open_base, public_name
from lmd_hf.truncated.cut import SIGHTS, Axes, axes_of, find_parts, put_in
from lmd_hf.truncated.loss import mean_loss
from lmd_hf.truncated.model import LMDModel
from lmd_hf.truncated.record import FactoredLayer, Loss, Truncation
from lmd_hf.weights.inventory import list_matrices


if TYPE_CHECKING:
    from torch import nn


def truncate(
    model: "str | Path | nn.Module",
    *,
    energy: float | None = None,
    rank: int | None = None,
    ratio: float | None = None,
    metric: str = "identity",
    roles: tuple[str, ...] = (),
    data: str | Path | Data | None = None,
    evaluate: str | Path | Data | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> LMDModel:
    """A smaller model: linear layers (and GPT-2's Conv1D) become `LMDLinear`, their leading axes in a metric.

    One of three says how many axes stay: `ratio`, the share of the selected matrices' parameters, given out over the
    layers by equal marginal loss (`lmd_hf.matrix.allocation`): with K axes of a layer of O × I kept, one more saves

        c · s'²_{K+1} / (O + I + 1) = μ   nats a parameter, the same in every layer, or without data
        (L(K) − L(K+1)) / (O + I + 1) = μ   with L(K) = (Σ_{i>K} s'² / Σ s'²)²;

    `energy`, the share of Σs'² that every layer keeps; `rank`, their number. A layer whose factors would have as many
    parameters as its matrix stays as it is, and so do embeddings, weights tied to them, convolutions and stacked
    experts; `result.truncation.left` lists them with the reason.

    Of all matrices of that rank the one put in has the least error in the `metric`: that of W (`identity`), of W times
    the gain of the norm before it (`norm`), of its outputs over `data` (`data`), or of the model over `data`, to second
    order (`fisher`: ½‖F^½(W − W')M_X^½‖², F the Fisher information of the layer's outputs, sampled from the model's own
    predictions, with a tenth of its mean eigenvalue added; Martens & Grosse 2015, arXiv 1503.05671). With data, biases
    also take up (W − W')x̄, and c is ½ tr F/O, or with `fisher` ½.
    `data` is a file or dataset as for `analyze`, or a `Data` with its settings. With `evaluate`,
    held-out text, the loss of a causal language model is measured before and after, and the card tells it.

    `model` is a Hub id or a folder, loaded without remote code, or a live module, which stays as it is; parameters that
    are not factorised are shared with it. The result runs as the model does and has `save_pretrained`, `push_to_hub`,
    `merge`; `LMDModel.from_pretrained` loads it. As `analyze`, it takes the fields of `Settings` as keywords. Raises
    `SettingsError` for values out of range, a budget below one axis a layer, peft's and quantised models, `SourceError`
    for models that cannot be loaded.
    """
    target = _target(energy=energy, rank=rank, ratio=ratio)
    if metric not in SIGHTS:
        raise SettingsError(f"no metric '{metric}'; known: {', '.join(SIGHTS)}")
    used = "data" if metric == "fisher" else metric
    settings = Settings(metric=used, roles=texts("roles", roles), data=_data(data))
    base = open_base(model, revision=revision, token=token)
    parts, left = find_parts(base, list_matrices(base.source), settings)
    held_out = None if evaluate is None else _data(evaluate)
    batches = None if held_out is None else load_batches(base.model, base.place, held_out)
    before = None if batches is None else mean_loss(base.model, batches)[0]
    size = _size(base)
    found, unseen = axes_of(base, parts, metric, settings.data)
    layers, whole = apply(base, found, ranks_of([axes.curve for axes in found], target))
    if not layers:
        raise SettingsError(f"no layer gets smaller with {_told(target)}; ask for less")
    loss = None
    if held_out is not None and batches is not None and before is not None:
        after, tokens = mean_loss(base.model, batches)
        loss = Loss(public_name(held_out.dataset), tokens, before, after)
    _as_loaded(base)
    record = Truncation(
        base=base.name,
        commit=base.commit,
        metric=metric,
        target=target,
        data=None if settings.data is None else public_name(settings.data.dataset),
        parameters=(size, _size(base)),
        selected=_selected(found, layers),
        layers=layers,
        left=(*left, *unseen, *whole),
        loss=loss,
    )
    return LMDModel(base.model, record, base.companions)


def ranks_of(curves: Sequence[Curve], target: dict[str, float]) -> tuple[int | None, ...]:
    """How many axes each matrix keeps; `None` where it stays whole."""
    ((name, value),) = target.items()
    if name == "ratio":
        return within_budget(curves, int(value * sum(curve.whole for curve in curves)))
    if name == "energy":
        return by_energy(curves, value)
    return tuple(int(value) if value <= len(curve.energies) else None for curve in curves)


def apply(
    base: Base, found: Sequence[Axes], ranks: Sequence[int | None]
) -> tuple[tuple[FactoredLayer, ...], tuple[Skipped, ...]]:
    """Put factors of these ranks into the model: what was exchanged, and what is better left whole."""
    pairs = list(zip(found, ranks, strict=True))
    layers = tuple(put_in(base, axes, rank) for axes, rank in pairs if rank is not None)
    return layers, tuple(
        Skipped(axes.part.ref.name, axes.part.ref.shape, "whole it loses less for what it takes")
        for axes, rank in pairs
        if rank is None
    )


def _target(**given: float | None) -> dict[str, float]:
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        raise SettingsError(f"give one of ratio, energy and rank; given: {', '.join(asked) or 'none'}")
    ((name, value),) = asked.items()
    check_type(name, value, NUMBER)
    if name == "rank" and (value < 1 or value != int(value)):
        raise SettingsError(f"rank is {value}; a layer keeps one axis or more")
    if name != "rank" and not 0 < value < 1:
        raise SettingsError(f"{name} is {value}; it is a share, so give a number between 0 and 1")
    return asked


def _told(target: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in target.items())


def _data(given: str | Path | Data | None) -> Data | None:
    return Data(str(given)) if isinstance(given, (str, Path)) else given


def _size(base: Base) -> int:
    return sum(parameter.numel() for parameter in base.model.parameters())


def _selected(found: Sequence[Axes], layers: Sequence[FactoredLayer]) -> tuple[int, int]:
    """Parameters of the matrices that could be factorised, before and after."""
    curves = {axes.part.path: axes.curve for axes in found}
    saved = sum(curves[layer.name].whole - layer.rank * curves[layer.name].axis for layer in layers)
    before = sum(curve.whole for curve in curves.values())
    return before, before - saved


def _as_loaded(base: Base) -> None:
    """As transformers would have loaded it: on the CPU, in the type that it is stored in, buffers in their own."""
    if base.dtype is None:
        return
    from accelerate.hooks import remove_hook_from_module

    model: Any = base.model
    remove_hook_from_module(model, recurse=True)  # accelerate's, where it ran on GPUs
    vars(model).pop("hf_device_map", None)
    model.to("cpu")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(base.dtype)
    model.config.dtype = base.dtype
