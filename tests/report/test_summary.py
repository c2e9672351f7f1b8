"""`lmd/summary.json` and the section say the same: every number of the text stands in the file."""

import json
import re
from dataclasses import replace

import pytest

from lmd_hf import analyze
from lmd_hf.report.sparkline import LEVELS, WIDEST, sparklines
from lmd_hf.report.summary import numbers_digest, summarise, summary_text
from lmd_hf.weights.source import EMBEDDED_ID


FORMATS = ("{:,.0f}", "{:.1f}", "{:,.1f}", "{:.2f}", "{:.4g}", "{:g}", "{:.0e}", "{:.2%}")
FIXED = {"0.5", "90", "2309.05968", "10", "99", "0.9", "1", "100", "0"}  # of the text itself, whatever the model


@pytest.fixture(scope="module")
def report():
    return analyze(EMBEDDED_ID, heads=True)


def numbers(value):
    """Every number of a JSON value."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    if isinstance(value, str):
        return [float(n.replace(",", "")) for n in re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", value)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_every_number_of_the_section_stands_in_the_file(report):
    stored = numbers(json.loads(summary_text(report)))
    coverage = report.coverage
    stored += [coverage.parameters - coverage.decomposed, 100 * coverage.fraction]
    shown = {form.format(number) for number in stored for form in FORMATS} | FIXED
    text = report.card(figure="lmd/heatmap.svg")
    text = re.sub(r"`[^`]*`|\(https[^)]*\)|```text.*?```|10⁻⁶|lmd_hf [\d.]+|log10", "", text, flags=re.DOTALL)
    text = re.sub(r"layer \d+ ", "", text)  # names
    found = re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?", text)
    assert len(found) > 100
    assert [token for token in found if token not in shown and token.lstrip("-") not in shown] == []


def test_the_guard_can_fail(report):
    stored = {form.format(n) for n in numbers(summarise(report)) for form in FORMATS}
    assert "123,456.7" not in stored


def test_the_digest_follows_the_numbers_and_nothing_else(report):
    same = replace(report, lmd_hf="9.9", model=replace(report.model, commit="f" * 40), timing={})
    assert numbers_digest(same) == numbers_digest(report)
    first = report.matrices[0]
    last_bit = replace(
        report, matrices=(replace(first, effective_rank=first.effective_rank * (1 + 1e-12)), *report.matrices[1:])
    )
    assert numbers_digest(last_bit) == numbers_digest(report)
    other = replace(report, matrices=(replace(first, effective_rank=first.effective_rank * 1.01), *report.matrices[1:]))
    assert numbers_digest(other) != numbers_digest(report)


def test_a_line_a_role_and_a_character_a_layer(report):
    lines = sparklines(report.matrices).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "attention q", "attention k", "attention v", "attention o", "mlp gate", "mlp up", "mlp down",
    ]  # fmt: skip
    assert all(len(re.findall(f"[{LEVELS}]", line)) == 4 for line in lines)


def test_deep_models_join_layers(report):
    query = next(m for m in report.matrices if m.role == "q")
    deep = [replace(query, layer=i, effective_rank=128.0 * i / 199) for i in range(200)]
    (line,) = sparklines(deep).splitlines()
    drawn = re.search(f"[{LEVELS}]+", line).group()
    assert len(drawn) == WIDEST
    assert drawn == "".join(sorted(drawn))
    assert sparklines([replace(query, layer=None)]) == ""
