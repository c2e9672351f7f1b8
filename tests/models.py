"""Tiny random models of every family, with the inputs that their forward pass takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t

from lmd_hf.compat import run_experts_on_cpu


H, F, L, V = 32, 48, 2, 60  # hidden, feed-forward, layers, vocabulary: all different, so that a swapped axis shows
HEADS, KV = 4, 2
TEXT = {"input_ids": torch.arange(1, 9)[None]}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
BOTH = {**TEXT, "decoder_input_ids": torch.arange(1, 6)[None]}
SOUND = {"input_features": torch.linspace(-1, 1, 300).reshape(1, 10, 30)}
BERT = {
    "hidden_size": H, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": HEADS, "vocab_size": V,
    "max_position_embeddings": 20,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": KV, "pad_token_id": 0}
BART = {
    "d_model": H, "encoder_layers": L, "decoder_layers": L, "encoder_attention_heads": HEADS, "vocab_size": V,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": F, "decoder_ffn_dim": F, "max_position_embeddings": 20,
}  # fmt: skip
T5 = {"d_model": H, "d_kv": 8, "d_ff": F, "num_layers": L, "num_heads": HEADS, "vocab_size": V}
FALCON = {"hidden_size": H, "num_hidden_layers": L, "num_attention_heads": HEADS, "vocab_size": V, "ffn_hidden_size": F}
CLIP_TEXT = {**BERT, "eos_token_id": 8}
VISION = {
    "hidden_size": H, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": HEADS, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[Callable[..., Any], str, dict[str, Any], dict[str, Any]]] = {
    "bert": (t.BertConfig, "BertForMaskedLM", BERT, TEXT),
    "roberta": (t.RobertaConfig, "RobertaForMaskedLM", BERT, TEXT),
    "distilbert": (
        t.DistilBertConfig,
        "DistilBertForMaskedLM",
        {"dim": H, "hidden_dim": F, "n_layers": L, "n_heads": HEADS, "vocab_size": V, "max_position_embeddings": 20},
        TEXT,
    ),
    "gpt2": (
        t.GPT2Config,
        "GPT2LMHeadModel",
        {"n_embd": H, "n_layer": L, "n_head": HEADS, "n_inner": F, "vocab_size": V, "n_positions": 20},
        TEXT,
    ),
    "gpt_neox": (t.GPTNeoXConfig, "GPTNeoXForCausalLM", BERT, TEXT),
    "opt": (
        t.OPTConfig,
        "OPTForCausalLM",
        {**BERT, "ffn_dim": F, "word_embed_proj_dim": H},
        TEXT,
    ),
    "opt-post-norm": (
        t.OPTConfig,
        "OPTForCausalLM",
        {**BERT, "ffn_dim": F, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
        TEXT,
    ),
    "bloom": (
        t.BloomConfig,
        "BloomForCausalLM",
        {"hidden_size": H, "n_layer": L, "n_head": HEADS, "vocab_size": V},
        TEXT,
    ),
    "falcon-new": (
        t.FalconConfig,
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": KV},
        TEXT,
    ),
    "falcon-mqa": (t.FalconConfig, "FalconForCausalLM", {**FALCON, "multi_query": True}, TEXT),
    "falcon-rw": (
        t.FalconConfig,
        "FalconForCausalLM",
        {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True},
        TEXT,
    ),
    "llama": (t.LlamaConfig, "LlamaForCausalLM", LLAMA, TEXT),
    "qwen2": (t.Qwen2Config, "Qwen2ForCausalLM", LLAMA, TEXT),
    "qwen3": (t.Qwen3Config, "Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}, TEXT),
    "qwen3_moe": (
        t.Qwen3MoeConfig,
        "Qwen3MoeForCausalLM",
        {**LLAMA, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        TEXT,
    ),
    "gemma": (t.GemmaConfig, "GemmaForCausalLM", {**LLAMA, "head_dim": 8}, TEXT),
    "gemma2": (t.Gemma2Config, "Gemma2ForCausalLM", {**LLAMA, "head_dim": 8}, TEXT),
    "phi3": (t.Phi3Config, "Phi3ForCausalLM", LLAMA, TEXT),
    "mixtral": (t.MixtralConfig, "MixtralForCausalLM", {**LLAMA, **MOE}, TEXT),
    "t5": (t.T5Config, "T5ForConditionalGeneration", T5, BOTH),
    "t5-gated": (
        t.T5Config,
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        BOTH,
    ),
    "bart": (t.BartConfig, "BartForConditionalGeneration", BART, BOTH),
    "vit": (t.ViTConfig, "ViTForImageClassification", VISION, IMAGE),
    "clip": (
        t.CLIPConfig,
        "CLIPModel",
        {"text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 24},
        {**TEXT, **IMAGE},
    ),
    "whisper": (
        t.WhisperConfig,
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 10, "max_source_positions": 15, "max_target_positions": 12, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        {**SOUND, "decoder_input_ids": torch.arange(1, 6)[None]},
    ),
}  # fmt: skip


def make(family: str, seed: int = 0, **changes: Any) -> t.PreTrainedModel:
    """A random model of a family; its norm gains and biases are random too, so that using or losing one shows."""
    config_class, model_class, values, _ = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(t, model_class)(config_class(**{**values, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    run_experts_on_cpu(model)
    return model


def write_ids(path: Path, count: int, length: int) -> str:
    """So many sequences of that many token ids, as a dataset without padding; the path, as text."""
    rng = np.random.default_rng(0)
    path.write_text("\n".join(json.dumps({"input_ids": rng.integers(1, V, length).tolist()}) for _ in range(count)))
    return str(path)


def inputs(family: str) -> dict[str, torch.Tensor]:
    """What the model's forward pass takes."""
    return FAMILIES[family][3]
