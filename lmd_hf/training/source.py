"""What of a model in training is watched: its own matrices, or the pairs of its LoRA adapter."""

from dataclasses import replace

from torch import nn

from lmd_hf.records import MatrixRef, TensorRef
from lmd_hf.weights.live import LiveSource, open_live


def open_training(model: nn.Module) -> LiveSource:
    """The module as a source. Of a model that peft has wrapped, the active adapter: each of its LoRA pairs is the
    update that it makes, and what else takes gradients is there as it is; the frozen base is left out.

    Raises `SourceError`, with the remedy, where parameters are spread over processes.
    """
    whole = open_live(model)
    config = getattr(model, "peft_config", None)
    adapter = getattr(model, "active_adapter", None)
    if not config or not isinstance(adapter, str) or adapter not in config:
        return whole
    kept = {tensor.name: _without(tensor.name, adapter) for tensor in whole.tensors if _is_trained(whole, tensor)}
    tensors = tuple(replace(tensor, name=kept[tensor.name]) for tensor in whole.tensors if tensor.name in kept)
    told = config[adapter].to_dict()
    return replace(
        whole,
        config=told | {"peft_type": getattr(told["peft_type"], "value", told["peft_type"])},
        module=None,
        tensors=tensors,
        shared=(),
        values={new: whole.values[old] for old, new in kept.items()},
        offloaded={new: whole.offloaded[old] for old, new in kept.items() if old in whole.offloaded},
    )


def takes_gradients(source: LiveSource, ref: MatrixRef) -> bool:
    """Whether training moves this matrix."""
    return any(source.values[tensor.name].requires_grad for tensor in ref.tensors)


def _is_trained(source: LiveSource, tensor: TensorRef) -> bool:
    return source.values[tensor.name].requires_grad


def _without(name: str, adapter: str) -> str:
    """The name as peft saves it: without that of the adapter, and of the wrapper around a module saved whole."""
    return name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
