"""The report: round trips, schema, coverage, text, card, figures and findings."""

import dataclasses
import json
import re
import shlex
from dataclasses import replace
from importlib import resources

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmd_hf import Report, analyze
from lmd_hf.errors import FormatError, OutputError, SourceError
from lmd_hf.evidence import Convergence, Evidence, LayerVerdict
from lmd_hf.records import Alias, Coverage, Skipped
from lmd_hf.report import findings, text
from lmd_hf.report.card import escape
from lmd_hf.report.files import write_folder
from lmd_hf.report.plane import points


SCHEMA = json.loads(resources.files("lmd_hf.report").joinpath("schema.json").read_text())


@pytest.fixture(scope="module")
def report(save):
    return analyze(save("mixtral"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A report whose spectrum is longer than what report.json keeps."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(700, 900)}, folder / "model.safetensors")
    return analyze(folder)


def test_the_schema_accepts_reports_and_nothing_else(report, wide):
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for each in (report, wide):
        validator.validate(json.loads(each.to_json()))
    for damage in (
        {"schema": "other"},
        {"heads": None},
        {"matrices": [{}]},
        {"extra": 1},
        {"convergence": {"verdict": "good"}},
        {"convergence": {"verdict": "stable", "evidence": [{}]}},
    ):
        assert not validator.is_valid({**json.loads(report.to_json()), **damage})


def test_the_schema_names_every_field(report):
    assert list(SCHEMA["properties"]) == list(report.to_dict()) == [f.name for f in dataclasses.fields(Report)]
    assert list(SCHEMA["properties"]["matrices"]["items"]["properties"]) == list(report.to_dict()["matrices"][0])


def test_json_round_trip_is_exact(report, wide):
    for each in (report, wide):
        again = Report.from_json(each.to_json())
        assert again.to_json() == each.to_json()
    assert Report.from_json(report.to_json()) == report


def test_reports_of_before_evidence_are_read_as_they_were(report):
    values = {**json.loads(report.to_json()), "convergence": {"verdict": "unknown", "evidence": []}}
    for matrix in values["matrices"]:
        del matrix["log_volume"]
    old = Report.from_dict(values)
    assert (old.convergence, old.matrices[0].log_volume) == (Convergence(), None)
    assert "convergence: unknown\n  no evidence was found" in old.summary()


def test_evidence_survives_json_and_is_inert_in_a_card(report):
    layers = (LayerVerdict("", 0, "unstable", {"spectrum_change": 0.5}), LayerVerdict("", None, "stable"))
    piece = Evidence("checkpoints", "org/<b>x</b>", "stable", "moved | `a`", {"n": None}, {"n": 0.1}, layers)
    told = replace(report, convergence=Convergence("stable", (piece,), layers))
    again = Report.from_json(told.to_json())
    assert again.convergence == told.convergence
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(told.to_json()))
    assert "convergence: stable; unstable by themselves: layer 0" in told.summary()
    assert "  - checkpoints (org/&lt;b&gt;x&lt;/b&gt;): stable, moved \\| \\`a\\`" in told.card()


def test_json_keeps_512_values_with_both_ends_and_parquet_all(wide, tmp_path):
    matrix = wide.to_dict()["matrices"][0]
    ranks = matrix["singular_value_ranks"]
    assert (len(ranks), ranks[0], ranks[-1]) == (512, 1, 700)
    whole = wide.matrices[0].singular_values
    assert matrix["singular_values"] == [whole[rank - 1] for rank in ranks]
    wide.save(tmp_path)
    loaded = Report.load(tmp_path)
    np.testing.assert_array_equal(loaded.matrices[0].singular_values, whole)
    assert loaded == wide
    (tmp_path / "matrices.parquet").unlink()
    assert len(Report.load(tmp_path / "report.json").matrices[0].singular_values) == 512


def test_parquet_is_readable_by_others(report, tmp_path):
    import pandas

    report.save(tmp_path)
    frame = pandas.read_parquet(tmp_path / "matrices.parquet")
    assert len(frame) == len(report.matrices)
    assert frame["stable_rank"].tolist() == [m.stable_rank for m in report.matrices]
    ours = report.to_pandas()
    assert set(ours.columns) - set(frame.columns) == {"singular_value_ranks", "topology_ranks"}
    assert ours["name"].tolist() == frame["name"].tolist()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"timing": NaN}', '{"schema": "lmd-report/2"}', '{"schema": "lmd-report/1"}']
)
def test_a_file_that_is_no_report_is_refused(content):
    with pytest.raises(FormatError):
        Report.from_json(content)


@pytest.mark.parametrize(
    "damage",
    [
        {"effective_rank": "x"}, {"layer": "1"}, {"layer": 1.5}, {"shape": "ab"}, {"shape": [1, 2, 3]}, {"role": None},
        {"singular_values": ["a"]}, {"singular_values": None}, {"singular_values": [[1.0]]}, {"spectral_norm": None},
    ],
)  # fmt: skip
def test_an_edited_matrix_is_refused(report, damage):
    values = report.to_dict()
    values["matrices"][0] |= damage
    with pytest.raises(FormatError, match="not a complete lmd-report/1 report"):
        Report.from_dict(values)


@pytest.mark.parametrize(("name", "value"), [("settings", None), ("environment", []), ("timing", 1), ("lmd_hf", 3)])
def test_an_edited_report_is_refused(report, name, value):
    with pytest.raises(FormatError, match=f"{name} is"):
        Report.from_dict({**report.to_dict(), name: value})
    with pytest.raises(FormatError, match="not a report but a list"):
        Report.from_dict([report.to_dict()])


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n", b"PAR1 damaged PAR1", None]
)
def test_a_table_that_came_as_something_else_is_one_line(report, tmp_path, content):
    import pandas

    report.save(tmp_path)
    table = tmp_path / "matrices.parquet"
    if content is None:
        pandas.DataFrame({"a": [1]}).to_parquet(table)
    else:
        table.write_bytes(content)
    with pytest.raises(FormatError, match=r"matrices.parquet: not the table of these spectra \(.+git lfs pull") as told:
        Report.load(tmp_path)
    assert "\n" not in str(told.value)
    table.unlink()
    assert Report.load(tmp_path) == report


def test_an_earlier_report_s_heads_do_not_stay(report, save, tmp_path):
    folder = tmp_path / "out"
    analyze(save("llama"), heads=True).save(folder)
    assert (folder / "heads.parquet").exists()
    (folder / "mine.txt").write_text("kept")
    report.save(folder)
    assert {p.name for p in folder.iterdir()} == {"report.json", "matrices.parquet", "mine.txt"}


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(SourceError, match="cannot read a report there"):
        Report.load(tmp_path)


def test_nothing_half_written(report, tmp_path):
    """A writer that fails half-way, as on a full disk, leaves the folder as it was."""
    report.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"No space left on device.*free some space"):
        write_folder(tmp_path, {"report.json": lambda p: p.write_text("new"), "matrices.parquet": full})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_file_in_the_way_is_an_output_error(report, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot write to"):
        report.save(tmp_path / "out")


def test_summary_shows_coverage_findings_and_convergence(report):
    summary = report.summary()
    assert re.search(r"[\d,]+ of [\d,]+ parameters decomposed \(\d\d\.\d\d %\); skipped 160: 5 vector", summary)
    assert "slow decay: found" in summary
    assert "not converged: found" in summary
    assert "high intrinsic dimension: not measured" in summary
    assert "convergence: unstable" in summary  # its weights are random
    assert re.search(r"  weights: unstable, \d+ of \d+ matrices cannot be told from i.i.d. noise", summary)


def test_coverage_says_100_percent_only_when_nothing_is_missing():
    whole = Coverage(100, 100, 1.0, (), (), ())
    nearly = Coverage(
        10**9, 10**9 - 1, 1 - 1e-9, (Skipped("b", (1,), "vector"),), (Alias("a", "b", (2, 2), False),), ()
    )
    assert text.coverage_line(whole) == "100 of 100 parameters decomposed (100 %)"
    assert text.coverage_line(nearly) == (
        "999,999,999 of 1,000,000,000 parameters decomposed (99.99 %); skipped 1: 1 vector; tied: a = b"
    )


def test_what_is_stored_again_was_not_skipped():
    again = Coverage(100, 60, 0.6, (Skipped("b", (4, 4), "vector"),), (Alias("a", "c", (4, 6), True),), ())
    assert text.coverage_line(again).endswith("skipped 16: 1 vector; tied: a = c, stored again: 24")


def test_bounds_are_rounded_up_and_halves_are_shown():
    assert [text.bound(value) for value in (2.2988e-10, 9.1e-8, 4e-9, 0.0)] == ["3e-10", "1e-07", "4e-09", "0e+00"]
    assert [text.rounded(0)(value) for value in (2.5, 11.5, 12, None)] == ["2.5", "11.5", "12", "–"]


@pytest.mark.parametrize(
    ("places", "shown"),
    [
        ([None], "what lies outside the layers"),
        ([0, None], "layer 0, and what lies outside the layers"),
        (range(14), f"layers {', '.join(map(str, range(12)))} and 2 more"),
    ],
)
def test_layers_with_another_verdict_are_named(places, shown):
    convergence = Convergence("unknown", (), tuple(LayerVerdict("", place, "unstable") for place in places))
    assert text.convergence_lines(convergence)[0] == f"unknown; unstable by themselves: {shown}"


def test_the_table_has_a_line_a_matrix(report):
    lines = report.table().splitlines()
    assert len(lines) == 2 + len(report.matrices)
    assert lines[0].split("  ")[0] == "layer"
    assert report.table(limit=3).splitlines()[-1] == f"… and {len(report.matrices) - 3} more"
    assert str(report).startswith(report.summary())


def test_every_row_of_a_layer_can_be_told_from_the_others(report):
    """Experts that each have a tensor of their own, as those that lie in one."""
    labels = [(matrix.layer, text.matrix_label(matrix)) for matrix in report.matrices]
    assert len(set(labels)) == len(labels)
    assert (1, "moe gate expert 2") in labels


def test_html_is_a_page_without_foreign_markup(report):
    evil = replace(report, model=replace(report.model, id="<script>alert(1)</script>"))
    html = evil._repr_html_()
    assert "<table>" in html
    assert "<script>" not in html


def test_the_card_holds_only_numbers_of_the_report(report):
    """Every number of the card is in the report, or is a median or range that the report's own text gives."""
    card = report.card()
    known = report.to_json() + report.summary() + report.table()
    known = known.replace(",", "")
    for number in re.findall(r"(?<![\w.])\d[\d,]*\.?\d*(?![\w])", _prose_removed(card)):
        assert number.replace(",", "") in known or _rounds_to_a_value(number, report), number


def _prose_removed(card):
    card = re.sub(r"\[arXiv [\d.]+\]\(\S+\)", "", card)
    return card.replace("10⁻⁶", "").replace("threshold 0.9", "").replace("threshold 6", "")


def _rounds_to_a_value(number, report):
    digits = len(number.partition(".")[2])
    return any(
        f"{value:.{digits}f}" == number
        for m in report.matrices
        for value in (m.participation_ratio, m.error_bound, min(m.shape))
        if value is not None
    )


def test_the_card_is_the_same_after_a_round_trip(report):
    assert Report.from_json(report.to_json()).card() == report.card()


def test_the_card_cannot_be_broken_out_of(report):
    evil = "x | y\n<!-- lmd:end --><script>alert(1)</script> [link](http://evil) `code` ![p](q)"
    names = [replace(m, name=evil, block="", layer=None) for m in report.matrices]
    card = replace(report, matrices=tuple(names), model=replace(report.model, id=evil)).card()
    assert "<script>" not in card
    assert "<!--" not in card
    assert "-->" not in card
    assert "](http://evil)" not in re.sub(r"`[^`]*`", "", card).replace("\\](", "")
    assert escape("a|b\nc") == "a\\|b c"


def test_the_command_of_a_card_can_be_pasted_into_a_shell(report):
    """Names and globs are quoted, a first layer below 0 is no option, and factors need a folder that is not told."""
    chosen = {"layers": "-2,-1", "match": "*mlp*", "roles": ["q", "up"], "heads": True, "rank": 4, "device": "cpu"}
    card = replace(
        report, model=replace(report.model, id="my models/it's"), settings={**report.settings, **chosen}
    ).card()
    words = shlex.split(re.search(r"\*\*Reproduce:\*\* `(.*?)`", card).group(1))
    assert words[:3] == ["lmd-hf", "analyze", "my models/it's"]
    assert sorted(words[3:]) == ["*mlp*", "--heads", "--layers=-2,-1", "--match", "--roles", "q,up"]


def test_the_command_of_a_card_says_where_the_weights_were(report):
    """A folder of the repository, and the base that updates were added to: without them it is another report."""
    model = replace(report.model, id="org/tuned", subfolder="unet", base="org/base")
    again = Report.from_json(replace(report, model=model).to_json())
    assert again.model == model
    assert "`lmd-hf analyze org/tuned --subfolder unet --base org/base" in again.card()


def test_the_card_makes_no_quality_claim(report):
    card = report.card()
    assert "do not measure quality, safety or accuracy" in card
    assert not re.search(r"\b(?:good|bad|better|best|worse) model\b", card)


def test_figures_show_every_role_and_layer(report, tmp_path):
    figures = report.plot(tmp_path)
    assert set(figures) == {"spectra", "capacity", "heatmap"}
    assert {p.name for p in tmp_path.iterdir()} == {"spectra.png", "capacity.png", "heatmap.png"}
    titles = [axes.get_title() for axes in figures["spectra"].axes]
    assert [t for t in titles if t] == [role for role, _ in text.by_role(report.matrices)]
    lines = sum(len(axes.get_lines()) for axes in figures["spectra"].axes)
    assert lines == len(report.matrices)
    again = Report.from_json(report.to_json()).plot(tmp_path / "again")
    assert set(again) == set(figures)
    assert (tmp_path / "again" / "spectra.png").read_bytes() == (tmp_path / "spectra.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "shown"), [(r"a$_b_c_$\frac", r"a$_b_c_$\frac"), ("a\udcffb", r"a\udcffb"), ("a\nb", r"a\nb")]
)
def test_figures_take_any_name_of_a_folder(report, tmp_path, name, shown):
    """Dollars begin no formula, and a byte that is no UTF-8 is shown escaped."""
    figures = replace(report, model=replace(report.model, id=name)).plot(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(figures)
    assert figures["spectra"].get_suptitle() == f"Singular values of every matrix: {shown}"


def test_the_plane_has_a_mark_for_every_capacity(report):
    axes, *_ = report.plot()["capacity"].axes
    marks = np.concatenate([group.get_offsets() for group in axes.collections])
    known = [(m.expressivity, m.capacity_log10) for m in report.matrices if m.capacity_log10 is not None]
    assert sorted(map(tuple, marks.tolist())) == sorted(known)
    assert len(axes.collections) == len(text.by_role(report.matrices))
    labels = [group.get_label() for group in axes.collections]
    assert "moe router (0 of 2)" in labels  # two directions are too few for a capacity
    assert f"attention q ({sum(m.role == 'q' for m in report.matrices)})" in labels


def test_a_report_without_layers_has_no_heatmap(tmp_path):
    save_file({"head.weight": torch.randn(5, 9)}, tmp_path / "model.safetensors")
    assert set(analyze(tmp_path).plot()) == {"spectra", "capacity"}


def test_heads_have_their_place_in_the_plane(save):
    report = analyze(save("llama"), heads=True)
    group = points(report)["attention heads"]
    assert [layer for layer, _, _ in group] == [head.layer for head in report.heads]
    assert all(0 < entropy <= 1 for _, entropy, _ in group)
    known = sum(head.capacity_log10 is not None for head in report.heads)
    label = f"attention heads ({known} of {len(group)})" if known < len(group) else f"attention heads ({known})"
    assert label in [marks.get_label() for marks in report.plot()["capacity"].axes[0].collections]


def test_a_report_without_capacities_has_no_plane(tmp_path):
    save_file({"head.weight": torch.randn(2, 9)}, tmp_path / "model.safetensors")
    assert set(analyze(tmp_path).plot()) == {"spectra"}


def test_random_weights_look_untrained_and_low_rank_ones_do_not(tmp_path):
    torch.manual_seed(0)
    noise = torch.randn(120, 200)
    low = torch.randn(120, 4) @ torch.randn(4, 200) + 0.05 * noise
    save_file({"noise.weight": noise, "low.weight": low}, tmp_path / "model.safetensors")
    found = {f.signature: f for f in analyze(tmp_path).findings}
    assert found["not converged"].matrices == ("noise.weight",)
    assert found["slow decay"].matrices == ("noise.weight",)
    assert found["high intrinsic dimension"].status == "not measured"


@pytest.mark.parametrize("weight", [torch.ones(2, 2), torch.ones(40, 40), torch.zeros(40, 40)])
def test_what_noise_cannot_be_compared_with_is_not_measured(tmp_path, weight):
    """2 × 2 has the participation ratio of noise at rank one already; a matrix of low rank has no bulk, whatever its
    size, and a share of none is not told."""
    save_file({"head.weight": weight}, tmp_path / "model.safetensors")
    report = analyze(tmp_path)
    slow, _, untrained = report.findings
    assert slow.status == ("not found" if weight.sum() == 1600 else "not measured")
    assert untrained.status == "not measured"
    assert "large enough" not in untrained.text
    assert "0 of 0" not in report.summary()


def test_thresholds_can_be_changed(report):
    strict = {f.signature: f for f in findings.find(report.matrices, slow_decay=2.0)}
    assert strict["slow decay"].status == "not found"
    assert strict["slow decay"].threshold == 2.0
    seen = findings.find(tuple(replace(matrix, metric="data") for matrix in report.matrices))
    assert {f.signature: f.status for f in seen}["slow decay"] == "not measured"


def test_a_stable_training_is_not_called_the_opposite_for_a_few_matrices_like_noise(tmp_path):
    torch.manual_seed(0)
    save_file({"noise.weight": torch.randn(120, 200)}, tmp_path / "model.safetensors")
    report = analyze(tmp_path)
    told = {v: findings.find(report.matrices, verdict=v)[2] for v in ("stable", "unstable", "unknown")}
    assert {v: each.status for v, each in told.items()} == {
        "stable": "not found", "unstable": "found", "unknown": "found",
    }  # fmt: skip
    assert {each.matrices for each in told.values()} == {("noise.weight",)}
    assert told["stable"].text.startswith("the training is stable; 1 of 1 matrices cannot")


def test_reports_are_frozen(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.schema = "x"
    with pytest.raises(ValueError, match="read-only"):
        report.matrices[0].singular_values[0] = 1
