"""Which modules can hold factors, the leading axes of each in the metric that is asked for, and the factors put in.

Shapes: O = out, I = in, K = axes kept.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from lmd_hf.errors import SettingsError
from lmd_hf.layers.linear import LMDLinear
from lmd_hf.matrix.allocation import Curve, most_axes
from lmd_hf.matrix.graph import knn_graph
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import Metric, dense, norm
from lmd_hf.records import Data, Inventory, MatrixRef, Settings, Skipped
from lmd_hf.run.activations import Observed
from lmd_hf.run.batches import load_batches
from lmd_hf.run.in_data import gram_of, memory_limit, observations
from lmd_hf.run.plan import nothing_left, selector
from lmd_hf.run.taps import Tap
from lmd_hf.run.world import World
from lmd_hf.truncated.base import QUANTISED, Base
from lmd_hf.truncated.fisher import output_gradients
from lmd_hf.truncated.record import FactoredLayer
from lmd_hf.weights.stored import read_gain


DAMPING = (
    0.1  # of the mean eigenvalue, added to F: what directions weigh in which the few gradients of a sample show none
)


@dataclass(frozen=True)
class Part:
    """One module that can hold factors: the whole matrix of it (a fused projection is one), and where it is."""

    path: str
    ref: MatrixRef


@dataclass(frozen=True)
class Seen:
    """The metrics of a matrix's inputs and outputs, `None` for the identity; the mean of the inputs that theirs is
    about, `None` for zero; and the loss, in nats, that a unit of energy in these metrics stands for, if known."""

    name: str = "identity"
    inputs: Metric | None = None
    outputs: Metric | None = None
    mean: Tensor | None = None
    slope: float | None = None


@dataclass(frozen=True)
class Axes:
    """As many leading axes of a part as pay, U·Odist (O × K), S' (K) and Idist·Vᵀ (K × I), and what fewer lose."""

    part: Part
    seen: Seen
    projection: Tensor
    s_K: Tensor
    similarity: Tensor
    curve: Curve


def find_parts(base: Base, inventory: Inventory, settings: Settings) -> tuple[list[Part], list[Skipped]]:
    """The modules of the selected matrices, and what of these is left as it is, with the reason.

    Raises `SettingsError` for a bad selection and one that leaves nothing to factorise.
    """
    chosen = selector(inventory.selected, settings)
    tied = {name for pair in base.source.shared for name in pair}
    groups: dict[str, list[MatrixRef]] = {}
    for ref in inventory.selected:
        groups.setdefault(ref.name, []).append(ref)
    modules = dict(base.model.named_modules())
    parts: list[Part] = []
    left: list[Skipped] = []
    for name, refs in groups.items():
        if not any(map(chosen, refs)):
            continue
        path = name.removesuffix(".weight")
        reason = _why_not(modules.get(path), refs, tied, all(map(chosen, refs)))
        shape = refs[0].tensors[0].shape
        if reason is None:
            assert len(shape) == 2, "the weight of a linear layer"
            whole = (shape[1], shape[0]) if refs[0].transposed else (shape[0], shape[1])
            parts.append(Part(path, replace(refs[0], part="", rows=(), shape=whole)))
        else:
            left.append(Skipped(name, shape, reason))
    if not parts and not left:
        raise nothing_left(settings)
    if not parts:
        ((reason, count),) = Counter(each.reason for each in left).most_common(1)
        first = next(each.name for each in left if each.reason == reason)
        told = f"'{first}' {reason} ({count} of {len(left)} matrices)"
        raise SettingsError(f"no matrix can be factorised: {told}; see `lmd-hf plan`")
    return parts, left


def _why_not(module: nn.Module | None, refs: list[MatrixRef], tied: set[str], whole: bool) -> str | None:
    """Why a module is left as it is; `None` where it can hold factors."""
    first = refs[0]
    weight = getattr(module, "weight", None)
    if first.role == "embed":
        return "is looked up, not multiplied"
    if first.name in tied:
        return "is tied to another weight, which would stay, so nothing would be saved"
    if first.expert is not None or module is None or not isinstance(weight, Tensor) or not _is_linear(module):
        return f"is applied by no plain linear layer ({type(module).__name__ if module else 'a bare parameter'})"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"is quantised; {QUANTISED}"
    if not whole:
        names = ", ".join(ref.role for ref in refs)
        return f"is one of several in a fused projection; select all of them ({names})"
    o, i = weight.shape
    if most_axes((o, i)) < 1:
        return "is so thin that even one axis has as many parameters"
    return None


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def axes_of(base: Base, parts: Sequence[Part], metric: str, data: Data | None) -> tuple[list[Axes], list[Skipped]]:
    """The leading axes of every part in the metric asked for, of W as the model holds it, float64; and the parts of
    whose inputs the data show nothing, with the reason."""
    found: dict[str, Axes] = {}
    unseen: list[Skipped] = []
    with tqdm(total=len(parts), desc="decomposing", leave=False, delay=2, name="lmd_hf.truncate") as bar:
        for part, seen in SIGHTS[metric](base, parts, data):
            if isinstance(seen, str):
                unseen.append(Skipped(part.ref.name, part.ref.shape, seen))
            else:
                found[part.path] = _axes(base, part, seen)
            bar.update()
    if not found:
        raise SettingsError(f"the data show no input of a matrix: '{unseen[0].name}' {unseen[0].reason}")
    return [found[part.path] for part in parts if part.path in found], unseen


def _axes(base: Base, part: Part, seen: Seen) -> Axes:
    weight: Any = base.model.get_submodule(part.path).weight
    w_OI = (weight.T if part.ref.transposed else weight).detach()
    most = most_axes(part.ref.shape)
    try:
        lmd = decompose(w_OI, input_metric=seen.inputs, output_metric=seen.outputs, rank=most)
    except ValueError as error:
        raise SettingsError(f"'{part.ref.name}': {error}; leave it out (roles)") from None
    curve = Curve(part.ref.shape, (lmd.s_K**2).cpu().numpy(), lmd.error_bound**2, seen.slope)
    return Axes(
        part, seen, lmd.projection.float(), lmd.s_K, lmd.similarity.float(), curve
    )  # no larger than W in float32


Sights = Iterator[tuple[Part, Seen | str]]


def _in_identity(base: Base, parts: Sequence[Part], data: Data | None) -> Sights:
    return ((part, Seen()) for part in parts)


def _in_norm(base: Base, parts: Sequence[Part], data: Data | None) -> Sights:
    for part in parts:
        gain = read_gain(base.source, part.ref)
        yield part, Seen() if gain is None else Seen("norm", norm(gain))


def _in_data(base: Base, parts: Sequence[Part], data: Data | None, *, name: str = "data") -> Sights:
    """One part after the other, as the passes over the data see their inputs; several parts share an input."""
    assert data is not None, "checked with the settings"
    batches = load_batches(base.model, base.place, data)
    device = next(base.model.parameters()).device
    refs = [part.ref for part in parts]
    outs = {part.path: part.ref.shape[0] for part in parts}
    limit = memory_limit(device)
    gradients = output_gradients(base.model, batches, outs, whole=name == "fisher", limit=limit)
    if name == "fisher" and not gradients:
        told = f"{type(base.model).__name__} gives no logits, so no error of a layer has a known loss"
        raise SettingsError(f"{told}; take the metric 'data'")
    known = bool(gradients)
    for number, (taps, observed, _) in enumerate(
        observations(base.model, batches, refs, data, device=device, world=World())
    ):
        made: dict[tuple[str, bool], Metric | str] = {}
        for part, tap in zip(parts, taps, strict=True):
            if isinstance(tap, str):
                if number == 0:
                    yield part, tap
            elif tap.input in observed:
                key = (tap.input, tap.biased)
                if key not in made:
                    made[key] = _input_metric(observed[tap.input], tap, data)
                mean = observed[tap.input].mean if tap.biased else None
                gradient = gradients.pop(part.path, torch.zeros(())) if known else None
                yield part, _seen(name, made[key], mean, gradient)


def _input_metric(observed: Observed, tap: Tap, data: Data) -> Metric | str:
    is_graph = data.graph == "knn" and len(observed.rows) > data.neighbours
    gram = gram_of(observed, knn_graph(observed.rows, data.neighbours) if is_graph else None, tap.biased, data)
    return gram if isinstance(gram, str) else dense(gram)


def _seen(name: str, inputs: Metric | str, mean: Tensor | None, gradient: Tensor | None) -> Seen | str:
    """What is known of a part. Half the Fisher information of its outputs, F, is what their squared error costs: all of
    it as the outputs' metric, M_Y = F⁻¹, or, of a `gradient` that is a number, F = tr F/O · I."""
    if isinstance(inputs, str):
        return inputs
    if gradient is None:
        return Seen(name, inputs, mean=mean)
    if not gradient.any():
        return "no error of its outputs shows in the model's predictions"
    if gradient.ndim == 0:
        return Seen(name, inputs, mean=mean, slope=gradient.item() / 2)
    damped = gradient + DAMPING * gradient.diagonal().mean() * torch.eye(len(gradient)).to(gradient)
    fisher = dense(damped)
    assert fisher.eigenvalues is not None, "dense metrics have them"
    return Seen(name, inputs, replace(fisher, name="fisher", eigenvalues=1 / fisher.eigenvalues), mean, 0.5)


SIGHTS: dict[str, Callable[[Base, Sequence[Part], Data | None], Sights]] = {
    "identity": _in_identity,
    "norm": _in_norm,
    "data": _in_data,
    "fisher": partial(_in_data, name="fisher"),
}


def put_in(base: Base, axes: Axes, rank: int) -> FactoredLayer:
    """Exchange a module for its `rank` leading axes, rounded to the type that the model is stored in.

    About a mean x̄ of its inputs the bias becomes b + (W − W')x̄, with which the outputs' mean stays what it was: the
    error is then Σ_{i>K} s'_i², without that ‖(W − W')x̄‖² more.
    """
    part = axes.part
    module: Any = base.model.get_submodule(part.path)
    projection, s_K, similarity = axes.projection[:, :rank], axes.s_K[:rank], axes.similarity[:rank]
    bias = module.bias
    if bias is not None and axes.seen.mean is not None:
        w_OI = (module.weight.T if part.ref.transposed else module.weight).detach().double()
        mean = axes.seen.mean.to(w_OI)
        bias = bias.double() + w_OI @ mean - projection.double() @ (s_K * (similarity.double() @ mean))
    held = module.weight.dtype
    layer = LMDLinear.from_factors(projection, s_K, similarity, bias=bias, dtype=base.dtype or held)
    base.model.set_submodule(part.path, layer.to(held).train(module.training))
    return FactoredLayer(
        name=part.path,
        role=part.ref.role,
        layer=part.ref.layer,
        shape=part.ref.shape,
        rank=rank,
        energy=round(1 - float(axes.curve.left_out()[rank]), 6),
        metric=axes.seen.name,
        bias=bias is not None,
        transposed=part.ref.transposed,
    )
