"""The heads that the table tells, against what the models' own attention computes: scores and values of every head."""

import inspect
from dataclasses import replace

import models
import pytest
import torch
import transformers as t
from torch import nn
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

from lmd_hf.records import Skipped
from lmd_hf.weights.heads import list_heads, unformed_notes
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_matrix


LATENT = {
    **models.LLAMA, "num_key_value_heads": models.HEADS, "kv_lora_rank": 16, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 7, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 20, "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 4096}  # fmt: skip
GRANITE = {**models.LLAMA, "attention_multiplier": 0.3}
NEO = {"hidden_size": models.H, "num_layers": 2, "num_heads": 4, "vocab_size": models.V, "intermediate_size": models.F,
       "max_position_embeddings": 20, "attention_types": [[["global", "local"], 1]]}  # fmt: skip
CODEGEN = {"n_embd": models.H, "n_layer": 2, "n_head": 4, "vocab_size": models.V, "n_positions": 20, "rotary_dim": 4}
BIGCODE = {"n_embd": models.H, "n_layer": 2, "n_head": 4, "vocab_size": models.V, "n_positions": 20}
OTHERS = {
    "deepseek_v3": (t.DeepseekV3Config, "DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": 12}),
    "deepseek_v3-yarn": (
        t.DeepseekV3Config,
        "DeepseekV3ForCausalLM",
        {**LATENT, "q_lora_rank": 12, "rope_parameters": YARN},
    ),
    "deepseek_v2-lite": (t.DeepseekV2Config, "DeepseekV2ForCausalLM", {**LATENT, "q_lora_rank": None}),
    "granite": (t.GraniteConfig, "GraniteForCausalLM", GRANITE),
    "gpt_neo": (t.GPTNeoConfig, "GPTNeoForCausalLM", NEO),
    "codegen": (t.CodeGenConfig, "CodeGenForCausalLM", CODEGEN),
    "gpt_bigcode": (t.GPTBigCodeConfig, "GPTBigCodeForCausalLM", {**BIGCODE, "scale_attn_weights": False}),
}
CHANGES = {
    "gemma2": {"attn_logit_softcapping": None, "query_pre_attn_scalar": 20},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
}
HEADS = models.HEADS
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # some take the softmax in float32
EAGER = {"attn_implementation": "eager"}
STACKS = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "": "attentions"}


def make(family):
    """A model without what the weights of a head leave out: biases, norms of queries and keys, positions."""
    if family in OTHERS:
        config_class, name, values = OTHERS[family]
        torch.manual_seed(0)
        model = getattr(t, name)(config_class(**values, **EAGER)).eval()
    else:
        model = models.make(family, **CHANGES.get(family, {}), **EAGER)
    for path in [path for path, _ in model.named_modules()]:
        if path.rpartition(".")[2] in ("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm"):
            model.set_submodule(path, nn.Identity())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "relative_attention_bias.weight")):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)  # scores that differ
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    return model.double()


def run(model, family):
    """({module path: its first input and its output}, the attention probabilities)."""
    seen = {}

    def hook(path):
        return lambda module, args, result: seen.__setitem__(path, (args[0].detach()[0], result.detach()[0]))

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(hook(path))
    given = models.inputs(family) if family in models.FAMILIES else models.TEXT
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.zeros_like(given["input_ids"])  # no rotation
    return seen, model(**given, output_attentions=True)


def whole(source, rows):
    """The rows of W, or of b·a."""
    w = read_matrix(source, rows.ref).double()[rows.start : rows.stop]
    return w if rows.after is None else w @ whole(source, rows.after)


def first(rows):
    """The module whose input is the stream."""
    return (rows.after or rows).ref.name.removesuffix(".weight")


PLAIN = [family for family in models.FAMILIES if family not in ("qwen3_moe", "opt-post-norm", "clip")]


@pytest.fixture
def no_alibi(monkeypatch):
    """Nothing is added to the scores for distance."""
    built = modeling_falcon.build_alibi_tensor
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", lambda *args, **more: 0 * built(*args, **more))
    name = "_get_alibi_slopes" if hasattr(modeling_bloom, "_get_alibi_slopes") else "build_alibi_tensor"  # up to 5.17
    slopes = getattr(modeling_bloom, name)
    monkeypatch.setattr(modeling_bloom, name, lambda *args: 0 * slopes(*args))


@pytest.mark.parametrize("family", [*PLAIN, *OTHERS])
def test_every_head_scores_and_writes_as_the_model_does(family, no_alibi):
    model = make(family)
    source = open_source(model)
    heads, unformed = list_heads(list_matrices(source))
    assert not unformed
    seen, outputs = run(model, family)
    attentions = {}
    for head in heads:
        attentions.setdefault((head.stack, head.block, head.layer), []).append(head)
    expected = {stack for stack in ("encoder", "decoder") if stack in {h.stack for h in heads}} or {""}
    assert len(attentions) == 2 * (len(expected) + any(h.block == "cross_attention" for h in heads))
    for (stack, block, layer), group in attentions.items():
        assert [head.head for head in group] == list(range(HEADS))
        name = "cross_attentions" if block == "cross_attention" else STACKS[stack]
        probabilities = outputs[name][layer][0]
        x_q, x_k = seen[first(group[0].q[0])][0], seen[first(group[0].k[0])][0]
        written = 0
        for head in group:
            w_q = torch.cat([whole(source, rows) for rows in head.q])
            w_k = torch.cat([whole(source, rows) for rows in head.k])
            scores = head.scale * (x_q @ w_q.T) @ (x_k @ w_k.T).T
            allowed = probabilities[head.head] > 0
            ours = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            torch.testing.assert_close(ours, probabilities[head.head], **CLOSE)
            w_o = read_matrix(source, head.o.ref).double()[:, head.o.start : head.o.stop]
            written = written + probabilities[head.head] @ (x_k @ whole(source, head.v).T) @ w_o.T
        torch.testing.assert_close(written, seen[group[0].o.ref.name.removesuffix(".weight")][1], **CLOSE)
        assert probabilities.std(0).max() > 0.02  # heads that were alike would hide a swap


def heads_of(model):
    return list_heads(list_matrices(open_source(model)))


def test_queries_share_keys_in_groups():
    heads, _ = heads_of(models.make("llama"))
    assert [(h.head, h.kv_head, h.k[0].start, h.v.stop) for h in heads[:4]] == [
        (0, 0, 0, 8), (1, 0, 0, 8), (2, 1, 8, 16), (3, 1, 8, 16)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ((), False, None, True)),
        ("qwen2", (("q", "k", "v"), False, None, True)),
        ("qwen3", ((), True, None, True)),
        ("gemma2", ((), False, 50.0, True)),
        ("gpt2", (("q", "k", "v", "o"), False, None, False)),
        ("bert", (("q", "k", "v", "o"), False, None, False)),
        ("t5", ((), False, None, False)),
        ("falcon-new", ((), False, None, True)),
        ("falcon-rw", ((), False, None, False)),
    ],
)
def test_what_the_weights_leave_out_is_told(family, expected):
    heads, _ = heads_of(models.make(family))
    for head in heads:
        assert (head.biases, head.qk_norm, head.soft_cap, head.rotary) == expected


def test_the_norm_of_an_indexer_is_none_of_the_heads():
    inventory = list_matrices(open_source(models.make("llama")))
    norm = Skipped("model.layers.0.self_attn.indexer.k_norm.weight", (8,), "vector")
    heads, _ = list_heads(replace(inventory, skipped=(*inventory.skipped, norm)))
    assert not any(head.qk_norm for head in heads)


def test_an_attention_inside_an_attention_is_one_with_its_output():
    sizes = {"hidden_size": 32, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 48}
    texts = {**sizes, "vocab_size": 60}
    model = t.FlavaModel(t.FlavaConfig(text_config=texts, image_config=sizes, multimodal_config=sizes, hidden_size=32))
    heads, unformed = heads_of(model)
    assert not unformed
    assert len(heads) == 3 * 2 * HEADS


def test_positions_of_keypoints_are_rotary():
    with torch.device("meta"):
        heads, _ = heads_of(t.LightGlueForKeypointMatching(t.LightGlueConfig()))
    assert {(head.block, head.rotary) for head in heads} == {("attention", True), ("cross_attention", False)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("RoFormer", (False, True)), ("VJEPA2", (False, True)), ("NanoChat", (True, True)), ("Llama", (False, True))],
)
def test_norms_and_rotations_without_parameters_are_told(name, expected):
    with torch.device("meta"):
        heads, _ = heads_of(getattr(t, f"{name}Model")(getattr(t, f"{name}Config")(num_hidden_layers=1)))
    assert {(head.qk_norm, head.rotary) for head in heads} == {expected}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_heads": HEADS, "hidden_size": 64, "embed_dim": 32}, HEADS),  # Qwen2-VL's vision tower, merged into 64
        ({"attention_heads": HEADS, "hidden_size": 32}, HEADS),  # Mllama's
        ({"num_heads": HEADS, "hidden_size": 64, "embed_dim": 16}, 0),
    ],
)
def test_heads_of_vision_towers_are_counted_as_they_call_them(config, count):
    inventory = list_matrices(open_source(models.make("gpt2")))
    heads, _ = list_heads(replace(inventory, config=config))
    assert len(heads) == 2 * count


def test_both_towers_and_files_have_their_heads(save):
    inventory = list_matrices(open_source(save("clip")))
    heads, unformed = list_heads(inventory)
    assert not unformed
    assert {(h.stack, h.layer, h.head) for h in heads} == {
        (stack, layer, head) for stack in ("vision", "text") for layer in range(2) for head in range(HEADS)
    }


def test_a_gate_beside_the_queries_is_none_of_them():
    layers = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "linear_num_value_heads": 4}
    moe = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    model = t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**{**models.LLAMA, "head_dim": 8, **layers, **moe}))
    heads, unformed = heads_of(model)
    assert not unformed
    assert [(h.q[0].start, h.q[0].stop) for h in heads] == [(0, 8), (16, 24), (32, 40), (48, 56)]


def test_what_multiplies_the_keys_multiplies_the_scores():
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    config = t.FalconH1Config(**{**models.LLAMA, "head_dim": 8, "key_multiplier": 0.4, **mamba})
    heads, unformed = heads_of(t.FalconH1ForCausalLM(config))
    assert not unformed
    assert {h.scale for h in heads} == {0.4 * 8**-0.5}


@pytest.mark.parametrize("kind", [t.ImageGPTConfig, t.DecisionTransformerConfig])
def test_what_is_made_of_gpt2_scales_as_it_is_told(kind):
    model = t.AutoModel.from_config(kind(hidden_size=16, n_embd=16, n_head=2, n_layer=2, scale_attn_weights=False))
    heads, unformed = heads_of(model)
    assert not unformed
    assert {h.scale for h in heads} == {1.0}


def test_content_and_position_terms_share_the_scale():
    values = {**models.BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    heads, _ = heads_of(t.DebertaV2ForMaskedLM(t.DebertaV2Config(**values)))
    assert {h.scale for h in heads} == {(3 * 8) ** -0.5}
    _, unformed = heads_of(t.DebertaV2ForMaskedLM(t.DebertaV2Config(**{**values, "pos_att_type": ["c2p"]})))
    assert "how many terms of position" in unformed[0].reason


def test_what_cannot_be_formed_has_a_reason():
    jetmoe = t.JetMoeConfig(
        hidden_size=32, num_hidden_layers=1, kv_channels=8, num_key_value_heads=2, vocab_size=60, intermediate_size=20,
        num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    heads, unformed = heads_of(t.JetMoeForCausalLM(jetmoe))
    assert not heads
    assert unformed_notes(unformed) == (
        "heads of 1 attention not formed (first 'model.layers.0.self_attention.experts.input_linear.weight'): its "
        "heads are experts, which are chosen for each token",
    )


def test_a_configuration_that_does_not_fit_is_not_believed():
    inventory = list_matrices(open_source(models.make("llama")))
    for change, reason in (
        ({"head_dim": 16}, "its 4 heads have 8 rows of queries each, the configuration says 16"),
        ({"num_attention_heads": None}, "the configuration does not say how many heads it has"),
        ({"num_attention_heads": 3}, "the 32 rows of its q are no whole number of 3 heads"),
    ):
        heads, unformed = list_heads(replace(inventory, config=inventory.config | change))
        assert not heads
        assert {each.reason for each in unformed} == {reason}
    lacking = replace(inventory, selected=tuple(ref for ref in inventory.selected if ref.role != "v"))
    assert list_heads(lacking)[1][0].reason == "there is no matrix that is its v alone"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, "x"])
def test_a_scale_that_is_no_number_is_not_believed(value):
    inventory = list_matrices(open_source(models.make("gemma2")))
    heads, unformed = list_heads(replace(inventory, config=inventory.config | {"query_pre_attn_scalar": value}))
    assert not heads
    assert "does not say the 'query_pre_attn_scalar'" in unformed[0].reason
