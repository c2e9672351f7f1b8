"""The model that is to be truncated: opened, checked, and what of its repository stays with it."""

import copy
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from lmd_hf.errors import SettingsError
from lmd_hf.layers.linear import LMDLinear
from lmd_hf.run.asked import check_model
from lmd_hf.run.loading import Origin, load_model, origin
from lmd_hf.weights.answers import told
from lmd_hf.weights.live import open_live
from lmd_hf.weights.source import TORCH_DTYPES, FileSource, Source, open_source


# what a tokenizer or a processor of transformers needs, and the card with its licence
COMPANIONS = (
    "tokenizer*", "*.tokenizer", "audio_tokenizer_config.json", "vocab*", "*_vocab.json", "merges.txt", "*.codes",
    "dict.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "normalizer.json", "emoji.json", "byte_maps.json",
    "word_shape.json", "word_pronunciation.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "generation_config.json", "README.md",
)  # fmt: skip
MERGE = "merge it (peft's merge_and_unload) and truncate what that gives"
QUANTISED = "truncate the model in its full precision, and quantise what that gives"


@dataclass(frozen=True)
class Base:
    """A model in memory, whose structure is ours to change (the parameters may be shared with the caller's), as a live
    `source`; the `dtype` that it is stored in, `None` for what the caller has in memory; where its tokenizer is; and
    the companions of its weights, {name: bytes}."""

    model: nn.Module
    source: Source
    name: str
    commit: str | None
    place: Origin
    dtype: torch.dtype | None = None
    companions: dict[str, bytes] = field(default_factory=dict, repr=False)


def open_base(model: str | Path | nn.Module, **where: Any) -> Base:
    """A live module (of which the structure is copied, not the parameters), or a Hub id or a folder, loaded by
    transformers without remote code.

    Raises `SourceError` where it cannot be loaded, `SettingsError` for models in the hands of peft, for quantised and
    for offloaded ones.
    """
    if isinstance(model, nn.Module):
        _check(model)
        source = open_live(model)
        copied = sharing(model)
        return Base(copied, open_live(copied), public_name(source.identity.id), None, origin(source))
    check_model(model, revision=where.get("revision"))
    stored = open_source(model, **where)
    place = origin(stored)
    if method := quantisation(stored.config):
        raise SettingsError(f"{stored.identity.id}: quantised ('{method}'); {QUANTISED}")
    loaded = load_model(stored, place)
    _check(loaded)
    companions = _companions(stored, place)
    name, commit = public_name(stored.identity.id), stored.identity.commit
    return Base(loaded, open_live(loaded), name, commit, place, _stored_dtype(stored), companions)


def public_name(identifier: str) -> str:
    """A Hub id as it is; of a place on this machine, which concerns nobody else, the last part."""
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", identifier) is not None
    return identifier if is_hub_id and not Path(identifier).exists() else Path(identifier).resolve().name


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters and buffers."""
    held = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=held)


def quantisation(config: dict[str, Any] | None) -> str | None:
    """The method that a configuration says the weights are quantised by."""
    asked: Any = (config or {}).get("quantization_config")
    return str(asked.get("quant_method", "unknown")) if isinstance(asked, dict) else None


def read_companions(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of what is beside the weights in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in COMPANIONS
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if any(type(each).__module__.partition(".")[0] == "peft" for each in model.modules()):
        raise SettingsError(f"{name}: peft has put adapters into it; {MERGE}")
    if any(isinstance(each, LMDLinear) for each in model.modules()):
        raise SettingsError(f"{name}: some of its layers hold factors already; merge() it and truncate what that gives")
    config: Any = getattr(model, "config", None)
    if config is not None and (method := quantisation(config.to_dict() if hasattr(config, "to_dict") else None)):
        raise SettingsError(f"{name}: quantised ('{method}'); {QUANTISED}")
    if any(each.is_meta for each in model.parameters()):
        raise SettingsError(f"{name}: some of its parameters are on the meta device or offloaded; load it whole")


def _stored_dtype(source: Source) -> torch.dtype | None:
    """The type of most of the stored numbers: what transformers calls the model's."""
    sizes: Counter[str] = Counter()
    for tensor in source.tensors:
        sizes[tensor.dtype] += tensor.stop - tensor.start
    return TORCH_DTYPES.get(sizes.most_common(1)[0][0])


def _companions(source: Source, place: Origin) -> dict[str, bytes]:
    if source.identity.commit is None or not isinstance(source, FileSource):
        return read_companions(Path(place.name))
    asked, subfolder = {"revision": source.identity.commit, "token": source.token}, source.identity.subfolder
    patterns = [f"{subfolder}/{each}" if subfolder else each for each in COMPANIONS]
    folder = told(place.name, lambda: snapshot_download(place.name, allow_patterns=patterns, **asked))
    return read_companions(Path(folder) / subfolder)
