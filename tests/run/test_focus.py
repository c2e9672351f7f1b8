"""k₉₀ and Hopfield classes against loops over the model's own attention, one query at a time."""

import json

import models
import numpy as np
import pytest
import torch

from lmd_hf import analyze
from lmd_hf.circuits import Heads
from lmd_hf.records import Data, Settings
from lmd_hf.run import loading
from lmd_hf.run.batches import load_batches
from lmd_hf.run.focus import with_focus
from lmd_hf.run.heads import measure_heads
from lmd_hf.run.loading import load_model, origin
from lmd_hf.run.plan import plan_heads
from lmd_hf.run.world import World
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import EMBEDDED_ID, open_source


@pytest.fixture
def ids(tmp_path):
    """A dataset of token ids: sequences of 20 to 60 tokens, so that batches are padded and some are too short."""
    draw = np.random.default_rng(0)
    rows = [{"input_ids": draw.integers(1, models.V, size=size).tolist()} for size in (20, 40, 33, 60, 31, 50)]
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def heads_of(source):
    return measure_heads(plan_heads(list_matrices(source), Settings(heads=True)), source, folded=False)


def focused(source, data):
    return with_focus(heads_of(source), source, data, device="cpu", world=World())


def by_hand(model, batches, take):
    """{(layer, head): [(k, n) of every query that sees 32 tokens]}, one probability after the other."""
    found = {}
    for index in range(len(batches)):
        batch = batches[index]
        with torch.no_grad():
            attentions = take(model(**batch, output_attentions=True))
        for layer, softmax in enumerate(attentions):
            for example, head, query in np.ndindex(*softmax.shape[:3]):
                if not batch["attention_mask"][example, query]:
                    continue
                n = sum(softmax[example, h, query].gt(0) for h in range(softmax.shape[1])).gt(0).sum().item()
                if n < 32:
                    continue
                carried, k = 0.0, 0
                for p in sorted(softmax[example, head, query].tolist(), reverse=True):
                    if carried >= 0.9 - 1e-6:
                        break
                    carried, k = carried + p, k + 1
                found.setdefault((layer, head), []).append((k, n))
    return found


def check(rows, expected):
    assert {(row.layer, row.head) for row in rows} == set(expected)
    for row in rows:
        k, n = np.array(expected[row.layer, row.head]).T
        assert (row.queries, row.k90, row.k90_share) == (len(k), np.median(k), pytest.approx(np.median(k / n)))
        bounds = [("I", 1 / 2, 1.1), ("II", 1 / 8, 1 / 2), ("III", 1 / 32, 1 / 8), ("IV", -1, 1 / 32)]
        assert row.hopfield_class == next(name for name, low, high in bounds if low < row.k90_share <= high)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_against_loops_over_a_padded_dataset(family, ids, tmp_path):
    model = models.make(family, max_position_embeddings=64, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "model")
    source, data = open_source(tmp_path / "model"), Data(ids, seq_len=64, batch_size=4)
    heads = focused(source, data)
    assert not heads.notes
    batches = load_batches(model, origin(source), data)
    check(heads.rows, by_hand(model, batches, lambda outputs: outputs.attentions))
    assert len({row.k90 for row in heads.rows}) > 2
    if family == "bert":  # each unpadded query of the long ones
        assert {row.queries for row in heads.rows} == {40 + 33 + 60 + 50}
    else:  # from the 32nd token on
        assert {row.queries for row in heads.rows} == {9 + 2 + 29 + 19}


def test_the_embedded_model_against_loops(tmp_path):
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 6}) for i in range(3))
    )
    source, data = open_source(EMBEDDED_ID), Data(str(tmp_path / "texts.jsonl"), seq_len=48, batch_size=2)
    heads = focused(source, data)
    place = origin(source)
    model = load_model(source, place, "cpu")
    model.set_attn_implementation("eager")
    check(heads.rows, by_hand(model.eval(), load_batches(model, place, data), lambda outputs: outputs.attentions))


def test_cross_attention_counts_what_the_encoder_gives(ids, save):
    heads = focused(open_source(save("t5")), Data(ids, seq_len=64))
    crossed = [row for row in heads.rows if row.block == "cross_attention"]
    assert {row.queries for row in crossed} == {40 + 33 + 60 + 50}
    decoding = [row for row in heads.rows if row.block == "attention" and row.stack == "decoder"]
    assert {row.queries for row in decoding} == {9 + 2 + 29 + 19}


def test_where_no_query_sees_32_tokens_there_is_no_number(ids, save):
    for row in focused(open_source(save("llama")), Data(ids, seq_len=16)).rows:
        assert (row.k90, row.k90_share, row.queries, row.hopfield_class) == (None, None, 0, None)


def test_a_live_module_is_left_as_it_was(ids):
    model = models.make("llama", max_position_embeddings=64)
    model.train()
    before = model.config._attn_implementation
    assert before != "eager"
    heads = focused(open_source(model), Data(ids, seq_len=64))
    assert all(row.hopfield_class for row in heads.rows)
    assert (model.config._attn_implementation, model.training) == (before, True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("lmd_hf")]


def test_the_model_is_loaded_once_for_the_metric_and_the_heads(ids, tmp_path, monkeypatch):
    models.make("llama", max_position_embeddings=64).save_pretrained(folder := tmp_path / "model")
    loads, load_again = [], loading.load_again
    monkeypatch.setattr(loading, "load_again", lambda *arguments: loads.append(1) or load_again(*arguments))
    report = analyze(folder, metric="data", data=Data(ids, seq_len=64), heads=True, roles=("q",), device="cpu")
    assert len(loads) == 1
    alone = focused(open_source(folder), Data(ids, seq_len=64))
    assert [row.k90 for row in report.heads] == [row.k90 for row in alone.rows]
    assert all(row.hopfield_class for row in report.heads)


def test_models_that_show_no_softmax_are_notes(ids):
    """Falcon cannot change how it attends; a plain module has no choice; a wrapped one shows nothing."""
    falcon = models.make("falcon-new")
    heads = focused(open_source(falcon), Data(ids, seq_len=40))
    assert "FalconForCausalLM cannot change how it computes attention; load it with eager" in heads.notes[0]
    assert all(row.k90 is None for row in heads.rows)
    assert with_focus(Heads((), ()), open_source(falcon), Data(ids), device="cpu", world=World()) == Heads((), ())


def test_falcon_from_its_files_is_loaded_with_eager(ids, save):
    heads = focused(open_source(save("falcon-new")), Data(ids, seq_len=64))
    assert not heads.notes
    assert {row.queries for row in heads.rows} == {9 + 2 + 29 + 19}  # causal, which its other attention is not


@pytest.mark.slow
def test_the_report_of_the_data_metric_has_classes(ids):
    model = models.make("llama", max_position_embeddings=64)
    report = analyze(model, heads=True, metric="data", data=Data(ids, seq_len=60))
    assert len(report.heads) == models.L * models.HEADS
    assert all(head.hopfield_class for head in report.heads)
    assert " of class " in report.summary()
