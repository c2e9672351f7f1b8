"""The tracker: a training comes out the same, its series is right, its time is kept."""

import json

import numpy as np
import peft
import pytest
import torch
from models import make

from lmd_hf import LMDTracker, analyze
from lmd_hf.errors import FormatError, SettingsError, SourceError
from lmd_hf.training.series import read_series


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(40, 16))


def train(model, steps, watch=None, seed=1):
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 24)
        loss = (model(x) - x[:, :16].abs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if watch is not None:
            watch(losses[-1])
    return losses


def test_losses_are_the_same_bit_for_bit():
    without = train(network(), 30)
    model = network()
    tracker = LMDTracker(model, every=3, budget=None)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    assert train(model, 30, tracker.step) == without
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert all(p.grad is not None for p in model.parameters())
    assert {point.step for point in tracker.points} == set(range(0, 31, 3))


def test_points_are_what_analyze_says():
    model = network()
    tracker = LMDTracker(model, every=10, budget=None)
    train(model, 10, tracker.step)
    rows = {row.name: row for row in analyze(model, device="cpu").matrices}
    last = [point for point in tracker.points if point.step == 10]
    assert {point.name for point in last} == set(rows)
    for point in last:
        row = rows[point.name]
        assert (point.latent_dim, point.effective_rank) == (row.latent_dim, row.effective_rank)
        assert np.allclose(point.singular_values, row.singular_values[np.array(point.singular_value_ranks) - 1])


def test_drift_is_against_the_start():
    model = network()
    start = [layer.weight.detach().clone().double() for layer in (model[0], model[3])]
    tracker = LMDTracker(model, every=50, budget=None)
    train(model, 50, tracker.step)
    for point, before, layer in zip(tracker.points[-2:], start[::-1], (model[3], model[0]), strict=True):
        after = layer.weight.detach().double()
        s, t = torch.linalg.svdvals(before), torch.linalg.svdvals(after)
        assert point.spectrum_drift == pytest.approx(float((t - s).norm() / s.norm()))
        first = next(p for p in tracker.points if p.name == point.name)
        n = first.latent_dim
        (u, _, vh), (u_after, _, vh_after) = torch.linalg.svd(before), torch.linalg.svd(after)
        left = (u[:, :n].T @ u_after[:, :n]).square().sum() / n
        right = (vh[:n] @ vh_after[:n].T).square().sum() / n
        assert point.subspace_cos2 == pytest.approx(float(left + right) / 2, abs=1e-5)


def test_a_tight_budget_takes_the_cheapest_then_what_waits_longest():
    model = torch.nn.ModuleDict({f"m{i}": torch.nn.Linear(16 * (i + 1), 16 * (i + 1)) for i in range(4)})
    tracker = LMDTracker(model, every=1, budget=0.02)
    tracker.budget.expected = lambda work: 1.0
    tracker.budget.room = lambda floor=0.0: 2.5
    tracker.points.clear()
    for _ in range(4):
        tracker.step()
    names = [[p.name for p in tracker.points if p.step == step] for step in range(1, 5)]
    assert names[0] == ["m0.weight", "m1.weight"]
    assert names[1] == ["m2.weight", "m3.weight"]
    assert names[2] == names[0]


def test_one_that_is_too_expensive_keeps_no_other_from_being_measured():
    """As the vocabulary of a small model: at the end what fits is measured, and between, both have half of the time."""
    model = torch.nn.ModuleDict(
        {f"m{i}": torch.nn.Linear(16, 16) for i in range(3)} | {"large": torch.nn.Linear(48, 48)}
    )
    tracker = LMDTracker(model, every=1, budget=0.02)
    saved = [0.0]  # seconds, of which three more are earned in a step
    tracker.budget.expected = lambda work: 6.0 if "large" in work.ref.name else 1.0
    tracker.budget.room = lambda floor=0.0: max(saved[0] - sum(map(tracker.budget.expected, measured())), floor)

    def measured(step=None):
        works = {work.ref.name: work for work in tracker._works}
        return [works[p.name] for p in tracker.points if step in (None, p.step)]

    tracker.points.clear()
    for _ in range(16):
        saved[0] += 3.0
        tracker.step()
    counts = [len(measured(step)) for step in range(1, 17)]
    assert counts == [3, 3, 0, 1, 3, 3, 0, 1, 3, 3, 0, 1, 3, 3, 0, 1]
    tracker.steps += 1
    tracker.measure(floor=2.0)
    assert len(measured(17)) == 2


def test_a_long_series_makes_no_step_longer():
    class Series(list):
        def __iter__(self):
            raise AssertionError("read from its beginning, in every step")

    tracker = LMDTracker(network(), every=1, budget=None)
    tracker.points = Series(tracker.points)
    assert tracker.step()["lmd/measured"] == tracker.step()["lmd/measured"] == 2
    assert len(tracker.points) == 6


def test_what_a_gpu_has_still_to_do_is_training_time(monkeypatch):
    tracker = LMDTracker(network(), every=1, budget=None)
    now = [tracker.budget.clock()]
    tracker.budget.clock = lambda: now[0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.append(now.pop() + 100.0))
    before = tracker.budget.spent, tracker.budget.trained
    tracker.step()
    assert tracker.budget.spent == before[0]
    assert tracker.budget.trained == pytest.approx(before[1] + 100.0)


def test_time_spent_keeps_to_the_share(monkeypatch):
    monkeypatch.setattr("lmd_hf.training.budget.ENDING_SECONDS", 0.0)
    monkeypatch.setattr("lmd_hf.training.tracker.FLOOR_SECONDS", 0.0)
    model = torch.nn.ModuleDict({f"m{i}": torch.nn.Linear(64, 64) for i in range(8)})
    tracker = LMDTracker(model, every=1, budget=0.05)
    begun = tracker.budget.spent
    tracker.budget.started -= begun / 0.05  # the inventory is paid for
    for _ in range(200):
        torch.randn(400, 400) @ torch.randn(400, 400)
        tracker.step()
    assert tracker.budget.spent > begun
    assert tracker.budget.used < 0.05 * 2  # a pause of the machine in a measurement counts as spent


def test_what_takes_no_gradients_is_measured_once():
    model = network()
    model[0].requires_grad_(False)
    tracker = LMDTracker(model, every=5, budget=None)
    train(model, 10, tracker.step)
    assert [p.step for p in tracker.points if p.name == "0.weight"] == [0]
    assert [p.step for p in tracker.points if p.name == "3.weight"] == [0, 5, 10]
    with pytest.raises(SettingsError, match="no selected matrix takes gradients"):
        LMDTracker(model.requires_grad_(False))


def test_what_is_unfrozen_or_frozen_on_the_way_is_measured_as_long_as_it_moves():
    model = network()
    model[0].requires_grad_(False)
    tracker = LMDTracker(model, every=5, budget=None)
    train(model, 5, tracker.step)
    model[0].requires_grad_(True)
    model[3].requires_grad_(False)
    train(model, 10, tracker.step)
    model[0].requires_grad_(False)
    model[3].requires_grad_(True)
    train(model, 10, tracker.step)
    assert [p.step for p in tracker.points if p.name == "0.weight"] == [0, 10, 15, 20]
    assert [p.step for p in tracker.points if p.name == "3.weight"] == [0, 5, 10, 20, 25]


def test_a_peft_model_shows_its_updates(tmp_path):
    model = peft.get_peft_model(make("gpt2"), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"]))
    tracker = LMDTracker(model, budget=None)
    assert {p.spectral_norm for p in tracker.points} == {0.0}  # B begins at 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape))
    tracker.steps = 1
    tracker.measure()
    model.save_pretrained(tmp_path)
    rows = analyze(tmp_path).matrices
    last = [point for point in tracker.points if point.step == 1]
    assert sorted(p.spectral_norm for p in last) == pytest.approx(sorted(r.spectral_norm for r in rows), rel=1e-6)
    assert len(last) == 2


def lora(model, names, native=False):
    """The model with adapters of different α on q_proj, all of them active, their factors random."""
    for number, name in enumerate(names):
        config = peft.LoraConfig(r=2, lora_alpha=4 + number, target_modules=["q_proj"])
        if native or number:
            model.add_adapter(config, name) if native else model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    (model if native else model.base_model).set_adapter(list(names))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("names", [("default",), ("0",), ("self_attn",), ("default", "b")])
def test_every_active_adapter_shows_its_own_update(names, native):
    model = lora(make("llama"), names, native)
    points = LMDTracker(model, budget=None).points
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    norms = {
        (number, adapter): float(torch.linalg.matrix_norm(layer.get_delta_weight(adapter).double(), 2))
        for number, layer in enumerate(layers)
        for adapter in names
    }
    assert {p.role for p in points} == {"q"}
    found = {(p.layer, p.name.partition(":")[0] if ":" in p.name else names[0]): p.spectral_norm for p in points}
    assert found == pytest.approx(norms, rel=1e-5)


def test_an_adapter_that_is_taken_out_ends_no_training():
    model = lora(make("llama"), ("default", "b"))
    tracker = LMDTracker(model, every=1, budget=None)
    model.delete_adapter("b")
    tracker.step()
    assert all(name[:2] == "b:" and "in the model no longer" in why for name, why in tracker.skipped.items())
    assert len(tracker.skipped) == 2


def test_a_matrix_that_is_not_finite_is_named_and_the_training_goes_on():
    model = network()
    tracker = LMDTracker(model, every=1, budget=None)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    tracker.step()
    assert "NaN" in tracker.skipped["0.weight"]
    assert [p.name for p in tracker.points if p.step == 1] == ["3.weight"]


def test_directions_that_do_not_converge_are_named_and_the_training_goes_on(monkeypatch):
    def failing(*told):
        raise torch.linalg.LinAlgError("no convergence")

    tracker = LMDTracker(network(), every=1, budget=None)
    monkeypatch.setattr("lmd_hf.training.tracker.look", failing)
    tracker.step()
    assert tracker.skipped == {"0.weight": "no convergence", "3.weight": "no convergence"}


def test_saved_and_resumed(tmp_path):
    model = network()
    tracker = LMDTracker(model, every=10, budget=None)
    train(model, 20, tracker.step)
    tracker.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "evolution.png", "series.parquet", "spectra.png", "training.json",
    ]  # fmt: skip
    tracker.checkpoint(tmp_path)
    assert read_series(tmp_path / "series.parquet") == tracker.points
    assert len(tracker.to_pandas()) == len(tracker.points)
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["convergence"]["verdict"] == tracker.convergence().verdict
    resumed = LMDTracker(model, budget=None, resume=(tmp_path, 20))
    assert resumed.points == tracker.points
    earlier = LMDTracker(model, budget=None, resume=(tmp_path, 10))
    assert {p.step for p in earlier.points} == {0, 10}
    train(model, 5)
    resumed.steps = 25
    resumed.measure()
    assert {p.since for p in resumed.points} == {0}
    (tmp_path / "views.safetensors").write_bytes(b"broken")
    with pytest.raises(FormatError, match="damaged"):
        LMDTracker(model, resume=(tmp_path, 20))


def test_a_series_does_not_go_on_in_another_metric(tmp_path):
    model = make("llama")
    LMDTracker(model, roles=["q"], budget=None).checkpoint(tmp_path)
    with pytest.raises(FormatError, match="no series in the metric 'norm' but in 'identity'; give metric='identity'"):
        LMDTracker(model, roles=["q"], metric="norm", resume=(tmp_path, 0))


def test_a_verdict_from_all_evidence():
    model = network()
    tracker = LMDTracker(model, every=5, budget=None)
    train(model, 40, tracker.step)
    verdict = tracker.convergence()
    assert [piece.kind for piece in verdict.evidence] == ["loss curve", "checkpoints", "weights"]
    assert verdict.evidence[0].numbers["points"] == 10
    assert "step 1" in verdict.evidence[1].source or "step 2" in verdict.evidence[1].source  # a half to a quarter back


def test_the_norm_metric_reads_the_gain():
    model = make("llama")
    plain, folded = (LMDTracker(model, roles=["q"], metric=metric, budget=None) for metric in ("identity", "norm"))
    rows = analyze(model, roles=("q",), metric="norm", device="cpu").matrices
    assert [p.spectral_norm for p in folded.points] == [row.spectral_norm for row in rows]
    assert plain.points[0].spectral_norm != folded.points[0].spectral_norm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"metric": "data"}, "watched in the metric"),
        ({"budget": 0}, "budget is 0"),
        ({"roles": ["nose"]}, "no role 'nose'"),
        ({"roles": ["router"]}, "leaves no matrix"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(SettingsError, match=message):
        LMDTracker(make("llama"), **options)


def test_parameters_in_parts_are_refused_with_the_remedy():
    model = network()
    model[0].weight.ds_id, model[0].weight.data = 0, torch.empty(0)
    with pytest.raises(SourceError, match="ZeRO-3"):
        LMDTracker(model)
