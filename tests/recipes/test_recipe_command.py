"""`lmd-hf recipe`: JSON on stdout, words on stderr, files, exit codes."""

import json

import peft
import pytest
import yaml
from models import make

from lmd_hf import analyze, compare
from lmd_hf.cli import run
from lmd_hf.weights.source import EMBEDDED_ID


def answer(capsys, *arguments, code=0):
    assert run(["recipe", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_lora(capsys, tmp_path):
    out = tmp_path / "adapter" / "adapter_config.json"
    told = json.loads(answer(capsys, "lora", EMBEDDED_ID, "--budget", 50_000, "--json", "--out", out).out)
    assert told["lmd"]["trainable_parameters"] <= told["lmd"]["budget"] == 50_000
    assert json.loads(out.read_text()).items() <= told.items()
    assert peft.PeftConfig.from_pretrained(out.parent).rank_pattern == told["rank_pattern"]
    shown = answer(capsys, "lora", EMBEDDED_ID, "--budget", 50_000)
    assert "model.layers.0.self_attn.q_proj" in shown.out
    assert "trainable parameters in 28 modules" in shown.err


def test_lora_from_saved_files_and_from_a_tuned_model(capsys, tmp_path, save):
    make("llama", seed=1).save_pretrained(tmp_path / "tuned")
    analyze(save("llama")).save(tmp_path / "report")
    compare(save("llama"), tmp_path / "tuned").save(tmp_path / "compare")
    ways = [
        ("lora", tmp_path / "report" / "report.json"),
        ("lora", save("llama")),
        ("lora", tmp_path / "compare" / "compare.json"),
        ("lora", save("llama"), "--tuned", tmp_path / "tuned"),
    ]
    ranks = [json.loads(answer(capsys, *way, "--budget", 9_000, "--json", "-q").out)["rank_pattern"] for way in ways]
    assert ranks[0] == ranks[1] != ranks[2] == ranks[3]


def test_a_saved_report_is_filtered_and_what_it_cannot_follow_is_refused(capsys, tmp_path):
    analyze(EMBEDDED_ID).save(tmp_path)
    selection = ("--layers", "0,-1", "--match", "*mlp*", "--json")
    for way, key in ((("lora", "--budget", 50_000), "target_modules"), (("freeze",), "modules")):
        told, live = (json.loads(answer(capsys, *way, m, *selection).out)[key] for m in (tmp_path, EMBEDDED_ID))
        assert told == live
        assert len(told) == 6
    for option in (("--metric", "norm"), ("--device", "cpu"), ("--samples", 4), ("--revision", "main")):
        told = answer(capsys, "lora", tmp_path, "--budget", 50_000, *option, code=1).err
        assert f"{option[0]} changes nothing" in told
    assert "leaves no matrix" in answer(capsys, "freeze", tmp_path, "--layers", "99", code=1).err


def test_freeze(capsys, tmp_path):
    shown = answer(capsys, "freeze", EMBEDDED_ID, "--share", 0.25)
    patterns = yaml.safe_load(shown.out)["unfrozen_parameters"]
    assert len(patterns) == 7
    told = json.loads(answer(capsys, "freeze", EMBEDDED_ID, "--share", 0.25, "--json").out)
    assert told["unfrozen_parameters"] == patterns


def test_extract(capsys, tmp_path, save):
    make("llama", seed=1).save_pretrained(tmp_path / "tuned")
    told = answer(
        capsys, "extract", save("llama"), tmp_path / "tuned", "--out", tmp_path / "out", "--rank", 2, "--json"
    )
    assert {module["rank"] for module in json.loads(told.out)["modules"]} == {2}
    assert "left out: model.norm.weight" in told.err
    peft.PeftModel.from_pretrained(make("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lora", EMBEDDED_ID, "--budget", "10"), "below one rank for each of the 28 modules"),
        (("lora", EMBEDDED_ID, "--budget", "0"), "below one rank"),
        (("lora", EMBEDDED_ID, "--budget", "90000", "--roles", "embed"), "tied"),
        (("freeze", EMBEDDED_ID, "--share", "0"), "share is 0"),
        (("extract", EMBEDDED_ID, EMBEDDED_ID, "--out", "x"), "nothing to extract"),
        (("extract", EMBEDDED_ID, EMBEDDED_ID, "--out", "x", "--rank", "0"), "rank is 0"),
        (("lora", "nowhere/", "--budget", "10"), "no such folder"),
    ],
)
def test_what_goes_wrong_is_one_line(capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = answer(capsys, *arguments, code=1)
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert message in told.err
    assert not (tmp_path / "x").exists()


def test_freeze_takes_no_comparison(capsys, tmp_path, save):
    make("llama", seed=1).save_pretrained(tmp_path / "tuned")
    compare(save("llama"), tmp_path / "tuned").save(tmp_path / "compare")
    assert "a comparison" in answer(capsys, "freeze", tmp_path / "compare", code=1).err


def test_bad_usage(capsys):
    answer(capsys, "lora", EMBEDDED_ID, code=2)
    answer(capsys, "extract", EMBEDDED_ID, EMBEDDED_ID, code=2)
