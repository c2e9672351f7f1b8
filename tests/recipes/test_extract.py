"""Extraction: peft loads what was written, and the logits are the tuned model's within the certificate."""

import json
import math

import peft
import pytest
import torch
import transformers
from models import inputs, make
from safetensors.torch import load_file, save_file
from stored import FORMATS

from lmd_hf import analyze, extract
from lmd_hf.errors import SettingsError
from lmd_hf.weights.source import EMBEDDED_FOLDER


def update(model, ranks, scale=0.05, seed=0):
    """Add a product of random factors of these ranks to the weights whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rank = next((r for end, r in ranks.items() if name.endswith(f"{end}.weight")), 0)
            if rank:
                left = torch.randn(parameter.shape[0], rank, generator=generator)
                parameter += scale * left @ torch.randn(rank, parameter.shape[1], generator=generator)
    return model


def logits(model, family):
    with torch.no_grad():
        return model.eval()(**inputs(family)).logits


RANKS = {
    "llama": {"q_proj": 2, "down_proj": 3, "0.mlp.up_proj": 5, "lm_head": 4, "embed_tokens": 3},
    "gpt2": {"c_attn": 4, "c_fc": 3, "mlp.c_proj": 2},
    "phi3": {"qkv_proj": 4, "gate_up_proj": 2},
    "bert": {"query": 3, "intermediate.dense": 2},
    "gpt_neox": {"query_key_value": 3, "dense_4h_to_h": 2},
    "bart": {"q_proj": 2, "fc1": 3},
}


@pytest.mark.parametrize("family", RANKS)
def test_peft_loads_it_and_the_logits_are_those_of_the_tuned_model(family, tmp_path):
    base, tuned = make(family), update(make(family), RANKS[family])
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make(family), tmp_path / "adapter")
    before, wanted, got = (logits(model, family) for model in (base, tuned, loaded))
    assert (before - wanted).abs().max() > 1e-2
    assert (got - wanted).abs().max() < 1e-4
    assert made.left_out == {}
    changed = {
        n.removesuffix(".weight")
        for n, p in tuned.named_parameters()
        if not torch.equal(p, dict(base.named_parameters())[n])
    }
    ranks = {module.module: module.rank for module in made.modules}
    assert set(ranks) == changed
    for name, rank in ranks.items():
        assert rank == next(r for end, r in RANKS[family].items() if name.endswith(end))
    assert made.parameters == sum(
        t.numel() for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    )
    assert len(analyze(tmp_path / "adapter").matrices) == len(made.modules)  # and lmd_hf reads it


@pytest.mark.parametrize("live", [True, False])
def test_positions_that_are_looked_up_in_a_way_of_their_own_are_left_out(live, tmp_path):
    """OPT computes its positions from the mask; peft would look its update up by the mask itself, and fails."""
    base, tuned = make("opt"), update(make("opt"), {"embed_positions": 2, "q_proj": 2, "embed_tokens": 2})
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    pair = (base, tuned) if live else (tmp_path / "base", tmp_path / "tuned")
    made = extract(*pair, tmp_path / "adapter")
    ((name, reason),) = made.left_out.items()
    assert name.endswith("decoder.embed_positions.weight")
    assert "peft would take those" in reason
    logits(peft.PeftModel.from_pretrained(make("opt"), tmp_path / "adapter"), "opt")


def test_the_certificate_is_true(tmp_path):
    base, tuned = make("llama"), make("llama", seed=1)
    made = extract(base, tuned, tmp_path, rank=4)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights = [dict(model.named_parameters()) for model in (base, tuned)]
    checked = 0
    for each in made.modules:
        delta = (weights[1][f"{each.module}.weight"].double() - weights[0][f"{each.module}.weight"].double()).detach()
        if "embed" in each.module:
            a, b = (tensors[f"base_model.model.{each.module}.lora_embedding_{side}"].double() for side in "AB")
            product = (b @ a).T
        else:
            a, b = (tensors[f"base_model.model.{each.module}.lora_{side}.weight"].double() for side in "AB")
            product = b @ a
        assert each.rank == 4
        missing = torch.linalg.svdvals(delta - product)
        assert each.error == pytest.approx(float(missing.norm()), rel=1e-6)
        assert missing[0] <= each.residual_norm * (1 + 1e-9)
        best = torch.linalg.svdvals(delta)[4:].norm()
        assert best * (1 - 1e-9) <= each.error <= best * (1 + 1e-4)
        checked += 1
    assert checked == 16
    assert json.loads((tmp_path / "lmd_extract.json").read_text())["modules"][0]["error"] == made.modules[0].error


def test_more_ranks_are_nearer(tmp_path):
    base, tuned = make("llama"), update(make("llama"), {"o_proj": 12}, scale=0.3)
    tuned_logits = logits(tuned, "llama")
    distances = []
    for rank in (1, 4, 12):
        extract(base, tuned, tmp_path / str(rank), rank=rank)
        loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path / str(rank))
        distances.append(float((logits(loaded, "llama") - tuned_logits).norm()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-4


def test_energy_chooses_ranks(tmp_path):
    base, tuned = make("llama"), make("llama", seed=1)
    made = extract(base, tuned, tmp_path, energy=0.5)
    for module in made.modules:
        pays = module.shape[0] * module.shape[1] // sum(module.shape)
        assert module.relative_error <= math.sqrt(0.5) + 1e-6 or module.rank == pays
    assert len({module.rank for module in made.modules}) > 1


def test_the_sketch_is_as_near(tmp_path):
    torch.manual_seed(0)
    base = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(900, 800)})])}
    )
    tuned = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(900, 800)})])}
    )
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.layers[0].q_proj.weight += torch.randn(800, 6) @ torch.randn(6, 900) / 100
    errors = [extract(base, tuned, tmp_path / k, kernel=k).modules[0].relative_error for k in ("exact", "sketch")]
    assert max(errors) < 1e-6


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_tied_head_goes_with_its_embedding(family, tmp_path):
    base, tuned = make(family), update(make(family), {"wte": 3}, scale=0.02)
    made = extract(base, tuned, tmp_path)
    assert [module.module for module in made.modules] == ["transformer.wte"]
    loaded = peft.PeftModel.from_pretrained(make(family), tmp_path)
    assert (logits(loaded, family) - logits(tuned, family)).abs().max() < 1e-4
    assert (logits(base, family) - logits(tuned, family)).abs().max() > 1e-2


def test_what_an_adapter_cannot_hold_is_left_out_by_name(tmp_path):
    base, tuned = make("llama"), update(make("llama"), {"q_proj": 2})
    with torch.no_grad():
        tuned.model.norm.weight[3] += 0.5
    made = extract(base, tuned, tmp_path)
    assert list(made.left_out) == ["model.norm.weight"]
    assert "changed by up to 0.5" in made.left_out["model.norm.weight"]


def test_experts_are_left_out(save, tmp_path):
    make("mixtral", seed=1).save_pretrained(tmp_path / "tuned")
    made = extract(save("mixtral"), tmp_path / "tuned", tmp_path / "out", rank=2)
    assert any("experts" in name for name in made.left_out)
    assert any("q_proj" in module.module for module in made.modules)


def test_a_quantised_base_is_dequantised_with_a_word(tmp_path):
    torch.manual_seed(0)
    tensors, meant = FORMATS["gptq, 4 bits"](torch.randn(128, 128))
    stored = {f"model.layers.0.self_attn.q_proj.{name}": value.contiguous() for name, value in tensors.items()}
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    save_file(stored, tmp_path / "base" / "model.safetensors")
    change = torch.randn(128, 2).double() @ torch.randn(2, 128).double()
    save_file({"model.layers.0.self_attn.q_proj.weight": meant + change}, tmp_path / "tuned" / "model.safetensors")
    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert "dequantised from gptq" in made.notes[-1]
    assert made.modules[0].relative_error < 0.01


def test_rounding_alone_is_no_difference(tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER)
    with pytest.raises(SettingsError, match="nothing to extract"):
        extract(base, EMBEDDED_FOLDER, tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float16)
    with pytest.raises(SettingsError, match="nothing to extract"):
        extract(base, half, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"kernel": "fast"}, "no kernel 'fast'"),
    ],
)
def test_bad_requests(options, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        extract(make("llama"), make("llama", seed=1), tmp_path, **options)


def test_an_adapter_in_place_of_a_model_is_refused(tmp_path):
    wrapped = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    for given in (wrapped, tmp_path / "adapter"):
        with pytest.raises(SettingsError, match="is an adapter"):
            extract(make("llama"), given, tmp_path / "out")
