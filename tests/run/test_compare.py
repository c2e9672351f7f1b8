"""Comparing whole models: numbers against numpy, storage formats, ties, vocabularies, what cannot be compared."""

import shutil
import threading
import time

import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmd_hf import Settings, compare
from lmd_hf.changes import MatrixChange
from lmd_hf.report.compare import build_comparison
from lmd_hf.run import compare as compare_module
from lmd_hf.run import read_ahead
from lmd_hf.run.compare import compare_all
from lmd_hf.run.pairs import match
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import FileSource, open_source


PLACES = {"name", "part", "tuned_name", "tuned_part", "matched", "tied", "stack", "block", "role", "layer", "shape"}
FACTS = {"dtype", "tuned_dtype", "identical", "base_norm", "latent_dim", "latent_dim_rule", "gap"}
ONES = {"left_cos2", "right_cos2"}
ZEROS = {f for f in MatrixChange.__dataclass_fields__ if not f.startswith("singular")} - PLACES - FACTS - ONES


def edited(family, edit):
    """The family's model with its parameters changed by `edit` (name, float64 value) → value."""
    model = models.make(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(edit(name, parameter.double()))
    return model


def nudged(family="llama"):
    """Rank-one updates of q and o, a new gain of the last norm; nothing else."""
    generator = torch.Generator().manual_seed(7)

    def edit(name, value):
        if "q_proj" in name or "o_proj" in name:
            return value + 0.1 * torch.outer(*(torch.randn(n, generator=generator).double() for n in value.shape))
        return value + 0.5 if name == "model.norm.weight" else value

    return edited(family, edit)


def assert_nothing_changed(comparison):
    for matrix in comparison.matrices:
        assert matrix.identical
        assert {getattr(matrix, name) for name in ZEROS} == {0}
        assert {getattr(matrix, name) for name in ONES} == {1}
        assert not matrix.singular_values.any()
        assert matrix.base_norm > 0
    assert {(v.largest_change, v.relative_change) for v in comparison.vectors} == {(0, 0)}
    assert comparison.unmatched == ()
    assert comparison.coverage["fraction"] == 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "clip"])
def test_a_model_against_itself_is_exactly_zero(save, family):
    assert_nothing_changed(compare(save(family), save(family)))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "bert"])
def test_a_folder_against_its_live_module_is_exactly_zero(save, family):
    assert_nothing_changed(compare(save(family), models.make(family)))
    assert_nothing_changed(compare(models.make(family), save(family)))


def test_a_change_is_found_where_it_is_and_nowhere_else(save):
    tuned = nudged()
    before, after = models.make("llama").state_dict(), tuned.state_dict()
    comparison = compare(save("llama"), tuned)
    assert {m.role for m in comparison.matrices if not m.identical} == {"q", "o"}
    for m in comparison.matrices:
        base, delta = (x.double().numpy() for x in (before[m.name], after[m.name].double() - before[m.name].double()))
        np.testing.assert_allclose(m.singular_values, np.linalg.svd(delta, compute_uv=False), atol=1e-12)
        assert m.update_norm == pytest.approx(np.linalg.norm(delta))
        assert m.relative_update == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base))
        assert m.update_rank == (0 if m.identical else 1)
    (vector,) = [v for v in comparison.vectors if v.largest_change]
    assert vector.name == "model.norm.weight"
    assert vector.largest_change == pytest.approx(0.5)
    assert vector.relative_change == pytest.approx(0.5 * 32**0.5 / before["model.norm.weight"].norm().item())


def test_order_is_the_inventory_s_and_threads_change_nothing(save):
    base, tuned = open_source(save("llama")), open_source(nudged())
    inventory = list_matrices(base)
    matching = match(inventory, list_matrices(tuned), Settings())
    seen = []
    runs = [
        compare_all(matching, base, tuned, progress=lambda p: seen.append((p.base.name, threading.current_thread())))
        for _ in range(2)
    ]
    assert [m.name for m in runs[0].matrices] == [ref.name for ref in inventory.selected]
    assert runs[0].matrices == runs[1].matrices
    assert {thread for _, thread in seen} == {threading.main_thread()}
    assert len(seen) == 2 * len(matching.pairs)


def test_swapping_the_models_keeps_the_update(save):
    there, back = compare(save("llama"), nudged()), compare(nudged(), save("llama"))
    for a, b in zip(there.matrices, back.matrices, strict=True):
        assert (a.update_rank, a.update_norm) == (b.update_rank, pytest.approx(b.update_norm))
        np.testing.assert_allclose(a.singular_values, b.singular_values, atol=1e-12)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_the_same_model_in_half_precision_has_no_update(save, tmp_path, dtype, unit):
    models.make("llama").to(dtype).save_pretrained(tmp_path)
    for pair in ((save("llama"), tmp_path), (tmp_path, save("llama"))):
        comparison = compare(*pair)
        assert len(comparison.matrices) == 16
        for m in comparison.matrices:
            assert m.dtype != m.tuned_dtype
            assert 0 < m.relative_update < unit
            assert (m.update_rank, m.update_energy, m.identical) == (0, 0, False)
            assert min(m.left_cos2, m.right_cos2) > 0.99
    widened = {name: value.float() for name, value in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "wide").mkdir()
    save_file(widened, tmp_path / "wide" / "model.safetensors")
    assert all(m.identical for m in compare(tmp_path, tmp_path / "wide").matrices)


def test_a_model_and_its_fp8_copy_have_no_update(save, tmp_path):
    """The floor follows the format: 2⁻⁴ of every entry, not the bf16 that the values are read into."""
    tensors = load_file(save("llama") / "model.safetensors")
    linear = {name for name, value in tensors.items() if value.ndim == 2 and "proj" in name}
    fp8 = {name: value.to(torch.float8_e4m3fn) if name in linear else value for name, value in tensors.items()}
    save_file(fp8, tmp_path / "model.safetensors")
    changed = {m.name: m for m in compare(save("llama"), tmp_path).matrices if not m.identical}
    assert set(changed) == linear
    for m in changed.values():
        assert m.update_rank == 0
        assert 2.0**-8 < m.relative_update < 2.0**-4


def test_what_could_not_be_read_is_said_and_the_rest_is_there(save, tmp_path):
    """One file of several that shrinks after its header was read, as a download under way does."""
    folder = tmp_path / "model"
    shutil.copytree(save("llama", max_shard_size="20KB"), folder)
    base, tuned = open_source(save("llama")), open_source(folder)
    matching = match(list_matrices(base), list_matrices(tuned), Settings())
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    changes = compare_all(matching, base, tuned)
    assert changes.matrices
    assert changes.unmatched
    comparison = build_comparison(base.identity, tuned.identity, Settings(), matching, changes)
    assert comparison.unread == comparison.unmatched
    assert all(item.side == "tuned" for item in comparison.unread)


def test_a_tied_head_is_compared_with_its_embedding(save):
    untied = models.make("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        untied.transformer.wte.weight.copy_(models.make("gpt2").transformer.wte.weight)
        untied.lm_head.weight.copy_(untied.transformer.wte.weight)
        untied.lm_head.weight[3] += 1
    comparison = compare(save("gpt2"), untied)
    head = comparison.matrices[-1]
    assert (head.name, head.role, head.tied, head.shape) == ("lm_head.weight", "head", "base", (60, 32))
    assert (head.update_rank, head.update_norm) == (1, pytest.approx(32**0.5))
    assert next(m for m in comparison.matrices if m.name.endswith("wte.weight")).identical
    assert comparison.coverage["compared"] <= comparison.coverage["parameters"]


@pytest.mark.parametrize("more", [7, -5])
def test_only_the_common_tokens_of_a_resized_vocabulary_are_compared(save, more):
    tuned = models.make("llama")
    tuned.resize_token_embeddings(models.V + more)
    comparison = compare(save("llama"), tuned)
    resized = {m.role: m for m in comparison.matrices if m.tokens_added}
    common = min(models.V, models.V + more)
    assert {role: (m.tokens_added, m.shape) for role, m in resized.items()} == {
        "embed": (more, (32, common)),
        "head": (more, (common, 32)),
    }
    assert all(m.identical for m in comparison.matrices)
    assert comparison.unmatched == ()


def test_fused_and_split_projections_are_one(save, tmp_path):
    tensors = load_file(save("phi3") / "model.safetensors")
    for name in [n for n in tensors if "qkv_proj" in n]:
        for part, rows in zip("qkv", tensors.pop(name).split([32, 16, 16]), strict=True):
            tensors[name.replace("qkv_proj", f"{part}_proj")] = rows.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((save("phi3") / "config.json").read_bytes())
    comparison = compare(save("phi3"), tmp_path)
    assert sum(m.matched == "place" for m in comparison.matrices) == 6
    assert all(m.identical for m in comparison.matrices)


def test_what_cannot_be_compared_is_listed_and_the_rest_goes_on(save, tmp_path):
    tensors = load_file(save("llama") / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((save("llama") / "config.json").read_bytes())
    meta = models.make("llama")
    meta.model.layers[1].to("meta")
    for pair, side in (((save("llama"), tmp_path), "tuned"), ((tmp_path, save("llama")), "base")):
        comparison = compare(*pair)
        assert {(u.side, u.name, u.reason) for u in comparison.unmatched} == {
            (side, "model.layers.0.mlp.up_proj.weight", "holds NaN or infinity (1 of 1536 entries)"),
            (side, "model.norm.weight", "holds NaN or infinity (1 of 32 entries)"),
        }
        assert len(comparison.matrices) == 15
    comparison = compare(save("llama"), meta)
    assert len(comparison.matrices) == 9
    assert len(comparison.unmatched) == 9
    assert all("meta device" in item.reason for item in comparison.unmatched)
    assert comparison.coverage["fraction"] < 1


def test_a_selection_does_less(save):
    comparison = compare(save("llama"), nudged(), settings=Settings(roles=("q",), layers="1"))
    assert [(m.role, m.layer) for m in comparison.matrices] == [("q", 1)]
    assert comparison.settings["roles"] == ["q"]
    assert comparison.vectors == comparison.unmatched == ()


def test_revisions_of_one_repository(hub, save):
    hub.add("org/model", {p.name: p.read_bytes() for p in save("llama").iterdir() if p.is_file()})
    comparison = compare("org/model", save("llama"), base_revision="main")
    assert comparison.base.commit
    assert comparison.base.revision == "main"
    assert comparison.tuned.commit is None
    assert all(m.identical for m in comparison.matrices)
    assert comparison.base.id == "org/model"


class Slow(FileSource):
    """A folder whose reads take a while, and that remembers what was read and how many reads were under way."""

    def read(self, tensor, start=0, stop=None):
        BUSY.append(self.identity.id)
        COUNTS.append((len(BUSY), len(set(BUSY))))
        READS.append((self.identity.id, tensor.name, start, stop))
        time.sleep(0.005)
        try:
            return super().read(tensor, start, stop)
        finally:
            BUSY.remove(self.identity.id)


BUSY, COUNTS, READS = [], [], []


def slow(folder):
    source = open_source(folder)
    return Slow(**{name: getattr(source, name) for name in FileSource.__dataclass_fields__})


@pytest.mark.parametrize("room", [0, 2**24])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "t5"])
def test_both_models_are_read_ahead_and_each_byte_once(save, tmp_path, monkeypatch, family, room):
    """One worker alone would never have more than one read under way."""
    monkeypatch.setattr(read_ahead, "ROOM", room)
    monkeypatch.setattr(compare_module, "count_workers", lambda *_: 1)
    shutil.copytree(save(family), tmp_path / "tuned")
    for memory in (COUNTS, READS):
        memory.clear()
    base, tuned = slow(save(family)), slow(tmp_path / "tuned")
    matching = match(list_matrices(base), list_matrices(tuned), Settings())
    COUNTS.clear()
    done = []
    worker = threading.Thread(target=lambda: done.append(compare_all(matching, base, tuned, device="cpu")), daemon=True)
    worker.start()
    worker.join(60)
    assert all(change.identical for change in done[0].matrices)
    assert len(done[0].matrices) == len(matching.pairs)
    assert len(READS) == len(set(READS))
    if room:
        assert max(count for count, _ in COUNTS) > 2
        assert max(models for _, models in COUNTS) == 2


def test_of_two_distant_models_every_byte_is_fetched_once(hub, save, monkeypatch):
    monkeypatch.setattr("lmd_hf.weights.hub.FIRST_BYTES", 4000)
    files = {p.name: p.read_bytes() for p in save("llama").iterdir() if p.is_file()}
    hub.add("distant/base", files)
    hub.add("distant/tuned", files)
    comparison = compare("distant/base", "distant/tuned")
    size = len(files["model.safetensors"])
    length = 8 + int.from_bytes(files["model.safetensors"][:8], "little")
    header = 4000 if length <= 4000 else 4000 + length - 8
    assert comparison.environment["bytes_fetched"] == 2 * (size - length + header)
    assert all(change.identical for change in comparison.matrices)


def test_pairs_that_share_bytes_follow_one_another_whichever_model_fuses_them(save):
    a, b, c = (read_ahead.Span(tensor, 0, 1) for tensor in open_source(save("llama")).tensors[:3])
    fused, split = {"q": {a}, "o": {b}, "k": {a}}, {"q": {a}, "o": {b}, "k": {c}}
    assert read_ahead.gathered(fused, split) == read_ahead.gathered(split, fused) == ["q", "k", "o"]
    assert read_ahead.gathered(split, split) == ["q", "o", "k"]
