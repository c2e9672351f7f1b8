"""Inputs observed through hooks: the right module, the right tokens, the same for any number of passes and ranks."""

import json

import models
import numpy as np
import pytest
import torch

from lmd_hf.errors import SettingsError
from lmd_hf.records import Data
from lmd_hf.run.activations import input_bytes, needed_tokens, observe, passes
from lmd_hf.run.batches import load_batches
from lmd_hf.run.loading import evaluating, forward, load_model, origin
from lmd_hf.run.taps import Tap, find_taps
from lmd_hf.run.world import World
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_stored


EVERY = 10**6  # tokens: all that there are


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Forty sequences of token ids of every length from 3 to 12."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "ids.jsonl"
    rows = [{"input_ids": rng.integers(1, 60, 3 + i % 10).tolist()} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def stage(save, family, sentences, **options):
    source = open_source(save(family))
    model = load_model(source, origin(source), "cpu")
    data = Data(sentences, seq_len=12, **options)
    batches = load_batches(model, origin(source), data)
    refs = list_matrices(source).selected
    return source, model, data, batches, refs, find_taps(model, refs, batches.build([batches.examples - 1]))


def plain_inputs(model, batches, names):
    """The unpadded rows of each module's input, by hooks alone."""
    seen, mask = {name: [] for name in names}, []

    def hook(name):
        def keep(_, args):
            rows = args[0].reshape(-1, args[0].shape[-1])
            seen[name].append(rows[mask[0].flatten().bool()] if len(rows) == mask[0].numel() else rows)

        return keep

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with evaluating(model):
        for i in range(len(batches)):
            mask[:] = [batches[i]["attention_mask"]]
            forward(model, batches[i])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


@pytest.mark.parametrize("family", [f for f in models.FAMILIES if f not in ("vit", "clip", "whisper")])
def test_every_matrix_is_applied_by_the_module_that_is_watched(save, sentences, family):
    source, model, *_, refs, taps = stage(save, family, sentences)
    for ref, tap in zip(refs, taps, strict=True):
        if isinstance(tap, Tap):
            assert tap.fits(read_stored(source, ref).matrix.double()), ref.name
            assert isinstance(model.get_submodule(tap.input), torch.nn.Module)
        else:
            assert ref.role == "embed" or "one-hot" in tap or (ref.block == "moe" and "several matrices" in tap)
    assert sum(isinstance(tap, Tap) for tap in taps) >= 10


def test_another_matrix_does_not_fit(save, sentences):
    source, *_, refs, taps = stage(save, "llama", sentences)
    q = [(r, t) for r, t in zip(refs, taps, strict=True) if r.role == "q"]
    assert not q[0][1].fits(read_stored(source, q[1][0]).matrix.double())


def test_q_k_v_share_an_input_and_fused_rows_are_cut(save, sentences):
    for family in ("llama", "phi3", "bloom"):
        *_, refs, taps = stage(save, family, sentences)
        first = [t.input for r, t in zip(refs, taps, strict=True) if r.layer == 0 and r.role in ("q", "k", "v")]
        assert len(set(first)) == 1
    biased = {r.role: t.biased for r, t in zip(*stage(save, "qwen2", sentences)[-2:], strict=True) if r.layer == 0}
    assert biased["q"]
    assert not biased["o"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "mixtral"])
def test_moments_are_those_of_plain_hooks(save, sentences, family):
    _, model, data, batches, _, taps = stage(save, family, sentences)
    names = sorted({tap.input for tap in taps if isinstance(tap, Tap)})
    expected = plain_inputs(model, batches, names)
    for name, seen in observe(model, batches, names, data, tokens=EVERY, world=World()).items():
        x = expected[name]
        assert seen.count == len(x)
        torch.testing.assert_close(seen.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen.covariance, torch.cov(x.T, correction=0), rtol=1e-12, atol=1e-12)
        assert {tuple(row) for row in seen.rows.tolist()} == {tuple(row) for row in x.tolist()}


def test_padding_is_no_token(save, sentences):
    """Batches of one have no padding: the same tokens, and nearly the same numbers, as in batches of eight."""
    counts = []
    for size in (1, 8):
        _, model, data, batches, _, _ = stage(save, "llama", sentences, batch_size=size)
        seen = observe(model, batches, ["lm_head"], data, tokens=EVERY, world=World())["lm_head"]
        counts.append(seen)
    assert counts[0].count == counts[1].count == batches.tokens
    torch.testing.assert_close(counts[0].covariance, counts[1].covariance, rtol=1e-4, atol=1e-5)


def test_a_sample_of_tokens_is_uniform_and_repeatable(save, sentences):
    _, model, data, batches, _, _ = stage(save, "llama", sentences)
    names = ["lm_head", "model.layers.1.mlp.down_proj"]
    some = observe(model, batches, names, data, tokens=100, world=World())
    again = observe(model, batches, names[:1], data, tokens=100, world=World())
    assert 70 < some["lm_head"].count < 130
    assert some["lm_head"].count == some[names[1]].count
    assert torch.equal(some["lm_head"].covariance, again["lm_head"].covariance)  # whatever else is observed with it
    assert torch.equal(some["lm_head"].examples, some[names[1]].examples)
    assert len(set(some["lm_head"].examples.tolist())) > 25
    every = observe(model, batches, ["lm_head"], data, tokens=EVERY, world=World())["lm_head"]
    assert {tuple(r) for r in some["lm_head"].rows.tolist()} < {tuple(r) for r in every.rows.tolist()}


def test_rows_know_their_example(save, sentences):
    _, model, data, batches, _, _ = stage(save, "llama", sentences)
    seen = observe(model, batches, ["model.layers.0.self_attn.q_proj"], data, tokens=EVERY, world=World())
    (seen,) = seen.values()
    assert np.bincount(seen.examples.numpy()).tolist() == list(batches.lengths)


def test_passes_fit_the_memory_in_order():
    widths = {"a": 100, "b": 100, "c": 400, "d": 100}
    one = input_bytes(100, "complete")
    assert passes(widths, "complete", 1e12) == [["a", "b", "c", "d"]]
    assert passes(widths, "complete", 2 * one) == [["a", "b"], ["c"], ["d"]]
    assert passes(widths, "complete", 1) == [["a"], ["b"], ["c"], ["d"]]
    assert passes({}, "complete", 1) == []


def test_too_few_tokens_are_told_with_how_many_are_needed(save, sentences):
    *_, data, batches, _, _ = stage(save, "llama", sentences)
    assert needed_tokens([32, 48], data, batches) == 4096
    with pytest.raises(SettingsError, match=r"40 examples give 300 tokens.*the widest input needs 301"):
        needed_tokens([300], data, batches)
    with pytest.raises(SettingsError, match="tokens is 48; the metric of the widest input needs 49 or more"):
        needed_tokens([32, 48], Data(sentences, tokens=48), batches)


def test_modules_that_are_shared_or_never_run_say_so(save, sentences):
    """CLIP's image side does not run on texts; the model says so itself."""
    source = open_source(save("clip"))
    model = load_model(source, origin(source), "cpu")
    with pytest.raises(SettingsError, match="CLIPModel fails on this data"):
        find_taps(model, list_matrices(source).selected, {"input_ids": torch.arange(1, 9)[None]})
