"""What of a model in training is watched: its own matrices, or the pairs of its LoRA adapters."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from lmd_hf.records import MatrixRef
from lmd_hf.weights.live import LiveSource, open_live


def open_training(model: nn.Module) -> tuple[LiveSource, ...]:
    """The module as a source, or one source for each active adapter that peft or transformers' `add_adapter` has put
    in: its LoRA pairs are the updates that it makes. What else takes gradients is in the first as it is; the frozen
    base is left out. A second adapter's name goes before those of its own: `b:model.layers.0 …`.

    Raises `SourceError`, with the remedy, where parameters are spread over processes.
    """
    whole = open_live(model)
    configs = getattr(model, "peft_config", None) or {}
    active = [name for name in _active(model) if name in configs]
    if not active:
        return (whole,)
    first = next(iter(configs))
    holders = {"modules_to_save", "prompt_encoder"}.union(*(_holders(module) for module in model.modules()))
    kept: dict[str, dict[str, str]] = {adapter: {} for adapter in active}  # {adapter: {name: the one it gets}}
    for name, value in whole.values.items():
        owner, saved = _split(name, holders, configs)
        if owner in kept:
            kept[owner][name] = saved if owner == first else f"{owner}:{saved}"
        elif owner is None and value.requires_grad:
            kept[active[0]][name] = saved
    return tuple(_part(whole, kept[adapter], configs[adapter].to_dict()) for adapter in active)


def takes_gradients(source: LiveSource, ref: MatrixRef) -> bool:
    """Whether training moves this matrix."""
    return any(source.values[tensor.name].requires_grad for tensor in ref.tensors)


def _holders(module: nn.Module) -> tuple[str, ...]:
    """The attributes of peft's layer that hold one entry for each adapter: `lora_A`, `lora_B` …; of others none."""
    return tuple(getattr(module, "adapter_layer_names", ()))


def _active(model: nn.Module) -> list[str]:
    """The adapters that some layer applies; where no layer has any (prompt tuning), that of the whole model."""
    layers: list[Any] = [module for module in model.modules() if _holders(module)]
    found = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    whole = getattr(model, "active_adapter", None)
    return list(found) or ([whole] if isinstance(whole, str) else [])


def _split(name: str, holders: set[str], adapters: Iterable[str]) -> tuple[str | None, str]:
    """The adapter that a parameter belongs to, and its name as peft saves it: without that of the adapter, and of the
    wrapper around a module saved whole."""
    steps = name.split(".")
    for i, (holder, adapter) in enumerate(pairwise(steps)):
        if holder in holders and adapter in adapters:
            before = steps[:i] if holder == "modules_to_save" else steps[: i + 1]
            return adapter, ".".join([*before, *steps[i + 2 :]])
    return None, name


def _part(whole: LiveSource, kept: dict[str, str], told: dict[str, Any]) -> LiveSource:
    """These tensors alone, renamed, as an adapter with this configuration."""
    return replace(
        whole,
        config=told | {"peft_type": getattr(told["peft_type"], "value", told["peft_type"])},
        module=None,
        tensors=tuple(replace(tensor, name=kept[tensor.name]) for tensor in whole.tensors if tensor.name in kept),
        shared=(),
        values={new: whole.values[old] for old, new in kept.items()},
        offloaded={new: whole.offloaded[old] for old, new in kept.items() if old in whole.offloaded},
    )
