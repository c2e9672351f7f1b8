"""From tensor names to places in the network: the module tree is built without memory and asked what each tensor is."""

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lmd_hf.compat import Target, checkpoint_key_map, unreachable_errors
from lmd_hf.errors import first_line
from lmd_hf.records import Weight
from lmd_hf.weights.families import Config, activation_classes, fact, family_fact, find_container, find_flat, find_role
from lmd_hf.weights.lora import is_adapter
from lmd_hf.weights.skeleton import BUILD_ERRORS, build


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# The tensor, of those that a weight is computed from, that has its shape.
_MADE = re.compile(r"^(.*?)\.?(?:parametrizations\.weight\.original1?|weight_v|weight_orig)$")


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes. `path` is the module's (without `.weight`); `kind` is one of `linear`, `conv1d`
    (transformers' transposed linear), `conv`, `conv_transposed`, `embedding`, `experts`, `experts_transposed`, `flat`,
    `flat_transposed` (three axes that are one matrix), `vector`, `buffer`, `ignored` (the model class drops it when
    loading), `piece` (of a weight in a format that is not known; `path` is its module's) and `parameter` (anything
    else). `inside` is the word for the class of the module that holds it:
    `attention`, `mlp` …, "" if that says nothing. `pieces` are the paths that transformers cuts it into along its first
    axis. `module` is where it ends up, if its own name does not say so. `activation` is transformers' name of the one
    activation among the modules around it, "" where there is none, or where there are several."""

    path: str
    kind: str
    interleaved: bool = False
    inside: str = ""
    pieces: tuple[str, ...] = ()
    module: str = ""
    activation: str = ""


@dataclass(frozen=True)
class Tree:
    """What the adapter knows of a model: a place for every tensor, ties {tensor: the one it repeats}, its config."""

    places: dict[str, Place]
    ties: dict[str, str]
    config: Config
    notes: tuple[str, ...]


def read_tree(weights: tuple[Weight, ...], config: dict[str, Any] | None, module: nn.Module | None) -> Tree:
    """The place of every tensor: from a live module, from the configuration's meta model, or from names alone."""
    notes: list[str] = []
    if module is None:
        module = _meta_model(config, len(weights), notes)
        mapped = checkpoint_key_map(module, [w.name for w in weights]) if module is not None else {}
    else:
        mapped = {weight.name: Target(weight.name) for weight in weights}
    if module is None:
        places = places_by_name(weights)
        return Tree(places, {}, Config(config), tuple(notes))
    values = _config_values(module, config)
    known = _known_parameters(module, Config(values))
    by_name = places_by_name(weights)
    ignored = [re.compile(p) for p in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    places = {}
    quantised = bool(values and (values.get("quantization_config") or values.get("compression_config")))
    read = {_owner(mapped[w.name].name, known) for w in weights if w.format != "plain" or _is_matrix(w, mapped, known)}
    for weight in weights:
        target = mapped[weight.name]
        if target.converted:
            places[weight.name] = _converted(weight, by_name[weight.name], target, known, module)
        elif target.name in known:
            places[weight.name] = known[target.name]
        elif any(pattern.search(weight.name) for pattern in ignored):
            places[weight.name] = Place(weight.name, "ignored")
        else:
            places[weight.name] = by_name[weight.name]
            owner = _owner(target.name, known) if quantised and weight.format == "plain" else None
            if owner is not None and owner not in read and places[weight.name].kind != "vector":
                places[weight.name] = Place(owner, "piece")
    companions = {tensor.name for weight in weights for tensor in weight.tensors[1:]}
    unknown = {w.name for w in weights if mapped[w.name].name not in known and places[w.name].kind != "ignored"}
    unknown = {name for name in unknown - companions if name.rpartition(".")[2] not in fact("companions")}
    if unknown:
        notes.append(
            f"{len(unknown)} tensors are not in {type(module).__name__}; their roles are read from their names"
        )
    return Tree(places, _ties(module, mapped), Config(values), tuple(notes))


def _config_values(module: nn.Module, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The configuration with transformers' own defaults filled in, where the module carries one."""
    parsed: Any = getattr(module, "config", None)
    return parsed.to_dict() if hasattr(parsed, "to_dict") else config


def _meta_model(config: dict[str, Any] | None, tensors: int, notes: list[str]) -> nn.Module | None:
    """The model class that the configuration names, on the meta device: no memory, no weights, no remote code."""
    if is_adapter(config):
        return None
    if config is None:
        notes.append("no config.json: roles and orientation are read from tensor names")
        return None
    model_type = config.get("model_type")
    if model_type is None:
        notes.append("its configuration names no model_type: roles and orientation are read from tensor names")
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        notes.append(f"model_type '{model_type}' is unknown to transformers: roles are read from tensor names")
        return None
    try:
        return build(config, tensors)
    except (*BUILD_ERRORS, *unreachable_errors()) as error:  # a default of an old transformers asks the Hub
        told = f"transformers cannot build '{model_type}' ({first_line(error)})"
        notes.append(f"{told}: roles are read from tensor names")
        return None


def _known_parameters(module: nn.Module, config: Config) -> dict[str, Place]:
    """{parameter or buffer name: its place} for a whole module tree."""
    result = {}
    classes = dict(module.named_modules())
    activations = _activations(classes)
    for path, child in classes.items():
        prefix = f"{path}." if path else ""
        inside, activation = _inside(path, classes), _activation(path, activations)
        for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            if is_lazy(parameter):
                continue
            place = _place(path, name, child, parameter, config)
            result[prefix + name] = replace(place, inside=inside, activation=activation)
            if whole := _MADE.match(prefix + name):
                owner = whole.group(1)
                place = _place(owner, "weight", classes[owner], parameter, config)
                inside, activation = _inside(owner, classes), _activation(owner, activations)
                result[f"{owner}.weight".lstrip(".")] = replace(place, inside=inside, activation=activation)
        for name, _ in child.named_buffers(recurse=False, remove_duplicate=False):
            result[prefix + name] = Place(prefix + name, "buffer")
    return result


def _is_matrix(weight: Weight, mapped: dict[str, Target], known: dict[str, Place]) -> bool:
    """Whether a tensor is a parameter of the model as it is."""
    place = known.get(mapped[weight.name].name)
    return place is not None and place.kind != "vector" and weight.dtype.startswith(("F", "BF"))


def _owner(name: str, known: dict[str, Place]) -> str | None:
    """The module with a weight that a tensor lies in, by its name."""
    while name:
        name = name.rpartition(".")[0]
        if f"{name}.weight" in known:
            return name
    return None


def _inside(path: str, modules: dict[str, nn.Module]) -> str:
    """What holds the module at `path`: its own class's word if it is a container itself, else that of the module
    around it, looking through lists and through the output halves that BERT makes modules of."""
    while True:
        owner = modules[path]
        name = type(owner).__name__
        if word := find_container(name):
            return word
        bare = not any(owner.children()) or isinstance(owner, (nn.ModuleList, nn.Sequential))
        if not path or not (bare or name.endswith("Output")):
            return ""
        path = path.rpartition(".")[0]


def _activations(modules: dict[str, nn.Module]) -> dict[str, set[str]]:
    """{path of a module: names of the activations in it, or in what it holds}."""
    found: dict[str, set[str]] = {}
    for path, module in modules.items():
        tanh = "Tanh" if getattr(module, "approximate", None) == "tanh" else ""
        if name := activation_classes().get(type(module).__name__ + tanh):
            for around in _around(path)[1:]:
                found.setdefault(around, set()).add(name)
    return found


def _activation(path: str, activations: dict[str, set[str]]) -> str:
    """The one activation of the nearest module around `path` that has any."""
    names = next((activations[around] for around in _around(path) if around in activations), set())
    return next(iter(names)) if len(names) == 1 else ""


def _around(path: str) -> list[str]:
    """A module and the two around it, without the whole model."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), max(len(parts) - 3, 0), -1)]


def _place(path: str, name: str, owner: nn.Module, parameter: nn.Parameter, config: Config) -> Place:
    full = f"{path}.{name}" if path else name
    if "bias" in name.rsplit("_", 1)[-1] or (sum(size > 1 for size in parameter.shape) < 2 and parameter.ndim != 2):
        return Place(full, "vector")
    if isinstance(owner, nn.Embedding):
        return Place(path, "embedding")
    if isinstance(owner, CONVOLUTIONS):
        return Place(path, "conv")
    if isinstance(owner, TRANSPOSED_CONVOLUTIONS):
        return Place(path, "conv_transposed")
    if type(owner).__name__.removeprefix("Parametrized") == "Conv1D":
        return Place(path, "conv1d")
    if parameter.ndim == 3 and find_container(type(owner).__name__) == "experts":
        turned = getattr(owner, "is_transposed", False) or family_fact("experts_transposed", config)
        stem = path if name == "weight" else full
        return Place(stem, "experts_transposed" if turned else "experts", not getattr(owner, "is_concatenated", True))
    if parameter.ndim == 3 and (turned := find_flat(full, config)) is not None:
        return Place(full, "flat_transposed" if turned else "flat")
    if parameter.ndim == 2 and name == "weight":  # nn.Linear, and routers that hold a weight of their own
        return Place(path, "linear")
    if parameter.ndim == 2 and name == "in_proj_weight":
        return Place(full, "linear")
    return Place(full, "parameter")


def _converted(weight: Weight, guess: Place, target: Target, known: dict[str, Place], module: nn.Module) -> Place:
    """The place of a tensor that transformers merges, cuts or turns while loading: it keeps its own name.

    Stacked experts stay stacked; where the last two axes differ from the module's, they are turned on disk.
    """
    if target.pieces and guess.kind == "linear":
        return replace(guess, pieces=target.pieces, module=target.name)
    if target.name not in known:
        return guess
    place = known[target.name]
    if len(weight.shape) == 3 and place.kind.startswith("experts"):
        own = tuple(module.get_parameter(target.name).shape)
        on_disk = tuple(weight.shape) != own and weight.shape[1:] == own[:0:-1]
        turned = (place.kind == "experts_transposed") != on_disk
        guess = replace(place, path=guess.path, kind="experts_transposed" if turned else "experts")
    return replace(guess, inside=place.inside, module=target.name, activation=place.activation)


def _ties(module: nn.Module, mapped: dict[str, Target]) -> dict[str, str]:
    """{name of a tied tensor: stored name of the one it repeats}; the tied one may be stored or not."""
    stored = {target.name: name for name, target in mapped.items() if not target.converted}
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


def places_by_name(weights: tuple[Weight, ...]) -> dict[str, Place]:
    """Places guessed from names and shapes; a bias beside a matrix tells which of its axes is the output."""
    shapes = {weight.name: weight.shape for weight in weights}
    transposed = _transposed_leaves(shapes)
    return {weight.name: _guess(weight, transposed) for weight in weights}


def _transposed_leaves(shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Last module names (`c_fc` …) whose weights are stored (in, out): their bias is as long as the second axis."""
    result = set()
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('weight')}bias")
        if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1] and bias == (shape[1],):
            result.add(name.split(".")[-2])
    return result


def _guess(weight: Weight, transposed: set[str]) -> Place:
    path = weight.name.removesuffix(".weight")
    if weight.low_rank is not None:  # an update is (out, in), however the base stores its matrix
        return Place(path, "experts" if len(weight.shape) == 3 else "linear")
    leaf = path.rsplit(".", 1)[-1]
    wide = sum(size > 1 for size in weight.shape)
    if weight.name.endswith("bias") or len(weight.shape) < 2 or (len(weight.shape) > 2 and wide < 2):
        return Place(weight.name, "vector")
    if weight.dtype == "BOOL" or (weight.dtype[0] in "IU" and (len(weight.shape) != 2 or wide < 2)):
        return Place(weight.name, "buffer")
    role = find_role(path)
    if (role is not None and role.role == "embed") or re.search(fact("looked_up"), path):
        return Place(path, "embedding" if len(weight.shape) == 2 else "parameter")
    if len(weight.shape) == 2:
        return Place(path, "conv1d" if leaf in transposed else "linear")
    if re.search(r"(?:^|\.)experts\.\w+$", path):
        return Place(path, "experts" if weight.tensors[0].file.endswith(".gguf") else "parameter")
    return Place(path, "conv" if re.search("conv|patch_embed|projection", path) else "parameter")
