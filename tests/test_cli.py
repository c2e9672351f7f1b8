"""The command line as a user meets it: exit codes, one clear line, machine output, interrupt."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import lmd_hf
from lmd_hf import cli, pipeline
from lmd_hf.run.journal import folder_name


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "lmd_hf", *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of a command run in this process."""
    code = cli.run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_is_fast_and_imports_no_torch():
    started = time.perf_counter()
    answer = run("--help")
    assert time.perf_counter() - started < 1.5  # 0.1 s on a quiet machine; importing torch would take longer than this
    assert answer.returncode == 0
    for command in ("demo", "plan", "analyze", "compare", "card"):
        assert command in answer.stdout
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, lmd_hf.cli\nlmd_hf.cli._parser()\nprint('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout.strip() == "False"


def test_plan_prints_what_would_be_done(capsys, save):
    code, out, _ = call(capsys, "plan", save("llama"))
    assert code == 0
    assert "16 matrices" in out
    assert "to fetch: nothing; here about a second or less and" in out
    assert "mlp gate" in out
    code, out, _ = call(capsys, "plan", save("llama"), "--json", "--metric", "norm")
    planned = json.loads(out)
    assert (code, len(planned["matrices"]), planned["parameters"]) == (0, 16, planned["decomposed"] + 160)
    assert planned["bytes_to_fetch"] == 0
    assert planned["expected_seconds"] > 0
    assert planned["memory_bytes"] > 10**8
    assert planned["matrices"][1]["norm"] == "model.layers.0.input_layernorm.weight"


def test_analyze_prints_a_table_and_writes_files(capsys, save, tmp_path):
    code, out, err = call(capsys, "analyze", save("llama"), "--out", tmp_path / "out")
    assert code == 0
    assert "parameters decomposed" in out
    assert "attention q" in out
    assert "wrote" in err
    call(capsys, "analyze", save("llama"), "--heads", "--out", tmp_path / "out", "-q")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"heads.parquet", "heads.png"}
    call(capsys, "analyze", save("llama"), "--out", tmp_path / "out", "-q")
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {"report.json", "matrices.parquet", "card.md", "spectra.png", "capacity.png", "heatmap.png"}


def test_json_is_the_report_and_nothing_else_on_stdout(capsys, save):
    code, out, _ = call(capsys, "analyze", save("llama"), "--json", "--roles", "q,k", "--layers", "-1")
    report = json.loads(out)
    assert code == 0
    assert [(m["role"], m["layer"]) for m in report["matrices"]] == [("q", 1), ("k", 1)]
    assert report["settings"]["roles"] == ["q", "k"]


def test_an_earlier_checkpoint_and_thresholds_are_options(capsys, save):
    where = ("analyze", save("llama"), "--before", save("gpt2"))
    code, _, err = call(capsys, *where)
    assert code == 1
    assert "no earlier checkpoint of this llama model, but a gpt2 model" in err
    again = save("llama", max_shard_size="20KB")  # the same weights
    code, out, _ = call(capsys, "analyze", save("llama"), "--before", again, "--untrained-share", "2", "--json")
    assert code == 0
    convergence = json.loads(out)["convergence"]
    assert convergence["verdict"] == "unknown"
    assert [piece["kind"] for piece in convergence["evidence"]] == ["checkpoints", "weights"]
    assert convergence["evidence"][1]["thresholds"] == {"untrained_share": 2.0}


def test_quiet_prints_nothing(capsys, save, tmp_path):
    code, out, _ = call(capsys, "analyze", save("llama"), "-q", "--out", tmp_path)
    assert (code, out) == (0, "")


def test_card_of_a_model_and_of_its_report_are_one(capsys, save, tmp_path):
    folder = save("llama")
    _, fresh, _ = call(capsys, "card", folder)
    call(capsys, "analyze", folder, "-q", "--out", tmp_path)
    _, from_file, _ = call(capsys, "card", tmp_path / "report.json")
    _, from_folder, _ = call(capsys, "card", tmp_path)
    _, as_json, _ = call(capsys, "card", tmp_path, "--json")
    assert fresh == from_file == from_folder == json.loads(as_json)["card"] == (tmp_path / "card.md").read_text()
    for option in (("--roles", "q"), ("--heads",), ("--before", "x"), ("--loss-change", "1"), ("--revision", "main")):
        code, out, err = call(capsys, "card", tmp_path, *option)
        assert (code, out) == (1, "")
        assert f"{option[0]} changes nothing; leave it out" in err


def test_compare_prints_a_table_and_writes_files(capsys, save, tmp_path):
    code, out, err = call(capsys, "compare", save("llama"), save("llama"), "--out", tmp_path / "out")
    assert code == 0
    assert "16 matrices and 5 vectors compared" in out
    assert "attention q" in out
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {"compare.json", "compare.parquet", "card.md", "updates.png", "changes.png"}
    assert all(name in err for name in written)


def test_card_of_a_comparison_is_the_one_that_was_written(capsys, save, tmp_path):
    call(capsys, "compare", save("llama"), save("llama"), "-q", "--out", tmp_path)
    for where in (tmp_path, tmp_path / "compare.json"):
        code, out, _ = call(capsys, "card", where)
        assert (code, out) == (0, (tmp_path / "card.md").read_text())


def test_compare_as_json_is_the_comparison_and_nothing_else(capsys, save):
    selection = ("--roles", "q,k", "--layers", "-1", "--match", "model.*", "--device", "cpu")
    code, out, _ = call(capsys, "compare", save("llama"), save("llama"), "--json", *selection)
    comparison = json.loads(out)
    assert (code, comparison["schema"]) == (0, "lmd-compare/1")
    assert [(m["role"], m["layer"], m["update_norm"]) for m in comparison["matrices"]] == [("q", 1, 0), ("k", 1, 0)]
    assert comparison["settings"] == {"roles": ["q", "k"], "layers": "-1", "match": "model.*", "device": "cpu"}


def test_compare_quietly_prints_nothing(capsys, save):
    code, out, _ = call(capsys, "compare", save("llama"), save("llama"), "-q")
    assert (code, out) == (0, "")


def test_compare_takes_a_revision_of_either_model(capsys, save, hub):
    for name in ("org/one", "org/two"):
        hub.add(name, {p.name: p.read_bytes() for p in save("llama").iterdir() if p.is_file()})
    revisions = ("--base-revision", "main", "--tuned-revision", "main")
    code, out, _ = call(capsys, "compare", "org/one", "org/two", "--json", *revisions)
    comparison = json.loads(out)
    assert code == 0
    assert [comparison[side]["revision"] for side in ("base", "tuned")] == ["main", "main"]
    code, _, err = call(capsys, "compare", "org/one", "org/two", "--tuned-revision", "absent")
    assert code == 1
    assert "absent" in err


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["missing", "empty", "pickle", "truncated", "garbage"])
def test_compare_names_the_model_that_cannot_be_read(capsys, save, tmp_path, kind, side):
    models = [save("llama"), save("llama")]
    models[side] = broken(tmp_path, kind)
    code, out, err = call(capsys, "compare", *models)
    assert (code, out) == (1, "")
    assert err.startswith("lmd-hf: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--roles", "qq"], 1, "no role 'qq'; known:"),
        (["--match", "nothing*"], 1, "the selection leaves no matrix"),
        (["--device", "abacus"], 1, "device 'abacus' cannot be used"),
        (["--out", "/dev/null"], 1, "--out"),
        (["--metric", "norm"], 2, "usage:"),
    ],
)
def test_compare_refuses_bad_settings(capsys, save, arguments, code, message):
    found, _, err = call(capsys, "compare", save("llama"), save("llama"), *arguments)
    assert found == code
    assert message in err


def broken(tmp_path, kind):
    if kind == "missing":
        return tmp_path / "absent"
    if kind == "pickle":
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    if kind == "truncated":
        save_file({"w.weight": torch.ones(30, 30)}, tmp_path / "model.safetensors")
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    if kind == "garbage":
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    return tmp_path


@pytest.mark.parametrize("command", ["plan", "analyze", "card"])
@pytest.mark.parametrize("kind", ["missing", "empty", "pickle", "truncated", "garbage"])
def test_known_errors_are_one_line_and_exit_1(capsys, tmp_path, kind, command):
    code, out, err = call(capsys, command, broken(tmp_path, kind))
    assert (code, out) == (1, "")
    assert err.startswith("lmd-hf: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_hf_debug_shows_the_traceback(tmp_path, monkeypatch):
    from lmd_hf.errors import SourceError

    monkeypatch.setenv("HF_DEBUG", "1")
    with pytest.raises(SourceError):
        cli.run(["plan", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["analyze"], ["compare", "x"], ["analyze", "x", "--metric", "euclid"], ["analyze", "x", "--nope"]],
)
def test_bad_usage_exits_2(capsys, arguments):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "usage:" in err


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("analyze", ["--roles", "qq"], "no role 'qq'; known:"),
        ("analyze", ["--layers", "x"], "cannot read layers"),
        ("card", ["--rank", "4"], "only `lmd-hf analyze MODEL --rank N --out DIR` writes factors"),
    ],
)
def test_bad_settings_exit_1(capsys, save, command, option, message):
    code, _, err = call(capsys, command, save("llama"), *option)
    assert code == 1
    assert message in err


@pytest.mark.parametrize("out", ["/dev/null", "/proc/nowhere/x", "x" * 300])
def test_an_unwritable_out_is_told_before_the_work(capsys, save, out):
    code, stdout, err = call(capsys, "analyze", save("llama"), "--out", out)
    assert (code, stdout) == (1, "")
    assert "--out" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_no_traceback(save):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lmd_hf", "plan", str(save("llama"))]
        answer = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert answer.returncode == 1
    assert answer.stderr.startswith("lmd-hf: cannot write the output")
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
@pytest.mark.parametrize("arguments", ["plan {}", "analyze {} --out {}"])
def test_a_closed_stream_is_one_that_nobody_reads(save, tmp_path, closed, arguments):
    command = f"{sys.executable} -m lmd_hf {arguments.format(save('llama'), tmp_path)} {closed}"
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "Traceback" not in answer.stderr
    assert bool(answer.stdout) == (closed == "2>&-")
    assert (tmp_path / "report.json").exists() == arguments.startswith("analyze")


def test_head_of_a_pipe_is_no_error(save):
    command = f"{sys.executable} -m lmd_hf analyze {save('llama')} --json | head -c 10"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert answer.stderr == ""


def test_an_interrupt_that_python_drops_ends_the_command_all_the_same():
    """What a signal handler raises inside a destructor is lost."""
    code = """
import os, signal, time
from lmd_hf.cli import interrupt
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
signal.signal(signal.SIGINT, interrupt)
dropped = Dropped()
del dropped
print("lost", flush=True)
time.sleep(30)
"""
    begun = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.stdout == "lost\n"
    assert answer.returncode == 130
    assert "lmd-hf: interrupted" in answer.stderr
    assert time.monotonic() - begun < 20


def test_ctrl_c_exits_130_at_once_and_writes_nothing(tmp_path):
    """A 6,000-square matrix keeps LAPACK busy for many seconds; the interrupt must not wait for it."""
    generator = torch.Generator().manual_seed(0)
    save_file({"w.weight": torch.randn(6000, 6000, generator=generator)}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "lmd_hf", "analyze", str(tmp_path / "model.safetensors"), "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(4)  # imports are done, the decomposition is under way
    process.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - stopped < 5
    assert "interrupted" in err
    assert "Traceback" not in err
    assert list(out.iterdir()) == []


def test_data_options_make_the_settings_and_their_errors_are_one_line(capsys, save, tmp_path):
    code, out, err = call(capsys, "analyze", save("llama"), "--metric", "data")
    assert (code, out) == (1, "")
    assert err.startswith("lmd-hf: the metric 'data' needs a dataset: give --dataset, a Hub id")
    assert err.count("\n") == 1
    code, _, err = call(capsys, "analyze", save("llama"), "--dataset", "x.txt")
    assert (code, err.count("\n")) == (1, 1)
    ids = tmp_path / "ids.jsonl"
    ids.write_text("\n".join(json.dumps({"input_ids": [1 + (i * j) % 59 for j in range(8)]}) for i in range(30)))
    options = ["--metric", "data", "--dataset", ids, "--seq-len", "8", "--graph", "knn", "--neighbours", "5"]
    code, out, _ = call(capsys, "analyze", save("llama"), "--json", "-q", *options)
    assert code == 0
    told = json.loads(out)["settings"]["data"]
    assert (told["seq_len"], told["graph"], told["neighbours"], told["samples"]) == (8, "knn", 5, 512)
    code, out, _ = call(capsys, "plan", save("llama"), "--json", *options)
    assert code == 0
    assert json.loads(out)["passes"] == 1
    assert json.loads(out)["input_bytes"] > 10**6


def test_models_that_would_share_a_folder_are_refused(save, tmp_path, capsys):
    code, _, told = call(capsys, "analyze", save("llama"), f"{save('llama')}/.", "--out", tmp_path / "out")
    assert code == 1
    assert "would be written to" in told


def test_what_the_disk_refuses_of_one_model_stops_no_other(save, tmp_path, capsys, monkeypatch):
    models = [save("llama"), save("gpt2"), save("bert")]
    blocked, unread = (folder_name(str(model)) for model in models[:2])
    (tmp_path / blocked).write_text("a file in the way")
    analyze_one = pipeline.analyze_one

    def refused(model, *arguments):
        if model == str(models[1]):
            raise PermissionError(13, "Permission denied", unread)
        return analyze_one(model, *arguments)

    monkeypatch.setattr(pipeline, "analyze_one", refused)
    code, stdout, err = call(capsys, "analyze", *models, "--out", tmp_path, "--json")
    assert code == 1
    assert [report["model"]["id"] for report in json.loads(stdout)] == [str(models[2])]
    assert f"{models[0]}: cannot write to" in err
    assert "Permission denied" in err
    assert "2 of 3 models failed; the others are done" in err


HOSTILE = "a\x1b[2J\x07\r\n\x9b31m\ud800"  # what clears a screen, rings, forges a line, colours, or is no character


def hostile(folder, name=HOSTILE, stop=96):
    """A checkpoint of one tensor of that name."""
    header = json.dumps({name: {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, stop]}}).encode()
    data = torch.randn(6, 4).numpy().tobytes()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return folder


def is_plain(text):
    return not any((c < " " and c != "\n") or "\x7f" <= c <= "\x9f" for c in text)


def test_names_of_others_reach_no_terminal_as_they_are(capsys, tmp_path):
    code, out, err = call(capsys, "analyze", hostile(tmp_path), "--out", tmp_path / "out")
    assert (code, is_plain(out + err)) == (0, True)
    assert r"a\x1b[2J\x07\r\n\x9b31m\ud800" in out
    saved = lmd_hf.Report.load(tmp_path / "out")
    assert saved.matrices[0].name == HOSTILE
    code, out, _ = call(capsys, "card", tmp_path / "out")
    assert (code, is_plain(out)) == (0, True)
    code, out, err = call(capsys, "compare", tmp_path, tmp_path)
    assert (code, is_plain(out + err)) == (0, True)
    done = run("analyze", tmp_path, "--json")
    assert json.loads(done.stdout)["matrices"][0]["name"] == HOSTILE


def test_names_of_others_in_errors_are_one_plain_line(capsys, tmp_path):
    code, out, err = call(capsys, "analyze", hostile(tmp_path, stop=90))
    assert (code, out, err.count("\n"), is_plain(err)) == (1, "", 1, True)
    promised = {"weight_map": {HOSTILE: "model-1.safetensors", "b": "model-1.safetensors"}}
    hostile(tmp_path, name="b").joinpath("model.safetensors").rename(tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(promised))
    code, out, err = call(capsys, "analyze", tmp_path)
    assert (code, out, err.count("\n"), is_plain(err)) == (1, "", 1, True)
