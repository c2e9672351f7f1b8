"""The README is true: its code runs, its rows are those of the committed report, its files exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from lmd_hf import Report
from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.outcome import index_page, index_table
from lmd_hf.report.text import COLUMNS, matrix_row
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CARD = ROOT / "model_cards" / EMBEDDED_ID.replace("/", "--")
SHOWN = ("layer", "matrix", "shape", "effective rank", "latent dim", "capacity", "error bound")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def readme_rows(report, layer=2):
    """Six rows of one layer, as Markdown."""
    keep = [COLUMNS.index(name) for name in SHOWN]
    rows = [matrix_row(m) for m in report.matrices if m.layer == layer][:6]
    lines = ["| " + " | ".join(SHOWN) + " |", "|---" * len(SHOWN) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row[i] for i in keep) + " |" for row in rows)])


@pytest.fixture
def org_model(hub, tmp_path):
    """The embedded model, and one with a rank-8 update of its queries, on the loopback Hub under the README's names."""
    files = {p.name: p.read_bytes() for p in EMBEDDED_FOLDER.iterdir() if p.is_file()}
    hub.add("org/model", files)
    tensors = load_file(EMBEDDED_FOLDER / "model.safetensors")
    for name, value in tensors.items():
        if "q_proj" in name:
            update = torch.randn(value.shape[0], 8) @ torch.randn(8, value.shape[1]) / value.shape[1] ** 0.5
            tensors[name] = (value + 0.5 * update).to(value.dtype)
    hub.add("org/tuned", {**files, "model.safetensors": save(tensors)})


def test_the_rows_are_those_of_the_committed_report():
    pasted = re.search(r"<!-- rows:begin -->\n(.*?)\n<!-- rows:end -->", README, re.DOTALL).group(1)
    assert pasted == readme_rows(Report.load(CARD / "report.json"))


def test_the_experiments_are_those_that_were_committed():
    pasted = re.search(r"<!-- experiments:begin -->\n(.*?)\n<!-- experiments:end -->", README, re.DOTALL).group(1)
    folder = ROOT / "model_cards" / "experiments"
    assert pasted == index_table(folder, tuple(EXPERIMENTS), link="model_cards/experiments/")
    assert (folder / "README.md").read_text() == index_page(folder, tuple(EXPERIMENTS))
    for name in EXPERIMENTS:
        outcome = json.loads((folder / name / "outcome.json").read_text())
        rules = [check["agrees"] for check in outcome["tables"]["checks"] if check["decides"]]
        assert outcome["agrees"] is all(rules)
        assert all(path.stat().st_size < 150_000 for path in (folder / name).iterdir())


@pytest.mark.parametrize("block", blocks("python"), ids=lambda b: b.splitlines()[0])
def test_python_blocks_run(block, org_model, capsys):
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    if "analyze" in block:
        assert "parameters decomposed" in printed
    if "compare" in block:
        assert "change as a whole" in printed


@pytest.mark.slow
def test_shell_blocks_run(org_model, tmp_path):
    for line in "".join(blocks("sh")).splitlines():
        command = line.partition("#")[0].split()
        assert command[0] == "lmd-hf"
        answer = subprocess.run(
            [sys.executable, "-m", "lmd_hf", *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout
    assert (tmp_path / "lmd" / "report.json").is_file()
    assert (tmp_path / "diff" / "compare.json").is_file()


def test_both_make_commands_exist():
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def test_links_point_at_files():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_install_and_test_need_nothing_else():
    """No path of a machine, no unpublished name."""
    assert "/work" not in README
    assert os.path.basename(os.environ["HF_HOME"]) not in README
