"""Which matrices of two models are the same one: names, prefixes, places, ties, vocabularies. From headers alone."""

import re
from collections import Counter

import models
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmd_hf.errors import SettingsError
from lmd_hf.records import Settings
from lmd_hf.run.pairs import match
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


ALL = Settings()


def inventory(model):
    return list_matrices(open_source(model))


def kinds(matching):
    return Counter(pair.matched for pair in matching.pairs)


def alone(matching):
    return {(item.side, item.name): item.reason for item in matching.unmatched}


@pytest.fixture
def rename(save, tmp_path):
    """A function (family, function of a name, config) → folder of the model with its tensors renamed."""

    def make(family, change, config=True):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        tensors = load_file(save(family) / "model.safetensors")
        save_file({change(name): value for name, value in tensors.items()}, folder / "model.safetensors")
        if config:
            (folder / "config.json").write_bytes((save(family) / "config.json").read_bytes())
        return folder

    return make


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_a_model_and_itself_pair_completely(save, family):
    same = inventory(save(family))
    matching = match(same, same, ALL)
    assert [(p.base, p.tuned, p.matched) for p in matching.pairs] == [(ref, ref, "name") for ref in same.selected]
    assert alone(matching) == {}
    assert len(matching.vectors) == sum(item.reason == "vector" for item in same.skipped)


def test_an_adapter_is_compared_with_an_adapter_alone(save, tmp_path):
    """Its rows are ΔW, and W − ΔW says nothing of what was tuned."""
    wrapped = peft.get_peft_model(models.make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    for adapter in (tmp_path, wrapped):
        for pair in ((save("llama"), adapter), (adapter, save("llama"))):
            with pytest.raises(SettingsError, match="is an adapter, or wrapped by one"):
                match(*map(inventory, pair), ALL)
        assert match(inventory(adapter), inventory(adapter), ALL).pairs


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "t5", "whisper", "vit"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module."])
def test_a_wrapper_s_prefix_is_seen_through(save, rename, family, prefix):
    """Encoder and decoder of T5 and Whisper hold the same names: only the prefix that explains most is right."""
    base, wrapped = inventory(save(family)), inventory(rename(family, lambda name: prefix + name, config=False))
    for one, other, strip in ((base, wrapped, True), (wrapped, base, False)):
        matching = match(one, other, ALL)
        assert set(kinds(matching)) == {"prefix"}
        assert len(matching.pairs) == len(base.selected)
        for pair in matching.pairs:
            names = (pair.base.name, pair.tuned.name) if strip else (pair.tuned.name, pair.base.name)
            assert names[1] == prefix + names[0]
        assert alone(matching) == {}


def test_a_body_without_its_head_pairs_with_the_whole(save):
    whole = models.make("gpt2")
    matching = match(inventory(save("gpt2")), inventory(whole.transformer), ALL)
    assert kinds(matching) == {"prefix": 14}
    assert all(pair.base.name == f"transformer.{pair.tuned.name}" for pair in matching.pairs)
    assert len(matching.vectors) == 18
    assert alone(matching) == {}


def test_a_language_model_pairs_with_its_part_of_a_larger_one(save, rename):
    """Another tower has the same names and shapes; the embeddings decide which prefix is meant."""
    base = inventory(save("llama"))
    inner = rename("llama", lambda name: name.replace("model.", "model.language_model.", 1), config=False)
    tensors = load_file(inner / "model.safetensors")
    tower = {
        name.replace("language_model", "vision_model"): value.clone()
        for name, value in tensors.items()
        if "layers" in name
    }
    save_file({**tensors, **tower}, inner / "model.safetensors")
    matching = match(base, inventory(inner), ALL)
    assert len(matching.pairs) == 16
    assert all("vision" not in pair.tuned.name for pair in matching.pairs)
    assert sum("vision" in name for _, name in alone(matching)) == len(tower)


def test_fused_and_split_projections_pair_by_place(save, tmp_path):
    """Phi-3 stores q, k, v in one tensor and gate, up in another; the same matrices under LLaMA's names."""
    tensors = load_file(save("phi3") / "model.safetensors")
    split = {}
    for name, value in tensors.items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", value.split([32, 16, 16]), strict=True):
                split[name.replace("qkv_proj", f"{part}_proj")] = rows.clone()
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                split[name.replace("gate_up_proj", f"{part}_proj")] = rows.clone()
        else:
            split[name] = value
    save_file(split, tmp_path / "model.safetensors")
    matching = match(inventory(save("phi3")), inventory(tmp_path), ALL)
    assert kinds(matching) == {"name": 6, "place": 10}
    for pair in matching.pairs:
        assert (pair.base.layer, pair.base.role) == (pair.tuned.layer, pair.tuned.role)
    assert alone(matching) == {}


def test_stacked_experts_pair_with_single_ones(save):
    matching = match(inventory(save("mixtral")), inventory(models.make("mixtral")), ALL)
    assert len(matching.pairs) == 30
    for pair in matching.pairs:
        if pair.tuned.expert is not None:
            assert f"experts.{pair.tuned.expert}." in pair.base.name
    assert alone(matching) == {}


def test_a_tied_head_pairs_with_a_stored_one(save):
    """An embedding is read (d × V), the head (V × d): the tied one is the embedding the other way round."""
    tied, untied = inventory(save("gpt2")), inventory(models.make("gpt2", tie_word_embeddings=False))
    for base, tuned, side in ((tied, untied, "base"), (untied, tied, "tuned")):
        matching = match(base, tuned, ALL)
        head = matching.pairs[-1]
        assert (head.base.name, head.tuned.name, head.tied) == ("lm_head.weight", "lm_head.weight", side)
        assert head.base.shape == head.tuned.shape == (models.V, models.H)
        stored = head.base if side == "base" else head.tuned
        assert stored.tensors[0].name == "transformer.wte.weight"
        assert sum(pair.tied != "" for pair in matching.pairs) == 1
        assert alone(matching) == {}
    assert len(match(tied, tied, ALL).pairs) == 14  # tied in both: one matrix, not two


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5-gated"])
def test_a_resized_vocabulary_is_compared_over_its_common_tokens(save, family):
    larger = models.make(family, vocab_size=models.V + 7)
    for base, tuned in ((save(family), larger), (larger, save(family))):
        matching = match(inventory(base), inventory(tuned), ALL)
        shapes = {pair.shape for pair in matching.pairs if pair.base.shape != pair.tuned.shape}
        assert (models.H, models.V) in shapes
        assert shapes <= {(models.H, models.V), (models.V, models.H)}
        assert {name for _, name in alone(matching)} <= {"cls.predictions.bias", "cls.predictions.decoder.bias"}


def test_classes_are_no_vocabulary(save):
    """Heads for two and for three labels are two heads: their rows do not correspond."""
    import transformers as t

    config = {k: v for k, v in models.BERT.items() if k != "type_vocab_size"}
    two, three = (t.BertForSequenceClassification(t.BertConfig(**config, num_labels=n)) for n in (2, 3))
    matching = match(inventory(two), inventory(three), ALL)
    assert alone(matching) == {
        ("base", "classifier.weight"): "the shape differs: 3 × 32 in the tuned model",
        ("tuned", "classifier.weight"): "the shape differs: 2 × 32 in the base model",
        ("base", "classifier.bias"): "a vector with no partner",
        ("tuned", "classifier.bias"): "a vector with no partner",
    }


def test_what_has_no_partner_is_listed_with_the_reason(save, rename):
    shorter = inventory(models.make("llama", num_hidden_layers=1))
    matching = match(inventory(save("llama")), shorter, ALL)
    missing = {name for (side, name) in alone(matching) if side == "base"}
    assert missing == {t.name for t in open_source(save("llama")).tensors if ".layers.1." in t.name}
    assert set(alone(matching).values()) == {"no partner in the tuned model", "a vector with no partner"}
    assert len(matching.pairs) == 9


def test_what_one_side_cannot_read_is_said(save, tmp_path):
    tensors = load_file(save("llama") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].reshape(2, -1, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    found = alone(match(inventory(save("llama")), inventory(tmp_path), ALL))
    assert found[("base", name)] == "skipped in the tuned model: a tensor of 3 axes with no rule to read it"
    assert found[("tuned", name)] == "a tensor of 3 axes with no rule to read it"


def test_nothing_is_paired_that_fits_two_partners(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, names in ((one, ["a.lm_head.weight"]), (two, ["b.lm_head.weight", "c.lm_head.weight"])):
        folder.mkdir()
        save_file({name: torch.randn(9, 5) for name in names}, folder / "model.safetensors")
    matching = match(inventory(one), inventory(two), ALL)
    assert matching.pairs == ()
    assert set(alone(matching)) == {
        ("base", "a.lm_head.weight"),
        ("tuned", "b.lm_head.weight"),
        ("tuned", "c.lm_head.weight"),
    }


def test_one_name_may_be_stored_either_way_round(save, tmp_path):
    """Other GPT-2 code uses GPT-2's names for plain linear layers: each side is read as its own shapes tell."""
    tensors = load_file(save("gpt2") / "model.safetensors")
    plain = {
        name: value.T.contiguous() if re.search(r"(c_attn|c_proj|c_fc)\.weight", name) else value
        for name, value in tensors.items()
    }
    save_file(plain, tmp_path / "model.safetensors")
    pairs = {p.base.name: p for p in match(inventory(save("gpt2")), inventory(tmp_path), ALL).pairs}
    for leaf in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        pair = pairs[f"transformer.h.0.{leaf}.weight"]
        assert (pair.base.transposed, pair.tuned.transposed) == (True, False)


def test_a_selection_selects_pairs(save):
    base = inventory(save("llama"))
    matching = match(base, base, Settings(roles=("q", "down"), layers="-1"))
    assert [(p.base.role, p.base.layer) for p in matching.pairs] == [("q", 1), ("down", 1)]
    assert matching.vectors == matching.unmatched == ()
    for bad, message in (
        (Settings(roles=("qq",)), "no role 'qq'"),
        (Settings(match="nothing*"), "the selection leaves no matrix"),
        (Settings(metric="norm"), "identity metric"),
    ):
        with pytest.raises(SettingsError, match=message):
            match(base, base, bad)
