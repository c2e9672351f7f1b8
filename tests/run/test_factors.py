"""Factors on disk: they rebuild each matrix, keep to the metric, and are written once."""

import json
from dataclasses import replace

import models
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lmd_hf import analyze, cli
from lmd_hf.errors import OutputError, SettingsError
from lmd_hf.matrix.lmd import decompose, decompose_product
from lmd_hf.records import Factored
from lmd_hf.run.factors import factor_file
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "factors"


def load(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lmd"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def rebuilt(factors):
    return (factors["projection"] * factors["s"]) @ factors["similarity"]


def test_full_rank_factors_rebuild_every_matrix_as_the_network_uses_it(save, folder):
    """GPT-2's matrices are stored turned round, and its q, k and v in one."""
    report = analyze(save("gpt2"), rank=10**6, factors=folder)
    stored = load_file(save("gpt2") / "model.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == len(report.matrices)
    rows = {(m.name, m.part): m for m in report.matrices}
    for path in files:
        told, factors = load(path)
        row = rows.pop((told["name"], told["part"]))
        torch.testing.assert_close(factors["s"], torch.tensor(row.singular_values), rtol=1e-7, atol=1e-9)
        w = stored[told["name"]].double()
        w = w.T if ".h." in told["name"] or row.role == "embed" else w
        if told["part"]:
            size = w.shape[0] // 3
            w = w["qkv".index(told["part"]) * size :][:size]
        torch.testing.assert_close(rebuilt(factors), w, rtol=0, atol=1e-10)
        assert told["error"] == pytest.approx(0, abs=1e-9)


def test_truncated_factors_are_the_best_of_their_rank(save, folder):
    report = analyze(save("llama"), rank=4, factors=folder, roles=("down",))
    for path, row in zip(sorted(folder.iterdir()), report.matrices, strict=True):
        told, factors = load(path)
        w = load_file(save("llama") / "model.safetensors")[row.name].double()
        assert factors["similarity"].shape == (4, row.shape[1])
        rest = torch.tensor(row.singular_values[4:])
        assert torch.linalg.norm(w - rebuilt(factors)) == pytest.approx(rest.norm().item())
        assert told["error"] == pytest.approx(rest.norm().item())


def test_a_pair_of_more_ranks_than_its_matrix_has_rows_keeps_its_row(folder, tmp_path):
    """As rank 16 on a router of eight experts; what has fewer axes than were asked for is written whole."""
    wrapped = peft.get_peft_model(
        models.make("llama"), peft.LoraConfig(r=64, target_modules=["k_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    report = analyze(tmp_path / "adapter", rank=60, factors=folder)
    assert report.coverage.skipped == ()
    pairs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(report.matrices) == len(list(folder.iterdir())) > 0
    for row in report.matrices:
        b, a = (pairs[row.name.replace("lora_A", side)].double() for side in ("lora_B", "lora_A"))
        _, factors = load(factor_file(folder, row))
        torch.testing.assert_close(rebuilt(factors), b @ a / 8, rtol=0, atol=1e-10)


def test_the_norm_metric_is_that_of_the_factors(save, folder):
    analyze(save("llama"), rank=3, factors=folder, metric="norm", roles=("q",))
    told, factors = load(sorted(folder.iterdir())[0])
    tensors = load_file(save("llama") / "model.safetensors")
    gain = tensors["model.layers.0.input_layernorm.weight"].double()
    expected = torch.linalg.svdvals(tensors[told["name"]].double() * gain)[:3]
    assert told["metric"] == "norm"
    torch.testing.assert_close(factors["s"], expected, rtol=1e-9, atol=0)


def test_what_is_written_is_not_written_again_unless_it_changed(save, folder):
    analyze(save("llama"))  # its spectra are known, its factors are not
    analyze(save("llama"), rank=2, factors=folder)
    first = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(first) == 16
    removed = sorted(folder.iterdir())[0]
    removed.unlink()
    analyze(save("llama"), rank=2, factors=folder)
    second = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in first if first[name] != second[name]} == {removed.name}
    analyze(save("llama"), rank=3, factors=folder)
    assert all(load(path)[0]["rank"] == 3 for path in folder.iterdir())


def test_thin_factors_give_the_factors_of_their_product():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(30, 5, generator=generator), torch.randn(5, 20, generator=generator)
    thin, whole = (
        decompose_product(Factored(left, right, -0.5)),
        decompose(-0.5 * left.double() @ right.double(), rank=5),
    )
    torch.testing.assert_close(thin.s_K, whole.s_K)
    torch.testing.assert_close(thin.reconstruct(), whole.reconstruct())
    torch.testing.assert_close(thin.u, whole.u)


def test_rank_and_folder_go_together(save, tmp_path, capsys):
    with pytest.raises(SettingsError, match="go together"):
        analyze(save("llama"), rank=4)
    with pytest.raises(SettingsError, match="go together"):
        analyze(save("llama"), rank=-1, factors=tmp_path / "out")
    assert cli.run(["analyze", str(save("llama")), "--rank", "4"]) == 1
    assert "give --out DIR" in capsys.readouterr().err
    assert cli.run(["analyze", str(save("llama")), "--rank", "4", "--out", str(tmp_path / "out"), "-q"]) == 0
    assert len(list((tmp_path / "out" / "factors").iterdir())) == 16
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --out"):
        analyze(save("llama"), rank=4, factors=tmp_path / "file")


def test_names_that_differ_have_files_that_differ(tmp_path):
    ref = list_matrices(open_source(torch.nn.Linear(2, 2))).selected[0]
    refs = [replace(ref, name=name) for name in ("a/b", "a:b", "a-b", "x" * 300, "x" * 299)]
    files = {factor_file(tmp_path, ref) for ref in refs}
    assert len(files) == len(refs)
    assert all(len(file.name) < 255 for file in files)
