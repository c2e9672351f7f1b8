"""The key–value reading of MLPs against plain loops over their neurons."""

import json
from importlib import resources

import jsonschema
import models
import numpy as np
import pytest
import torch

from lmd_hf import Report, analyze
from lmd_hf.errors import SourceError
from lmd_hf.records import Settings
from lmd_hf.run.mlps import measure_mlps
from lmd_hf.run.plan import plan_mlps
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.mlps import list_mlps
from lmd_hf.weights.source import open_source


SCHEMA = json.loads(resources.files("lmd_hf.report").joinpath("schema.json").read_text())


def cosines(keys, values):
    return np.mean([k @ v / np.linalg.norm(k) / np.linalg.norm(v) for k, v in zip(keys, values, strict=True)])


def lengths(vectors):
    each = np.array([np.linalg.norm(v) for v in vectors])
    return np.median(each), each.std() / each.mean()


@pytest.mark.parametrize("metric", ["identity", "norm"])
def test_a_gated_mlp_neuron_by_neuron(metric):
    model = models.make("llama")
    report = analyze(model, heads=True, metric=metric)
    assert [mlp.layer for mlp in report.mlps] == [0, 1]
    for mlp in report.mlps:
        block = model.model.layers[mlp.layer]
        w = {n: getattr(block.mlp, f"{n}_proj").weight.detach().double().numpy() for n in ("up", "gate", "down")}
        gain = block.post_attention_layernorm.weight.detach().double().numpy() if metric == "norm" else 1
        keys, gates, values = w["up"] * gain, w["gate"] * gain, w["down"].T
        assert (mlp.neurons, mlp.activation, mlp.norm_folded) == (models.F, "silu", metric == "norm")
        assert (mlp.key_norm, mlp.key_norm_spread) == pytest.approx(lengths(keys))
        assert (mlp.gate_norm, mlp.gate_norm_spread) == pytest.approx(lengths(gates))
        assert (mlp.value_norm, mlp.value_norm_spread) == pytest.approx(lengths(values))
        assert mlp.key_value_cosine == pytest.approx(cosines(keys, values))
        assert mlp.gate_value_cosine == pytest.approx(cosines(gates, values))
        assert mlp.chance == pytest.approx((models.F * models.H) ** -0.5)


def test_neurons_that_write_what_they_find_have_a_cosine_of_one():
    model = models.make("gpt2")
    with torch.no_grad():
        for block, sign in zip(model.transformer.h, (1, -2), strict=True):
            block.mlp.c_proj.weight.copy_(sign * block.mlp.c_fc.weight.T)  # (in, out) both
    report = analyze(model, heads=True, roles=("down",))
    assert [mlp.key_value_cosine for mlp in report.mlps] == pytest.approx([1, -1])
    assert [(mlp.gate_norm, mlp.gate_value_cosine) for mlp in report.mlps] == [(None, None)] * 2
    assert report.mlps[1].value_norm == pytest.approx(2 * report.mlps[1].key_norm)


def test_unrelated_neurons_stay_within_chance():
    reports = [analyze(models.make("bert", seed), heads=True, roles=("up",)) for seed in range(8)]
    found = [mlp.key_value_cosine / mlp.chance for report in reports for mlp in report.mlps]
    assert len(found) == 16
    assert 0.5 < np.std(found) < 1.7


@pytest.mark.parametrize(
    ("family", "count"),
    [("bert", 2), ("t5-gated", 4), ("mixtral", 6), ("qwen3_moe", 6), ("clip", 4), ("falcon-mqa", 2)],
)
def test_every_mlp_and_expert_is_one_memory(family, count):
    mlps = list_mlps(list_matrices(open_source(models.make(family))).selected)
    assert len(mlps) == count
    for mlp in mlps:
        assert mlp.up.shape == mlp.down.shape[::-1]
        assert {ref.expert for ref in (mlp.up, mlp.down)} == {mlp.up.expert}


def test_reports_keep_them(save):
    report = analyze(save("mixtral"), heads=True)
    assert len(report.mlps) == 6
    assert Report.from_json(report.to_json()) == report
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(report.to_json()))
    assert list(SCHEMA["properties"]["mlps"]["items"]["properties"]) == list(report.to_dict()["mlps"][0])
    assert "moe: 6 key–value memories" in report.summary()
    assert analyze(save("mixtral")).mlps == ()
    older = {name: value for name, value in report.to_dict().items() if name != "mlps"}
    assert Report.from_dict(older).mlps == ()


def test_the_capacity_of_an_mlp_is_that_of_its_keys(save):
    report = analyze(save("mixtral"), heads=True)
    rows = {(matrix.name, matrix.part): matrix for matrix in report.matrices}
    for mlp in report.mlps:
        keys = rows[mlp.keys]
        assert (keys.role, keys.layer) == ("up", mlp.layer)
        assert (mlp.capacity_log10, mlp.energy_degree) == (keys.capacity_log10, keys.energy_degree)
    chosen = analyze(save("llama"), heads=True, roles=("down",)).mlps
    assert chosen
    assert all(mlp.capacity_log10 is None for mlp in chosen)


def test_what_cannot_be_done_is_a_note():
    model = models.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    source = open_source(model)
    mlps = plan_mlps(list_matrices(source), Settings(heads=True))
    rows, notes = measure_mlps(mlps, source, folded=False)
    assert [row.layer for row in rows] == [0]
    assert notes == (
        "keys and values of 'model.layers.1.mlp.down_proj.weight' left out: the matrices hold NaN or infinity",
    )

    class Broken:
        def read(self, tensor, *span):
            raise SourceError("the file is gone")

    _, notes = measure_mlps(mlps, Broken(), folded=False)
    assert "keys and values of 'model.layers.0.mlp.down_proj.weight' could not be read: the file is gone" in notes
