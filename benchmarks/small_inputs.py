"""Dummy inputs for the forward pass of any model of transformers, from its signature and configuration."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lmd_hf.weights.adapter import BUILD_ERRORS


RUN_ERRORS = (*BUILD_ERRORS, IndexError, ZeroDivisionError, NotImplementedError, UnboundLocalError)
Inputs = dict[str, Any]
TEXT = ("input_ids", "decoder_input_ids")
MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "hidden_states", "past_values",
         "audio_values", "inputs", "flattened_patches", "input_points")  # fmt: skip
RUNS = 3  # sets of inputs that run, at most


def whole(model: Any) -> Iterator[Inputs]:
    """Sets of inputs with which a model runs; the fullest first."""
    names = inspect.signature(model.forward).parameters
    count = 0
    for inputs in itertools.islice(candidates(model, names), 40):
        if runs(model, inputs):
            count += 1
            yield inputs
            if count == RUNS:
                return


def runs(module: nn.Module, inputs: Inputs, flow: Tensor | None = None) -> bool:
    """Whether the module takes these inputs, and what comes out has the form of `flow` but for its width."""
    torch.manual_seed(2)
    try:
        with torch.no_grad():
            output = module(**inputs)
    except RUN_ERRORS:
        return False
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return flow is None or (isinstance(first, Tensor) and first.shape[:-1] == flow.shape[:-1])


def candidates(model: Any, names: Any) -> Iterator[Inputs]:
    """What might be accepted."""
    config = model.config
    text: Inputs = {}
    extra: Inputs = {"use_cache": False} if "use_cache" in names else {}
    for name in TEXT:
        if name in names:
            text[name] = tokens(config, 9)
    for name, value in more(config).items():
        if name in names:
            extra[name] = value
    media = {name: list(values(name, config)) for name in MEDIA if name in names}
    media = {name: found for name, found in media.items() if found}
    main = getattr(model, "main_input_name", "")
    if isinstance(main, str) and main in media:
        media = {main: media[main], **media}
    for chosen in itertools.product(*media.values()):
        yield {**text, **dict(zip(media, chosen, strict=True)), **extra}
    if media:
        for name, found in media.items():
            for value in found:
                if text:
                    yield {**text, name: value, **extra}
                yield {name: value, **extra}
    if text:
        yield {**text, **extra}
        yield {name: value for name, value in text.items() if name == "input_ids"} | extra
    if "inputs_embeds" in names:
        yield {"inputs_embeds": noise(1, 9, setting(config, 64, "hidden_size", "d_model", "n_embd")), **extra}


def setting(config: Any, default: Any, *names: str) -> Any:
    """The first of these settings, in the configuration or in one inside it."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    for source in (config, *inner):
        for name in names:
            if (found := getattr(source, name, None)) is not None:
                return found
    return default


def noise(*shape: int) -> Tensor:
    """Fixed random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def tokens(config: Any, count: int) -> Tensor:
    """Distinct small token numbers that stand for nothing special, then the end."""
    size = setting(config, 100, "vocab_size", "n_words")
    ids = torch.arange(20, 20 + count) % max(int(size) - 1, 1)
    end = setting(config, None, "eos_token_id")
    if isinstance(end, int) and 0 <= end < size:
        ids[-1] = end
    return ids[None]


def more(config: Any) -> Inputs:
    """Small inputs of a fixed form."""
    return {
        "bbox": torch.zeros(1, 9, 4, dtype=torch.long),
        "codebook_idx": 2,
        "grid_thw": torch.tensor([[1, 4, 4]]),
        "visual_feats": noise(1, 4, setting(config, 8, "visual_feat_dim", "visual_embedding_dim")),
        "visual_pos": noise(1, 4, setting(config, 4, "visual_pos_dim")),
    }


def pair(value: Any) -> tuple[int, int]:
    """Height and width."""
    if isinstance(value, dict):
        value = [value.get("height", 224), value.get("width", 224)]
    return (value[0], value[-1]) if isinstance(value, (list, tuple)) else (value, value)


def values(name: str, config: Any) -> Iterator[Tensor]:
    """Inputs that are no text, in the shapes that are usual."""
    if name in ("pixel_values", "pixel_values_videos", "inputs"):
        channels = setting(config, 3, "num_channels", "in_channels", "in_chans")
        vision = getattr(config, "vision_config", None) or config
        size = setting(vision, None, "image_size", "img_size", "input_size")
        sizes = [pair(size)] if size else []
        frames = setting(config, 2, "num_frames", "frames")
        for height, width in dict.fromkeys([*sizes, (64, 64), (224, 224)]):
            if height * width > 600 * 600:
                continue
            if name != "pixel_values_videos":
                yield noise(1, channels, height, width)
            yield noise(1, frames, channels, height, width)
            yield noise(1, channels, frames, height, width)
    elif name in ("input_features", "audio_values"):
        mel = setting(config, 80, "num_mel_bins", "feature_size", "input_feat_per_channel", "mel_bins",
                      "feature_projection_input_dim", "input_dim", "n_mels", "input_size")  # fmt: skip
        length = setting(config, 64, "max_source_positions")
        yield noise(1, mel, 2 * length if length > 64 else 128)
        yield noise(1, 128, mel)
        yield noise(1, 1, 1001, mel)
        yield noise(1, 1, 4000)
    elif name == "input_values":
        yield noise(1, 4000)
        yield noise(1, 1, 4000)
        yield noise(1, setting(config, 1024, "max_length"), setting(config, 128, "num_mel_bins"))
        yield noise(1, 50, setting(config, 80, "num_mel_bins"))
    elif name == "hidden_states":
        patch, frames = pair(setting(config, 14, "patch_size"))[0], setting(config, 1, "temporal_patch_size")
        yield noise(16, setting(config, 3, "in_channels", "in_chans", "num_channels") * frames * patch * patch)
    elif name == "flattened_patches":
        patch = pair(setting(config, 16, "patch_size"))[0]
        yield torch.cat([torch.arange(8.0).reshape(1, 8, 1).repeat(1, 1, 2), noise(1, 8, patch * patch * 3)], -1)
    elif name == "past_values":
        length = setting(config, 24, "context_length")
        yield noise(1, length, setting(config, 1, "num_input_channels", "input_size"))
        yield noise(1, length)


def alone(module: nn.Module) -> Iterator[Inputs]:
    """Inputs for a layer or a part of it: hidden states of the width of its first matrix."""
    widths = []
    for child in module.modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            widths += [weight.shape[1], weight.shape[0]]
        elif isinstance(weight, Tensor) and weight.ndim == 1:
            widths.append(weight.shape[0])
    parameters = inspect.signature(module.forward).parameters
    asked = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    size = next((child.head_dim for child in module.modules() if isinstance(getattr(child, "head_dim", None), int)), 0)
    turns = noise(1, 8, size or 2)
    for width in list(dict.fromkeys(widths))[:4]:
        for shape in ((1, 8, width), (8, width), (1, 4, 4, width)):
            if len(shape) != 2 and "cu_seqlens" in parameters:
                continue
            flow = noise(*shape)
            inputs: Inputs = {}
            for place, name in enumerate(asked):
                if place == 0 or name in ("encoder_hidden_states", "key_value_states", "key", "value", "query"):
                    inputs[name] = flow
                elif name in ("position_embeddings", "rotary_pos_emb"):
                    inputs[name] = (turns.cos(), turns.sin())
                elif name == "cu_seqlens":
                    inputs[name] = torch.tensor([0, 8], dtype=torch.int32)
                else:
                    inputs[name] = None
            if "position_embeddings" in parameters and size:
                inputs["position_embeddings"] = (turns.cos(), turns.sin())
            if "encoder_hidden_states" in parameters:
                inputs["encoder_hidden_states"] = flow
            if runs(module, inputs, flow):
                yield inputs
