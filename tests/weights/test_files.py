"""Weight files of other kinds than sharded safetensors: pickles, variants, the authors' own layouts, GGUF."""

import hashlib
import io
import json
import os
import pickle
import re

import gguf
import numpy as np
import pytest
import torch
from models import make
from safetensors.torch import load_file, save_file
from torch import nn

import lmd_hf
from lmd_hf.errors import FormatError, LmdError, SourceError
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.repository import unread_files, weight_files
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_stored


def is_loaded(value):
    """Whether torch loads what it saves of this with tensors alone."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    try:
        torch.load(stream, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny LLaMA as transformers saves it, and its state dict."""
    folder = tmp_path_factory.mktemp("saved")
    make("llama").save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def rows(model):
    return {(m.role, m.layer, m.part): m.singular_values for m in lmd_hf.analyze(model).matrices}


def same(model, saved):
    """The same matrices, with the same singular values, as the safetensors file has."""
    ours, theirs = rows(model), rows(saved)
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        np.testing.assert_allclose(values, theirs[key], rtol=1e-12)


# --- pickles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_checkpoint_gives_the_same_numbers(tmp_path, saved, legacy):
    folder, state = saved
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    same(tmp_path, folder)
    report = lmd_hf.analyze(tmp_path)
    assert report.model.files[0].sha256 is not None
    assert report.coverage.parameters == sum(value.numel() for value in state.values())


def test_a_sharded_pickle_and_weights_inside_a_trainers_checkpoint(tmp_path, saved):
    folder, state = saved
    names = sorted(state)
    for index, part in enumerate((names[::2], names[1::2])):
        torch.save({"epoch": 3, "state_dict": {n: state[n] for n in part}}, tmp_path / f"pytorch_model-{index}.bin")
    index = {"weight_map": {name: f"pytorch_model-{place % 2}.bin" for place, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "training_args.bin").write_bytes(b"never opened")
    same(tmp_path, folder)


def test_a_tensor_pickled_under_two_names_is_counted_once(tmp_path):
    weight = torch.randn(6, 4)
    state = {"wte.weight": weight, "lm_head.weight": weight}
    torch.save(state, tmp_path / "pytorch_model.bin")
    report = lmd_hf.analyze(tmp_path)
    assert (report.coverage.parameters, len(report.matrices)) == (24, 1)
    assert [(a.name, a.of) for a in report.coverage.aliases] == [("lm_head.weight", "wte.weight")]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_code_in_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    with (tmp_path / "old" / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Harmful(), file)
    torch.save({"weight": torch.ones(2, 2), "optimiser": Harmful()}, tmp_path / "pytorch_model.bin")
    for folder in (tmp_path, tmp_path / "old"):
        with pytest.raises(SourceError, match="holds more than tensors"):
            open_source(folder)
    assert not (tmp_path / "harm").exists()


def test_a_pickle_without_tensors_says_so(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(FormatError, match="no named tensors"):
        open_source(tmp_path / "model.pt")


W = torch.arange(24.0).reshape(6, 4)
STATE = {"a.weight": W}
DEEP = {"enc": STATE, "l": [W, W], "b.weight": W + 1}
SPARSE = torch.sparse_coo_tensor([[0], [1]], [2.0], (4, 4))
CSR = torch.sparse_csr_tensor(torch.tensor([0, 1, 1]), torch.tensor([1]), torch.tensor([2.0]), (2, 4))
META = torch.empty(6, 4, device="meta")
RAGGED = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
NESTED = pytest.mark.skipif(not is_loaded(RAGGED), reason=f"torch {torch.__version__} loads no nested tensors")


@pytest.mark.parametrize(
    ("saved_as", "read", "listed", "beside"),
    [
        ({"step": torch.tensor(3.0), "state_dict": STATE}, "a.weight", {}, "step"),
        ({"ema": {"a": W, "b": W}, "model": STATE}, "a.weight", {}, r"ema \(2 tensors\)"),
        ({"model": {"b.weight": W}, "state_dict": STATE}, "a.weight", {}, "model"),
        ({"model": {"module": STATE, "ema": STATE | {"b": W}}}, "a.weight", {}, r"model\.ema \(2 tensors\)"),
        ({"state_dict": DEEP}, "b.weight", dict.fromkeys(["enc.a.weight", "l.0", "l.1"], "in a dict or list"), ""),
        ({1: W, "1": W + 1}, "1|1 (again)", {}, ""),
        (STATE | {"s": SPARSE}, "a.weight", {"s": "stored sparse"}, ""),
        (STATE | {"s": CSR}, "a.weight", {"s": "stored sparse"}, ""),
        pytest.param(STATE | {"s": RAGGED}, "a.weight", {"s": "nested"}, "", marks=NESTED),
        (STATE | {"m": META, "n": META}, "a.weight", {"m": "no data", "n": "no data"}, ""),
        (nn.ParameterDict({"w": nn.Parameter(W)}).state_dict(keep_vars=True), "w", {}, ""),
    ],
)
def test_what_a_pickle_holds_is_read_or_listed(tmp_path, saved_as, read, listed, beside):
    torch.save(saved_as, tmp_path / "pytorch_model.bin")
    report = lmd_hf.analyze(tmp_path)
    assert [matrix.name for matrix in report.matrices] == read.split("|")
    assert report.coverage.parameters >= 24 * (len(report.matrices) + len(listed) - ("s" in listed))
    skipped = {item.name: item.reason for item in report.coverage.skipped}
    assert skipped.keys() == listed.keys()
    assert all(reason in skipped[name] for name, reason in listed.items())
    notes = [note for note in report.coverage.notes if "not read beside" in note]
    assert len(notes) == bool(beside)
    assert all(re.search(f": {beside}$", note) for note in notes)


def test_a_gain_without_data_is_the_reason_of_what_it_feeds(tmp_path, saved):
    folder, state = saved
    name = "model.layers.0.input_layernorm.weight"
    torch.save(state | {name: state[name].to("meta")}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    skipped = lmd_hf.analyze(tmp_path, metric="norm", layers="0").coverage.skipped
    assert {s.name.split(".")[-2] for s in skipped if "no data" in s.reason} == {
        "q_proj",
        "k_proj",
        "v_proj",
        name.split(".")[-2],
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([W], "no named tensors in it"),
        ({"net": STATE, "opt": {"m": W}}, r"no named tensors .*but in net, opt; save one"),
    ],
)
def test_a_pickle_without_a_state_dict_says_where_its_tensors_are(tmp_path, content, said):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(FormatError, match=said):
        open_source(tmp_path / "model.pt")


def test_a_pickle_that_holds_itself_ends(tmp_path):
    content = {"a.weight": W}
    content["state_dict"] = content
    torch.save(content, tmp_path / "model.pt")
    assert [tensor.name for tensor in open_source(tmp_path / "model.pt").tensors] == ["a.weight"]


def test_a_damaged_old_pickle_is_one_clear_line(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    data[data.index(b"Storage\n") + 16] ^= 1  # of the number by which its entries are found
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not a readable checkpoint"):
        open_source(path)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_pickle_that_is_saved_again_is_read_again(tmp_path, in_place):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.eye(300)}, path)
    before = open_source(tmp_path)
    assert lmd_hf.analyze(tmp_path).matrices[0].shape == (300, 300)
    torch.save({"a.weight": torch.eye(3)}, path if in_place else tmp_path / "next")
    if not in_place:
        os.replace(tmp_path / "next", path)
    report = lmd_hf.analyze(tmp_path)
    assert report.matrices[0].shape == (3, 3)
    assert report.model.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(FormatError, match="changed while it was being read"):  # and neither old entries nor a bus error
        before.read(before.tensors[0])


# --- which files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ("model.safetensors pytorch_model.bin model.fp16.safetensors", "model.safetensors"),
        ("model.fp16.safetensors pytorch_model.bin", "model.fp16.safetensors"),
        ("model.safetensors.index.fp16.json model-1.fp16.safetensors", "model.safetensors.index.fp16.json"),
        ("model.safetensors.index.json model-1.safetensors consolidated.safetensors", "model.safetensors.index.json"),
        ("unet.safetensors unet.fp16.safetensors", "unet.safetensors"),
        ("consolidated.safetensors params.json", "consolidated.safetensors"),
        ("consolidated.00.pth params.json", "consolidated.00.pth"),
        ("pytorch_model.bin training_args.bin optimizer.pt rng_state_0.pth", "pytorch_model.bin"),
        ("pytorch_model.bin.index.json pytorch_model-1.bin", "pytorch_model.bin.index.json"),
        ("model-q4.gguf README.md", "model-q4.gguf"),
    ],
)  # fmt: skip
def test_which_file_is_read(present, chosen):
    assert weight_files(present.split(), "here") == [chosen]


@pytest.mark.parametrize(
    ("present", "remedy"),
    [
        ("optimizer_0 pytorch_model_fsdp_0 rng_state_0.pth scheduler.pt", "accelerate merge-weights"),
        ("__0_0.distcp config.json", "accelerate merge-weights"),
        ("config.json global_step2 latest rng_state_0.pth zero_to_fp32.py", r"zero_to_fp32\.py there"),
        ("config.json training_args.bin", "save_pretrained"),
    ],
)
def test_weights_in_parts_name_the_way_to_whole_ones(present, remedy):
    with pytest.raises(SourceError, match=f"^here: no .*weights in it; .*{remedy}"):
        weight_files(present.split(), "here")


@pytest.mark.parametrize(
    ("present", "read", "named"),
    [
        ("model.safetensors q4.gguf quantised/q8.gguf", "model.safetensors", "q4.gguf quantised/q8.gguf"),
        ("pytorch_model.bin q4.gguf mm_projector.bin", "pytorch_model.bin", "mm_projector.bin q4.gguf"),
        ("model.safetensors reward.pt head.pth", "model.safetensors", "head.pth reward.pt"),
        ("a.safetensors a.bin pytorch_model.bin open_clip_pytorch_model.bin", "a.safetensors", ""),
        ("adapter_model.safetensors adapter_model.bin", "adapter_model.safetensors", ""),
        ("model.safetensors voices/af.pt openvino/openvino_model.bin", "model.safetensors", ""),
        ("pytorch_model.bin training_args.bin optimizer.pt scheduler.bin rng_state_0.pth", "pytorch_model.bin", ""),
        ("model.safetensors sampler.bin dl_state_dict.bin custom_checkpoint_0.pkl optim.pt", "model.safetensors", ""),
        ("checkpoint-5/optimizer.bin checkpoint-5/training_args.bin model.pt", "model.pt", ""),
    ],
)
def test_which_files_are_named_as_unread(present, read, named):
    said = ", ".join(named.split()) + ("; --subfolder reads a folder" if "/" in named else "")
    assert unread_files(present.split(), [read]) == ((f"weight files not read: {said}",) if named else ())


def test_files_beside_the_model_are_named_and_folders_are_not(tmp_path):
    save_file({"a.weight": W}, tmp_path / "model.safetensors")
    (tmp_path / "value_head.bin").write_bytes(b"never opened")
    (tmp_path / "parts.bin").mkdir()
    assert open_source(tmp_path).notes == ("weight files not read: value_head.bin",)


def test_several_gguf_files_are_a_choice():
    with pytest.raises(SourceError, match=r"2 GGUF files; give one of them: a\.gguf, b\.gguf"):
        weight_files(["a.gguf", "b.gguf"], "here")


def test_slices_of_every_matrix_are_not_taken_for_matrices():
    with pytest.raises(SourceError, match="2 files each hold a slice of every matrix"):
        weight_files(["consolidated.00.pth", "consolidated.01.pth"], "here")
    with pytest.raises(SourceError, match="2 files each hold a slice of every matrix"):
        weight_files(["consolidated.00.safetensors", "consolidated.01.safetensors", "params.json"], "here")


ORIGINAL = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv"}
ORIGINAL |= {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"}
ORIGINAL |= {"mlp.up_proj": "feed_forward.w3", "embed_tokens": "tok_embeddings", "lm_head": "output", "model.": ""}


def as_the_authors(state):
    renamed = {}
    for key, value in state.items():
        for ours, theirs in ORIGINAL.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def cut(name, value, count, place, tokens):
    """What process `place` of `count` holds: a linear layer whose outputs (column-parallel) or inputs (row-parallel)
    are cut, an embedding whose width or whose tokens are."""
    if value.ndim == 1:
        return value
    by_input = any(leaf in name for leaf in ("wo", "w2", "tok_embeddings")) and not (tokens and "tok" in name)
    return value.chunk(count, dim=int(by_input))[place].clone()


@pytest.fixture
def sliced(saved):
    """A function that writes the files of `count` processes into a folder; the whole matrices by name."""

    def write(folder, count, tokens=False, dim=32):
        whole = as_the_authors(saved[1])
        for place in range(count):
            part = {name: cut(name, value, count, place, tokens) for name, value in whole.items()}
            torch.save(part, folder / f"consolidated.{place:02}.pth")
        (folder / "params.json").write_text(json.dumps({"dim": dim, "n_layers": 2}))
        return whole

    return write


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_slices_of_every_matrix_are_joined(tmp_path, saved, sliced, count, tokens):
    whole = sliced(tmp_path, count, tokens)
    source = open_source(tmp_path)
    assert {tensor.name: tensor.shape for tensor in source.tensors} == {n: tuple(v.shape) for n, v in whole.items()}
    for tensor in source.tensors:
        assert torch.equal(source.read(tensor), whole[tensor.name])
        assert torch.equal(source.read(tensor, 1, 7), whole[tensor.name][1:7])
    same(tmp_path, saved[0])
    report = lmd_hf.analyze(tmp_path)
    assert report.coverage.parameters == sum(value.numel() for value in whole.values())
    assert [file.name for file in report.model.files] == [f"consolidated.{n:02}.pth" for n in range(count)]
    assert all(file.sha256 for file in report.model.files)


def test_slices_on_the_hub_are_joined(tmp_path, hub, saved, sliced):
    sliced(tmp_path, 2)
    hub.add("org/sliced", {f"original/{path.name}": path.read_bytes() for path in tmp_path.iterdir()})
    ours = {(m.role, m.layer): m.singular_values for m in lmd_hf.analyze("org/sliced", subfolder="original").matrices}
    theirs = {(m.role, m.layer): m.singular_values for m in lmd_hf.analyze(saved[0]).matrices}
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        np.testing.assert_allclose(values, theirs[key], rtol=1e-12)


@pytest.mark.parametrize("fault", ["width", "name", "absent", "shape", "vector"])
def test_slices_that_leave_a_doubt_are_refused(tmp_path, sliced, fault):
    sliced(tmp_path, 2, dim=48 if fault == "width" else 32)
    last = tmp_path / "consolidated.01.pth"
    part = torch.load(last)
    name = "layers.0.attention.wq.weight"
    if fault == "absent":
        del part[name]
    elif fault == "shape":
        part[name] = part[name][1:]
    elif fault in ("name", "vector"):
        extra = torch.ones(4, 32) if fault == "name" else torch.ones(4)
        first = torch.load(tmp_path / "consolidated.00.pth")
        torch.save(first | {"layers.0.attention.mystery": extra}, tmp_path / "consolidated.00.pth")
        part["layers.0.attention.mystery"] = extra
    torch.save(part, last)
    with pytest.raises(FormatError, match=r"no rule joins the slices of .* join them with their authors' script"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.safetensors"])
def test_the_authors_own_layout(tmp_path, saved, name):
    folder, state = saved
    renamed = as_the_authors(state)
    original = tmp_path / "original"
    original.mkdir()
    if name.endswith(".pth"):
        torch.save(renamed, original / name)
    else:
        save_file(renamed, original / name)
    (original / "params.json").write_text("{}")
    found = {(m.role, m.layer, m.part): m for m in lmd_hf.analyze(tmp_path, subfolder="original").matrices}
    expected = rows(folder)
    assert found.keys() == expected.keys()
    for key, row in found.items():
        np.testing.assert_allclose(row.singular_values, expected[key], rtol=1e-12)


# --- GGUF --------------------------------------------------------------------------------------------------------

GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
GGUF_NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
GGUF_NAMES |= {"mlp.down_proj": "ffn_down", "model.layers": "blk", "model.embed_tokens": "token_embd"}
GGUF_NAMES |= {"lm_head": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
GGUF_NAMES |= {"model.norm": "output_norm"}


def write_gguf(path, state, kind=gguf.GGMLQuantizationType.F32, architecture="llama", heads=4):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    for name, value in state.items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        array = value.float().numpy()
        if array.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_has_the_roles_and_numbers_of_the_model(tmp_path):
    model = make("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    model.save_pretrained(tmp_path / "saved")
    write_gguf(tmp_path / "model.gguf", load_file(tmp_path / "saved" / "model.safetensors"))
    report = lmd_hf.analyze(tmp_path / "model.gguf")
    expected = {(m.role, m.layer): m for m in lmd_hf.analyze(tmp_path / "saved").matrices}
    found = {(m.role, m.layer): m for m in report.matrices}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        np.testing.assert_allclose(row.singular_values, expected[key].singular_values, rtol=1e-12)
        assert (row.shape, row.energy_degree) == (expected[key].shape, expected[key].energy_degree)
    assert report.coverage.parameters == sum(p.numel() for p in model.parameters())
    assert found["q", 1].name == "blk.1.attn_q.weight"


def test_gguf_queries_and_keys_come_in_the_order_of_transformers(tmp_path):
    """Written as convert_hf_to_gguf.py does; its comparison with the model is all zeros, quantised one of few ranks."""
    model = make("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    turned = {
        name: w.reshape(4 if "q_proj" in name else 2, 2, 8, 64).swapaxes(1, 2).reshape(w.shape)
        for name, w in state.items()
        if re.search("[qk]_proj", name)
    }
    write_gguf(tmp_path / "m.gguf", state | turned)
    change = lmd_hf.compare(model, tmp_path / "m.gguf")
    assert {row.role for row in change.matrices} >= {"q", "k", "v", "o"}
    assert all(row.identical for row in change.matrices)
    write_gguf(tmp_path / "q8.gguf", state | turned, gguf.GGMLQuantizationType.Q8_0)
    q, k, v = (
        row for row in lmd_hf.compare(model, tmp_path / "q8.gguf").matrices if row.layer == 0 and row.role in "qkv"
    )
    assert max(q.relative_update, k.relative_update) < 2 * v.relative_update < 0.02


WRITABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "BF16", "F16"]
PACKED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_M", "IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_S", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("name", WRITABLE)
def test_gguf_blocks_written_by_ggml(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": w}, kind)
    source = open_source(tmp_path)
    (ref,) = list_matrices(source).selected
    found = read_stored(source, ref)
    expected = gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind)
    assert torch.equal(found.matrix.float(), torch.from_numpy(expected))
    assert (ref.dtype, ref.shape, ref.role, ref.layer) == (name, (32, 256), "up", 0)
    if name.startswith("Q"):  # the half step bounds the errors' root mean square, and not by far
        error = float((found.matrix - w).double().square().mean().sqrt())
        assert error < found.rounding.absolute < 3 * error


@pytest.mark.parametrize("name", PACKED)
def test_gguf_blocks_of_every_other_type(tmp_path, name):
    """Random bytes are valid blocks, once their scales are finite."""
    kind = gguf.GGMLQuantizationType[name]
    entries, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (8, 512 // entries * size), dtype=np.uint8)
    while not np.isfinite(gguf.quants.dequantize(raw, kind)).all():
        bad = ~np.isfinite(gguf.quants.dequantize(raw, kind)).all(1)
        raw[bad] = np.random.default_rng(int(raw[bad].sum())).integers(0, 256, raw[bad].shape, dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    source = open_source(tmp_path / "m.gguf")
    (ref,) = list_matrices(source).selected
    assert ref.shape == (8, 512)
    assert torch.equal(read_stored(source, ref).matrix, torch.from_numpy(gguf.quants.dequantize(raw, kind)).float())


def test_gguf_experts_fused_attention_and_shared_experts(tmp_path):
    state = {
        "blk.0.attn_qkv.weight": torch.randn(128, 64),
        "blk.0.ffn_gate_exps.weight": torch.randn(3, 96, 64),
        "blk.0.ffn_gate_inp.weight": torch.randn(3, 64),
        "blk.0.ffn_up_shexp.weight": torch.randn(96, 64),
    }
    write_gguf(tmp_path / "m.gguf", state, architecture="unheard-of")
    source = open_source(tmp_path / "m.gguf")
    found = {(r.role, r.expert): (r.shape, read_stored(source, r).matrix) for r in list_matrices(source).selected}
    assert found["q", None][0] == (64, 64)
    assert found["k", None][0] == (32, 64)
    assert torch.equal(found["v", None][1], state["blk.0.attn_qkv.weight"][96:])
    gates = [matrix for (role, expert), (_, matrix) in found.items() if expert is not None]
    assert torch.equal(torch.stack(gates), state["blk.0.ffn_gate_exps.weight"])
    assert {role for role, _ in found} >= {"router"}


@pytest.mark.parametrize("cut", [3, 40, -100])
def test_a_damaged_gguf_file_is_one_clear_line(tmp_path, cut):
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": torch.randn(32, 256)})
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:cut])
    with pytest.raises(LmdError, match=r"m\.gguf: "):
        open_source(tmp_path / "m.gguf")


def test_gguf_metadata_that_are_no_text_are_one_clear_line(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": torch.randn(32, 256)})
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"llama", b"\xfflama", 1))
    with pytest.raises(LmdError, match=r"m\.gguf: not a readable GGUF file"):
        open_source(tmp_path / "m.gguf")


def test_gguf_of_no_heads(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"blk.0.attn_qkv.weight": torch.randn(96, 32)}, heads=0)
    report = lmd_hf.analyze(tmp_path / "m.gguf", heads=True)
    assert sum(m.shape[0] for m in report.matrices) + sum(s.shape[0] for s in report.coverage.skipped) == 96


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "m.gguf"])
def test_a_hub_model_of_another_kind_is_downloaded_and_read(tmp_path, hub, saved, kind):
    folder, state = saved
    files = {"config.json": (folder / "config.json").read_bytes()}
    if kind.endswith(".gguf"):
        write_gguf(tmp_path / kind, state)
    else:
        torch.save(state, tmp_path / kind)
    name = f"org/other-{kind.split('.')[-1]}"
    commit = hub.add(name, {**files, kind: (tmp_path / kind).read_bytes()})
    same(name, folder)
    report = lmd_hf.analyze(name)
    assert (report.model.commit, report.model.files[0].name) == (commit, kind)
