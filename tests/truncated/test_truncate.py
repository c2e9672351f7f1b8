"""What truncate makes: the right matrices, in the right metric, of the right size; and what it refuses."""

from dataclasses import replace

import models
import pytest
import torch
from transformers.pytorch_utils import Conv1D

import lmd_hf
from lmd_hf import LMDLinear, cli, decompose, truncate
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.matrix.metrics import dense, norm
from lmd_hf.records import Data
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


def weight(model, path):
    module = model.get_submodule(path)
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().double()


def logits(model, family):
    with torch.no_grad():
        return model(**models.inputs(family)).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", "qwen3_moe", "opt-post-norm", "bart"])
def test_the_layers_hold_the_best_matrix_of_their_rank_and_the_model_is_that_of_its_merge(family):
    model = models.make(family)
    before = logits(model, family)
    found = truncate(model, rank=5)
    assert found.truncation.layers
    for layer in found.truncation.layers:
        held, w = found.model.get_submodule(layer.name), weight(model, layer.name)
        assert isinstance(held, LMDLinear)
        torch.testing.assert_close(held.weight.double(), decompose(w, rank=5).reconstruct(), rtol=1e-4, atol=1e-5)
        assert (held.bias is None) == (model.get_submodule(layer.name).bias is None)
    torch.testing.assert_close(logits(found.merge(), family), logits(found, family), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(model, family), before, rtol=0, atol=0)  # the one given stays as it is
    assert (logits(found, family) - before).abs().max() > 1e-3
    assert {type(m) for m in found.merge().modules()} == {type(m) for m in model.modules()}


def test_the_size_is_what_was_asked_for(base):
    for ratio in (0.9, 0.5, 0.1):
        record = truncate(base, ratio=ratio).truncation
        assert ratio - 0.01 <= record.selected[1] / record.selected[0] <= ratio
        assert record.parameters[0] - record.parameters[1] == record.selected[0] - record.selected[1]
    found = truncate(base, ratio=0.5)
    assert sum(p.numel() for p in found.parameters()) == found.truncation.parameters[1]


def test_energy_and_rank_hold_in_every_layer(base):
    found = truncate(base, energy=0.8).truncation
    assert all(0.8 <= layer.energy < 0.9 for layer in found.layers)
    record = truncate(base, rank=40).truncation
    assert {layer.rank for layer in record.layers} == {40}
    whole = {skipped.name for skipped in truncate(base, rank=60).truncation.left}
    assert "model.layers.0.self_attn.k_proj.weight" in whole  # 64 × 128 is smaller than 60 axes


def test_roles_select_and_a_tied_embedding_is_left_with_its_reason(base):
    record = truncate(base, ratio=0.5, roles=("q", "embed")).truncation
    assert {layer.role for layer in record.layers} == {"q"}
    assert {s.name: s.reason for s in record.left}["model.embed_tokens.weight"] == "is looked up, not multiplied"
    untied = models.make("llama", tie_word_embeddings=False)
    assert "lm_head" in {layer.name for layer in truncate(untied, rank=4).truncation.layers}
    t5 = truncate(models.make("t5"), rank=4)
    assert t5.model.get_input_embeddings().weight is t5.model.lm_head.weight


def test_a_fused_projection_is_cut_as_a_whole_or_not_at_all():
    model = models.make("gpt2")
    assert "transformer.h.0.attn.c_attn" in {layer.name for layer in truncate(model, rank=4).truncation.layers}
    with pytest.raises(SettingsError, match=r"one of several in a fused projection; select all of them \(q, k, v\)"):
        truncate(model, rank=4, roles=("q",))


def test_the_norm_metric_is_that_of_the_gain(base):
    found = truncate(base, rank=10, metric="norm")
    gain = base.model.layers[1].post_attention_layernorm.weight.detach()
    best = decompose(weight(base, "model.layers.1.mlp.up_proj"), input_metric=norm(gain), rank=10)
    held = found.model.get_submodule("model.layers.1.mlp.up_proj")
    torch.testing.assert_close(held.weight.double(), best.reconstruct(), rtol=1e-4, atol=1e-5)
    metrics = {layer.role: layer.metric for layer in found.truncation.layers}
    assert metrics["up"] == "norm"
    assert metrics["down"] == "identity"


def moments(model, path, data):
    """Second moments and mean of a module's inputs, by running it."""
    rows = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, __: rows.append(args[0].flatten(0, -2)))
    ids = torch.tensor([__import__("json").loads(line)["input_ids"] for line in data.read_text().splitlines()])
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    x = torch.cat(rows).double()
    return x.T @ x / len(x), x.mean(0)


@pytest.mark.parametrize(
    ("family", "path"), [("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")]
)
def test_in_the_metric_of_data_the_outputs_have_the_least_error_and_their_mean_stays(family, path, texts):
    model = models.make(family)
    data = Data(str(texts / "ids.jsonl"), seq_len=16)
    found = truncate(model, rank=6, metric="data", data=data)
    second, mean = moments(model, path, texts / "ids.jsonl")
    held, w = found.model.get_submodule(path), weight(model, path)
    if held.bias is not None:  # about the mean, and the bias takes up what that leaves
        second = second - torch.outer(mean, mean)
        old = model.get_submodule(path)
        torch.testing.assert_close(held(mean.float()), old(mean.float()), rtol=1e-4, atol=1e-4)
    best = decompose(w, input_metric=dense(second), rank=6)
    off = w - held.weight.double()
    assert (off @ second @ off.T).trace().sqrt().item() == pytest.approx(best.error_bound, rel=1e-4)
    plain = w - decompose(w, rank=6).reconstruct()
    assert (plain @ second @ plain.T).trace().sqrt().item() > 1.02 * best.error_bound


def test_the_metric_of_neighbours_is_another_one_and_counts_the_axes_all_the_same(texts):
    model = models.make("llama")
    found = [
        truncate(model, rank=6, metric="data", data=Data(str(texts / "ids.jsonl"), seq_len=16, graph=graph))
        for graph in ("complete", "knn")
    ]
    assert [layer.rank for layer in found[0].truncation.layers] == [layer.rank for layer in found[1].truncation.layers]
    weights = [each.model.model.layers[1].mlp.up_proj.weight for each in found]
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_fisher_information_predicts_the_divergence_of_a_small_error(texts):
    """½ E[δᵀFδ] of one layer's error beside the divergence of the predictions that it makes."""
    from lmd_hf.run.batches import load_batches
    from lmd_hf.run.loading import Origin
    from lmd_hf.truncated.fisher import output_gradients

    model, path = models.make("llama").double(), "model.layers.0.mlp.down_proj"
    batches = load_batches(model, Origin("none"), Data(str(texts / "ids.jsonl"), seq_len=16))
    fisher = output_gradients(model, batches, {path: 32}, whole=True, limit=1e9)[path]
    number = output_gradients(model, batches, {path: 32}, whole=False, limit=1e9)[path]
    assert number.item() == pytest.approx(fisher.diagonal().mean().item(), rel=1e-6)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    ids = torch.cat([batches[i]["input_ids"] for i in range(len(batches))])
    shift = 1e-4 * torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        before = model(input_ids=ids).logits.double().log_softmax(-1)
        handle = model.get_submodule(path).register_forward_hook(
            lambda _, __, y: y + shift * torch.randn(*y.shape[:2], 1, generator=torch.Generator().manual_seed(1))
        )
        after = model(input_ids=ids).logits.double().log_softmax(-1)
        handle.remove()
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    assert (shift @ fisher @ shift / 2).item() == pytest.approx(divergence, rel=0.35)


def test_fisher_needs_predictions(texts):
    from transformers import BertModel

    plain = BertModel(models.make("bert").config)
    with pytest.raises(SettingsError, match="BertModel gives no logits"):
        truncate(plain, rank=4, metric="fisher", data=Data(str(texts / "ids.jsonl"), seq_len=16))
    record = truncate(plain, ratio=0.5, metric="data", data=Data(str(texts / "ids.jsonl"), seq_len=16)).truncation
    assert {layer.metric for layer in record.layers} == {"data"}


@pytest.mark.slow
def test_on_held_out_text_data_beats_the_weights_and_fisher_beats_data(texts, base):
    data = Data(str(texts / "code.jsonl"), seq_len=64)
    losses = {}
    for metric in ("identity", "data", "fisher"):
        given = None if metric == "identity" else replace(data, dataset=str(EMBEDDED_FOLDER / "README.md"))
        given = None if metric == "identity" else data
        made = truncate(EMBEDDED_ID, ratio=0.6, metric=metric, data=given, evaluate=data)
        losses[metric] = made.truncation.loss.after
    assert made.truncation.loss.before < losses["fisher"] < losses["data"] < losses["identity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; a layer keeps one axis or more"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"ratio": 0.0}, "ratio is 0.0; it is a share, so give a number between 0 and 1"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({}, "give one of ratio, energy and rank; given: none"),
        ({"ratio": 0.5, "rank": 3}, "given: rank, ratio"),
        ({"ratio": 0.001}, "parameters are too few: one axis in each of 28 matrices takes"),
        ({"rank": 10**6}, "no layer gets smaller with rank 1e"),
        ({"rank": 4, "metric": "nonsense"}, "no metric 'nonsense'; known: identity, norm, data, fisher"),
        ({"rank": 4, "metric": "data"}, "the metric 'data' needs a dataset"),
        ({"rank": 4, "data": "texts.txt"}, "a dataset is for the metric 'data'"),
        ({"rank": 4, "roles": ("nonsense",)}, "no role 'nonsense'"),
        ({"rank": 4, "roles": ("embed",)}, "no matrix can be factorised: 'model.embed_tokens.weight' is looked up"),
    ],
)
def test_bad_values_are_refused_in_one_line(base, options, message):
    with pytest.raises(SettingsError, match=message) as caught:
        truncate(base, **options)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(m, LMDLinear) for m in base.modules())


def test_peft_quantised_and_offloaded_models_are_refused(save, tmp_path):
    import json

    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(models.make("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for each in (wrapped, wrapped.base_model.model):
        with pytest.raises(SettingsError, match="peft has put adapters into it; merge it"):
            truncate(each, rank=2)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SourceError, match="merge it into its base"):
        truncate(tmp_path / "adapter", rank=2)
    folder = tmp_path / "quantised"
    folder.mkdir()
    for path in save("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(SettingsError, match=r"quantised \('gptq'\); truncate the model in its full precision"):
        truncate(folder, rank=2)
    with torch.device("meta"):
        empty = models.make("llama") if False else type(models.make("llama"))(models.make("llama").config)
    with pytest.raises(SettingsError, match="on the meta device or offloaded"):
        truncate(empty, rank=2)
    with pytest.raises(SourceError, match="no such folder"):
        truncate(str(tmp_path / "none"), rank=2)


def test_a_truncated_model_is_merged_before_it_is_truncated_again():
    found = truncate(models.make("llama"), rank=6)
    with pytest.raises(SettingsError, match="hold factors already; merge"):
        truncate(found, rank=4)
    assert truncate(found.merge(), rank=4).truncation.layers[0].energy < 1


def test_a_truncated_folder_says_how_to_merge_it(saved, capsys):
    told = "a truncated model, whose layers hold factors; give the folder that LMDModel.from_pretrained"
    with pytest.raises(SourceError, match=told):
        truncate(saved, rank=4)
    for recipe in (("lora", "--budget", "9000"), ("freeze",)):
        assert cli.run(["recipe", *recipe, str(saved)]) == 1
        assert told in capsys.readouterr().err


def test_where_nothing_can_be_factorised_the_commonest_reason_is_told():
    told = r"query_key_value.weight' is applied by no plain linear layer \(FalconLinear\) \(8 of 9 matrices\)"
    with pytest.raises(SettingsError, match=told):
        truncate(models.make("falcon-mqa"), rank=2)


def test_a_layer_with_nan_is_named():
    model = models.make("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SettingsError, match=r"'model.layers.0.mlp.up_proj.weight': .*not finite; leave it out"):
        truncate(model, rank=2)


def test_the_names_are_public():
    assert lmd_hf.truncate is truncate
    assert lmd_hf.LMDLinear is LMDLinear
