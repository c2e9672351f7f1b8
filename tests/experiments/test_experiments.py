"""Every experiment once, small; and its rules, fed with numbers that must agree and numbers that must not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lmd_hf.experiments import (
    activations,
    adaptive,
    capacity,
    capacity_expressivity,
    convergence,
    encoding_margin,
    high_dimension,
    hopfield_similarity,
    semantics,
    swiss_roll,
    training,
)
from lmd_hf.experiments.catalogue import EXPERIMENTS, load
from lmd_hf.experiments.outcome import outcome_writers


TINY = {
    "swiss-roll": swiss_roll.Setup(points=100, width=16, steps=5),
    "activations": activations.Setup(few=10, many=40, held_out=50, width=24, steps=5),
    "high-dimension": high_dimension.Setup(points=100, steps=5),
    "semantics": semantics.Setup(training=200, steps=20),
    "hopfield-similarity": hopfield_similarity.Setup(stored=20, noise=(0.0, 0.1), hidden=(0, 4)),
    "training": training.Setup(steps=10, first=2),
    "convergence": convergence.Setup(points=200, early=10, long=10),
    "capacity": capacity.Setup(((2, (128, 256)), (3, (32, 64)), (4, (16, 24))), (8, 12), 16, 4096),
    "capacity-expressivity": capacity_expressivity.Setup(points=40, widths=(16, 32), steps=5),
    "encoding-margin": encoding_margin.Setup(points=(60, 120), digits=200, tests=40, width=8, steps=5),
    "adaptive": adaptive.Setup(language=11, digits=11),
}


@pytest.mark.parametrize("name", TINY)
def test_it_runs_and_its_files_can_be_written(name, tmp_path):
    outcome = load(name).run((3,), TINY[name])
    assert (outcome.name, outcome.question, outcome.seeds) == (name, EXPERIMENTS[name], (3,))
    assert outcome.tables
    assert outcome.figures
    for file, write in outcome_writers(outcome).items():
        write(tmp_path / file)
        assert 0 < (tmp_path / file).stat().st_size < 150_000
    assert json.loads((tmp_path / "outcome.json").read_text())["agrees"] is outcome.agrees
    assert all(check.expected and check.found for check in outcome.checks)


def test_every_experiment_has_its_module_and_one_question():
    for name, question in EXPERIMENTS.items():
        module = load(name)
        assert name == module.NAME
        assert callable(module.run)
        assert callable(module.judge)
        assert question.endswith("?")


def test_the_same_seeds_give_the_same_numbers():
    first, second = (swiss_roll.run((0, 1), TINY["swiss-roll"]) for _ in range(2))
    assert first.to_dict() == second.to_dict()


def verdicts(checks):
    return [check.agrees for check in checks]


def roll(trained, untrained=5.0, weights=4.0, other=2.0, error=1e-5):
    keys = [(layer, metric) for layer in swiss_roll.LAYERS for metric in swiss_roll.METRICS]
    ratios = {**dict.fromkeys(keys, trained), ("middle", "identity"): weights}
    others = {"one target": dict.fromkeys(keys, 2.0), "six targets": dict.fromkeys(keys, other)}
    return swiss_roll.Trial(dict.fromkeys(keys, untrained), ratios, others, error)


def test_swiss_roll_follows_its_rules():
    judge = swiss_roll.judge  # found, untrained, other targets of each graph; weights alone; learned
    assert verdicts(judge([roll(2.59)] * 10)) == [True] * 8
    assert verdicts(judge([roll(2.1)] * 9 + [roll(3.0)])) == [True] * 8  # nine of ten are enough
    assert verdicts(judge([roll(2.1)] * 8 + [roll(3.0)] * 2)) == [False, True, True] * 2 + [True] * 2  # eight are not
    assert verdicts(judge([roll(2.1, untrained=2.1)] * 10)) == [True, False, True] * 2 + [True] * 2
    assert verdicts(judge([roll(2.1, other=3.0)] * 10)) == [True, True, False] * 2 + [True] * 2
    assert verdicts(judge([roll(2.3, weights=2.2)] * 10)) == [True] * 6 + [False, True]
    assert verdicts(judge([roll(2.1)] * 9 + [roll(2.1, error=3e-4)])) == [True] * 7 + [False]


def activation_trials(order, span_of_x3=19):
    """Every measure in this order of sizes for ReLU, x² and x³, on ten seeds."""
    spans = {"ReLU": 60, "x²": 9, "x³": span_of_x3}
    trial = activations.Trial(1.0, 1.0, 0, 1.0, 1.0, 1.0, (1.0,))
    return {
        name: [
            replace(trial, latent=value, weights=value, error_few=value, error_many=value, span=spans[name])
        ] * 10
        for name, value in zip(activations.BY_DEGREE, order, strict=True)
    }  # fmt: skip


def test_activations_follow_their_rules():
    assert verdicts(activations.judge(activation_trials((1.0, 2.0, 3.0)))) == [True] * 5
    assert verdicts(activations.judge(activation_trials((1.0, 3.0, 2.0)))) == [False] * 4 + [True]
    assert verdicts(activations.judge(activation_trials((1.0, 2.0, 3.0), span_of_x3=20))) == [True] * 4 + [False]
    mixed = activation_trials((1.0, 2.0, 3.0))
    mixed["x²"] = mixed["x²"][:8] + [replace(mixed["x²"][0], latent=9.0)] * 2
    assert verdicts(activations.judge(mixed)) == [False, True, True, True, True]


def dial_trials(scale=1.0, images=9.0, flat=False, control=3.0):
    graphs = ("complete", "knn")
    values = {f"d = {d}": 5.0 if flat else scale * d for d in high_dimension.DIAL}
    values |= {"digits": images, "photographs": images}
    rng = np.random.default_rng(0)
    return {
        name: [
            high_dimension.Trial(
                dict.fromkeys(graphs, value + 0.01 * rng.random()), dict.fromkeys(graphs, control * rng.random()),
                1, 1.0, 1.0, 1.0, 0.0,
            )
            for _ in range(10)
        ]
        for name, value in values.items()
    }  # fmt: skip


def test_high_dimension_follows_its_rules():
    assert verdicts(high_dimension.judge(dial_trials())) == [True] * 8
    assert verdicts(high_dimension.judge(dial_trials(scale=2.0))) == [True, True, False, True] * 2
    assert verdicts(high_dimension.judge(dial_trials(images=1.0))) == [True, True, True, False] * 2
    assert verdicts(high_dimension.judge(dial_trials(flat=True)))[0] is False
    trained = dial_trials()
    same = {name: [replace(t, untrained=t.trained) for t in trials] for name, trials in trained.items()}
    assert verdicts(high_dimension.judge(same)) == [True, False, True, True] * 2


def probe_trials(latent=0.9, random=0.5, untrained=0.5, principal=0.8):
    accuracies = {f"latent, {metric}": latent for metric in semantics.LATENT}
    accuracies |= {"random": random, "latent, untrained": untrained, "principal": principal}
    probes = {axes: (value,) * len(semantics.KEPT) for axes, value in accuracies.items()}
    return [semantics.Trial(1.0, probes, accuracies)] * 10


def test_semantics_follow_their_rules():
    assert verdicts(semantics.judge(probe_trials())) == [True] * 6
    assert verdicts(semantics.judge(probe_trials(random=0.95))) == [False] * 4 + [True] * 2
    assert verdicts(semantics.judge(probe_trials(untrained=0.9))) == [True] * 4 + [False, True]
    assert verdicts(semantics.judge(probe_trials(principal=0.9))) == [True] * 5 + [False]
    worse_at_one_count = probe_trials()[0]
    worse_at_one_count.probes["latent, weights alone"] = (0.9, 0.9, 0.4, 0.9, 0.9)
    mixed = [*probe_trials()[:8], worse_at_one_count, worse_at_one_count]
    assert verdicts(semantics.judge(mixed))[0] is False


def test_separation_is_the_variance_between_the_classes():
    labels = np.array([0, 0, 1, 1])
    assert semantics.separation(np.array([[1.0], [1.0], [3.0], [3.0]]), labels) == 1
    assert semantics.separation(np.array([[1.0], [3.0], [1.0], [3.0]]), labels) == 0
    assert semantics.separation(np.array([[0.0, 7.0], [2.0, 7.0], [2.0, 7.0], [4.0, 7.0]]), labels) == 0.5


def run_of(noise=(0.9, 0.5, 0.0, 0.0), participation=(1.0, 0.9, 0.5, 0.5), distance=(0.9, 0.5, 0.001, 0.0)):
    cos2 = (0.1, 0.5, 0.995, 1.0)
    rows = zip(noise, participation, distance, cos2, strict=True)
    return [training.Checkpoint(step, 1.0, *row) for step, row in enumerate(rows)]


def test_training_follows_its_rules():
    assert verdicts(training.judge([run_of()] * 10)) == [True] * 5
    assert verdicts(training.judge([run_of(noise=(0.7, 0.5, 0.2, 0.2))] * 10)) == [False, False, True, True, True]
    assert verdicts(training.judge([run_of(participation=(0.5,) * 4)] * 10)) == [True, True, False, True, True]
    assert verdicts(training.judge([run_of(distance=(0.5, 0.9, 0.001, 0.0))] * 10)) == [True, True, True, False, True]
    assert verdicts(training.judge([run_of(distance=(0.9, 0.5, 0.02, 0.0))] * 10)) == [True] * 4 + [False]


def found_again(dot=0.2, cosine=0.5, euclidean=0.6, manhattan=0.7):
    shares = {"dot": dot, "cosine": cosine, "euclidean": euclidean, "manhattan": manhattan}
    return {damage: {0.0: dict.fromkeys(shares, 1.0), 0.5: shares} for damage in ("noise", "masking")}


def test_hopfield_similarity_follows_its_rules():
    assert verdicts(hopfield_similarity.judge([found_again()] * 10)) == [True] * 4
    assert verdicts(hopfield_similarity.judge([found_again(euclidean=0.8)] * 10)) == [True, False] * 2
    assert verdicts(hopfield_similarity.judge([found_again(dot=0.65)] * 10)) == [False, True] * 2
    assert verdicts(hopfield_similarity.judge([found_again()] * 8 + [found_again(dot=0.9)] * 2)) == [False] * 4


def test_undamaged_digits_are_found_by_all_but_the_dot_product():
    outcome = hopfield_similarity.run((0,))
    first = outcome.tables["found again under noise"][0]
    assert [first[s] for s in ("cosine", "euclidean", "manhattan")] == [1, 1, 1]
    assert first["dot"] < 1


def test_checkpoints_double_up_to_nine_tenths_and_the_end():
    assert training.checkpoints(training.Setup()) == (0, 10, 20, 40, 80, 160, 320, 576, 640)


@pytest.mark.slow
def test_swiss_roll_finds_two_dimensions():
    """The issue's measure and its control, for both graphs; the other targets may disagree, and for knn they do."""
    found = swiss_roll.run((0, 1)).checks
    assert all(found[place].agrees for place in (0, 1, 3, 4, 6, 7)), [check.found for check in found]


def adaptive_trials(**losses):
    found = {kind: losses.get(kind.replace(" ", "_"), 2.0) for kind in adaptive.KINDS}
    return {task: [adaptive.Trial(found, {}, {}, {})] * 10 for task in adaptive.TASKS}


def test_adaptive_ranks_agree_where_they_beat_fixed_ranks_and_dense_networks():
    assert verdicts(adaptive.judge(adaptive_trials(adaptive=1.9))) == [True] * 6
    assert verdicts(adaptive.judge(adaptive_trials(adaptive=1.9, fixed_rank=1.8))) == [False] * 2 + [True] * 4
    assert (
        verdicts(adaptive.judge(adaptive_trials(adaptive=1.9, narrower=1.8))) == [True] * 2 + [False] * 2 + [True] * 2
    )
    assert verdicts(adaptive.judge(adaptive_trials())) == [False] * 6


def test_networks_that_are_compared_have_the_parameters_of_the_dense_one_at_most():
    wide, narrow = adaptive._digits(0)
    most = sum(p.numel() for p in narrow.model.parameters())
    for kind in adaptive.KINDS:
        _, size, *_ = adaptive._trained((wide, kind, narrow), steps=11)
        assert 0.9 * most <= size <= most
