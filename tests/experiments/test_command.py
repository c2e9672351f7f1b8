"""`lmd-hf reproduce` as a user meets it."""

import json
import signal
import subprocess
import sys
import time
from types import ModuleType

import pytest

from lmd_hf import cli
from lmd_hf.experiments import catalogue, command
from lmd_hf.experiments.outcome import Check, Outcome


LIST = """\
swiss-roll             Does S' find the intrinsic dimension of the data that a network was trained on?
activations            Does the latent dimension grow with the degree of the activation, and the held-out error with it?
training               How do the factors of a Transformer change from initialisation to convergence?
convergence            Do the verdicts on convergence tell trainings that were stopped early from long ones?
high-dimension         Does S' tell data of few intrinsic dimensions from data of many?
semantics              Do the latent axes of a trained network separate the classes that it learned?
capacity               How does the number of patterns that an associative memory recalls grow with its dimension?
hopfield-similarity    Which similarity finds a stored digit again from a noisy or a half hidden one?
capacity-expressivity  Which ratio of capacity to expressivity goes with the lowest error on which manifold?
encoding-margin        Does the encoding theorem's bound hold for trained networks, and how tight is it?
adaptive               Does a network trained in factors learn better if its latent spectrum decides their ranks?
"""


@pytest.fixture
def tiny(monkeypatch):
    """Two experiments that take no time, in place of the paper's."""

    def run(name):
        return lambda seeds: Outcome(name, "Is it tiny?", "So.", (Check("yes", "yes", True),), seeds, {"t": [{"a": 1}]})

    known = dict.fromkeys(("one", "two"), "Is it tiny?")
    for name in known:
        module = ModuleType(name)
        module.run = run(name)
        monkeypatch.setitem(sys.modules, f"lmd_hf.experiments.{name}", module)
    monkeypatch.setattr(catalogue, "EXPERIMENTS", known)
    monkeypatch.setattr(command, "EXPERIMENTS", known)


def call(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = cli.run(["reproduce", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list_is_golden_and_needs_no_torch():
    code = (
        "import sys\nfrom lmd_hf import cli\n"
        "assert cli.run(['reproduce', '--list']) == 0\nassert 'torch' not in sys.modules"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.stderr == ""
    assert answer.stdout == LIST


def test_the_list_as_json(capsys):
    _, out, _ = call(capsys, "--list", "--json")
    assert [entry["name"] for entry in json.loads(out)] == list(catalogue.EXPERIMENTS)


def test_json_is_the_outcome_and_nothing_else_on_stdout(capsys, tiny):
    code, out, err = call(capsys, "one", "--json", "--seeds", 3)
    assert code == 0
    assert list(json.loads(out)) == ["name", "expected", "found", "agrees", "seeds", "tables"]
    assert json.loads(out)["seeds"] == [0, 1, 2]
    assert "one: " in err


def test_files_are_written_and_the_report_is_printed(capsys, tiny, tmp_path):
    code, out, err = call(capsys, "one", "--out", tmp_path)
    assert code == 0
    assert out.strip() == (tmp_path / "report.md").read_text().strip()
    assert {p.name for p in tmp_path.iterdir()} == {"report.md", "outcome.json"}
    assert "wrote" in err
    assert call(capsys, "one", "-q")[:2] == (0, "")


def test_all_of_them_with_an_index(capsys, tiny, tmp_path):
    code, out, _ = call(capsys, "--all", "--json", "--out", tmp_path)
    assert code == 0
    assert [outcome["name"] for outcome in json.loads(out)] == ["one", "two"]
    assert json.loads((tmp_path / "two" / "outcome.json").read_text())["name"] == "two"
    assert "[one](one/report.md)" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "one of the arguments NAME --list --all is required"),
        (("one", "--all"), 2, "not allowed with"),
        (("three",), 1, "lmd-hf: no experiment 'three'; known: one, two"),
        (("one", "--seeds", 0), 1, "at least one seed"),
        (("one", "--out", "/dev/null"), 1, "--out"),
    ],
)
def test_what_is_wrong_is_said(capsys, tiny, arguments, code, message):
    found, out, err = call(capsys, *arguments)
    assert (found, out) == (code, "")
    assert message in err


@pytest.mark.slow
def test_ctrl_c_exits_130_at_once_and_writes_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "lmd_hf", "reproduce", "swiss-roll", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(4)  # imports are done, training is under way
    process.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - stopped < 5
    assert err == cli.INTERRUPTED + "\n"
    assert list((tmp_path / "out").iterdir()) == []
