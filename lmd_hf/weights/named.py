"""Models whose names tell everything: their places are known at once, without importing transformers for seconds."""

import re
from typing import Any

from torch import nn

from lmd_hf.records import Weight
from lmd_hf.weights.adapter import Tree, places_by_name, read_tree
from lmd_hf.weights.families import Config, find_names
from lmd_hf.weights.formats import list_weights
from lmd_hf.weights.repository import architectures
from lmd_hf.weights.source import Source


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def find_tree(weights: tuple[Weight, ...], config: dict[str, Any] | None, module: nn.Module | None) -> Tree:
    """The place of every tensor: from names where they tell all, else as `read_tree` finds it. The two agree, by test,
    for every model type of the table."""
    if module is not None or not is_named(weights, config):
        return read_tree(weights, config, module)
    ties = {HEAD: EMBEDDING} if (config or {})["tie_word_embeddings"] else {}
    return Tree(places_by_name(weights), ties, Config(config), ())


def names_tell_all(source: Source) -> bool:
    """Whether listing the matrices of a source needs no import that takes time."""
    return is_named(list_weights(source.tensors, source.config, source.read), source.config)


def is_named(weights: tuple[Weight, ...], config: dict[str, Any] | None) -> bool:
    """Whether a model type of the table, a whole one and stored plainly, says by its names what each tensor is.

    The configuration must state itself what transformers would fill in (ties, activation), and agree with the tensors
    in width and layers; no other name may be there.
    """
    values = config or {}
    names = find_names(values.get("model_type"))
    kind = next(iter(architectures(config)), "")
    if names is None or not kind.endswith("ForCausalLM") or any(values.get(key) is None for key in names.needs):
        return False
    if not all(weight.format == "plain" and names.pattern.fullmatch(weight.name) for weight in weights):
        return False
    layers = {found[1] for weight in weights if (found := re.match(r"model\.layers\.(\d+)\.", weight.name))}
    widths = {weight.shape[-1] for weight in weights if weight.name == EMBEDDING}
    numbered = len(layers) == values.get("num_hidden_layers") and layers == {str(n) for n in range(len(layers))}
    return numbered and list(widths) == [values.get("hidden_size")]
