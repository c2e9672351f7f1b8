"""Roles and splits against the forward pass, which knows no table.

Scores are q·k, so q × c with k / c changes nothing; nor does v × c with o / c, nor, where the MLP is gated, up × c with
down / c. Each alone changes the output: a wrong row, part or role would show.
"""

import pytest
import torch
import transformers as t

from lmd_hf.compat import run_experts_on_cpu
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


TEXT = {"input_ids": torch.arange(1, 9)[None]}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
SOUND = {"input_values": torch.linspace(-1, 1, 400)[None]}
BASE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 64}
VISION = {**{k: BASE[k] for k in list(BASE)[:4]}, "image_size": 16, "patch_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "num_experts_per_tok": 2,
}  # fmt: skip
# name: (class, its configuration, inputs, the pairs that the forward pass can judge)
MODELS = {
    "codegen": ("CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, TEXT, "qk vo"),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}, TEXT, "qk vo"),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT, TEXT, "qk vo"),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", BASE, TEXT, "qk vo"),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 60}, TEXT, "qk vo"),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT, TEXT, "qk vo"),
    "persimmon": ("PersimmonForCausalLM", {**BASE, "qk_layernorm": False}, TEXT, "qk vo"),
    "modernbert": ("ModernBertForMaskedLM", BASE, TEXT, "qk vo up"),
    "deberta": ("DebertaForMaskedLM", BASE, TEXT, "vo"),
    "deberta-v2": ("DebertaV2ForMaskedLM", BASE, TEXT, "qk vo"),
    "albert": ("AlbertForMaskedLM", {**BASE, "embedding_size": 16}, TEXT, "qk vo"),
    "xlm": ("XLMModel", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 60}, TEXT, "qk vo"),
    "ctrl": ("CTRLModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "vocab_size": 60}, TEXT, "qk vo"),
    "gpt_oss": ("GptOssForCausalLM", {**GROUPED, "head_dim": 8, "num_local_experts": 4}, TEXT, "qk vo"),
    "llama4": ("Llama4ForCausalLM", {**GROUPED, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 40},
               TEXT, "vo up"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 24}, TEXT,
                  "qk vo up"),
    "granitemoe": ("GraniteMoeForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, TEXT,
                   "qk vo up"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**BASE, **MLA}, TEXT, "up"),
    "cohere": ("CohereForCausalLM", GROUPED, TEXT, "qk vo up"),
    "timesformer": ("TimesformerModel", {**VISION, "num_frames": 1},
                    {"pixel_values": IMAGE["pixel_values"][None]}, "qk vo"),
    "dinov2": ("Dinov2Model", {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}, IMAGE, "qk vo up"),
    "swin": ("SwinModel", {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                           "window_size": 2}, IMAGE, "qk vo"),
    "blip_vision_model": ("BlipVisionModel", {**VISION, "initializer_range": 0.02}, IMAGE, "qk vo"),
    "wav2vec2": ("Wav2Vec2Model", {**BASE, "conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2),
                                   "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                                   "num_conv_pos_embedding_groups": 2}, SOUND, "qk vo"),
    "xlnet": ("XLNetModel", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 60}, TEXT, "vo"),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "state_size": 4},
              TEXT, ""),
}  # fmt: skip
PAIRS = {"qk": ("q", "k"), "vo": ("v", "o"), "up": ("up", "down")}


def build(name):
    class_name, options, inputs, pairs = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(t, class_name)
    model = model_class(model_class.config_class(**options)).eval()
    run_experts_on_cpu(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "_bias" in parameter_name:
                parameter.zero_()
            elif parameter.ndim > 1:  # the usual initialisation is so small that a wrong split would hardly show
                parameter.mul_(4)
    return model, inputs, pairs


def scaled(model, refs, factors):
    """Multiply every matrix whose role is in `factors`; the parameters as they were before."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {ref.name: parameters[ref.name].detach().clone() for ref in refs}
    with torch.no_grad():
        for ref in refs:
            if ref.role not in factors or ref.block not in ("attention", "cross_attention", "mlp", "moe"):
                continue
            w = parameters[ref.name]
            w = w if ref.expert is None else w[ref.expert]
            w = w.reshape(len(w), -1)
            w = w.T if ref.transposed else w
            for start, stop, step in ref.rows or ((0, len(w), 1),):
                w[start:stop:step] *= factors[ref.role]
    return before


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0].double()


@pytest.mark.parametrize(("name", "pair"), [(n, p) for n, m in MODELS.items() for p in m[3].split()])
def test_the_forward_pass_agrees_with_roles_and_splits(name, pair):
    model, inputs, _ = build(name)
    refs = [ref for ref in list_matrices(open_source(model)).selected if pair != "up" or ref.gated]
    first, second = PAIRS[pair]
    assert {first, second} <= {ref.role for ref in refs}
    out = run(model, inputs)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def change(factors):
        before = scaled(model, refs, factors)
        difference = (run(model, inputs) - out).abs().max() / out.abs().max()
        with torch.no_grad():
            for key, value in before.items():
                parameters[key].copy_(value)
        return difference.item()

    assert change({first: 4.0, second: 0.25}) < 1e-5
    assert change({first: 4.0}) > 1e-3
    assert change({second: 0.25}) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_an_attention_or_mlp_is_left_without_a_role(name, tmp_path):
    model = build(name)[0]
    model.save_pretrained(tmp_path)
    for source in (open_source(model), open_source(tmp_path)):
        inventory = list_matrices(source)
        assert not [skip for skip in inventory.skipped if "looks fused" in skip.reason]
        inside = [ref for ref in inventory.selected if ref.layer is not None]
        assert {ref.layer for ref in inside} <= {0, 1}
        roles = {ref.role for ref in inside}
        assert roles & {"ssm", "q"}


def test_latent_attention_comes_in_pairs():
    refs = list_matrices(open_source(build("deepseek_v3")[0])).selected
    assert {(ref.role, ref.part) for ref in refs if ref.block == "attention"} == {
        ("q", "a"), ("q", "b"), ("kv", "a"), ("kv", "b"), ("o", ""),
    }  # fmt: skip


def test_a_fused_matrix_that_transformers_cuts_itself_takes_its_roles(tmp_path):
    """Jina's checkpoint holds Wqkv, its module q_proj, k_proj and v_proj: the cut is transformers' own."""
    config = t.JinaEmbeddingsV3Config(**BASE) if hasattr(t, "JinaEmbeddingsV3Config") else pytest.skip("too old")
    model = t.JinaEmbeddingsV3Model(config)
    model.save_pretrained(tmp_path)
    refs = list_matrices(open_source(tmp_path)).selected
    fused = [ref for ref in refs if "Wqkv" in ref.name and ref.layer == 1]
    assert [(ref.role, ref.rows) for ref in fused] == [
        ("q", ((0, 32, 1),)),
        ("k", ((32, 64, 1),)),
        ("v", ((64, 96, 1),)),
    ]
