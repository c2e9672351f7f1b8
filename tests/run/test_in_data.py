"""Rows in the metric of the data, against plain hooks and dense float64 algebra."""

import json
import os
import subprocess
import sys
from importlib import resources

import jsonschema
import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmd_hf import Report, analyze
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.records import Data
from lmd_hf.run import in_data
from lmd_hf.weights.source import EMBEDDED_ID


SAME = 1e-5 if torch.cuda.is_available() else 1e-9  # there the one model runs on the GPU, in float32, the other not
SCHEMA = json.loads(resources.files("lmd_hf.report").joinpath("schema.json").read_text())


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return models.write_ids(tmp_path_factory.mktemp("data") / "ids.jsonl", 60, 8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Paragraphs of Python's own documentation, a line each."""
    import argparse
    import collections
    import inspect

    found = [o.__doc__ for m in (argparse, collections, inspect) for o in vars(m).values() if inspect.isfunction(o)]
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(" ".join(doc.split()) for doc in found if doc))
    return str(path)


def settings(path, **changes):
    return Data(path, seq_len=8, **changes)


def inputs_of(folder, path, module):
    """Every input row of one module, over the whole dataset."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = []
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 48)))
    with torch.no_grad(), open(path) as lines:
        for line in lines:
            model(input_ids=torch.tensor([json.loads(line)["input_ids"]]))
    return torch.cat(seen).double()


@pytest.fixture(scope="module")
def llama(save, ids):
    return analyze(save("llama"), metric="data", data=settings(ids))


def test_a_row_is_dense_algebra_on_plain_hooks(save, ids, llama):
    """S', its shares and its energy, for a layer without a bias: the second moments are the metric."""
    name = "model.layers.1.mlp.down_proj"
    row = next(m for m in llama.matrices if m.name == f"{name}.weight")
    x = inputs_of(save("llama"), ids, name)
    w = load_file(save("llama") / "model.safetensors")[f"{name}.weight"].double()
    m = x.T @ x / len(x)
    values, basis = torch.linalg.eigh(m)
    root = (basis * values.clamp_min(0).sqrt()) @ basis.T
    s = torch.linalg.svdvals(w @ root)
    np.testing.assert_allclose(row.singular_values, s, rtol=1e-4)
    k = row.latent_dim
    assert (row.metric, row.latent_dim_rule, row.data.samples) == ("data", "energy-0.90", 480)
    assert k == int(torch.searchsorted((s**2).cumsum(0) / (s**2).sum(), 0.9)) + 1
    assert row.data.energy == pytest.approx((x @ w.T).pow(2).sum(1).mean().item(), rel=1e-4)
    assert row.data.metric_share == pytest.approx(((s[:k] ** 2).sum() / (s**2).sum()).item(), rel=1e-4)
    u = torch.linalg.svd(w).U[:, :k]
    assert row.data.weights_share == pytest.approx(((x @ w.T @ u).pow(2).sum() / (x @ w.T).pow(2).sum()).item(), 1e-4)
    assert row.data.weights_share < row.data.metric_share
    assert 0 < row.data.energy_error < 0.1
    assert row.data.dimensions["latent"]["two_nn"][1] > 0


def test_a_layer_with_a_bias_is_centred(save, ids, monkeypatch):
    report = analyze(save("bert"), metric="data", data=settings(ids), roles=("q",))
    assert all(m.metric == "data" for m in report.matrices)
    seen = {}
    monkeypatch.setattr(in_data, "dense", lambda m: seen.setdefault("m", m) is None or real(m))
    from lmd_hf.matrix.metrics import dense as real

    analyze(save("bert"), metric="data", data=settings(ids), roles=("q",), layers="0")
    gram = seen["m"].cpu()
    assert torch.linalg.eigvalsh(gram)[0] > -1e-12
    assert report.matrices[0].data.energy == pytest.approx(
        (load_file(save("bert") / "model.safetensors")[report.matrices[0].name].double() @ gram).mul(
            load_file(save("bert") / "model.safetensors")[report.matrices[0].name].double()
        ).sum().item(), rel=1e-9,
    )  # fmt: skip


def test_a_mean_far_above_the_spread_leaves_the_covariance_its_digits(ids):
    """A norm's outputs lie in a plane, so that their covariance has a zero for rounding to turn negative."""
    module = models.make("gpt2")
    seen = []
    with torch.no_grad():
        module.transformer.h[1].ln_2.bias.fill_(1e3)
    handle = module.transformer.h[1].ln_2.register_forward_hook(lambda _, __, y: seen.append(y.detach().flatten(0, 1)))
    report = analyze(module, metric="data", data=settings(ids), roles=("up",), layers="1")
    handle.remove()
    x = torch.cat(seen)[-480:].double()  # the first pass looks for the modules
    w = module.transformer.h[1].mlp.c_fc.weight.detach().double().cpu()
    expected = (w.T @ torch.cov(x.T, correction=0).cpu() @ w).trace().item()
    assert report.matrices[0].metric == "data"
    assert report.matrices[0].data.energy == pytest.approx(expected, rel=1e-9)


def test_knn_is_another_metric_on_at_most_4096_rows(save, ids, llama):
    knn = analyze(save("llama"), metric="data", data=settings(ids, graph="knn", neighbours=5))
    one, other = (next(m for m in r.matrices if m.role == "head") for r in (knn, llama))
    assert one.data.samples == one.data.graph_samples == 480
    assert one.data.energy < other.data.energy
    assert one.data.energy_error > 0
    assert knn.settings["data"]["neighbours"] == 5


def test_neighbours_that_are_all_equal_are_no_metric(save, tmp_path):
    """Of six tokens and no positions yet, each row has dozens of equals."""
    rng = np.random.default_rng(0)
    rows = [json.dumps({"input_ids": rng.integers(1, 7, 8).tolist()}) for _ in range(60)]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    options = {"metric": "data", "roles": ("q",), "layers": "0"}
    knn = analyze(save("llama"), data=settings(str(tmp_path / "few.jsonl"), graph="knn"), **options).matrices[0]
    assert (knn.metric, knn.data) == ("identity", None)
    assert knn.metric_note == "its input never changes from a sample to its neighbours"
    complete = analyze(save("llama"), data=settings(str(tmp_path / "few.jsonl")), **options).matrices[0]
    assert len(complete.topology_spectrum) == 0
    assert complete.data.dimensions["input"]["two_nn"] is None


def test_what_has_no_metric_says_why(save, ids):
    report = analyze(save("mixtral"), metric="data", data=settings(ids))
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(report.to_json()))
    for matrix in report.matrices:
        assert (matrix.metric == "data") == (matrix.metric_note is None) == (matrix.data is not None)
        assert (matrix.topology_spectrum is None) == (matrix.data is None)
    notes = report.coverage.notes
    assert any(note.startswith("data: 60 examples of") and "480 tokens" in note for note in notes)
    assert "identity metric for 1 of 30 matrices: an embedding's inputs are one-hot tokens" in notes
    assert any(note.startswith("identity metric for 18 of 30 matrices: one parameter holds several") for note in notes)


def test_round_trips_with_thinned_topology(llama, tmp_path):
    again = Report.from_json(llama.to_json())
    assert again == llama
    assert again.to_json() == llama.to_json()
    llama.save(tmp_path)
    loaded = Report.load(tmp_path)
    for one, other in zip(loaded.matrices, llama.matrices, strict=True):
        if other.topology_spectrum is not None:
            np.testing.assert_array_equal(one.topology_spectrum, other.topology_spectrum)
    assert "--metric data --dataset" in llama.card()
    assert "--seq-len 8" in llama.card()


def test_text_says_what_the_data_say(llama):
    summary, card = llama.summary(), llama.card()
    assert "high intrinsic dimension: found" in summary or "high intrinsic dimension: not found" in summary
    assert "60 examples of" in summary
    rows = [line for line in summary.splitlines() if line.startswith("mlp down")]
    assert len(rows) == 2
    assert rows[1].count("%") == 6
    assert "hold 90 % of the outputs' energy over the data" in card
    assert "come from the weights and one dataset" in card
    assert "| energy in n'" in card


def test_several_passes_give_what_one_gives(save, ids, llama, monkeypatch):
    monkeypatch.setattr(in_data, "memory_limit", lambda _: 1.0)
    several = analyze(save("llama"), metric="data", data=settings(ids))
    assert any("passed 9 times through the model" in note for note in several.coverage.notes)
    for one, other in zip(several.matrices, llama.matrices, strict=True):
        np.testing.assert_array_equal(one.singular_values, other.singular_values)
        assert (one.data is None) == (other.data is None)
        if one.data:
            assert one.data.energy == pytest.approx(other.data.energy, rel=1e-12)
            assert one.data.components == other.data.components


def test_factors_are_those_of_the_data_metric(save, ids, llama, tmp_path):
    analyze(save("llama"), metric="data", data=settings(ids), rank=3, factors=tmp_path, roles=("down",))
    row = next(m for m in llama.matrices if m.role == "down")
    factors = load_file(tmp_path / f"{row.name}.safetensors")
    np.testing.assert_allclose(factors["s"], row.singular_values[:3], rtol=1e-7)


def test_a_live_module_is_observed_as_it_is(ids, llama):
    module = models.make("llama").train()
    live = analyze(module, metric="data", data=settings(ids))
    assert module.training
    assert not any(child._forward_hooks for child in module.modules())
    np.testing.assert_allclose(live.matrices[5].singular_values, llama.matrices[5].singular_values, rtol=SAME)


def test_a_module_that_accelerate_keeps_on_disk_runs_layer_by_layer(ids, llama, tmp_path):
    from accelerate import disk_offload

    module = models.make("llama")
    disk_offload(module, tmp_path, execution_device=torch.device("cpu"))
    offloaded = analyze(module, metric="data", data=settings(ids))
    assert all(p.is_meta for p in module.parameters())
    for row, plain in zip(offloaded.matrices, llama.matrices, strict=True):
        assert row.metric == plain.metric
        np.testing.assert_allclose(row.singular_values, plain.singular_values, rtol=SAME)


def test_the_embedded_model_works_with_a_text_file(text):
    report = analyze(EMBEDDED_ID, metric="data", data=text, layers="0-1")
    assert {m.metric for m in report.matrices if m.role != "embed"} == {"data"}
    assert all(0 < m.data.weights_share <= m.data.metric_share for m in report.matrices if m.data)
    assert all(m.data.energy_error < 0.2 for m in report.matrices if m.data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "the metric 'data' needs a dataset"),
        ({"metric": "norm"}, "a dataset is for the metric 'data'"),
        ({"samples": 2}, "2 examples give 16 tokens, too few for the metric: the widest input needs 49"),
        ({"seq_len": 21}, "seq_len 21 is longer than the model's 20 positions"),
    ],
)
def test_bad_input_is_one_clear_line(save, ids, changes, message):
    fields = {name: value for name, value in changes.items() if name in ("samples", "seq_len")}
    options = {"metric": "data", "data": Data(ids, **{"seq_len": 8, **fields})}
    with pytest.raises(SettingsError, match=message) as caught:
        analyze(save("llama"), **{**options, **{k: v for k, v in changes.items() if k not in fields}})
    assert "\n" not in str(caught.value)


def test_inputs_that_are_nan_leave_the_identity_metric(save, ids, tmp_path):
    module = models.make("llama")
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    report = analyze(module, metric="data", data=settings(ids))
    after = [m for m in report.matrices if m.layer == 1]
    assert {m.metric_note for m in after} == {"its input holds NaN or infinity"}
    assert any(s.name == "model.layers.0.mlp.down_proj.weight" for s in report.coverage.skipped)


def test_adapters_and_lone_files_are_refused(save, ids, tmp_path):
    (tmp_path / "x.safetensors").write_bytes((save("llama") / "model.safetensors").read_bytes())
    with pytest.raises(SourceError, match="no whole model to run"):
        analyze(tmp_path / "x.safetensors", metric="data", data=settings(ids))


def run(launcher, folder, ids):
    command = [*launcher, "-m", "lmd_hf", "analyze", str(folder), "--metric", "data", "--dataset", ids, "--json"]
    command += ["--seq-len", "8", "--tokens", "300", "--device", "cpu", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.slow
def test_one_process_and_two_agree(save, ids):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master_port", "29641", "--nproc_per_node", "2"]
    one, two = run([sys.executable], save("llama"), ids), run(torchrun, save("llama"), ids)
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert one["coverage"] == two["coverage"]
    for first, second in zip(one["matrices"], two["matrices"], strict=True):
        np.testing.assert_allclose(first["singular_values"], second["singular_values"], rtol=1e-10)
        if first["data"]:
            np.testing.assert_allclose(first["topology_spectrum"], second["topology_spectrum"], rtol=1e-10)
            assert first["data"]["energy"] == pytest.approx(second["data"]["energy"], rel=1e-10)
            for place, found in first["data"]["dimensions"].items():
                for name, pair in found.items():
                    assert pair == pytest.approx(second["data"]["dimensions"][place][name], rel=1e-6)
