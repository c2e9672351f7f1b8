"""The model class that a configuration names, without memory and weights. A configuration is the word of whoever wrote
it, and may name files, or even code, that transformers would fetch for a model: nothing of that is asked for."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from lmd_hf.weights.repository import architectures


# What building an unusual configuration raises: a missing class or package, a value it does not understand.
BUILD_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, AssertionError, OSError),
    *(ArithmeticError, MemoryError, StrictDataclassError),
)
# The keys that choose code: an implementation may be a repository of kernels, a class may be in a repository.
CODE = re.compile(r"_?(?:attn|experts)_implementation(?:_internal)?|auto_map")
OWN_CODE = ("eager", "sdpa", None)  # torch's and transformers' own
# Model types that build a `backbone` of that name by timm; others look for a repository of that name.
TIMM = (
    *("conditional_detr", "dab_detr", "deformable_detr", "detr", "omdet_turbo", "table_transformer"),
    "timm_backbone",
)
COUNTS = re.compile(r".*(?:layers?|depths?|blocks|experts|groups|stages)")  # keys that say how often modules repeat
REPEATS = 1000  # modules that cost no time worth mentioning, whatever the checkpoint holds of them


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what chooses code for a forward pass, at any depth; transformers then takes its own.
    `ValueError` if building it would look for something elsewhere: another repository, or a file."""
    for values in _dictionaries(config):
        if elsewhere := _elsewhere(values):
            raise ValueError(f"its configuration names '{elsewhere}', and nothing is fetched that is not its own")
    own: dict[str, Any] = _without_code(config)
    return own


def build(config: dict[str, Any], tensors: int) -> nn.Module:
    """The model on the meta device, for a checkpoint of so many tensors. One of `BUILD_ERRORS` if it cannot be built,
    or would be far larger than the checkpoint."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for values in _dictionaries(config):
        for key, value in values.items():
            counts = value if isinstance(value, list) else [value]
            most = max((count for count in counts if isinstance(count, (int, float))), default=0)
            if COUNTS.fullmatch(str(key)) and most > max(REPEATS, tensors):
                raise ValueError(f"{key} {most} for {tensors} tensors")
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(own_config(config))
    kind = model_class(architectures(config))
    with torch.device("meta"):
        model: nn.Module = kind(parsed) if kind else transformers.AutoModel.from_config(parsed, trust_remote_code=False)
    return model


def model_class(names: Sequence[str]) -> Any:
    """transformers' class of the first of these names; `None` where it has none, or one that is no model."""
    import transformers

    kind = getattr(transformers, names[0], None) if names else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """A configuration and all that are in it."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _dictionaries(inner)


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        kept = (key for key, inner in value.items() if inner in OWN_CODE or not CODE.fullmatch(str(key)))
        return {key: _without_code(value[key]) for key in kept}
    return [_without_code(inner) for inner in value] if isinstance(value, list) else value


def _elsewhere(values: dict[str, Any]) -> str | None:
    """What a configuration would have transformers, or timm, look for outside the model; `None` if nothing."""
    arguments, inner = values.get("model_args"), values.get("backbone_config")
    if isinstance(arguments, dict) and arguments.get("checkpoint_path"):
        return str(arguments["checkpoint_path"])
    if isinstance(inner, str):
        return inner
    backbone = values.get("backbone")
    for name in (values.get("architecture"), backbone):
        if isinstance(name, str) and ":" in name:  # timm's `hf-hub:…` and `local-dir:…`
            return name
    if inner or not isinstance(backbone, str):
        return None
    timm = values.get("use_timm_backbone", True) and not values.get("backbone_kwargs") and "/" not in backbone
    return None if timm and values.get("model_type") in TIMM else backbone
