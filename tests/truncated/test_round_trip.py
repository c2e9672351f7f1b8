"""To disk, to the Hub and back: the same logits, small, with a card that tells what was done."""

import json
import subprocess
import sys
from dataclasses import replace

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmd_hf import LMDModel, truncate
from lmd_hf.errors import FormatError, OutputError, SettingsError, SourceError
from lmd_hf.truncated.card import card_text
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


IDS = torch.arange(3, 63).reshape(2, 30)
FRESH = """
import sys, torch, lmd_hf
model = lmd_hf.LMDModel.from_pretrained(sys.argv[1])
torch.save(model(input_ids=torch.arange(3, 63).reshape(2, 30)).logits.detach(), sys.argv[2])
"""


def test_a_fresh_process_loads_the_same_logits(small, saved, tmp_path):
    subprocess.run([sys.executable, "-c", FRESH, saved, tmp_path / "logits"], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits"), small(input_ids=IDS).logits)
    before, after = ((folder / "model.safetensors").stat().st_size for folder in (EMBEDDED_FOLDER, saved))
    assert after / before == pytest.approx(small.truncation.parameters[1] / small.truncation.parameters[0], rel=0.01)
    assert {value.dtype for value in load_file(saved / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "vit", "qwen3_moe", "bart", "whisper", "clip"])
def test_families_come_back(family, tmp_path):
    found = truncate(models.make(family), rank=4)
    found.save_pretrained(tmp_path)
    again = LMDModel.from_pretrained(tmp_path)
    assert again.truncation == found.truncation
    first, second = (each(**models.inputs(family)) for each in (found, again))
    for name in ("logits", "text_embeds", "image_embeds"):
        if getattr(first, name, None) is not None:
            torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-6, atol=1e-6)
    assert not again.training


def test_the_rest_of_the_model_is_there_too(saved):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = LMDModel.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    answer = model.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=3)
    assert answer.shape[1] > 3
    assert model.config.model_type == "llama"
    with pytest.raises(ValueError, match="model_type"):  # never layers filled with noise
        AutoModelForCausalLM.from_pretrained(saved)


def test_options_that_are_not_taken_are_refused(saved):
    with pytest.raises(SettingsError, match=r"no option device_map, dtype; known: revision.* Move what is loaded"):
        LMDModel.from_pretrained(saved, dtype=torch.bfloat16, device_map="cpu")
    assert LMDModel.from_pretrained(saved, local_files_only=True).truncation.layers


def test_what_any_tokenizer_or_processor_needs_comes_along(tmp_path):
    base = tmp_path / "base"
    models.make("llama").save_pretrained(base)
    names = {"source.spm", "target.spm", "vocab.json", "bpe.codes", "dict.txt", "entity_vocab.json", "normalizer.json",
             "tekken.json", "video_preprocessor_config.json", "additional_chat_templates/rag.jinja"}  # fmt: skip
    (base / "additional_chat_templates").mkdir()
    for name in names:
        (base / name).write_text("{}")
    for number in range(2):  # of the base, and of what was made of it
        model = LMDModel.from_pretrained(tmp_path / "0") if number else truncate(base, rank=3)
        model.save_pretrained(tmp_path / str(number))
    assert names <= {path.relative_to(tmp_path / "1").as_posix() for path in (tmp_path / "1").rglob("*.*")}


def test_a_merged_model_is_one_of_transformers_and_loads_as_such(small, tmp_path):
    from transformers import AutoModelForCausalLM

    dense = small.merge()
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(input_ids=IDS).logits, dense(input_ids=IDS).logits)
    assert sum(p.numel() for p in again.parameters()) == small.truncation.parameters[0]


def test_the_card_claims_what_was_measured_and_no_more(saved, small, texts, tmp_path):
    card = (saved / "README.md").read_text()
    assert "library_name: lmd-hf" in card
    assert f"base_model: {EMBEDDED_ID}" in card
    assert "license: apache-2.0" in card
    assert "was not measured" in card
    before, after = small.truncation.parameters
    assert f"{before:,} → {after:,}" in card
    made = truncate(EMBEDDED_ID, ratio=0.8, evaluate=texts / "code.jsonl")
    loss = made.truncation.loss
    assert loss.before < loss.after
    text = str(made.generate_model_card())
    assert f"**{loss.before:.4f}** before, **{loss.after:.4f}** after" in text
    assert "not measured" not in text
    assert str(texts) not in text  # no path of this machine
    local = truncate(EMBEDDED_FOLDER, rank=3)
    local.save_pretrained(tmp_path)
    for name in ("README.md", "config.json"):
        written = (tmp_path / name).read_text()
        assert "base_model:" not in written
        assert str(EMBEDDED_FOLDER) not in written


@pytest.mark.parametrize(
    ("target", "shown"), [({"energy": 0.9999}, "99.99% of"), ({"ratio": 0.625}, "62.5% of"), ({"ratio": 0.7}, "70% of")]
)
def test_the_card_tells_the_goal_as_it_was_given(small, target, shown):
    assert f" {shown} " in card_text(replace(small.truncation, target=target))


def test_the_measured_loss_is_that_of_transformers(texts, base):
    from transformers import AutoTokenizer

    made = truncate(EMBEDDED_ID, ratio=0.8, evaluate=texts / "code.jsonl").truncation.loss
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    total, count = 0.0, 0
    for line in (texts / "code.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], truncation=True, max_length=128, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += base.float()(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert made.tokens == count
    assert made.before == pytest.approx(total / count, rel=1e-4)


def test_the_hub_and_back(hub, small):
    small.push_to_hub("tester/small", token=hub.token, private=True)
    files = hub.repos["tester/small"].commits[hub.repos["tester/small"].branches["main"]]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    again = LMDModel.from_pretrained("tester/small", revision="main")
    assert torch.equal(again(input_ids=IDS).logits, small(input_ids=IDS).logits)
    assert again.truncation == small.truncation
    smaller = truncate(EMBEDDED_ID, rank=4)
    assert smaller.push_to_hub("tester/small", token=hub.token, create_pr=True).pr_num == 1
    smaller.push_to_hub("tester/small", token=hub.token)
    assert LMDModel.from_pretrained("tester/small").truncation == smaller.truncation
    with pytest.raises(SourceError, match="nope: not the id of a repository"):
        LMDModel.from_pretrained("./nope")
    with pytest.raises(SourceError, match="no such Hub repository"):
        LMDModel.from_pretrained("tester/none")


def test_a_base_on_the_hub_is_named_with_its_commit(hub):
    commit = hub.add("org/model", {p.name: p.read_bytes() for p in EMBEDDED_FOLDER.iterdir() if p.is_file()})
    record = truncate("org/model", rank=4)
    assert (record.truncation.base, record.truncation.commit) == ("org/model", commit)
    assert commit in str(record.generate_model_card())
    assert "tokenizer.json" in record.companions


def damaged(saved, tmp_path, change):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path)
    return tmp_path


def test_what_is_no_truncated_model_or_a_damaged_one_is_told(saved, tmp_path, base):
    with pytest.raises(SourceError, match="not a model that lmd_hf"):
        LMDModel.from_pretrained(EMBEDDED_FOLDER)
    folder = damaged(saved, tmp_path, lambda folder: None)
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    first = next(name for name in tensors if name.endswith("projection"))
    save_file({name: value for name, value in tensors.items() if name != first}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=f"1 tensors are missing, 0 unknown, first '{first}'"):
        LMDModel.from_pretrained(folder)
    save_file(tensors | {first: tensors[first][:, :1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(FormatError, match="do not fit"):
        LMDModel.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="do not fit"):
        LMDModel.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for broken in ({"truncated": {}}, {"base_config": config["base_config"] | {"architectures": ["NoSuchModel"]}}):
        (folder / "config.json").write_text(json.dumps(config | broken))
        with pytest.raises((FormatError, SourceError), match=r"no readable record|has no 'NoSuchModel'"):
            LMDModel.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises((FormatError, json.JSONDecodeError)):
        LMDModel.from_pretrained(folder)


def test_what_cannot_be_loaded_again_is_not_written(tmp_path):
    from torch import nn

    plain = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 30))
    found = truncate(plain, rank=3)
    assert found(torch.ones(1, 40)).shape == (1, 30)
    with pytest.raises(SettingsError, match="Sequential is no class of transformers"):
        found.save_pretrained(tmp_path / "out")


def test_a_full_disk_is_told(small, tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OutputError, match="cannot write to"):
        small.save_pretrained(tmp_path)
