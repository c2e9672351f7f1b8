"""Heads in reports: round trips, files, text, card and figure."""

import json
from dataclasses import replace
from importlib import resources

import jsonschema
import numpy as np
import pandas
import pytest

from lmd_hf import Report, analyze
from lmd_hf.report import heads


SCHEMA = json.loads(resources.files("lmd_hf.report").joinpath("schema.json").read_text())


@pytest.fixture(scope="module")
def report(save):
    return analyze(save("t5"), heads=True)


def test_the_schema_names_every_number_of_a_head(report):
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(report.to_json()))
    item = SCHEMA["properties"]["heads"]["items"]
    assert list(item["properties"]) == list(report.to_dict()["heads"][0])
    assert list(item["properties"]["conventions"]["properties"]) == list(report.heads[0].conventions)


def test_heads_come_back_from_json_and_from_a_folder(report, tmp_path):
    assert Report.from_json(report.to_json()) == report
    report.save(tmp_path)
    assert Report.load(tmp_path).heads == report.heads
    table = pandas.read_parquet(tmp_path / "heads.parquet")
    assert len(table) == len(report.heads)
    np.testing.assert_array_equal(table["qk_singular_values"][3], report.heads[3].qk_singular_values)


def test_without_heads_there_is_no_file_paragraph_or_figure(save, tmp_path):
    bare = analyze(save("t5"))
    bare.save(tmp_path)
    assert not (tmp_path / "heads.parquet").exists()
    assert "Hopfield memories" not in bare.card()
    assert "heads" not in bare.plot()
    assert "symmetric energy" not in bare.summary()


def test_text_says_each_head_and_the_conventions(report):
    lines = heads.table(report.heads).splitlines()
    assert lines[0].split()[:3] == ["layer", "head", "keys"]
    assert len(lines) == 2 + len(report.heads)
    assert heads.table(report.heads, limit=5).endswith(f"… and {len(report.heads) - 5} more")
    assert str(heads.table(report.heads)) in report.table()
    summary = report.summary()
    assert "decoder cross_attention: 8 heads" in summary
    assert "gains of norms not folded in; nothing else left out" in summary
    assert "Hopfield memories" in report.card()
    assert " --heads`" in report.card()


def test_one_head_is_no_heads_and_a_small_temperature_is_not_zero(report):
    cold = replace(report.heads[0], qk_symmetric_energy=0.95, qk_eigenvalue_score=0.95, inverse_temperature=0.00123)
    one = replace(report, heads=(cold,))
    assert ": 1 head, " in one.summary()
    assert "inverse temperature σ₁ 0.00123," in one.summary()
    assert "**1 attention head as a Hopfield memory**" in one.card()
    assert "1 head is auto-associative" in one.card()


def test_classes_are_shown_where_there_are_any(report):
    seen = tuple(replace(head, k90=3.0, hopfield_class="III") for head in report.heads)
    assert heads.table(seen).splitlines()[0].split()[-2:] == ["k90", "class"]
    assert ", 8 of class III" in replace(report, heads=seen).summary()


def test_thresholds_count_what_passes_both(report):
    head = replace(report.heads[0], qk_symmetric_energy=0.95, qk_eigenvalue_score=0.95, copying_score=0.6)
    others = [replace(head, qk_eigenvalue_score=0.5), replace(head, qk_symmetric_energy=None, copying_score=None)]
    assert heads.auto_associative([head, *others]) == [head]
    assert heads.copiers([head, *others]) == [head, others[0]]


def test_conventions_say_what_is_mixed_and_left_out(report):
    plain = report.heads[0]
    told = {
        **plain.conventions,
        "biases": ["q"],
        "qk_norm": True,
        "soft_cap": 50.0,
        "rotary": True,
        "norm_folded": True,
    }
    other = replace(plain, conventions=told)
    assert heads.conventions([other]) == (
        "gains of norms folded in; left out: biases, norms of queries and keys, soft caps; "
        "rotary positions at zero offset"
    )
    assert heads.conventions([plain, other]).startswith("gains of norms folded in for 1 of 2;")


def test_the_figure_has_a_row_for_each_stack_and_block(report):
    grids = heads.grids(report.heads)
    assert list(grids) == ["encoder attention", "decoder attention", "decoder cross_attention"]
    energy = grids["encoder attention"]["symmetric energy of QK"]
    assert energy.shape == (2, 4)
    expected = next(h for h in report.heads if (h.stack, h.layer, h.head) == ("encoder", 1, 2)).qk_symmetric_energy
    assert energy[1, 2] == expected
    assert np.isnan(grids["decoder cross_attention"]["copying score of OV"]).all()
    figure = report.plot()["heads"]
    assert sum(axes.get_title() != "" for axes in figure.axes) == 3 * len(heads.MEASURES)
