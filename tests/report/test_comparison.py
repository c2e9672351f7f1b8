"""A comparison: round trips, schema, text, card, figures; every line that a reader sees is exact."""

import dataclasses
import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jsonschema
import models
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmd_hf import Comparison, compare
from lmd_hf.changes import Unmatched
from lmd_hf.errors import FormatError, SourceError
from lmd_hf.report import compare_text
from lmd_hf.report.text import by_role


SCHEMA = json.loads(resources.files("lmd_hf.report").joinpath("compare_schema.json").read_text())


@pytest.fixture(scope="module")
def changed(save):
    """LLaMA with a rank-one update of q in layer 1, a larger vocabulary and without its last MLP's `down`."""
    model = models.make("llama")
    model.resize_token_embeddings(models.V + 3)
    with torch.no_grad():
        q = model.model.layers[1].self_attn.q_proj.weight
        q += 0.5 * torch.outer(*torch.eye(32)[:2])
        model.model.norm.weight[0] += 0.25
    model.model.layers[1].mlp.down_proj = torch.nn.Identity()
    return compare(save("llama"), model)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A spectrum longer than what compare.json keeps."""
    torch.manual_seed(0)
    folders = [tmp_path_factory.mktemp(name) for name in ("before", "after")]
    for folder in folders:
        save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(600, 700)}, folder / "model.safetensors")
    return compare(*folders)


def test_the_schema_accepts_comparisons_and_nothing_else(changed, wide):
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for each in (changed, wide):
        validator.validate(json.loads(each.to_json()))
    for damage in ({"schema": "lmd-report/1"}, {"matrices": [{}]}, {"extra": 1}, {"vectors": None}):
        assert not validator.is_valid({**json.loads(changed.to_json()), **damage})


def test_the_schema_names_every_field(changed):
    assert list(SCHEMA["properties"]) == list(changed.to_dict()) == [f.name for f in dataclasses.fields(Comparison)]
    assert list(SCHEMA["properties"]["matrices"]["items"]["properties"]) == list(changed.to_dict()["matrices"][0])


def test_json_round_trip_is_exact(changed, wide):
    for each in (changed, wide):
        assert Comparison.from_json(each.to_json()).to_json() == each.to_json()
    again = Comparison.from_json(changed.to_json())
    assert again == changed
    assert (again.card(), str(again)) == (changed.card(), str(changed))


def test_json_keeps_512_values_and_parquet_all(wide, tmp_path):
    import pandas

    row = wide.to_dict()["matrices"][0]
    assert (len(row["singular_values"]), row["singular_value_ranks"][-1]) == (512, 600)
    wide.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"compare.json", "compare.parquet"}
    loaded = Comparison.load(tmp_path)
    assert loaded == wide
    np.testing.assert_array_equal(loaded.matrices[0].singular_values, wide.matrices[0].singular_values)
    frame = pandas.read_parquet(tmp_path / "compare.parquet")
    assert frame["update_rank"].tolist() == wide.to_pandas()["update_rank"].tolist() == [600]
    (tmp_path / "compare.parquet").unlink()
    assert len(Comparison.load(tmp_path / "compare.json").matrices[0].singular_values) == 512


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "lmd-report/1"}', '{"schema": "lmd-compare/1"}'])
def test_a_file_that_is_no_comparison_is_refused(content, tmp_path):
    for read, value in ((Comparison.from_json, content), (Comparison.from_dict, [content])):
        with pytest.raises(FormatError):
            read(value)
    with pytest.raises(SourceError, match="lmd-hf compare BASE TUNED --out DIR"):
        Comparison.load(tmp_path)


def test_the_summary_says_everything_that_matters(changed):
    lines = changed.summary().splitlines()
    total = 0.5 / np.sqrt(sum(m.base_norm**2 for m in changed.matrices))
    assert lines[0].endswith("→ LlamaForCausalLM")
    assert lines[1:6] == [
        "15 matrices and 5 vectors compared: 17,824 of 19,360 parameters of the base (92.07 %); identical: 14",
        f"change as a whole: ‖ΔW‖ is {100 * total:.2g} % of ‖W‖, over all matrices",
        "model.embed_tokens.weight: 3 rows added, the first 60 compared",
        "lm_head.weight: 3 rows added, the first 60 compared",
        "1 of 5 vectors changed, most model.norm.weight (by 0.25)",
    ]
    assert lines[-1] == (
        "not compared (base): model.layers.1.mlp.down_proj.weight (32 × 48): no partner in the tuned model"
    )


def test_the_table_has_a_line_a_matrix(changed):
    lines = changed.table().splitlines()
    assert len(lines) == 2 + len(changed.matrices)
    q = next(line for line in lines if re.match(r"1 +attention q", line))
    assert re.search(r"32 × 32 +[\d.]+ % +1 +1 +[\d.]+ % +\d+ +~?0\.\d{4} +~?0\.\d{4}$", q)
    assert changed.table(limit=3).splitlines()[-1] == f"… and {len(changed.matrices) - 3} more"
    assert str(changed).startswith(changed.summary())


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0, "0"), (1e-9, "1e-07 %"), (0.0123, "1.2 %"), (0.5, "50 %"), (1.4142, "141 %")]
)
def test_shares_are_zero_only_when_nothing_changed(value, shown):
    assert compare_text.share(value) == shown


def test_an_overlap_is_one_only_when_exactly_one():
    shown = [compare_text.overlap(value) for value in (None, 1.0, 1 - 1e-12, 0.5)]
    assert shown == ["–", "1", "0.9999", "0.5000"]


def test_a_long_list_of_unmatched_tensors_says_how_many_follow(changed):
    many = tuple(Unmatched("tuned", f"extra.{i}.weight", "", (3, 4), "no partner") for i in range(30))
    text = replace(changed, unmatched=many).summary()
    assert text.count("not compared (tuned)") == 20
    assert text.endswith("… and 10 more not compared")


def test_the_card_is_golden(changed):
    first, other = changed.matrices[1], changed.matrices[2]
    assert (first.role, other.role) == ("q", "k")
    q = replace(
        first, identical=False, base_norm=1.0, update_norm=0.5, relative_update=0.5, update_rank=2,
        update_energy_rank_90=1, spectrum_drift=0.5, left_cos2=0.75, right_cos2=1.0, degenerate=False,
    )  # fmt: skip
    k = replace(other, base_norm=3**0.5)
    comparison = replace(
        changed,
        lmd_hf="0.1.0",
        base=replace(changed.base, id="org/base", commit="0123456789abcdef"),
        tuned=replace(changed.tuned, id="tuned"),
        settings={"roles": ["q", "k"], "layers": "", "match": "", "device": "auto"},
        coverage={"parameters": 60, "compared": 48, "fraction": 0.8, "notes": []},
        matrices=(q, k),
        vectors=(),
        unmatched=(
            Unmatched("base", "model.layers.0.self_attn.v_proj.weight", "", (3, 4), "no partner in the tuned model"),
        ),
    )
    assert comparison.card() == Path(__file__).with_name("golden_compare_card.md").read_text(encoding="utf-8")


def test_the_card_cannot_be_broken_out_of(changed):
    evil = "x | y\n<!-- lmd:end --><script>alert(1)</script> [link](http://evil) `code` ![p](q)"
    rows = tuple(replace(m, name=evil, tuned_name=evil, matched="prefix", block="") for m in changed.matrices)
    comparison = replace(
        changed,
        matrices=rows,
        base=replace(changed.base, id=evil),
        tuned=replace(changed.tuned, id=evil),
        unmatched=(Unmatched("base", evil, "", (1, 2), evil),),
    )
    card = comparison.card()
    assert "<script>" not in card
    assert "<!--" not in card
    assert "](http://evil)" not in re.sub(r"`[^`]*`", "", card).replace("\\](", "")
    assert "<script>" not in comparison._repr_html_()


def test_figures_show_every_role_and_change(changed, tmp_path):
    figures = changed.plot(tmp_path)
    assert {p.stem for p in tmp_path.iterdir()} == set(figures) == {"updates", "changes"}
    titles = [axes.get_title() for axes in figures["updates"].axes if axes.get_title()]
    assert titles == [role for role, _ in by_role(changed.matrices)]
    panels = dict(zip(titles, figures["updates"].axes, strict=False))
    assert len(panels["attention q"].get_lines()) == 2  # one spectrum and the dot at its rank
    assert [text.get_text() for text in panels["attention k"].texts] == ["identical"]
    Comparison.from_json(changed.to_json()).plot(tmp_path / "again")
    assert (tmp_path / "again" / "updates.png").read_bytes() == (tmp_path / "updates.png").read_bytes()


def test_identical_models_have_figures_a_card_and_a_page(save):
    same = compare(save("llama"), save("llama"))
    assert set(same.plot()) == {"updates", "changes"}
    assert "identical: 16" in same.card()
    assert "Changed most" not in same.card()
    assert "‖ΔW‖ is 0 of ‖W‖" in same.summary()
    assert "0 of 5 vectors changed" in same._repr_html_()


def test_models_that_share_nothing_say_so(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({f"model.{name}.weight": torch.randn(3, 5)}, tmp_path / name / "model.safetensors")
    nothing = compare(tmp_path / "a", tmp_path / "b")
    assert nothing.matrices == ()
    assert len(nothing.unmatched) == 2
    for text in (nothing.summary(), nothing.card(), nothing.table(), nothing._repr_html_()):
        assert text
    assert set(nothing.plot(tmp_path)) == {"updates"}
