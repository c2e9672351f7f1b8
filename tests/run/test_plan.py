"""Plans are pure: selection, cost and shards from an inventory."""

import math
from dataclasses import replace

import pytest
import torch

from lmd_hf import analyze
from lmd_hf.errors import SettingsError
from lmd_hf.matrix.cost import BLOCK, LANCZOS, PROBES, STEPS
from lmd_hf.records import Data, Settings
from lmd_hf.run.plan import expected_inputs, make_plan
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


@pytest.fixture
def stage(save):
    """(inventory, identity) of a tiny Mixtral."""
    source = open_source(save("mixtral"))
    return list_matrices(source), source.identity


def names(plan):
    return {(w.ref.role, w.ref.layer) for w in plan.works}


def test_everything_is_planned_by_default(stage):
    plan = make_plan(*stage, Settings())
    assert len(plan.works) == len(stage[0].selected)
    assert plan.skipped == stage[0].skipped


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(roles=("q", "router")), {("q", 0), ("q", 1), ("router", 0), ("router", 1)}),
        (Settings(roles=("o",), layers="1"), {("o", 1)}),
        (Settings(roles=("o",), layers="-1"), {("o", 1)}),
        (Settings(roles=("o",), layers="0-1"), {("o", 0), ("o", 1)}),
        (Settings(roles=("o",), layers="0, -1"), {("o", 0), ("o", 1)}),
        (Settings(match="lm_*"), {("head", None)}),
    ],
)
def test_selection(stage, settings, expected):
    plan = make_plan(*stage, settings)
    assert names(plan) == expected
    unselected = [s for s in plan.skipped if s.reason == "not selected"]
    assert len(unselected) + len(plan.works) == len(stage[0].selected)
    done = sum(math.prod(w.ref.shape) for w in plan.works) + sum(math.prod(s.shape) for s in plan.skipped)
    assert done == plan.parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(roles=("qq",)), "no role 'qq'; known: embed"),
        (Settings(metric="euclid"), "no metric 'euclid'; known: identity, norm, data"),
        (Settings(kernel="magic"), "no kernel 'magic'; known: auto, exact, sketch"),
        (Settings(tolerance=1.5), "tolerance is 1.5; it is relative"),
        (Settings(layers="a-b"), "cannot read layers 'a-b'"),
        (Settings(layers="7"), "leaves no matrix"),
        (Settings(match="nothing*"), "leaves no matrix"),
        (Settings(metric="data"), "the metric 'data' needs a dataset: give --dataset, a Hub id"),
        (Settings(metric="data", data=Data(samples=8)), "needs a dataset"),
        (Settings(data=Data("x.txt")), "a dataset is for the metric 'data', not for 'identity'"),
        (Settings(metric="data", data=Data("x.txt", graph="ring")), "no graph 'ring'; known: complete, knn"),
        (Settings(metric="data", data=Data("x.txt", seq_len=0)), "seq_len is 0; give 1 or more"),
        (Settings(metric="data", data=Data("x.txt", tokens=-1)), "tokens is -1"),
    ],
)
def test_bad_settings_are_named(stage, settings, message):
    with pytest.raises(SettingsError, match=message):
        make_plan(*stage, settings)


@pytest.mark.parametrize("world", [1, 2, 3, 1024])
def test_shards_cover_every_matrix_once_and_evenly(stage, world):
    plan = make_plan(*stage, Settings(), world)
    assert sorted(index for shard in plan.shards for index in shard) == list(range(len(plan.works)))
    loads = [sum(plan.works[i].flops for i in shard) for shard in plan.shards]
    assert max(loads) - min(loads) <= max(w.flops for w in plan.works)
    assert make_plan(*stage, Settings(), world).shards == plan.shards
    for shard in plan.shards:
        costs = [plan.works[i].flops for i in shard]
        assert costs == sorted(costs, reverse=True)


def test_cost_is_that_of_the_exact_kernel(stage):
    work = next(w for w in make_plan(*stage, Settings()).works if w.ref.role == "down")
    k, long = min(work.ref.shape), max(work.ref.shape)
    assert work.flops == long * k**2 + 4 / 3 * k**3


@pytest.mark.parametrize(
    ("asked", "shape", "kernel", "sketched"),
    [
        ("auto", (8192, 30_000), "exact", False),
        ("auto", (30_000, 8193), "sketch", True),
        ("exact", (30_000, 8193), "exact", False),
        ("sketch", (2000, 1000), "sketch", True),
        ("sketch", (2000, 700), "sketch", False),  # shorter than what the probes would build from it: exact runs
    ],
)
def test_the_kernel_is_decided_by_cost(stage, asked, shape, kernel, sketched):
    inventory, identity = stage
    down = next(ref for ref in inventory.selected if ref.role == "down")
    ref = replace(down, shape=shape, tensors=(), stored="plain")
    sized = replace(inventory, selected=(ref,), skipped=(), aliases=())
    work = make_plan(sized, identity, Settings(kernel=asked, tolerance=0.02)).works[0]
    long, short = max(shape), min(shape)
    assert (work.kernel, work.tolerance) == (kernel, 0.02)
    if sketched:
        products = 4 * long * short * (BLOCK * STEPS + PROBES * LANCZOS)  # with W and Wᵀ
        assert products < work.flops < 1.6 * products
        beside = work.bytes - 4 * long * short
        assert 24 * short**2 <= beside < 24 * short**2 + 8 * 4 * 1200 * (long + short)  # exact may run after all
    else:
        assert work.flops == long * short**2 + 4 / 3 * short**3
        assert work.bytes == 4 * long * short + 24 * short**2


def test_an_estimate_knows_bytes_time_and_memory(hub, save):
    from lmd_hf.api import plan

    local = plan(save("mixtral")).estimate
    assert local.fetch_bytes == 0
    assert 0 < local.seconds < 60
    assert local.memory_bytes > 50e6
    hub.add("org/estimated", {p.name: p.read_bytes() for p in save("mixtral").iterdir()})
    remote = plan("org/estimated", settings=Settings(roles=("q",)))
    assert remote.estimate.fetch_bytes == sum(4 * math.prod(work.ref.shape) for work in remote.works)
    whole = plan("org/estimated", settings=Settings(roles=("q", "k")))
    assert whole.estimate.fetch_bytes > remote.estimate.fetch_bytes


def test_the_estimate_of_seconds_is_of_the_right_size(minilm):
    """Within a factor of four, for neighbours come and go on shared machines."""
    from lmd_hf.api import plan
    from lmd_hf.run.execute import execute

    todo = plan(minilm)
    took = execute(todo, open_source(minilm)).timing["execute"]
    assert took / 4 < todo.estimate.seconds < took * 4


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "phi3", "bart", "t5", "mixtral"])
def test_inputs_are_expected_as_they_are_observed(save, family):
    """From headers alone as many inputs, as wide, as the running model has, but for routers, whose rows are a view."""
    import models

    from lmd_hf.run.loading import load_model, origin
    from lmd_hf.run.taps import Tap, find_taps

    source = open_source(save(family))
    refs = [ref for ref in list_matrices(source).selected if ref.role != "router"]
    taps = find_taps(load_model(source, origin(source)), refs, models.inputs(family))
    seen = {tap.input: ref.shape[1] for ref, tap in zip(refs, taps, strict=True) if isinstance(tap, Tap)}
    expected = expected_inputs(ref for ref in refs if "relative" not in ref.name)
    assert sorted(seen.values()) == sorted(expected.values())


def test_data_costs_more_than_weights_alone(stage):
    plain, data = (make_plan(*stage, s) for s in (Settings(), Settings(metric="data", data=Data("x.txt"))))
    for one, other in zip(plain.works, data.works, strict=True):
        assert other.flops > one.flops
        assert other.bytes > one.bytes


@pytest.mark.parametrize(("metric", "told"), [("norm", True), ("identity", False)])
def test_a_norm_that_is_known_for_no_matrix_is_told(metric, told):
    report = analyze(torch.nn.Linear(6, 5), metric=metric)
    assert any("norm is the identity here" in note for note in report.coverage.notes) == told
