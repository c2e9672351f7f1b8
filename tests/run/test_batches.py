"""A dataset as batches, and the model to run them on: columns, masks, sampling; one clear line for what cannot be."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.records import Data
from lmd_hf.run.batches import load_batches
from lmd_hf.run.loading import Origin, evaluating, forward, load_model, origin
from lmd_hf.run.world import World
from lmd_hf.weights.source import EMBEDDED_ID, open_source


LINES = [f"line {i} " + "says a little more than the one before " * (i % 5) for i in range(40)]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(LINES) + "\n   \n")
    return path


@pytest.fixture(scope="module")
def embedded():
    source = open_source(EMBEDDED_ID)
    return load_model(source, origin(source), "cpu"), origin(source)


def ids(batches):
    return [row for i in range(len(batches)) for row in batches[i]["input_ids"].tolist()]


def test_text_is_tokenised_padded_and_masked(embedded, text_file):
    model, place = embedded
    batches = load_batches(model, place, Data(str(text_file), samples=100, seq_len=20, batch_size=8))
    assert (batches.examples, len(batches)) == (40, 5)  # blank lines are no examples
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.name)
    expected = sorted(map(tuple, tokenizer(LINES)["input_ids"]))
    found = []
    for i in range(len(batches)):
        batch = batches[i]
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            found.append(tuple(row[mask.bool()].tolist()))
    assert sorted(t[:5] for t in found) == sorted(t[:5] for t in expected)
    assert max(map(len, found)) == 20
    assert batches.tokens == sum(map(len, found))


def test_sampling_is_uniform_without_repeats_and_repeatable(embedded, text_file):
    model, place = embedded
    data = Data(str(text_file), samples=10, seq_len=30)
    first, again = load_batches(model, place, data), load_batches(model, place, data)
    assert ids(first) == ids(again)
    assert first.examples == 10
    starts = {tuple(row[:4]) for row in ids(first)}
    assert len(starts) == 10


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json"])
def test_columns_are_found_in_every_format(embedded, tmp_path, kind):
    import pandas

    model, place = embedded
    frame = pandas.DataFrame({"label": range(6), "sentence": [f"the sentence {i}" for i in range(6)]})
    path = tmp_path / f"data.{kind}"
    {
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: path.write_text(json.dumps(frame.to_dict("records"))),
        "csv": lambda: frame.to_csv(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
    }[kind]()
    batches = load_batches(model, place, Data(str(path)))
    assert (batches.examples, batches.about) == (6, "texts of column 'sentence'")


def test_ranks_share_whole_batches(embedded, text_file):
    model, place = embedded
    batches = load_batches(model, place, Data(str(text_file), seq_len=16))
    parts = [dict(batches.share(World(rank, 2))) for rank in range(2)]
    assert sorted([*parts[0], *parts[1]]) == list(range(5))
    assert torch.equal(parts[1][3]["input_ids"], batches[3]["input_ids"])


def test_images_go_through_the_processor(save, tmp_path):
    from transformers import AutoImageProcessor, ViTImageProcessor

    folder = save("vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    source = open_source(folder)
    model, data = load_model(source, origin(source)), Data(str(tmp_path / "images"), batch_size=2)
    if type(AutoImageProcessor).__name__ == "DummyObject":  # up to transformers 5.17, which asks for torchvision
        with pytest.raises(SourceError, match="requires the Torchvision library"):
            load_batches(model, origin(source), data)
        return
    batches = load_batches(model, origin(source), data)
    assert (batches.examples, len(batches), batches.tokens) == (5, 3, None)
    assert batches[2]["pixel_values"].shape == (1, 3, 16, 16)
    with evaluating(model):
        forward(model, batches[0])


def test_an_encoder_decoder_gets_the_text_on_both_sides(save, tmp_path):
    source = open_source(save("t5"))
    model = load_model(source, origin(source))
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [4, 5, 6, 7]}\n')
    batches = load_batches(model, origin(source), Data(str(path)))
    assert set(batches[0]) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert batches.lengths == (3, 4)
    with evaluating(model):
        forward(model, batches[0])


def test_a_live_module_runs_on_token_ids_and_keeps_its_modes(save, tmp_path):
    import models

    module = models.make("bert").train()
    module.base_model.encoder.layer[0].eval()
    source = open_source(module)
    assert load_model(source, origin(source)) is module
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [1, 2, 3]}\n')
    batches = load_batches(module, origin(source), Data(str(path), seq_len=8))
    with evaluating(module):
        assert not module.training
        forward(module, batches[0])
    assert module.training
    assert not module.base_model.encoder.layer[0].training
    (tmp_path / "text.txt").write_text("words\n")
    with pytest.raises(SourceError, match="a live module may run on a dataset with a column 'input_ids'"):
        load_batches(module, origin(source), Data(str(tmp_path / "text.txt"), seq_len=8))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"label": 1}\n', "no column of text; its columns are label; name the right one 'text'"),
        ("b.jsonl", '{"a": "x", "b": "y"}\n', r"several columns of text \(a, b\)"),
        ("empty.txt", "", "the dataset is empty"),
        ("blank.txt", " \n\n  \n", "the dataset is empty"),
        ("broken.json", "{[", "the dataset cannot be read"),
        ("absent.txt", None, "no such file; check the path of the dataset"),
        ("absent/dataset", None, "the dataset cannot be read"),
    ],
)
def test_bad_datasets_are_one_clear_line(embedded, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=message) as caught:
        load_batches(*embedded, Data(str(path)))
    assert "\n" not in str(caught.value)


def test_texts_longer_than_the_model_takes(embedded, minilm, text_file):
    with pytest.raises(SettingsError, match="seq_len 300 is longer than the model's 256 positions"):
        load_batches(*embedded, Data(str(text_file), seq_len=300))
    source = open_source(minilm)
    with pytest.raises(SettingsError, match="seq_len 513 is longer than the model's 512 positions"):
        load_batches(load_model(source, origin(source)), origin(source), Data(str(text_file), seq_len=513))


def test_a_model_of_images_wants_images(save, text_file):
    source = open_source(save("vit"))
    with pytest.raises(SettingsError, match=r"takes images, and the dataset has none \(its columns: text\)"):
        load_batches(load_model(source, origin(source)), origin(source), Data(str(text_file)))


def test_remote_code_adapters_and_lone_files_are_refused(save, tmp_path):
    from safetensors.torch import save_file

    config = {"model_type": "secret", "auto_map": {"AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w.weight": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="running 'secret' needs code from its repository"):
        origin(open_source(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(SourceError, match="no whole model to run; give a folder"):
        origin(open_source(tmp_path))
    lone = save("llama") / "model.safetensors"
    assert origin(open_source(lone)) == Origin(str(lone.parent))


def test_what_the_model_does_not_take_is_one_line(embedded):
    model, _ = embedded
    with pytest.raises(SettingsError, match="LlamaForCausalLM fails on this data") as caught:
        forward(model, {"input_ids": torch.full((1, 3), 10**6)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [10**6, -1])
def test_a_token_that_the_model_does_not_have_is_named(embedded, tmp_path, token):
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in ([1, 2], [3, token, 4])))
    with pytest.raises(SettingsError, match=f"token {token} is none of the model's"):
        load_batches(*embedded, Data(str(path)))


def test_a_padding_token_that_the_model_does_not_have_is_another(embedded, tmp_path, monkeypatch):
    model, place = embedded
    (tmp_path / "a.txt").write_text("import os\nx = 1 + 2 + 3 + 4 + 5\n")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.name)
    tokenizer.add_special_tokens({"pad_token": "<nowhere>"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    batches = load_batches(model, place, Data(str(tmp_path / "a.txt"), batch_size=2))
    batch = batches[0]
    assert batch["attention_mask"].min() == 0
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {0}
    forward(model, batch)
