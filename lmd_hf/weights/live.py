"""A module in memory, or partly elsewhere: offloaded by accelerate, or a DTensor that one process holds whole."""

import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lmd_hf.errors import NoDataError, SourceError
from lmd_hf.records import ModelIdentity, TensorRef, Weight
from lmd_hf.weights.source import dtype_name, make_identity


GATHER = (
    "save the whole model (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True "
    "gathers it) and analyse the saved folder"
)

FLAT = ("_is_flat_param", "_fsdp_flattened")  # FSDP's marks on what it has made of parameters, and on those themselves


@dataclass(frozen=True)
class Offloaded:
    """Where accelerate keeps the values of a parameter that is on the meta device: in memory or on disk."""

    weights: Mapping[str, Tensor]
    key: str

    def load(self) -> Tensor:
        """The values; from disk, a copy that nobody else holds."""
        try:
            return self.weights[self.key]
        except KeyError:
            raise NoDataError("no data: its offloading hook does not hold it; load the model again") from None

    @property
    def address(self) -> int:
        """Where the values are in memory, 0 if they are on disk."""
        held: Any = getattr(self.weights, "dataset", self.weights)
        loaded = getattr(held, "state_dict", held)  # a loader's part that is in memory
        value = loaded.get(getattr(self.weights, "prefix", "") + self.key) if isinstance(loaded, dict) else None
        return value.data_ptr() if isinstance(value, Tensor) else 0


@dataclass(frozen=True)
class LiveSource:
    """A live module. Parameters that share memory are one tensor with several names, and one that is parametrised is
    what a forward pass uses. `module` is `None` where only a part of it is looked at, such as its adapter."""

    identity: ModelIdentity
    config: dict[str, Any] | None
    module: nn.Module | None
    tensors: tuple[TensorRef, ...]
    shared: tuple[tuple[str, str], ...]
    values: dict[str, Tensor]
    offloaded: dict[str, Offloaded]
    notes: tuple[str, ...] = ()
    updates: tuple[Weight, ...] = ()

    def read(self, tensor: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
        """A view of the parameter, nothing copied; of an offloaded one what the next forward pass would load, this
        parameter alone. From Apple's GPUs, which have no float64, a copy on the CPU."""
        value = self.values[tensor.name].detach()
        if value.layout is not torch.strided:
            raise NoDataError(f"its layout is {value.layout}; make it dense first (to_dense)")
        if tensor.name in self.offloaded:
            value = self.offloaded[tensor.name].load().to(value.dtype)
        if value.is_meta:
            raise NoDataError("no data: it is on the meta device; load or materialise it first")
        part = value.reshape(tensor.shape)[start:stop] if tensor.shape else value
        return part.cpu() if part.device.type == "mps" else part


def open_live(module: nn.Module) -> LiveSource:
    """A module as a source, wherever its parameters are: on any devices, offloaded by accelerate (`cpu_offload`,
    `disk_offload`, `device_map`), or DTensors of which this process holds every entry.

    Raises `SourceError` with the remedy for parameters that are spread over processes: gathering them is a collective,
    which every process would have to enter in the same order.
    """
    config: Any = getattr(module, "config", None)
    identifier = str(getattr(config, "_name_or_path", "") or type(module).__name__)
    _refuse_flat(module, identifier)
    values: dict[str, Tensor] = {}
    offloaded: dict[str, Offloaded] = {}
    first: dict[tuple[Any, ...], str] = {}
    shared = []
    unset = []
    hooks, parametrised = _hooks(module), _parametrised(module)
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):  # extra state of a module, such as a quantiser's, is no parameter
            continue
        if is_lazy(value):
            unset.append(name)
            continue
        elsewhere = _find(name, hooks) if value.is_meta else None
        address = elsewhere.address if elsewhere else 0  # hooks give each name a tensor of its own on the meta device
        key = ("address", address) if address else _memory(value)
        value = _local(value, name, identifier)
        if part := next((prefix for prefix in parametrised if name.startswith(prefix)), None):
            name, made = parametrised[part]
            if name in values:  # another tensor that it is computed from
                continue
            key, value, elsewhere = ("object", id(made)), _computed(made), None
        if first.setdefault(key, name) != name:
            shared.append((name, first[key]))
            continue
        values[name] = value
        if elsewhere:
            offloaded[name] = elsewhere
    tensors = tuple(
        TensorRef(name, "", 0, v.numel() * v.element_size(), dtype_name(v), tuple(v.shape))
        for name, v in values.items()
    )
    raw = config.to_dict() if hasattr(config, "to_dict") else None
    identity = replace(make_identity(identifier, None, None, raw, []), architectures=(type(module).__name__,))
    notes = (f"not initialised, run a forward pass first: {', '.join(unset)}",) if unset else ()
    return LiveSource(identity, raw, module, tensors, tuple(dict(shared).items()), values, offloaded, notes)


def _memory(value: Tensor) -> tuple[Any, ...]:
    """What two names of the same entries have in common."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or not value.data_ptr():
        return "object", id(value)
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _parametrised(module: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """{beginning of the names of the tensors that a parameter is computed from: (its name, what computes it)}, but for
    weight normalisation, which is read as it is from files."""
    found = {}
    for path, child in module.named_modules(remove_duplicate=False):
        forms: Any = child.parametrizations if parametrize.is_parametrized(child) else {}
        prefix = f"{path}." if path else ""
        for name, made in forms.items():
            if not prefix or [type(step).__name__ for step in made] != ["_WeightNorm"]:
                found[f"{prefix}parametrizations.{name}."] = (prefix + name, made)
    return found


def _computed(made: nn.Module) -> Tensor:
    """The parameter that a forward pass uses. A copy computes it: in training, a spectral norm changes its state."""
    with torch.no_grad():
        value: Tensor = copy.deepcopy(made).eval()()
    return value.detach().requires_grad_(any(each.requires_grad for each in made.parameters()))


def _hooks(module: nn.Module) -> dict[str, Any]:
    """{path: the hook of accelerate there that holds offloaded values}."""
    return {path: hook for path, child in module.named_modules() for hook in _offloading(child)}


def _offloading(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    for single in getattr(hook, "hooks", (hook,)):  # several in one: SequentialHook
        if getattr(single, "weights_map", None) is not None:
            yield single


def _find(name: str, hooks: dict[str, Any]) -> Offloaded | None:
    """The values of a parameter: with the module that owns it, or with one around it that moves all of its parts."""
    owner = name.rpartition(".")[0]
    path = owner
    while True:
        hook = hooks.get(path)
        if hook is not None and (path == owner or hook.place_submodules):
            return Offloaded(hook.weights_map, name[len(path) + 1 :] if path else name)
        if not path:
            return None
        path = path.rpartition(".")[0]


def _local(value: Tensor, name: str, identifier: str) -> Tensor:
    """The parameter itself; of a DTensor what this process holds, if that is all of it."""
    if hasattr(value, "ds_id") and value.numel() == 0:  # DeepSpeed's mark, which also stays on gathered parameters
        remedy = "analyse the checkpoint that `Trainer.save_model` or `zero_to_fp32.py` writes"
        raise SourceError(f"{identifier}: DeepSpeed ZeRO-3 keeps '{name}' in parts on every process; {remedy}")
    tensors: Any = sys.modules.get("torch.distributed.tensor")  # not imported: then there is no DTensor
    if tensors is None or not isinstance(value, tensors.DTensor):
        return value
    mesh = value.device_mesh
    if not all(mesh.size(axis) == 1 or placed.is_replicate() for axis, placed in enumerate(value.placements)):
        spread = f"'{name}' is a DTensor spread over {mesh.size()} processes"
        raise SourceError(f"{identifier}: {spread}, of which each holds a part; {GATHER}")
    return value.detach().to_local().requires_grad_(value.requires_grad)


def _refuse_flat(module: nn.Module, identifier: str) -> None:
    """Also the module inside of a wrapper, which bears no mark but that of its parameters: to ask it for its state
    would gather, on every process at once or for ever."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and (
        any(isinstance(child, fsdp.FullyShardedDataParallel) for child in module.modules())
        or any(getattr(value, mark, False) for value in module.parameters() for mark in FLAT)
    ):
        raise SourceError(f"{identifier}: FSDP keeps its parameters flat, in parts on every process; {GATHER}")
