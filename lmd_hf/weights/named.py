"""Models whose names tell everything: their places are known at once, without importing transformers for seconds."""

from typing import Any

from torch import nn

from lmd_hf.records import Weight
from lmd_hf.weights.adapter import Tree, places_by_name, read_tree
from lmd_hf.weights.families import Config, Names, find_names
from lmd_hf.weights.formats import list_weights
from lmd_hf.weights.repository import architectures
from lmd_hf.weights.source import Source


def find_tree(weights: tuple[Weight, ...], config: dict[str, Any] | None, module: nn.Module | None) -> Tree:
    """The place of every tensor: from names where they tell all, else as `read_tree` finds it. The two agree, by test,
    for every model type of the table."""
    names = None if module is not None else _names(weights, config)
    if names is None:
        return read_tree(weights, config, module)
    is_tied = names.head and (config or {})["tie_word_embeddings"]
    return Tree(places_by_name(weights), {names.head: names.embedding} if is_tied else {}, Config(config), ())


def names_tell_all(source: Source) -> bool:
    """Whether listing the matrices of a source needs no import that takes time."""
    return is_named(list_weights(source.tensors, source.config, source.read), source.config)


def is_named(weights: tuple[Weight, ...], config: dict[str, Any] | None) -> bool:
    """Whether a model type of the table, a whole one and stored plainly, says by its names what each tensor is.

    The configuration must state itself what transformers would fill in (ties, activation, what attention heads are
    like), and agree with the tensors in width and layers; no other name may be there.
    """
    return _names(weights, config) is not None


def _names(weights: tuple[Weight, ...], config: dict[str, Any] | None) -> Names | None:
    values = config or {}
    model_type, kind = values.get("model_type"), next(iter(architectures(config)), "")
    names = find_names(model_type) if isinstance(model_type, str) else None
    if names is None or not kind.endswith(names.ending):
        return None
    if any(all(values.get(key) is None for key in either.split("|")) for either in names.needs):
        return None
    if not all(weight.format == "plain" and names.pattern.fullmatch(weight.name) for weight in weights):
        return None
    layers = {found[1] for weight in weights if (found := names.layer.match(weight.name))}
    widths = {weight.shape[-1] for weight in weights if weight.name == names.embedding}
    numbered = len(layers) == values.get("num_hidden_layers") and layers == {str(n) for n in range(len(layers))}
    return names if numbered and list(widths) == [values.get("hidden_size")] else None
