"""Any model type of transformers in small: its default configuration with every width divided by one number.

Widths hang together (hidden = heads × head_dim, the projector's input is the tower's output …), mostly by products with
counts. So all widths are divided by the same `scale` and counts of heads stay; stacks are cut to a few layers, at least
one of each kind; vocabularies and experts are cut by themselves. What does not build with one scale is tried with a
smaller one. The rules look at names of settings, not at model types; a few types need a setting that has no default.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmd_hf.compat import run_experts_on_cpu
from lmd_hf.weights.adapter import BUILD_ERRORS


MOST = 20_000_000  # parameters
# terms beside a product, by position or from an adapter, which do not scale with it: they are taken out
BESIDE = re.compile(
    r"rel_pos|relative_k_proj|linear_pos|pos_(?:key|query|q)?_?(?:proj|embed)|distance_embedding|r_kernel|\br\b|rel_proj"
    r"|\br_net\b|relative_position_k|seg_embed|pe_k|emb_rel|value_embed|adapter_list"
)
SCALES = (16, 8, 4, 32, 2, 1)
VOCABULARY = 256
LAYERS = re.compile(
    r"(?:num_hidden|num|n|num_encoder|num_decoder|encoder|decoder|\w*(?:text|vision|hidden|attention|transformer|blocks?|"
    r"encoder|decoder|e?qformer|resampler|layout))_layers|layers|n_layer|depth|\w+_depth|num_(?:encoder_)?blocks|"
    r"num_(?:stacked_)?(?:attention|transformer)_blocks|num_self_attends_per_block"
)
NOT_LAYERS = re.compile(r"max_window_layers|num_feat_extract_layers|iou_head_depth|num_kv_shared_layers")
WIDTH = re.compile(
    r"hidden|d_model|d_latents|section|upsample_groups|dims?(?:$|_)|dim$|embd|embed_?|embedding_size|channels?|width|lora_rank|ffn|d_ff|d_kv|d_head|dff|inner"
    r"|intermediate|num_filters|head_size|feature_size|features?$|mlp_size|rnn|ssm_state|d_state|state_size|neck|proj_size"
)
NOT_WIDTH = re.compile(
    r"image|patch_size|kernel|window|vocab|chunk|block_size|stride|codebook_size|token|layers|depth|max_|num_(?!filters|"
    r"features)|act|mult|ratio|expan|drop|n_embeddings|indices|index|positions?$|audio_channels|in_chans|rope_dim$|type"
)
EXPERTS = re.compile(r"(?:moe_|n_|num_)+(?:local_|routed_|total_)?experts|expert_num|encoder_experts")
TOKENS = re.compile(
    r"\w*(?:token|eos|bos|pad|sep|cls|mask|blank|unk)(?:_token)?_(?:id|idx|ids|index)s?|\w+_token_index"
)
BUILD = (*BUILD_ERRORS, ZeroDivisionError, IndexError)
DROPPED = ("architectures", "id2label", "label2id", "stage_names", "transformers_version", "_name_or_path")
# settings that have no default, or whose default asks for a package that is not needed otherwise
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"prediction_length": 4} for name in ("autoformer", "informer", "time_series_transformer")},
    "reformer": {"is_decoder": True},
    "esm": {"vocab_size": 33},
    **{name: {"head_dim": 128} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    "lfm2_moe": {"layer_types": ["full_attention" if place % 4 == 2 else "conv" for place in range(32)]},
}


def shrink(values: dict[str, Any], scale: int, layers: bool = True) -> dict[str, Any]:
    """The settings of a small model of the same kind."""
    ids: dict[int, int] = {}
    return _shrink(values, scale, layers, ids)


def _shrink(values: dict[str, Any], scale: int, layers: bool, ids: dict[int, int]) -> dict[str, Any]:
    depth = _depths(values) if layers else {}
    result = {}
    for key, value in values.items():
        if not isinstance(key, str):
            result[key] = value
            continue
        if key in DROPPED or (key == "out_features" and values.get("out_indices")):
            continue
        if isinstance(value, dict):
            if depth and all(str(name).isdigit() for name in value):  # settings of single layers
                value = {name: inner for name, inner in value.items() if int(name) < max(depth.values())}
            value = _shrink(value, scale, layers, ids)
        elif isinstance(value, (list, tuple)):
            value = _shrink_list(key, list(value), scale, depth, ids)
        elif key.endswith("glu_limit"):
            value = 1e6  # what is clamped does not scale
        elif isinstance(value, int) and not isinstance(value, bool):
            value = _shrink_number(key, value, scale, depth, ids, values)
        result[key] = value
    return result if scale == 1 else _fewer_heads(result)


def _fewer_heads(values: dict[str, Any]) -> dict[str, Any]:
    """Fewer heads where they would be narrower than eight numbers, as rotations in two dimensions need."""
    for stem, width_key in (
        ("num_attention_heads", "hidden_size"),
        ("num_heads", "embed_dim"),
        ("num_heads", "hidden_size"),
    ):
        heads, width = values.get(stem), values.get(width_key)
        if (
            not (isinstance(heads, int) and isinstance(width, int))
            or values.get("head_dim")
            or (width / heads) % 8 == 0
        ):
            continue
        fewer = next((h for h in range(heads, 0, -1) if heads % h == 0 and width % (8 * h) == 0), heads)
        for key in ("num_key_value_heads", "num_kv_heads"):
            if isinstance(groups := values.get(key), int):
                values = {**values, key: math.gcd(groups, fewer) if groups < heads else fewer}
        values = {**values, stem: fewer}
    return values


def _depths(values: dict[str, Any]) -> dict[int, int]:
    """{number of layers: how many of them to keep}: two, or as many as it takes to have one of each kind."""
    result = {}
    values = {key: value for key, value in values.items() if isinstance(key, str)}
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 3:
            continue
        if not LAYERS.fullmatch(key) or NOT_LAYERS.fullmatch(key):
            continue
        kept = 2
        for kinds in values.values():
            if not isinstance(kinds, (list, tuple)) or not kinds:
                continue
            if len(kinds) == value and isinstance(kinds[0], (str, int)):
                kept = max(kept, 1 + max(kinds.index(kind) for kind in set(kinds)))
        for name, places in values.items():
            if isinstance(places, (list, tuple)) and _are_places(name, list(places)) and len(places) < value:
                kept = max(kept, len(places))
        period = max((values.get(name) or 0 for name in values if re.search("_period$|_interval$", name)), default=0)
        kept = max(kept, period + 1 if isinstance(period, int) and period > 1 else 0)
        result[value] = min(kept, value, 12)
    return result


def _are_places(key: str, values: list[Any]) -> bool:
    """Whether a list counts layers: `out_indices`, `deepstack_visual_indexes` …"""
    numbers = all(isinstance(value, int) for value in values) or all(re.fullmatch(r"stage\d+", str(v)) for v in values)
    named = re.search(
        r"ind(?:ex|ic)es|out_features|fusion_layers|cross_attention_layers|_layer_ids|_blocks$|_layers$", key
    )
    return bool(values) and numbers and bool(named)


def _shrink_list(key: str, values: list[Any], scale: int, depth: dict[int, int], ids: dict[int, int]) -> list[Any]:
    if len(values) in depth and isinstance(values[0], (str, int, float)):
        values = values[: depth[len(values)]]
        return values
    if values and isinstance(values[0], dict):
        return [_shrink(value, scale, bool(depth), ids) for value in values]
    if TOKENS.fullmatch(key):
        return [_token(value, ids) for value in values]
    if key in ("depths", "blocks_per_stage", "layers_per_stage", "num_layers") and all(
        isinstance(v, int) for v in values
    ):
        return [min(value, 2) for value in values]
    if depth and _are_places(key, values):
        kept = max(depth.values())
        if isinstance(values[0], str):
            count = max(int(value[5:]) for value in values)
            return [f"stage{min(index + 1, kept)}" for index in range(len(values))] if count in depth else values
        if key == "out_indices":  # counted from the stem
            return [min(index + 1, kept) for index in range(len(values))]
        return values if max(values) < kept else [min(index, kept - 1) for index in range(len(values))]
    if WIDTH.search(key) and not NOT_WIDTH.search(key) and all(isinstance(v, int) and v % scale == 0 for v in values):
        return [value // scale for value in values]
    return values


def _shrink_number(
    key: str, value: int, scale: int, depth: dict[int, int], ids: dict[int, int], values: dict[str, Any]
) -> int:
    if TOKENS.fullmatch(key):
        return _token(value, ids)
    if LAYERS.fullmatch(key) and not NOT_LAYERS.fullmatch(key):
        return depth.get(value, value)
    if key == "num_kv_shared_layers" or (key == "first_k_dense_replace" and depth):
        return min(value, 1 if key.startswith("first") else 0)
    if re.search(r"vocab|^n_words$|^num_embeddings$", key) and value > VOCABULARY:
        return VOCABULARY
    if EXPERTS.fullmatch(key):
        return min(value, 4)
    if re.fullmatch(r"(?:n|num)_(?:expert_)?groups?|topk_group|num_experts_per_tok\w*|moe_topk|top_k|moe_k", key):
        return min(value, 1 if key == "topk_group" else 2)
    if key == "image_size" and isinstance(patch := values.get("patch_size"), int) and "depths" not in values:
        return min(value, 4 * patch)
    if re.search(r"max_\w*positions?|n_positions|n_ctx", key) and value > 4096:
        return 4096
    if WIDTH.search(key) and not NOT_WIDTH.search(key) and value >= scale and value % scale == 0:
        return value // scale
    return value


def _token(value: Any, ids: dict[int, int]) -> Any:
    """A token's new number: small ones stay, the others move together below the end of the vocabulary."""
    if not isinstance(value, int) or value < 100:
        return value
    return ids.setdefault(value, 101 + len(ids))


def build(model_type: str, class_name: str) -> Iterator[nn.Module]:
    """Ever larger models of a type, from the smallest that builds; each random, of fewer than 20 M parameters."""
    config_class = CONFIG_MAPPING[model_type]
    settings = SETTINGS.get(model_type, {})
    values = config_class(**settings).to_dict()
    model_class = getattr(transformers, class_name)
    error: BaseException = ValueError("nothing to try")
    built = False
    for scale in SCALES:
        try:
            config = config_class.from_dict(shrink(values, scale))
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(config).parameters())
            if size > MOST:
                error = ValueError(f"{size / 1e6:.0f} M parameters")
                continue
            torch.manual_seed(0)
            model = model_class(config).float().eval()
        except BUILD as failure:
            error = failure
            continue
        built = True
        run_experts_on_cpu(model)
        randomise(model)
        yield model
    if not built:
        raise error


def randomise(model: nn.Module) -> None:
    """Biases zero, matrices so large that a change shows, gains near one; reproducibly."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if "bias" in name.rpartition(".")[2] or BESIDE.search(name):
                parameter.zero_()
            elif parameter.ndim > 1:
                fan = parameter[0].numel() if parameter.ndim == 2 else max(parameter.shape[-2:])
                parameter.normal_(0, 1.5 * max(fan, 1) ** -0.5)
            elif parameter.abs().max() < 1e-2:  # layer scales and closed gates
                parameter.fill_(0.7)
