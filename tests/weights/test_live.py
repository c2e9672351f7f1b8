"""Live modules whose parameters are elsewhere: every number is the plain model's, or the refusal names the remedy."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import transformers as t
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from torch.nn.utils import prune

from lmd_hf import LmdError, analyze
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_matrix


TESTS = Path(__file__).parents[1]
CPU = torch.device("cpu")
HALF = {"transformer.wte": "cpu", "lm_head": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu",
        "transformer.h.1": "disk", "transformer.ln_f": "disk"}  # fmt: skip


def loaded(folder, save, device_map):
    model = t.AutoModelForCausalLM.from_pretrained(save("gpt2"), device_map=device_map, offload_folder=folder)
    if not hasattr(model, "hf_device_map"):
        pytest.skip("transformers 5.10 loads nothing where everything is on disk")
    return model


def rows(report):
    return {(m.name, m.part): m.singular_values for m in report.matrices}


def equal(ours, plain):
    assert rows(ours).keys() == rows(plain).keys()
    for key, values in rows(plain).items():
        np.testing.assert_array_equal(rows(ours)[key], values)
    assert not ours.unread


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("preload", [None, ["GPT2Block", "MixtralDecoderLayer", "T5Block"]])
def test_parameters_that_accelerate_offloaded_to_memory(family, preload):
    model = models.make(family)
    cpu_offload(model, execution_device=CPU, preload_module_classes=preload)
    assert any(p.is_meta for p in model.parameters())
    ours, plain = analyze(model), analyze(models.make(family))
    equal(ours, plain)
    assert ours.coverage == plain.coverage
    assert any(p.is_meta for p in model.parameters()), "nothing is left materialised"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_accelerate_offloaded_to_disk(tmp_path, dtype):
    model = models.make("gpt2").to(dtype)
    plain = analyze(models.make("gpt2").to(dtype))
    disk_offload(model, tmp_path, execution_device=CPU)
    equal(analyze(model), plain)  # the tied head is a second file there, which is an alias all the same


@pytest.mark.parametrize("device_map", [HALF, {"": "disk"}])
def test_a_model_loaded_to_memory_and_disk(tmp_path, save, device_map):
    model = loaded(tmp_path, save, device_map)
    assert any(p.is_meta for p in model.parameters())
    ours, plain = analyze(model, metric="norm"), analyze(models.make("gpt2"), metric="norm")
    equal(ours, plain)
    assert ours.coverage == plain.coverage


def test_a_dispatched_model(tmp_path):
    model = models.make("llama")
    places = {"model": "cpu", "lm_head": "disk"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.lm_head.weight.is_meta
    equal(analyze(model), analyze(models.make("llama")))


def test_one_parameter_is_loaded_at_a_time(save, tmp_path):
    model = loaded(tmp_path, save, {"": "disk"})
    source = open_source(model)
    ref = next(ref for ref in list_matrices(source).selected if ref.role == "up" and ref.layer == 1)
    assert torch.equal(read_matrix(source, ref), models.make("gpt2").transformer.h[1].mlp.c_fc.weight.T)
    assert all(p.is_meta for p in model.parameters())


def test_the_meta_device_without_a_hook_has_no_data():
    with torch.device("meta"):
        module = nn.Linear(4, 6)
    report = analyze(module)
    assert not report.matrices
    assert any("meta device" in item.reason for item in report.coverage.skipped)


def test_parameters_that_deepspeed_partitioned_are_refused_and_gathered_ones_read():
    module = nn.Linear(4, 6)
    module.weight.ds_id = 0  # as deepspeed.zero.Init marks a parameter, for good
    assert len(analyze(module).matrices) == 1
    module.weight.data = torch.empty(0)
    with pytest.raises(LmdError, match=r"ZeRO-3 keeps 'weight' in parts.*zero_to_fp32"):
        analyze(module)


DISTRIBUTED = """
import json, numpy as np, torch, torch.distributed as dist, models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from lmd_hf import LmdError, analyze

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
PLAN = {"model.layers.0.mlp.up_proj": ColwiseParallel(), "model.layers.0.mlp.down_proj": RowwiseParallel()}
KINDS = {
    "fully_shard": lambda model: fully_shard(model, mesh=mesh),
    "tensor_parallel": lambda model: parallelize_module(model, mesh, PLAN),
    "replicated": lambda model: distribute_module(model, mesh),
    "flat": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
}

def outcome(make):
    try:
        report = analyze(make(models.make("llama")))
    except LmdError as error:
        return str(error)
    ours = [(m.name, m.singular_values.tolist()) for m in report.matrices]
    return "equal" if ours == plain and not report.unread else "other numbers"

plain = [(m.name, m.singular_values.tolist()) for m in analyze(models.make("llama")).matrices]
told = {kind: outcome(make) for kind, make in KINDS.items()}
if dist.get_rank() == 0:
    print("TOLD", json.dumps(told))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_spread_over_processes_is_refused_and_what_is_whole_is_read(tmp_path, processes):
    script = tmp_path / "spread.py"
    script.write_text(DISTRIBUTED)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))
    told = json.loads(line.removeprefix("TOLD "))
    assert told["replicated"] == "equal"
    assert "FSDP keeps its parameters flat" in told["flat"]
    for kind in ("fully_shard", "tensor_parallel"):
        if processes == 1:
            assert told[kind] == "equal"
        else:
            assert "is a DTensor spread over 2 processes" in told[kind]
            assert "get_model_state_dict" in told[kind]


# --- weights that are computed before every forward pass ----------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


def parametrised(kind):
    """A module of 8 × 8 inside another."""
    torch.manual_seed(0)
    made, inner = nn.utils.parametrizations, nn.Linear(8, 8)
    if kind == "symmetric":
        nn.utils.parametrize.register_parametrization(inner, "weight", Symmetric())
    elif kind == "pruned":
        prune.random_unstructured(inner, "weight", amount=0.7)
    elif kind == "weight_norm, whole":
        made.weight_norm(inner, dim=None)
    else:
        getattr(made, kind)(inner)
        inner.parametrizations.weight[0].training = True
    return nn.Sequential(inner)


KINDS = ["symmetric", "pruned", "weight_norm, whole", "weight_norm", "orthogonal", "spectral_norm"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_parametrised_weight_is_what_the_forward_pass_uses(kind):
    model = parametrised(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (row,) = analyze(model).matrices
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    used = torch.linalg.svdvals(model.eval()[0].weight.detach().double())
    np.testing.assert_allclose(row.singular_values, used, rtol=1e-5, atol=1e-6)


def test_a_parametrised_module_by_itself_and_a_transposed_one():
    weight = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)).requires_grad_(False)
    weight.parametrizations.weight.original0.mul_(1.7)
    assert analyze(weight).matrices[0].frobenius_norm == pytest.approx(float(weight.weight.norm()))
    turned = t.pytorch_utils.Conv1D(6, 8)
    nn.utils.parametrizations.spectral_norm(turned)
    assert analyze(nn.Sequential(turned)).matrices[0].shape == (6, 8)


@pytest.mark.parametrize("kind", [*KINDS, "old spectral_norm", "old weight_norm"])
def test_a_parametrised_weight_on_disk_is_read_right_or_listed(tmp_path, kind):
    model = parametrised(kind) if "old" not in kind else nn.Sequential(nn.LSTM(8, 8))
    if "old" in kind:
        getattr(nn.utils, kind.removeprefix("old "))(model[0], "weight_hh_l0")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    report = analyze(tmp_path)
    used = [float(model[0].weight.norm())] if kind in ("pruned", "weight_norm", "weight_norm, whole") else []
    assert [m.frobenius_norm for m in report.matrices if "ih" not in m.name] == pytest.approx(used)
    assert used or any("save a copy without the parametrisation" in item.reason for item in report.coverage.skipped)


# --- odd parameters ------------------------------------------------------------------------------------------------


def test_parameters_of_one_memory_are_one():
    a, b, c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight.data, c.weight.data = a.weight.data, a.weight.data.T
    found = analyze(nn.ModuleDict({"a": a, "b": b, "c": c}))
    assert [m.name for m in found.matrices] == ["a.weight", "c.weight"]
    assert [(alias.name, alias.of) for alias in found.coverage.aliases] == [("b.weight", "a.weight")]


@pytest.mark.parametrize("turned", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_sparse_parameter_is_listed(turned):
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(turned(torch.eye(4)), requires_grad=False)
    (reason,) = [item.reason for item in analyze(module).coverage.skipped if item.name == "weight"]
    assert "to_dense" in reason


def test_a_module_that_is_not_initialised_is_listed():
    found = analyze(nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(5)))
    assert [m.name for m in found.matrices] == ["0.weight"]
    assert found.coverage.notes == ("not initialised, run a forward pass first: 1.weight, 1.bias",)


def test_a_name_that_is_no_text():
    module = nn.Linear(4, 4)
    module.config = t.PretrainedConfig()
    module.config._name_or_path = 5
    assert "5" in analyze(module)._repr_html_()


class OnApple(torch.Tensor):
    """As a parameter on a GPU of Apple's."""

    device = property(lambda self: torch.device("mps"))

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_what_is_where_there_is_no_float64_is_read_on_the_cpu():
    source = open_source(nn.Linear(4, 3))
    there = replace(source, values={name: value.as_subclass(OnApple) for name, value in source.values.items()})
    for tensor in source.tensors:
        assert there.read(tensor, 1, 3).device.type == "cpu"
        assert torch.equal(there.read(tensor), source.read(tensor))
