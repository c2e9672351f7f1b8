"""Freeze recipes: noise has no signal, planted signal is found, and the Trainer trains just that."""

import json
import re
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from models import make

from lmd_hf import analyze, freeze, freeze_recipe
from lmd_hf.errors import SettingsError


def layers(*scales, out=64, width=64):
    """A stack of MLPs whose up matrix is noise plus a spike of this many times its edge."""
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.mlp = torch.nn.ModuleDict(
                {"up_proj": torch.nn.Linear(width, out), "down_proj": torch.nn.Linear(out, width)}
            )
            with torch.no_grad():
                for layer in self.mlp.values():
                    torch.nn.init.normal_(layer.weight, std=width**-0.5)
                    spike = torch.randn(layer.weight.shape[0], 1) @ torch.randn(1, layer.weight.shape[1])
                    layer.weight += scale * 2 * spike / spike.norm()

    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Block(scale) for scale in scales])})


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (48, 300)])
def test_noise_of_any_shape_has_next_to_no_signal(shape):
    """Where the common formula calls a quarter of a square matrix signal, and all of a long one."""
    recipe = freeze_recipe(analyze(layers(0, 0, out=shape[0], width=shape[1])))
    assert all(module.signal < 0.08 for module in recipe.modules)
    assert all(module.noise_like for module in recipe.modules)


def test_the_layers_with_a_signal_are_trained():
    model = layers(0, 3, 0, 5)
    recipe = freeze_recipe(analyze(model))
    assert [module.layer for module in recipe.modules if module.trained and module.role == "up"] == [1, 3]
    by_layer = {module.layer: module.signal for module in recipe.modules if module.role == "up"}
    assert by_layer[3] > by_layer[1] > max(by_layer[0], by_layer[2])
    counts = freeze(model, recipe)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(recipe.trained)
    assert counts == {"trained": 4 * 64 * 64, "frozen": 4 * 64 * 64 + 8 * 64}
    assert counts["trained"] == recipe.to_dict()["trained_parameters"]


def test_the_signal_is_the_share_above_the_edge():
    model = layers(4)
    module = next(m for m in freeze_recipe(analyze(model)).modules if m.role == "up")
    energies = np.linalg.svd(model.layers[0].mlp.up_proj.weight.detach().double().numpy(), compute_uv=False) ** 2
    edge = 4 * np.median(energies) / 0.652776  # (1+√β)² = 4 and the law's median at β = 1
    assert module.signal == pytest.approx(energies[energies > edge].sum() / energies.sum(), rel=1e-5)


def axolotls(pattern, name):
    """How axolotl reads a pattern: a dot is a dot unless a plus follows, matched from the beginning."""
    return re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)).match(name) is not None


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_axolotl_and_freeze_take_the_same_parameters(family, save):
    recipe = freeze_recipe(analyze(save(family)), share=0.5)
    model = make(family)
    freeze(model, recipe)
    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    theirs = {n for n, _ in model.named_parameters() if any(axolotls(p, n) for p in recipe.patterns)}
    assert ours == theirs == set(recipe.trained)
    assert recipe.to_yaml().startswith("unfrozen_parameters:\n  - ^")
    json.dumps(recipe.to_dict())


@pytest.mark.parametrize(("family", "inner"), [("gpt2", "transformer"), ("bert", "bert"), ("llama", "model")])
def test_axolotl_finds_what_a_checkpoint_of_the_inner_model_calls_otherwise(family, inner, tmp_path):
    model = make(family)
    model.base_model.save_pretrained(tmp_path)
    recipe = freeze_recipe(analyze(tmp_path))
    freeze(model, recipe)
    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ours == {f"{inner}.{name}" for name in recipe.trained}
    assert ours == {n for n, _ in model.named_parameters() if any(axolotls(p, n) for p in recipe.patterns)}
    freeze(model, recipe.patterns)
    assert ours == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("layer", [1, 10])
def test_one_layer_is_not_taken_for_another_whose_number_begins_with_its(layer):
    model = make("llama", num_hidden_layers=12)
    recipe = freeze_recipe(analyze(model))
    recipe = replace(recipe, modules=tuple(replace(m, trained=m.layer == layer) for m in recipe.modules))
    freeze(model, recipe)
    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ours == {n for n, _ in model.named_parameters() if n.startswith(f"model.layers.{layer}.") and "proj" in n}
    assert ours == {n for n, _ in model.named_parameters() if any(axolotls(p, n) for p in recipe.patterns)}


def test_shares_are_rounded_up(save):
    recipe = freeze_recipe(analyze(save("llama")), share=0.01, roles=["q"])
    assert len(recipe.trained) == 1
    assert len(freeze_recipe(analyze(save("llama")), share=1.0, roles=["q"]).trained) == 2


def test_a_share_that_is_a_whole_number_of_layers_is_that_number():
    report = analyze(
        torch.nn.ModuleDict({f"layers.{i}.q_proj".replace(".", "_"): torch.nn.Linear(8, 8) for i in range(25)})
    )
    assert len(freeze_recipe(report, share=0.28, roles=["other"]).trained) == 7


def test_only_what_was_chosen_gets_gradients():
    model = make("llama").train()
    freeze(model, ["layers.1.mlp.*"])
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }


def test_bad_requests(save):
    report = analyze(save("llama"))
    for share in (0, -1, 1.1, float("nan")):
        with pytest.raises(SettingsError, match="share is"):
            freeze_recipe(report, share=share)
    with pytest.raises(SettingsError, match="in the metric 'identity' alone"):
        freeze_recipe(analyze(save("llama"), metric="norm"))
    model = make("llama")
    asked = [p.requires_grad for p in model.parameters()]
    for patterns, message in ((["layers.9.q"], "matches no parameter"), ([], "trains nothing")):
        with pytest.raises(SettingsError, match=message):
            freeze(model, patterns)
    assert [p.requires_grad for p in model.parameters()] == asked
    with pytest.raises(SettingsError, match="matches no parameter"):
        freeze(make("gpt2"), freeze_recipe(report))
    wrapped = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SettingsError, match="wrapped by peft"):
        freeze(wrapped, freeze_recipe(report))


def test_a_quantised_parameter_takes_no_gradients():
    model = layers(1)
    layer = model.layers[0].mlp["up_proj"]
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(SettingsError, match="stored as int8 and takes no gradients"):
        freeze(model, ["up_proj.weight"])
