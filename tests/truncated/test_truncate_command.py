"""lmd-hf recipe truncate: files, table, JSON and one line for what is wrong."""

import json

import pytest
import torch

from lmd_hf import LMDModel, cli
from lmd_hf.truncated import command, cut
from lmd_hf.weights.source import EMBEDDED_ID


def run(capsys, *options):
    code = cli.run(["recipe", "truncate", EMBEDDED_ID, *map(str, options)])
    return code, *capsys.readouterr()


def test_it_writes_a_model_that_loads_and_tells_its_sizes(capsys, tmp_path, texts):
    out = tmp_path / "out"
    held_out = texts / "code.jsonl"
    code, told, errors = run(capsys, "--ratio", 0.7, "--out", out, "--evaluate", held_out, "--seq-len", 64)
    assert code == 0
    assert "parameters 1,000,576 → 77" in told
    assert "of the selected matrices 70.0%" in told
    assert "loss " in told
    assert "config.json, generation_config.json, model.safetensors" in errors
    record = LMDModel.from_pretrained(out).truncation
    assert f"{record.loss.before:.4f} → {record.loss.after:.4f} nats a token" in told


def test_json_is_the_record(capsys, tmp_path):
    code, told, _ = run(capsys, "--rank", 4, "--out", tmp_path / "out", "--json", "--roles", "q,k")
    assert code == 0
    record = json.loads(told)
    assert record["target"] == {"rank": 4}
    assert {layer["role"] for layer in record["layers"]} == {"q", "k"}


def test_quiet_prints_nothing_on_stdout(capsys, tmp_path):
    assert run(capsys, "--energy", 0.5, "--out", tmp_path / "out", "-q")[:2] == (0, "")


def test_the_metric_of_data_takes_its_dataset(capsys, tmp_path, texts):
    asked = ("--metric", "fisher", "--dataset", texts / "code.jsonl", "--samples", 60, "--seq-len", 64)
    code, told, _ = run(capsys, "--ratio", 0.5, "--out", tmp_path / "out", *asked, "--json")
    assert code == 0
    record = json.loads(told)
    assert (record["metric"], record["data"]) == ("fisher", "code.jsonl")
    assert torch.isfinite(LMDModel.from_pretrained(tmp_path / "out")(input_ids=torch.tensor([[1, 2]])).logits).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", 0), "lmd-hf: rank is 0; a layer keeps one axis or more\n"),
        (("--ratio", 2), "lmd-hf: ratio is 2.0; it is a share, so give a number between 0 and 1\n"),
        (("--ratio", 0.5, "--metric", "data"), "lmd-hf: the metric 'data' needs a dataset"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(capsys, tmp_path, options, message):
    code, told, errors = run(capsys, *options, "--out", tmp_path / "out")
    assert (code, told) == (1, "")
    assert errors.splitlines()[-1].startswith(message.rstrip("\n"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(capsys, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    code, _, errors = run(capsys, "--rank", 4, "--out", tmp_path)
    assert code == 1
    assert "is there already; give --out a new folder" in errors
    assert (tmp_path / "README.md").read_text() == "mine"


def test_one_of_the_three_is_asked_for_and_the_metrics_are_those_that_there_are(capsys, tmp_path):
    assert run(capsys, "--out", tmp_path / "out")[0] == 2
    assert run(capsys, "--out", tmp_path / "out", "--rank", 3, "--ratio", 0.5)[0] == 2
    assert tuple(cut.SIGHTS) == command.METRICS
