"""The frame of the experiments: outcomes and their renderings, seeds, small networks, manifolds, the command."""

import json
import math

import pytest
import torch

from lmd_hf.experiments import catalogue, manifolds, networks, outcome, seeding
from lmd_hf.experiments.outcome import Check, Outcome


def example(*agrees):
    checks = tuple(Check(f"rule {i}", f"number {i}", value) for i, value in enumerate(agrees))
    rows = [{"graph": "knn", "ratio": 2.0123456, "passed": True, "missing": None}]
    return Outcome("swiss-roll", "Why?", "So.", checks, (0, 1, 2), {"ratios": rows})


@pytest.mark.parametrize(("agrees", "verdict"), [((True, True), True), ((True, False), False), ((False,), False)])
def test_an_outcome_agrees_only_if_every_check_does(agrees, verdict):
    assert example(*agrees).agrees is verdict
    assert example(*agrees).to_dict()["agrees"] is verdict
    assert ("| no" in example(*agrees).to_markdown()) is not verdict


def test_a_further_control_decides_nothing_but_is_shown():
    checks = (Check("rule", "number", True), Check("more", "less", False, decides=False))
    outcome = Outcome("x", "Why?", "So.", checks, (0,), {})
    assert (outcome.agrees, outcome.expected, outcome.found) == (True, "rule", "number")
    assert outcome.to_dict()["tables"]["checks"][1]["agrees"] is False
    assert "| more" in outcome.to_markdown()


def test_json_has_the_promised_keys_and_no_others():
    found = json.loads(json.dumps(example(True).to_dict(), allow_nan=False))
    assert list(found) == ["name", "expected", "found", "agrees", "seeds", "tables"]
    assert found["seeds"] == [0, 1, 2]
    assert found["tables"]["checks"] == [{"expected": "rule 0", "found": "number 0", "agrees": True, "decides": True}]
    assert found["tables"]["ratios"][0]["missing"] is None


def test_the_report_shows_every_number():
    text = example(True).to_markdown()
    for part in ("# swiss-roll", "Why?", "rule 0", "number 0", "2.012", "yes", "–", "0…2"):
        assert part in text


def test_a_deviation_stands_beside_its_mean():
    rows = [{"x": 1.0, "x sd": 0.25}, {"x": 2.0, "x sd": None}]
    lines = Outcome("a", "", "", (), (0,), {"t": rows}).to_markdown().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[-4:] == [["x"], ["----------"], ["1 ± 0.25"], ["2"]]


def test_nan_is_refused(tmp_path):
    broken = Outcome("x", "", "", (), (0,), {"t": [{"a": math.nan}]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        outcome.outcome_writers(broken)


def test_the_index_lists_what_is_there(tmp_path):
    for name, agrees in (("a", True), ("b", False)):
        (tmp_path / name).mkdir()
        content = {**example(agrees).to_dict(), "name": name}
        (tmp_path / name / outcome.JSON).write_text(json.dumps(content))
    page = outcome.index_page(tmp_path, ("b", "a", "absent"))
    assert page.index("[b](b/report.md)") < page.index("[a](a/report.md)")
    assert "absent" not in page
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "report.md" in line]
    assert cells[0] == ["[b](b/report.md)", "rule 0", "number 0", "0 of 1", "no"]
    assert "[a](x/a/report.md)" in outcome.index_table(tmp_path, ("a",), link="x/")


def test_spread_is_mean_and_sample_deviation():
    assert outcome.spread([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"
    assert outcome.spread([1.25]) == "1.25"
    assert outcome.counted([True, False]) == "on 1 of 2"
    assert outcome.averaged("x", [1.0, 2.0, 3.0]) == {"x": 2.0, "x sd": 1.0}
    assert outcome.averaged("x", [1.0]) == {"x": 1.0, "x sd": None}


def test_random_numbers_come_from_names():
    first = torch.rand(3, generator=seeding.generator("a/data", 0))
    assert torch.equal(first, torch.rand(3, generator=seeding.generator("a/data", 0)))
    for name, seed in (("a/data", 1), ("b/data", 0)):
        assert not torch.equal(first, torch.rand(3, generator=seeding.generator(name, seed)))


def test_each_keeps_the_order_and_one_arithmetic_thread():
    before = torch.get_num_threads()
    assert seeding.each(lambda case: (case, torch.get_num_threads()), [3, 1, 2], what="x") == [(3, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == before


def test_each_raises_what_the_work_raises():
    with pytest.raises(ZeroDivisionError):
        seeding.each(lambda case: 1 // case, [1, 0], what="x")


def test_a_perceptron_is_drawn_from_its_generator_alone():
    one, two = (networks.perceptron((3, 5, 2), seeding.generator("x", 0)) for _ in range(2))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert [tuple(layer.weight.shape) for layer in networks.linears(one)] == [(5, 3), (2, 5)]
    assert one[0].weight.abs().max() <= 1 / math.sqrt(3)


def test_training_finds_a_linear_map_and_inputs_are_seen():
    random = seeding.generator("x", 0)
    x = torch.randn(64, 3, generator=random)
    model = networks.perceptron((3, 2), random)
    assert networks.fit(model, x, x[:, :2], steps=3000, decay=0.0) < 1e-5
    assert torch.allclose(model[0].weight, torch.eye(2, 3), atol=1e-2)
    inputs = networks.layer_inputs(model, x)
    assert len(inputs) == 1
    assert inputs[0].dtype == torch.float64


@pytest.mark.parametrize(("name", "power"), [("x²", 2), ("x³", 3)])
def test_powers(name, power):
    x = torch.tensor([-2.0, 3.0])
    assert torch.equal(networks.ACTIVATIONS[name]()(x), x**power)


def test_manifolds_lie_where_they_should():
    for name in manifolds.MANIFOLDS:
        points, own = manifolds.sample(name, 500, seeding.generator(name, 0))
        assert (points.shape, own.shape, points.dtype) == ((500, 3), (500, 2), torch.float64)
    points, own = manifolds.sample("sphere", 500, seeding.generator("x", 0))
    assert torch.allclose(points.norm(dim=1), torch.ones(500, dtype=torch.float64))
    points, _ = manifolds.sample("torus", 500, seeding.generator("x", 0))
    tube = (points[:, :2].norm(dim=1) - 1) ** 2 + points[:, 2] ** 2
    assert torch.allclose(tube, torch.full((500,), 0.25, dtype=torch.float64))
    points, own = manifolds.sample("swiss roll", 500, seeding.generator("x", 0))
    assert torch.allclose(points[:, 0], own[:, 0] * torch.cos(own[:, 0]))


def test_embedding_keeps_distances():
    random = seeding.generator("x", 0)
    points = torch.randn(50, 3, generator=random, dtype=torch.float64)
    far = manifolds.embed(points, 20, random)
    assert far.shape == (50, 20)
    assert torch.allclose(far @ far.T, points @ points.T)


def test_standardising_leaves_a_constant_column_alone():
    columns = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    assert manifolds.standardised(columns).tolist() == [[-1, 0], [1, 0]]


def test_unknown_experiments_and_no_seeds_are_refused():
    from lmd_hf.errors import SettingsError

    with pytest.raises(SettingsError, match="no experiment 'x'; known: "):
        catalogue.reproduce("x")
