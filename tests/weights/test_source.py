"""Folders, files and live modules; and every kind of input that is refused, with its remedy."""

import hashlib
import json
import math
import os
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lmd_hf
from lmd_hf.errors import FormatError, LmdError, SourceError
from lmd_hf.weights import source as source_module
from lmd_hf.weights.identity import BLOCK, BLOCKS, marks, with_hashes
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_matrix


def test_a_sharded_folder_holds_the_same_tensors_as_a_single_file(save):
    single, sharded = open_source(save("llama")), open_source(save("llama", max_shard_size="20KB"))
    assert len({t.file for t in sharded.tensors}) > 2
    read = {t.name: sharded.read(t) for t in sharded.tensors}
    assert set(read) == {t.name for t in single.tensors}
    for tensor in single.tensors:
        assert torch.equal(read[tensor.name], single.read(tensor))


def test_a_single_file_reads_the_config_beside_it(save):
    source = open_source(save("gpt2") / "model.safetensors")
    assert source.identity.model_type == "gpt2"
    assert [f.name for f in source.identity.files] == ["model.safetensors"]
    assert list_matrices(source).selected == list_matrices(open_source(save("gpt2"))).selected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_and_slices_are_read_exactly(tmp_path, dtype):
    values = {"w.weight": torch.randn(11, 7).to(dtype), "v.weight": torch.randn(3, 5).to(dtype)}
    save_file(values, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    for tensor in source.tensors:
        assert torch.equal(source.read(tensor), values[tensor.name])
        assert torch.equal(source.read(tensor, 1, 3), values[tensor.name][1:3])


def test_files_carry_their_hash(save):
    path = save("llama") / "model.safetensors"
    file = with_hashes(open_source(save("llama"))).files[0]
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("target", "link", "trusted"),
    [
        ("blobs/{}", "snapshots/commit/model.safetensors", True),
        ("blobs/{}", "snapshots/commit/sub/model.safetensors", True),
        ("blobs/{}", "mine/model.safetensors", False),
        ("store/{}", "snapshots/commit/model.safetensors", False),
        ("other/blobs/{}", "snapshots/commit/model.safetensors", False),
    ],
)
def test_a_hash_is_taken_from_a_name_in_the_hubs_cache_alone(tmp_path, save, target, link, trusted):
    data, name = (save("llama") / "model.safetensors").read_bytes(), "0" * 64
    blob, path = tmp_path / target.format(name), tmp_path / link
    for file in (blob, path):
        file.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    path.symlink_to(blob)
    file = with_hashes(open_source(path.parent)).files[0]
    assert file.sha256 == (name if trusted else hashlib.sha256(data).hexdigest())


def test_a_live_module_that_transformers_does_not_know():
    shared = nn.Linear(6, 6)
    module = nn.ModuleDict(
        {"a": nn.Linear(5, 9), "emb": nn.Embedding(12, 4), "conv": nn.Conv2d(2, 6, 3), "x": shared, "y": shared}
    )
    inventory = list_matrices(open_source(module))
    shapes = {ref.name: (ref.role, ref.shape) for ref in inventory.selected}
    assert shapes == {
        "a.weight": ("other", (9, 5)),
        "emb.weight": ("embed", (4, 12)),
        "conv.weight": ("conv", (6, 18)),
        "x.weight": ("other", (6, 6)),
    }
    assert [(a.name, a.of) for a in inventory.aliases] == [("y.weight", "x.weight")]
    assert inventory.parameters == sum(p.numel() for p in module.parameters())


def test_convolutions_are_flattened_as_they_act(tmp_path):
    """A strided convolution without overlap is a matrix product on patches: W·patch must be its output."""
    conv = nn.Conv2d(3, 8, 4, stride=4, bias=False)
    source = open_source(nn.ModuleDict({"conv": conv}))
    w = read_matrix(source, list_matrices(source).selected[0])
    image = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(w @ image.flatten(), conv(image).flatten())


def test_linears_act_as_their_matrix(save):
    source, model = open_source(save("gpt2")), models.make("gpt2")
    ref = next(r for r in list_matrices(source).selected if r.role == "up" and r.layer == 0)
    module = model.transformer.h[0].mlp.c_fc
    x = torch.randn(models.H)
    torch.testing.assert_close(read_matrix(source, ref) @ x + module.bias, module(x))


def test_a_tie_that_is_stored_twice_is_found(tmp_path, save):
    tensors = load_file(save("gpt2") / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((save("gpt2") / "config.json").read_bytes())
    ref = next(r for r in list_matrices(open_source(tmp_path)).selected if r.name == "lm_head.weight")
    assert ref.tied_to == "transformer.wte.weight"


def test_buffers_that_the_model_ignores_are_listed_as_such(tmp_path, save):
    tensors = load_file(save("gpt2") / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 20, 20)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((save("gpt2") / "config.json").read_bytes())
    skipped = {s.name: s.reason for s in list_matrices(open_source(tmp_path)).skipped}
    assert skipped["transformer.h.0.attn.bias"] in ("vector", "buffer that the model class itself ignores")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.layers.0.mlp.up_proj.qweight", torch.ones(4, 4, dtype=torch.int32), "stored as I32"),
        ("model.layers.0.mlp.up_proj.scales", torch.ones(4, 4), "companion of model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(0, 4), "empty"),
        ("model.layers.0.input_layernorm.weight", torch.ones(4), "vector"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", torch.ones(4, 6), "vector"),
        ("blob", torch.ones(2, 3, 4), "3 axes"),
    ],
)
def test_what_cannot_be_read_is_listed_with_its_reason(tmp_path, name, tensor, reason):
    save_file({name: tensor}, tmp_path / "model.safetensors")
    inventory = list_matrices(open_source(tmp_path))
    assert not inventory.selected
    assert reason in inventory.skipped[0].reason
    assert inventory.parameters == math.prod(tensor.shape)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SourceError, match="no such folder or file"):
        open_source(tmp_path / "absent")
    with pytest.raises(SourceError, match="no such folder or file"):
        open_source("./absent.safetensors")


@pytest.mark.parametrize(
    "name", ["/tmp/" + "b" * 300, "b" * 5000, "org/" + "b" * 300, "org/-x", "~nobody-of-that-name/x"]
)
def test_a_name_that_can_be_no_path_and_no_hub_id(name):
    with pytest.raises(SourceError, match=r"no such folder or file, and not a Hub id \(org/name\)"):
        open_source(name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "m.gguf", "model.safetensors.index.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_weight_file_that_is_none(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(SourceError, match=rf"{name}: not a file but a folder, a pipe or a link that leads nowhere"):
        open_source(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(SourceError, match="no weights in it"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_damaged_pickles_are_one_clear_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is not even a pickle")
    for model in (tmp_path, tmp_path / name):
        with pytest.raises(LmdError, match=rf"{name}: (?:not a readable checkpoint|holds more than tensors)"):
            open_source(model)


def test_an_index_that_names_absent_shards(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(FormatError, match=r"1 shards that are absent, first 'model-1\.safetensors'"):
        open_source(tmp_path)


def test_an_index_of_another_version(tmp_path):
    save_file({"a.weight": torch.ones(2, 4)}, tmp_path / "model-1.safetensors")
    promised = {"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(promised))
    with pytest.raises(FormatError, match=r"promises 1 tensors that no shard holds, first 'b\.weight'"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../../etc/passwd"}}',
        '{"weight_map": {"a": 3}}',
        "[" * 50_000,
    ],
    ids=range(6),
)
def test_a_broken_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FormatError, match="weight_map"):
        open_source(tmp_path)


@pytest.mark.parametrize("config", ["{", "[1]", "\x00", "[" * 50_000], ids=range(4))
def test_a_broken_config(tmp_path, config):
    save_file({"a.weight": torch.ones(2, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(FormatError, match=r"config\.json: not"):
        open_source(tmp_path)


def test_a_config_that_transformers_cannot_build_goes_on_from_names(tmp_path, save):
    (tmp_path / "model.safetensors").write_bytes((save("llama") / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    inventory = list_matrices(open_source(tmp_path))
    assert "transformers cannot build 'llama'" in inventory.notes[0]
    assert len(inventory.selected) == 16


def test_the_same_name_in_two_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w.weight": torch.ones(2, 4)}, tmp_path / name)
    with pytest.raises(FormatError, match=r"is in a\.safetensors and in b\.safetensors"):
        open_source(tmp_path)


def replaced(path):
    """By a file of the same size and times, renamed into its place."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    fresh = path.with_name("fresh")
    save_file({"w.weight": torch.zeros(20, 40)}, fresh)
    os.utime(fresh, ns=times)
    os.replace(fresh, path)


@pytest.mark.parametrize("change", [replaced, lambda path: path.write_bytes(path.read_bytes()[:-100])])
@pytest.mark.parametrize("while_read", [False, True])
def test_a_file_that_changes_after_it_was_opened_is_read_no_more(tmp_path, monkeypatch, change, while_read):
    path = tmp_path / "model.safetensors"
    save_file({"w.weight": torch.ones(20, 40)}, path)
    source = open_source(tmp_path)
    if while_read:
        buffer = source_module._page_buffer
        monkeypatch.setattr(source_module, "_page_buffer", lambda size: (change(path), buffer(size))[1])
    else:
        change(path)
    with pytest.raises(FormatError, match="the file changed while it was"):
        source.read(source.tensors[0])
    assert with_hashes(source).files[0].sha256 is None


def test_other_bytes_leave_other_marks_wherever_they_are(tmp_path):
    """In one block of a file that is not read whole."""
    values, seen = torch.zeros(BLOCKS, 4 * BLOCK, dtype=torch.uint8), []
    for changed in (None, 0, BLOCKS // 2, BLOCKS - 1):
        values[changed or 0] = 0 if changed is None else 1
        save_file({"w.weight": values}, tmp_path / "model.safetensors")
        seen.append(marks(open_source(tmp_path))["blocks of model.safetensors"])
    assert len(set(seen)) == 4


def test_a_file_that_is_gone_is_one_line(tmp_path):
    save_file({"w.weight": torch.ones(20, 40)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors: No such file or directory; check that it is still"):
        source.read(source.tensors[0])
    assert with_hashes(source).files[0].sha256 is None


@pytest.mark.parametrize("name", ["", "model.safetensors", "config.json"])
def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch, name):
    """As a user who is not root sees it."""
    save_file({"w.weight": torch.ones(20, 40)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    def refuse(path, *_, **__):
        if path == tmp_path / name:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *_, **__)

    method = "open" if name else "iterdir"
    original = getattr(Path, method)
    monkeypatch.setattr(Path, method, refuse)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: path.open().read())
    with pytest.raises(SourceError, match=rf"{name}: Permission denied; check that it is still there"):
        open_source(tmp_path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SourceError, match="not a weight file"):
        open_source(tmp_path / "notes.txt")


@pytest.mark.parametrize("layer", ["9" * 5000, "9" * 20, "99999999", "²"])
def test_a_number_that_is_no_layer(tmp_path, layer):
    save_file(
        {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(3, 4) for n in ("0", layer)}, tmp_path / "x.safetensors"
    )
    lmd_hf.analyze(tmp_path).save(tmp_path / "out")
    assert {m.layer for m in lmd_hf.Report.load(tmp_path / "out").matrices} == {0, None}


def test_names_are_in_the_order_of_their_numbers(tmp_path):
    names = [f"x{n}.{m}.weight" for n in (0, 2, 10) for m in (1, 9, 11)]
    save_file({name: torch.ones(3, 4) for name in reversed(names)}, tmp_path / "x.safetensors")
    assert [ref.name for ref in list_matrices(open_source(tmp_path)).selected] == names
