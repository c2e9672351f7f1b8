"""Verdicts on convergence from numbers alone: each kind of evidence against cases whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lmd_hf import Thresholds, analyze
from lmd_hf.changes import MatrixChange
from lmd_hf.errors import SettingsError
from lmd_hf.evidence import Evidence, LayerVerdict
from lmd_hf.run.convergence import conclude, judge_change, judge_loss, judge_weights


NORMAL = Thresholds()


def curve(losses, every=10):
    return [{"step": every * (i + 1), "loss": float(loss)} for i, loss in enumerate(losses)]


def test_a_flat_curve_is_stable_and_a_falling_one_is_not():
    noise = np.random.default_rng(0).normal(0, 0.002, 200)
    flat = judge_loss(curve(2 + noise), "trainer_state.json", NORMAL)
    assert (flat.kind, flat.verdict, flat.source) == ("loss curve", "stable", "trainer_state.json")
    assert flat.numbers["points"] == 20
    assert (flat.numbers["first_step"], flat.numbers["last_step"]) == (1810, 2000)
    falling = judge_loss(curve(np.linspace(3, 1, 200) + noise), "s", NORMAL)
    assert falling.verdict == "unstable"
    expected = -2 / 199 * 19 / (1 + 2 / 199 * 9.5)
    assert falling.numbers["change"] == pytest.approx(expected, abs=falling.numbers["half_width"])


def test_the_change_and_its_error_are_those_of_least_squares():
    from scipy.stats import linregress

    rng = np.random.default_rng(1)
    losses = 2 + rng.normal(0, 0.1, 15)
    found = judge_loss(curve(losses), "s", NORMAL).numbers  # fewer than 100 points: the last 10
    line = linregress(np.arange(10), losses[-10:])
    assert found["change"] == pytest.approx(9 * line.slope / losses[-10:].mean())
    assert found["half_width"] == pytest.approx(2.306004 * 9 * line.stderr / losses[-10:].mean(), rel=1e-6)


def test_the_half_width_covers_the_true_change_in_95_of_100_curves():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        numbers = judge_loss(curve(1 + rng.normal(0, 0.05, 50)), "s", NORMAL).numbers
        covered += abs(numbers["change"]) <= numbers["half_width"]
    assert 0.93 <= covered / 1000 <= 0.97


@pytest.mark.parametrize(
    ("losses", "verdict", "text"),
    [
        ([], "unknown", "0 points"),
        ([1.0] * 9, "unknown", "9 points of the training loss, at least 10"),
        ([1.0] * 10, "stable", "within"),
        ([1.0] * 20 + [math.nan], "unstable", "not finite"),
        ([math.nan] + [1.0] * 20, "stable", "within"),  # long healed
        ([0.0] * 20, "unknown", "0 on average"),
        (np.linspace(1, 1.5, 20), "unstable", "beyond"),
        ([1e200] * 20, "unstable", "not finite"),
    ],
)
def test_curves_at_the_edge(losses, verdict, text):
    found = judge_loss(curve(losses), "s", NORMAL)
    assert found.verdict == verdict
    assert text in found.text


def test_other_entries_of_the_history_do_not_matter():
    """Evaluations, the final summary, entries without a step or with a loss that is no number."""
    history = curve([2.0] * 12)
    noise = [{"step": 5, "eval_loss": 9.0}, {"step": 130, "train_loss": 9.0}, {"loss": 9.0}, {"step": 7, "loss": "x"}]
    assert judge_loss(noise[:2] + history[::-1] + noise[2:], "s", NORMAL) == judge_loss(history, "s", NORMAL)


def test_numbers_that_are_none_do_no_harm():
    odd = [
        {"step": 10**400, "loss": 1.0},
        {"step": math.nan, "loss": 1.0},
        {"step": 5, "loss": 10**400},
        {"step": True},
    ]
    found = judge_loss([*odd, *curve([2.0] * 12)], "s", NORMAL)
    assert found == judge_loss(curve([2.0] * 12), "s", NORMAL)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_a_threshold_is_a_number_from_zero_on(value):
    with pytest.raises(SettingsError, match="loss_change"):
        analyze(torch.nn.Linear(9, 9), thresholds=Thresholds(loss_change=value))


def test_a_threshold_turns_the_verdict_and_is_recorded():
    losses = np.linspace(1.00, 0.97, 10)
    assert judge_loss(curve(losses), "s", NORMAL).verdict == "unstable"
    loose = judge_loss(curve(losses), "s", Thresholds(loss_change=0.05))
    assert (loose.verdict, loose.thresholds) == ("stable", {"loss_change": 0.05})


def change(layer, *, drift=0.0, cos2=1.0, norm=1.0, **values):
    """A row of a comparison in which only what the verdict reads has meaning."""
    row = MatrixChange(
        "w", "", "w", "", "name", "", "", "mlp", "up", layer, (8, 8), 0, "F32", "F32", False, norm, 0.1, 0.1, 0.1, 0.0,
        8, 1.0, 1.0, 1.0, 1, 1, 1, drift, 4, "gavish-donoho", cos2, 0.0, cos2, 0.0, 0.5, False, 0.0, None, np.zeros(8),
    )  # fmt: skip
    return replace(row, **values)


def test_checkpoints_layer_by_layer():
    rows = [change(0), change(0, drift=0.005), change(1, drift=0.02), change(2, cos2=0.98), change(None, cos2=0.995)]
    found = judge_change(rows, "before", NORMAL)
    assert {each.layer: each.verdict for each in found.layers} == {
        0: "stable", 1: "unstable", 2: "unstable", None: "stable",
    }  # fmt: skip
    assert found.verdict == "unstable"
    assert "2 of 4 layers are stable, 2 are not" in found.text
    assert judge_change(rows[:2], "before", NORMAL).verdict == "stable"
    assert judge_change(rows, "before", Thresholds(spectrum_change=0.05, subspace_cos2=0.9)).verdict == "stable"


def test_a_layers_numbers_are_those_of_its_matrices_together():
    """‖ΔS'‖ = √(Σ ‖Δσ‖²), ‖S'‖ likewise; cos² over all axes, each matrix by its n'."""
    rows = [
        change(0, drift=0.1, norm=3.0, latent_dim=1, left_cos2=0.5, right_cos2=0.7),
        change(0, drift=0.01, norm=4.0, latent_dim=9),
    ]
    numbers = judge_change(rows, "before", NORMAL).layers[0].numbers
    assert numbers["spectrum_change"] == pytest.approx(math.hypot(0.3, 0.04) / 5)
    assert numbers["subspace_cos2"] == pytest.approx((0.6 + 9) / 10)


def test_checkpoints_that_tell_nothing():
    same = change(0, identical=True)
    assert judge_change([same, same], "b", NORMAL).verdict == "unknown"
    assert "the same weights" in judge_change([same], "b", NORMAL).text
    assert judge_change([], "b", NORMAL).verdict == "unknown"
    frozen = judge_change([same, change(1)], "b", NORMAL)
    assert [each.verdict for each in frozen.layers] == ["unknown", "stable"]
    blurred = judge_change([change(0, degenerate=True, cos2=0.2)], "b", NORMAL)
    assert blurred.verdict == "unknown"  # rounding may have turned the subspace
    assert judge_change([change(0, degenerate=True, drift=0.5)], "b", NORMAL).verdict == "unstable"


def test_weights_alone_speak_against_only():
    torch.manual_seed(0)
    noise = {f"l{i}": torch.nn.Linear(80, 120) for i in range(10)}
    for layer in noise.values():
        torch.nn.init.normal_(layer.weight)
    rows = analyze(torch.nn.ModuleDict(noise)).matrices
    found = judge_weights(rows, NORMAL)
    assert (found.verdict, found.numbers) == ("unstable", {"untrained": 10, "judged": 10})
    low = [replace(row, mp_spikes=3, mp_spikes_99=3) for row in rows[:2]]
    mixed = judge_weights([*low, *rows[2:]], NORMAL)
    assert (mixed.verdict, mixed.numbers["untrained"]) == ("unknown", 8)
    assert "cannot show that a training has converged" in mixed.text
    assert judge_weights([*low, *rows[2:]], Thresholds(untrained_share=0.8)).verdict == "unstable"
    layered = judge_weights([replace(row, layer=i // 2) for i, row in enumerate([*low, *rows[2:]])], NORMAL)
    assert [each.verdict for each in layered.layers] == ["unknown", *["unstable"] * 4]
    assert judge_weights([], NORMAL).verdict == "unknown"


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ([], "unknown"),
        (["unknown"], "unknown"),
        (["unknown", "stable"], "stable"),
        (["stable", "unstable", "unknown"], "unstable"),
    ],
)
def test_one_unstable_makes_it_unstable_else_one_stable_stable(verdicts, whole):
    pieces = [Evidence("weights", "the weights", verdict, "") for verdict in verdicts]
    assert conclude(pieces).verdict == whole
    layered = Evidence("weights", "the weights", "unknown", "", layers=(LayerVerdict("", 3, "unknown"),))
    assert [(each.layer, each.verdict) for each in conclude([*pieces, layered]).layers] == [(3, whole)]


def test_a_layers_own_verdict_counts_for_it():
    loss = Evidence("loss curve", "s", "stable", "")
    layers = (LayerVerdict("", 0, "unstable"), LayerVerdict("", 1, "unknown"))
    found = conclude([loss, Evidence("weights", "the weights", "unknown", "", layers=layers)])
    assert found.verdict == "stable"
    assert [each.verdict for each in found.layers] == ["unstable", "stable"]


@pytest.mark.parametrize(("side", "verdict"), [(5, "unknown"), (6, "unknown"), (40, "unstable")])
def test_a_matrix_too_small_to_tell_from_noise_is_no_evidence(side, verdict):
    torch.manual_seed(0)
    rows = analyze(torch.nn.Linear(80, side, bias=False)).matrices
    found = judge_weights(rows, NORMAL)
    assert (found.verdict, found.numbers["judged"]) == (verdict, side >= 24)
