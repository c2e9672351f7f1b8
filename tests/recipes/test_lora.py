"""LoRA recipes: peft takes them as they are, budgets are kept, names match one module each."""

import dataclasses
import json

import numpy as np
import peft
import pytest
import torch
from models import make
from safetensors.torch import save_file
from stored import FORMATS

from lmd_hf import analyze, compare, lora_config, lora_recipe
from lmd_hf.errors import SettingsError
from lmd_hf.recipes.modules import Module
from lmd_hf.recipes.ranks import by_budget, by_energy
from lmd_hf.report.report import Report


def ranks_in(model):
    """{module: rank} of what peft has made of a configuration."""
    return {
        name.removeprefix("base_model.model."): layer.r["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "bert", "t5", "phi3", "gpt_neox", "bart", "falcon-new", "vit", "whisper", "clip"]
)
def test_peft_takes_it_as_it_is(family, save, recwarn):
    folder = save(family)
    report = analyze(folder)
    named = make(family) if family == "vit" else None  # whose checkpoints still bear the names of before transformers 5
    recipe = lora_recipe(report, budget=9_000, model=named)
    config = lora_config(report, budget=9_000, model=named)
    model = peft.get_peft_model(make(family), config)
    ranks = ranks_in(model)
    assert ranks == recipe.ranks
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == recipe.parameters
    assert 9_000 - min(m.unit for m in recipe.modules if recipe.ranks[m.name] < m.most) < trainable <= 9_000
    assert all(layer.scaling["default"] == 2 for layer in model.modules() if hasattr(layer, "lora_A"))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]


def test_the_dictionary_is_an_adapter_config(save, tmp_path):
    recipe = lora_recipe(analyze(save("gpt2")), budget=5_000)
    (tmp_path / "adapter_config.json").write_text(json.dumps(recipe.to_dict()))
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert ranks_in(peft.get_peft_model(make("gpt2"), config)) == recipe.ranks
    assert any("c_attn" in name for name in recipe.ranks)  # the fused module once, not q, k and v


def module(name, values, shape=(8, 8), rows=()):
    return Module(name, "q", 0, shape, np.array(values, dtype=float), len(values), rows)


def test_of_a_sketch_the_energy_beyond_its_leading_values_counts(save):
    row = dataclasses.replace(analyze(save("llama")).matrices[0], frobenius_norm=10.0)
    sketched = module("a", [4, 3, 0], rows=(row,))  # 25 of 100
    assert by_energy([sketched], 0.16) == {"a": 1}
    assert by_energy([sketched], 0.2) == {"a": 2}
    assert by_energy([sketched], 0.64) == {"a": 3}  # as much as is known


def test_the_next_rank_goes_where_it_adds_most():
    steep, flat = module("steep", [10, 1, 0.1, 0.1]), module("flat", [3, 3, 3, 3])
    assert by_budget([steep, flat], 16 * 4, relative=True) == {"steep": 1, "flat": 3}
    assert by_budget([steep, flat], 16 * 7, relative=False) == {"steep": 3, "flat": 4}


@pytest.mark.parametrize("budget", [40, 41, 55, 97, 160])
def test_no_other_ranks_of_that_cost_hold_more(budget):
    """Every allocation tried: none that costs as much or less adds more, up to the one rank that did not fit."""
    rng = np.random.default_rng(budget)
    modules = [
        module(str(i), np.sort(rng.exponential(size=4))[::-1], shape) for i, shape in enumerate([(4, 6), (6, 6)])
    ]
    got = by_budget(modules, budget, relative=False)
    cost = {m.name: m.unit for m in modules}
    held = {m.name: np.cumsum(m.values**2) for m in modules}
    spent = sum(got[n] * cost[n] for n in cost)
    assert spent <= budget
    best = max(
        held["0"][a - 1] + held["1"][b - 1]
        for a in range(1, 5)
        for b in range(1, 5)
        if a * cost["0"] + b * cost["1"] <= spent
    )
    left = budget - spent
    assert left < min([cost[n] for n in cost if got[n] < 4], default=np.inf)
    density = (
        max((held[n][got[n]] - held[n][got[n] - 1]) / cost[n] for n in cost if got[n] < 4)
        if min(got.values()) < 4
        else 0
    )
    assert sum(held[n][got[n] - 1] for n in cost) >= best - density * max(cost.values())


def test_energy():
    assert by_energy([module("a", [4, 3, 0])], 0.64) == {"a": 1}
    assert by_energy([module("a", [4, 3, 0])], 0.65) == {"a": 2}
    assert by_energy([module("a", [0, 0, 0])], 0.65) == {"a": 1}
    for energy in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(SettingsError, match="energy is"):
            by_energy([module("a", [1])], energy)


def test_a_comparison_gives_the_ranks_of_the_update():
    base, tuned = make("llama"), make("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for layer, rank in ((0, 2), (1, 5)):
            weight = tuned.model.layers[layer].self_attn.q_proj.weight
            weight += torch.randn(32, rank) @ torch.randn(rank, 32) / 10
    recipe = lora_recipe(compare(base, tuned), energy=1.0)
    assert recipe.ranks == {f"model.layers.{i}.self_attn.q_proj": r for i, r in ((0, 2), (1, 5))}
    assert recipe.source == "comparison"
    with pytest.raises(SettingsError, match="the same in every selected matrix"):
        lora_recipe(compare(base, base), energy=0.9)


def test_a_saved_report_gives_the_same(save, tmp_path):
    report = analyze(save("llama"))
    report.save(tmp_path)
    assert lora_recipe(Report.load(tmp_path), budget=9_000).ranks == lora_recipe(report, budget=9_000).ranks


def test_the_data_metric(tmp_path):
    from lmd_hf.weights.source import EMBEDDED_FOLDER

    (tmp_path / "texts.txt").write_text("\n".join(f"def function_{i}(x): return x + {i}" for i in range(200)))
    report = analyze(EMBEDDED_FOLDER, metric="data", data=tmp_path / "texts.txt", roles=("q", "o"))
    recipe = lora_recipe(report, budget=4_000, roles=("q", "o"))
    assert recipe.source == "data"
    assert recipe.ranks != lora_recipe(analyze(EMBEDDED_FOLDER, roles=("q", "o")), budget=4_000, roles=["q", "o"]).ranks


def test_names_of_the_model_where_they_differ(save):
    report = analyze(save("gpt_neox"))
    recipe = lora_recipe(report, budget=5_000, roles=["q", "head"], model=make("gpt_neox"))
    model = make("gpt_neox")
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert head in recipe.ranks  # embed_out in the checkpoint, and lm_head in the model of recent versions
    assert ranks_in(peft.get_peft_model(make("gpt_neox"), peft.LoraConfig(**_values(recipe)))) == recipe.ranks


def _values(recipe):
    return {k: v for k, v in recipe.to_dict().items() if k not in ("peft_type", "base_model_name_or_path")}


def test_a_name_that_ends_like_another_is_kept_apart():
    """encoder.layers.0.q_proj is the end of text.encoder.layers.0.q_proj, and peft looks at ends."""

    def block():
        return torch.nn.ModuleDict(
            {
                "layers": torch.nn.ModuleList(
                    [torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(24, 24)})})]
                )
            }
        )

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"encoder": block(), "text": torch.nn.ModuleDict({"encoder": block()})})
    report = analyze(model)
    recipe = lora_recipe(report, budget=48 * 7)
    assert ranks_in(peft.get_peft_model(model, lora_config(report, budget=48 * 7))) == recipe.ranks
    assert len(recipe.ranks) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "below one rank for each of the 14 modules"),
        ({"budget": 900}, "below one rank"),
        ({}, "either a budget"),
        ({"budget": 9_000, "energy": 0.9}, "either a budget"),
        ({"energy": 0.0}, "energy is 0"),
        ({"budget": 9000, "scale": 0}, "scale is 0"),
        ({"budget": 9000, "roles": ["nose"]}, "no role 'nose'"),
        ({"budget": 9000, "roles": ["router"]}, "no matrix of the roles router"),
    ],
)
def test_bad_requests(save, options, message):
    with pytest.raises(SettingsError, match=message):
        lora_recipe(analyze(save("llama")), **options)


def test_tied_embeddings_are_refused(save):
    with pytest.raises(SettingsError, match="tied"):
        lora_recipe(analyze(save("gpt2")), budget=9_000, roles=["embed"])
    assert lora_recipe(analyze(save("llama")), budget=9_000, roles=["embed", "head"]).parameters <= 9_000


def test_a_wrapped_model_is_refused():
    wrapped = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SettingsError, match="wrapped by peft already"):
        lora_recipe(analyze(wrapped), budget=9_000)
    with pytest.raises(SettingsError, match="wrapped by peft already"):
        lora_recipe(analyze(make("llama")), budget=9_000, model=wrapped)


def test_experts_are_left_out_with_the_reason(save):
    recipe = lora_recipe(analyze(save("mixtral")), budget=4_000)
    assert all("self_attn" in name for name in recipe.ranks)
    assert any("experts" in name for name in recipe.left_out)


@pytest.mark.parametrize(("kind", "tensor"), [("gptq, 4 bits", "qweight"), ("fp8, rows", "weight"), ("awq", "qweight")])
def test_a_quantised_base_keeps_its_module_names(tmp_path, kind, tensor):
    torch.manual_seed(0)
    stored = {
        f"model.layers.{i}.self_attn.q_proj.{name}": value.contiguous()
        for i in range(2)
        for name, value in FORMATS[kind](torch.randn(128, 128))[0].items()
    }
    assert any(name.endswith(tensor) for name in stored)
    save_file(stored, tmp_path / "model.safetensors")
    ranks = lora_recipe(analyze(tmp_path), budget=256 * 5).ranks
    assert sorted(ranks) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert sum(ranks.values()) == 5
