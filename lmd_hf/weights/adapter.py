"""From tensor names to places in the network: the module tree is built without memory and asked what each tensor is."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from lmd_hf.compat import checkpoint_key_map
from lmd_hf.records import TensorRef
from lmd_hf.weights.families import Config, fact, find_role


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What building an unusual configuration raises: a missing class or package, a value it does not understand.
_BUILD_ERRORS = (
    *(ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, AssertionError, OSError),
    StrictDataclassError,
)


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes. `path` is the module's (without `.weight`); `kind` is one of `linear`, `conv1d`
    (transformers' transposed linear), `conv`, `conv_transposed`, `embedding`, `experts`, `experts_transposed`,
    `vector`, `buffer`, `ignored` (the model class drops it when loading) and `parameter` (anything else)."""

    path: str
    kind: str
    interleaved: bool = False


@dataclass(frozen=True)
class Tree:
    """What the adapter knows of a model: a place for every tensor, ties {tensor: the one it repeats}, its config."""

    places: dict[str, Place]
    ties: dict[str, str]
    config: Config
    notes: tuple[str, ...]


def read_tree(tensors: tuple[TensorRef, ...], config: dict[str, Any] | None, module: nn.Module | None) -> Tree:
    """The place of every tensor: from a live module, from the configuration's meta model, or from names alone."""
    notes: list[str] = []
    if module is None:
        module = _meta_model(config, notes)
        mapped = checkpoint_key_map(module, [t.name for t in tensors]) if module is not None else {}
    else:
        mapped = {tensor.name: (tensor.name, False) for tensor in tensors}
    if module is None:
        places = _places_by_name(tensors)
        return Tree(places, {}, Config(config), tuple(notes))
    known = _known_parameters(module)
    by_name = _places_by_name(tensors)
    ignored = [re.compile(p) for p in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    places = {}
    for tensor in tensors:
        target, merged = mapped[tensor.name]
        if merged:  # several stored tensors feed one parameter: each keeps its own name and is a plain matrix
            places[tensor.name] = by_name[tensor.name]
        elif target in known:
            places[tensor.name] = known[target]
        elif any(pattern.search(tensor.name) for pattern in ignored):
            places[tensor.name] = Place(tensor.name, "ignored")
        else:
            places[tensor.name] = by_name[tensor.name]
    unknown = sum(1 for t in tensors if mapped[t.name][0] not in known and places[t.name].kind != "ignored")
    if unknown:
        notes.append(f"{unknown} tensors are not in {type(module).__name__}; their roles are read from their names")
    values = _config_values(module, config)
    return Tree(places, _ties(module, mapped), Config(values), tuple(notes))


def _config_values(module: nn.Module, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The configuration with transformers' own defaults filled in, where the module carries one."""
    parsed: Any = getattr(module, "config", None)
    return parsed.to_dict() if hasattr(parsed, "to_dict") else config


def _meta_model(config: dict[str, Any] | None, notes: list[str]) -> nn.Module | None:
    """The model class that the configuration names, on the meta device: no memory, no weights, no remote code."""
    if config is None:
        notes.append("no config.json: roles and orientation are read from tensor names")
        return None
    model_type = config.get("model_type")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        notes.append(f"model_type '{model_type}' is unknown to transformers: roles are read from tensor names")
        return None
    import transformers

    name = (config.get("architectures") or [None])[0]
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(config)
        with torch.device("meta"):
            if name is not None and hasattr(transformers, name):
                return getattr(transformers, name)(parsed)
            return transformers.AutoModel.from_config(parsed, trust_remote_code=False)
    except _BUILD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        notes.append(f"transformers cannot build '{model_type}' ({reason}): roles are read from tensor names")
        return None


def _known_parameters(module: nn.Module) -> dict[str, Place]:
    """{parameter or buffer name: its place} for a whole module tree."""
    result = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            result[prefix + name] = _place(path, name, child, parameter)
        for name, _ in child.named_buffers(recurse=False, remove_duplicate=False):
            result[prefix + name] = Place(prefix + name, "buffer")
    return result


def _place(path: str, name: str, owner: nn.Module, parameter: nn.Parameter) -> Place:
    full = f"{path}.{name}" if path else name
    if name.endswith("bias") or (sum(size > 1 for size in parameter.shape) < 2 and parameter.ndim != 2):
        return Place(full, "vector")
    if isinstance(owner, nn.Embedding):
        return Place(path, "embedding")
    if isinstance(owner, CONVOLUTIONS):
        return Place(path, "conv")
    if isinstance(owner, TRANSPOSED_CONVOLUTIONS):
        return Place(path, "conv_transposed")
    if type(owner).__name__ == "Conv1D":
        return Place(path, "conv1d")
    if parameter.ndim == 3 and re.search(r"(?:^|\.)experts$", path):
        kind = "experts_transposed" if getattr(owner, "is_transposed", False) else "experts"
        return Place(full, kind, interleaved=not getattr(owner, "is_concatenated", True))
    if parameter.ndim == 2 and name == "weight":  # nn.Linear, and routers that hold a weight of their own
        return Place(path, "linear")
    if parameter.ndim == 2 and name == "in_proj_weight":
        return Place(full, "linear")
    return Place(full, "parameter")


def _ties(module: nn.Module, mapped: dict[str, tuple[str, bool]]) -> dict[str, str]:
    """{name of a tied tensor: stored name of the one it repeats}; the tied one may be stored or not."""
    stored = {target: name for name, (target, merged) in mapped.items() if not merged}
    groups: dict[str, list[str]] = {}
    for target, source in (getattr(module, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, [source]).append(target)
    result: dict[str, str] = {}
    for members in groups.values():
        keeper = next((name for name in members if name in stored), None)  # tying is symmetric: any name may be kept
        if keeper is not None:
            result |= {stored.get(name, name): stored[keeper] for name in members if name != keeper}
    return result


# --- names alone -------------------------------------------------------------------------------------------------


def _places_by_name(tensors: tuple[TensorRef, ...]) -> dict[str, Place]:
    """Places guessed from names and shapes; a bias beside a matrix tells which of its axes is the output."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    transposed = _transposed_leaves(shapes)
    return {tensor.name: _guess(tensor, transposed) for tensor in tensors}


def _transposed_leaves(shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Last module names (`c_fc` …) whose weights are stored (in, out): their bias is as long as the second axis."""
    result = set()
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('weight')}bias")
        if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1] and bias == (shape[1],):
            result.add(name.split(".")[-2])
    return result


def _guess(tensor: TensorRef, transposed: set[str]) -> Place:
    path = tensor.name.removesuffix(".weight")
    leaf = path.rsplit(".", 1)[-1]
    wide = sum(size > 1 for size in tensor.shape)
    if tensor.name.endswith("bias") or len(tensor.shape) < 2 or (len(tensor.shape) > 2 and wide < 2):
        return Place(tensor.name, "vector")
    if tensor.dtype == "BOOL" or (tensor.dtype[0] in "IU" and len(tensor.shape) != 2):
        return Place(tensor.name, "buffer")
    role = find_role(path)
    if (role is not None and role.role == "embed") or re.search(fact("looked_up"), path):
        return Place(path, "embedding" if len(tensor.shape) == 2 else "parameter")
    if len(tensor.shape) == 2:
        return Place(path, "conv1d" if leaf in transposed else "linear")
    if re.search(r"(?:^|\.)experts\.\w+$", path):
        return Place(path, "parameter")
    return Place(path, "conv" if re.search("conv|patch_embed|projection", path) else "parameter")
