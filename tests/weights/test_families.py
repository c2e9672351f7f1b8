"""Every family of the table: what each stored tensor is, that nothing is lost, and which norm feeds which matrix."""

import math
from collections import Counter
from pathlib import Path

import models
import pytest
import torch
import transformers
from torch import nn

from lmd_hf.weights.families import Config, _table, check_table, find_fused
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_matrix


L, H, F, V = models.L, models.H, models.F, models.V
ATTENTION = {("attention", role): L for role in "qkvo"}
PLAIN = {("mlp", "up"): L, ("mlp", "down"): L}
GATED = {**PLAIN, ("mlp", "gate"): L}
MOE = {("moe", "router"): L, ("moe", "gate"): 3 * L, ("moe", "up"): 3 * L, ("moe", "down"): 3 * L}
CROSS = {("cross_attention", role): L for role in "qkvo"}
DOUBLED = {key: 2 * count for key, count in {**ATTENTION, **PLAIN}.items()}
EXPECTED = {
    "bert": {**ATTENTION, **PLAIN, ("", "embed"): 3, ("", "other"): 1},
    "roberta": {**ATTENTION, **PLAIN, ("", "embed"): 3, ("", "other"): 1},
    "distilbert": {**ATTENTION, **PLAIN, ("", "embed"): 2, ("", "other"): 1},
    "gpt2": {**ATTENTION, **PLAIN, ("", "embed"): 2},
    "gpt_neox": {**ATTENTION, **PLAIN, ("", "embed"): 1, ("", "head"): 1},
    "opt": {**ATTENTION, **PLAIN, ("", "embed"): 2},
    "opt-post-norm": {**ATTENTION, **PLAIN, ("", "embed"): 2, ("", "other"): 2},
    "bloom": {**ATTENTION, **PLAIN, ("", "embed"): 1},
    "falcon-new": {**ATTENTION, **PLAIN, ("", "embed"): 1},
    "falcon-mqa": {**ATTENTION, **PLAIN, ("", "embed"): 1},
    "falcon-rw": {**ATTENTION, **PLAIN, ("", "embed"): 1},
    "llama": {**ATTENTION, **GATED, ("", "embed"): 1, ("", "head"): 1},
    "qwen2": {**ATTENTION, **GATED, ("", "embed"): 1, ("", "head"): 1},
    "qwen3": {**ATTENTION, **GATED, ("", "embed"): 1, ("", "head"): 1},
    "qwen3_moe": {**ATTENTION, **MOE, ("", "embed"): 1, ("", "head"): 1},
    "gemma": {**ATTENTION, **GATED, ("", "embed"): 1},
    "gemma2": {**ATTENTION, **GATED, ("", "embed"): 1},
    "phi3": {**ATTENTION, **GATED, ("", "embed"): 1, ("", "head"): 1},
    "mixtral": {**ATTENTION, **MOE, ("", "embed"): 1, ("", "head"): 1},
    "t5": {**DOUBLED, **CROSS, ("", "embed"): 1, ("", "other"): 2},
    "t5-gated": {**DOUBLED, **CROSS, ("mlp", "gate"): 2 * L, ("", "embed"): 1, ("", "other"): 2},
    "bart": {**DOUBLED, **CROSS, ("", "embed"): 3},
    "vit": {**ATTENTION, **PLAIN, ("", "embed"): 1, ("", "conv"): 1, ("", "head"): 1},
    "clip": {**DOUBLED, ("", "embed"): 3, ("", "conv"): 1, ("", "other"): 2},
    "whisper": {**DOUBLED, **CROSS, ("", "embed"): 3, ("", "conv"): 2},
}
STACKS = {"t5": {"encoder", "decoder"}, "t5-gated": {"encoder", "decoder"}, "bart": {"encoder", "decoder"},
          "clip": {"vision", "text"}, "whisper": {"encoder", "decoder"}}  # fmt: skip
# (out, in) of the roles whose two sides differ, where a family does not say otherwise
SHAPES = {"up": (F, H), "gate": (F, H), "down": (H, F), "embed_rows": V}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_tensor_has_a_role_and_nothing_is_lost(family, save):
    source = open_source(save(family))
    inventory = list_matrices(source)
    assert Counter((ref.block, ref.role) for ref in inventory.selected) == EXPECTED[family]
    assert {ref.stack for ref in inventory.selected if ref.block} == STACKS.get(family, {""})
    assert {ref.layer for ref in inventory.selected if ref.block} == set(range(L))
    assert all(skip.reason == "vector" for skip in inventory.skipped)
    assert not inventory.notes
    counted = sum(math.prod(r.shape) for r in inventory.selected) + sum(math.prod(s.shape) for s in inventory.skipped)
    assert counted == inventory.parameters == sum(t.numel() for t in _stored(save(family)).values())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_orientation_is_out_by_in(family, save):
    source = open_source(save(family))
    for ref in list_matrices(source).selected:
        assert read_matrix(source, ref).shape == ref.shape
        if ref.block == "mlp" and family not in ("bloom", "gpt2", "gpt_neox", "falcon-new", "falcon-mqa", "falcon-rw"):
            assert ref.shape == SHAPES[ref.role]
        if ref.role == "down":
            assert ref.shape[0] == H
        if ref.role == "head" or "word" in ref.name or "tokens" in ref.name or "wte" in ref.name:
            assert V in ref.shape or family == "vit"
            assert (ref.shape[1] if ref.role == "embed" else ref.shape[0]) in (V, 2)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_live_model_gives_the_same_matrices_as_its_checkpoint(family, save):
    """The live module stacks experts and fuses what the checkpoint keeps apart; the matrices must not change."""
    on_disk, live = open_source(save(family)), open_source(models.make(family))
    spectra = []
    for source in (on_disk, live):
        spectra.append(
            sorted(
                (r.stack, r.block, r.role, r.layer or 0, r.shape, [round(x, 4) for x in _spectrum(source, r)])
                for r in list_matrices(source).selected
            )
        )
    assert spectra[0] == spectra[1]


def _spectrum(source, ref):
    return torch.linalg.svdvals(read_matrix(source, ref).double()).tolist()


def _stored(folder):
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# --- fused projections, against the splitting code of the models themselves ---------------------------------------


def _qkv_as_the_model_splits_it(family, model):
    """{role: (out, in) matrix} of layer 1, from the module's own forward-pass code on the columns of the identity."""
    if family == "gpt2":
        fused = model.transformer.h[1].attn.c_attn
        q, k, v = nn.functional.linear(torch.eye(H), fused.weight.T).split(H, dim=1)
    elif family == "phi3":
        fused = model.model.layers[1].self_attn.qkv_proj
        size = H // models.HEADS
        q, k, v = fused.weight.T.split([models.HEADS * size, models.KV * size, models.KV * size], dim=1)
    elif family == "gpt_neox":
        fused = model.gpt_neox.layers[1].attention.query_key_value
        heads = fused.weight.T.view(1, H, models.HEADS, -1).transpose(1, 2).chunk(3, dim=-1)
        q, k, v = (part.transpose(1, 2) for part in heads)
    elif family == "bloom":
        attention = model.transformer.h[1].self_attention
        heads = attention._reshape(attention.query_key_value.weight.T[None])
        q, k, v = (part.transpose(1, 2) for part in heads)
    else:
        attention = model.transformer.h[1].self_attention
        q, k, v = attention._split_heads(attention.query_key_value.weight.T[None])
        if family == "falcon-new":  # it repeats each key and value for the queries of its group
            size = H // models.HEADS
            k, v = (part.reshape(1, H, models.KV, -1, size)[:, :, :, 0] for part in (k, v))
    return {role: part.reshape(H, -1).T for role, part in zip("qkv", (q, k, v), strict=True)}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "phi3", "falcon-new", "falcon-mqa", "falcon-rw"])
def test_fused_projections_split_as_the_model_does(family, save):
    source = open_source(save(family))
    expected = _qkv_as_the_model_splits_it(family, models.make(family))
    for ref in list_matrices(source).selected:
        if ref.layer == 1 and ref.role in expected:
            assert ref.part == ref.role
            torch.testing.assert_close(read_matrix(source, ref), expected[ref.role], rtol=0, atol=0)


def test_fused_gate_and_up_split_as_the_model_does(save):
    source, model = open_source(save("phi3")), models.make("phi3")
    gate, up = model.model.layers[0].mlp.gate_up_proj.weight.chunk(2)
    found = {
        r.role: read_matrix(source, r) for r in list_matrices(source).selected if r.layer == 0 and r.block == "mlp"
    }
    torch.testing.assert_close(found["gate"], gate, rtol=0, atol=0)
    torch.testing.assert_close(found["up"], up, rtol=0, atol=0)


def test_a_layout_is_never_borrowed_from_another_family():
    """CodeGen's qkv_proj has Phi-3's name, but interleaves its parts four ways: the next such family must be listed."""
    unknown = Config({"model_type": "gpt9", "num_attention_heads": 4, "hidden_size": H})
    assert find_fused("h.0.attn.qkv_proj", unknown) is None


def test_without_a_family_row_a_fused_matrix_is_skipped_with_the_remedy(save, tmp_path):
    for path in save("gpt_neox").glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    inventory = list_matrices(open_source(tmp_path))
    reasons = [s.reason for s in inventory.skipped if s.name.endswith("query_key_value.weight")]
    assert len(reasons) == L
    assert all("no rule for" in reason and "families.toml" in reason for reason in reasons)


# --- norms, against what really flows in a forward pass -----------------------------------------------------------


def _norms_seen(model, inputs):
    """{module name: norm whose output it was given}, by the identity of the tensors that flow."""
    outputs, seen, keep = {}, {}, []

    def after_norm(name):
        def hook(module, args, output):
            keep.append(output)
            outputs[output.untyped_storage()._cdata] = name

        return hook

    def before_matrix(name):
        def hook(module, args, kwargs):
            given = args[0] if args else kwargs.get("hidden_states")
            seen[name] = outputs.get(given.untyped_storage()._cdata)
            keep.append(given)

        return hook

    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_hook(after_norm(name))
        elif getattr(module, "weight", None) is not None or name.endswith("experts"):
            module.register_forward_pre_hook(before_matrix(name), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    return {
        name: norm for name, norm in seen.items() if norm is not None and "q_norm" not in norm and "k_norm" not in norm
    }


# BERT's pooler-like transforms are fed by a norm as well, but are no block of their own; embeddings are looked up.
UNTOLD = (
    "cls.predictions.transform.dense",
    "vocab_transform",
    "lm_head.dense",
    "classifier",
    "projection",
    "project_out",
)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_norm_of_the_table_is_the_norm_that_feeds_the_matrix(family, save):
    model = models.make(family)
    seen = _norms_seen(model, models.inputs(family))
    told = {}
    for ref in list_matrices(open_source(model)).selected:
        module = ref.name.removesuffix(".weight").removesuffix(".gate_up_proj") if ref.block == "moe" else None
        module = module or ref.name.removesuffix(".weight")
        if ref.norm is not None:
            told[module] = ref.norm.tensor.name.removesuffix(".weight")
    told = {name: norm for name, norm in told.items() if name in seen or not name.endswith("experts")}
    tied = {a.name.removesuffix(".weight") for a in list_matrices(open_source(model)).aliases}
    expected = {n: norm for n, norm in seen.items() if n not in tied and not any(word in n for word in UNTOLD)}
    told = {n: norm for n, norm in told.items() if not any(word in n for word in UNTOLD)}
    assert told == expected


def test_gemma_gains_are_stored_minus_one():
    model = models.make("gemma")
    offsets = {ref.norm.offset for ref in list_matrices(open_source(model)).selected if ref.norm}
    assert offsets == {1.0}
    norm = model.model.norm
    row = torch.randn(1, H)
    unit = row / row.pow(2).mean().sqrt()
    torch.testing.assert_close(norm(row), unit * (1 + norm.weight), rtol=1e-4, atol=1e-5)


# --- names alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama", "qwen2", "mixtral", "t5", "bart", "vit", "whisper"])
def test_names_alone_give_the_same_roles(family, save, tmp_path):
    """Without config.json the analysis goes on from names, and says so."""
    for path in save(family).glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with_config, without = list_matrices(open_source(save(family))), list_matrices(open_source(tmp_path))
    assert "no config.json" in without.notes[0]
    known = {(r.name, r.part): (r.block, r.role, r.layer, r.shape) for r in with_config.selected}
    assert {(r.name, r.part): (r.block, r.role, r.layer, r.shape) for r in without.selected} == known


def test_an_unknown_model_type_goes_on_from_names(save, tmp_path):
    for path in save("llama").glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gpt9", "auto_map": {"AutoModel": "evil.Model"}}')
    inventory = list_matrices(open_source(tmp_path))
    assert "model_type 'gpt9' is unknown to transformers" in inventory.notes[0]
    assert Counter((r.block, r.role) for r in inventory.selected) == EXPECTED["llama"]


# --- ties --------------------------------------------------------------------------------------------------------


def test_a_tied_weight_is_counted_once(save):
    inventory = list_matrices(open_source(save("gpt2")))
    assert [(a.name, a.of, a.stored) for a in inventory.aliases] == [
        ("lm_head.weight", "transformer.wte.weight", False)
    ]


# --- the table itself --------------------------------------------------------------------------------------------


def test_the_table_rejects_unknown_keys():
    with pytest.raises(ValueError, match=r"role\.colour, style"):
        check_table({"role": [{"ends": "x", "colour": "red"}], "style": {}})


def test_every_fused_row_is_reachable_and_cites_its_source():
    rows = _table()["fused"]
    assert all(row["source"] and row["blocks"] in (1, 4, "heads", "kv_heads") for row in rows)
    falcon = Config({"model_type": "falcon", "new_decoder_architecture": True})
    assert find_fused("h.0.self_attention.query_key_value", falcon).blocks == "kv_heads"
    assert find_fused("h.0.self_attention.query_key_value", Config({"model_type": "gpt9"})) is None


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("afmoe", "AfmoeForCausalLM"),
        ("apertus", "ApertusForCausalLM"),
        ("beam", "BeamForCausalLM"),
        ("codegen", "CodeGenForCausalLM"),
        ("cohere2", "Cohere2ForCausalLM"),
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("glm4", "Glm4ForCausalLM"),
        ("gpt_oss", "GptOssForCausalLM"),
        ("granitemoe", "GraniteMoeForCausalLM"),
        ("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
        ("jamba", "JambaForCausalLM"),
        ("jetmoe", "JetMoeForCausalLM"),
        ("lfm2", "Lfm2ForCausalLM"),
        ("minimax_m2", "MiniMaxM2ForCausalLM"),
    ],
)
def test_other_decoders_are_fed_by_the_norms_of_the_table(monkeypatch, model_type, class_name):
    """Also the gain itself: with what is stored set to minus the offset, the norm gives nothing."""
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from tiny_models import build

    model = next(build(model_type, class_name))
    modules, seen = dict(model.named_modules()), _norms_seen(model, {"input_ids": torch.arange(1, 9)[None]})
    refs = list_matrices(open_source(model)).selected
    folded = [ref for ref in refs if ref.norm is not None]
    inside = [ref for ref in refs if ref.role in ("q", "k", "v", "gate", "up", "router", "head")]
    assert not [ref.name for ref in inside if ref.norm is None and ref.name.removesuffix(".weight") in seen]
    for ref in folded:
        norm, name = ref.norm.tensor.name.removesuffix(".weight"), ref.name.removesuffix(".weight")
        if name in seen:
            assert seen[name] == norm
        gain = modules[norm].weight
        with torch.no_grad():
            gain.fill_(-ref.norm.offset)
            given = modules[norm](torch.randn(2, len(gain)))
            bias = getattr(modules[norm], "bias", None)
        assert torch.allclose(given, torch.zeros_like(given) if bias is None else bias.expand_as(given), atol=1e-6)
    assert {ref.block for ref in folded} >= {"attention"}
    assert {ref.block for ref in folded} & {"mlp", "moe"}


@pytest.mark.parametrize(
    ("model_type", "class_name", "part", "activation"),
    [
        ("blip-2", "Blip2ForConditionalGeneration", "qformer", "gelu"),  # its configuration, of OPT, says relu
        ("gpt_oss", "GptOssForCausalLM", "experts", "quick_gelu"),  # its configuration says silu
        ("lfm2", "Lfm2ForCausalLM", "w1", "silu"),  # what the others say nowhere, or under names of their own
        ("moonshine", "MoonshineForConditionalGeneration", "decoder", "silu"),
        ("mpt", "MptForCausalLM", "ffn", "gelu"),
        ("rwkv", "RwkvForCausalLM", "key", "relu2"),
    ],
)
def test_the_activation_is_the_one_of_the_module(monkeypatch, model_type, class_name, part, activation):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from tiny_models import build

    refs = list_matrices(open_source(next(build(model_type, class_name)))).selected
    assert {ref.activation for ref in refs if part in ref.name and ref.block in ("mlp", "moe")} == {activation}


def test_of_several_activations_around_a_matrix_none_is_taken():
    mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 8), "a": nn.ReLU(), "b": nn.Tanh(), "down_proj": nn.Linear(8, 4)})
    told = list_matrices(open_source(nn.ModuleDict({"mlp": mlp})))
    assert {(ref.role, ref.activation) for ref in told.selected} == {("up", None), ("down", None)}
