"""Several processes share one run: real launchers, real process groups, the numbers of one process."""

import hashlib
import json
import os
import subprocess
import sys

import models
import pytest
import torch

from lmd_hf import analyze
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.run.journal import clear_kept
from lmd_hf.run.world import World, join


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(launcher, *arguments, **environment):
    return subprocess.run(
        [*launcher, "-m", "lmd_hf", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def launch_script(script, what):
    return subprocess.run(
        [*TORCHRUN, "--nproc_per_node", "2", str(script), what], capture_output=True, text=True, timeout=120
    )


def rows(text):
    return json.loads(text)["matrices"]


def plain(report):
    return json.loads(report.to_json())["matrices"]


def test_a_world_of_one():
    world = World()
    assert world.gather(3) == [3]
    counter = world.counter()
    assert (counter.add(2), counter.add(0), world.counter().add(1)) == (2, 2, 1)
    assert world.together(lambda: "done") == "done"
    with pytest.raises(SourceError, match="gone"):
        world.together(lambda: (_ for _ in ()).throw(SourceError("gone")))
    world.check_same({"anything": "seen"})


def test_two_processes_give_the_rows_and_numbers_of_one(save):
    expected = plain(analyze(save("mixtral")))
    clear_kept()
    answer = launch([*TORCHRUN, "--nproc_per_node", "2"], "analyze", save("mixtral"), "--json")
    assert answer.returncode == 0, answer.stderr
    shared = json.loads(answer.stdout)
    assert (shared["environment"]["processes"], shared["environment"]["reused"]) == (2, 0)
    assert shared["matrices"] == expected
    assert analyze(save("mixtral")).environment["reused"] == len(shared["matrices"])  # what the ranks have journalled


@pytest.mark.slow
def test_several_models_are_shared_out_whole(save, tmp_path):
    folders = [save(family) for family in ("llama", "gpt2", "bert")]
    missing = tmp_path / "missing"
    answer = launch(
        [*TORCHRUN, "--nproc_per_node", "2"], "analyze", *folders, missing, "--out", tmp_path / "out", "--json"
    )
    assert answer.returncode == 1
    assert f"{missing}: no such folder or file" in answer.stderr
    assert "1 of 4 models failed; the others are done" in answer.stderr
    reports = json.loads(answer.stdout)
    assert [r["model"]["id"] for r in reports] == [str(f) for f in folders]
    assert len(list((tmp_path / "out").glob("*/report.json"))) == 3


def test_a_list_of_models_gives_a_list_of_reports(save):
    folders = [save("llama"), save("gpt2")]
    assert [r.model.id for r in analyze(folders)] == [str(folder) for folder in folders]
    with pytest.raises(SourceError, match="nowhere"):
        analyze([folders[0], "/nowhere"])


@pytest.mark.slow
def test_what_goes_wrong_on_all_ranks_is_said_once():
    answer = launch([*TORCHRUN, "--nproc_per_node", "2"], "analyze", "/nowhere")
    assert answer.returncode == 1
    assert answer.stderr.count("lmd-hf: /nowhere: no such folder or file") == 1


def test_a_cpu_launch_that_starts_one_process_is_an_error_with_the_remedy(save):
    answer = launch([*ACCELERATE, "--cpu", "--num_processes", "2"], "analyze", save("llama"))
    assert answer.returncode == 1
    assert "was asked for 2 processes and started one" in answer.stderr
    assert "use `torchrun --nproc_per_node 2 -m lmd_hf" in answer.stderr


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "LOCAL_RANK and MASTER_ADDR and MASTER_PORT not; unset it, or start through",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
    ],
)
def test_processes_that_cannot_share_the_work_are_refused(monkeypatch, environment, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=told):
        join("cpu")


APART = """
import os, runpy
os.chdir(os.environ["RANK"])
runpy.run_module("lmd_hf", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["nothing", "model", "dataset"])
def test_ranks_that_see_other_bytes_under_the_same_names_are_told(tmp_path, changed):
    """Each rank has a disk of its own; that one of them has a link into the Hub's cache is no difference."""
    rows = [{"input_ids": list(range(20))} for _ in range(30)]
    for number in (0, 1):
        model, folder = models.make("llama"), tmp_path / str(number)
        if number and changed == "model":
            with torch.no_grad():
                model.model.norm.weight += 1
        model.save_pretrained(folder / "model")
        if number and changed == "dataset":
            rows[-1]["input_ids"][0] = 1
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    snapshot, blobs = tmp_path / "snapshots" / "commit", tmp_path / "blobs"
    blobs.mkdir()
    snapshot.parent.mkdir()
    (tmp_path / "0" / "model").rename(snapshot)
    (tmp_path / "0" / "model").symlink_to(snapshot)
    weights = snapshot / "model.safetensors"
    blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    (tmp_path / "script.py").write_text(APART)
    command = [*TORCHRUN, "--nproc_per_node", "2", tmp_path / "script.py", "analyze", "model", "--json"]
    command += ["--metric", "data", "--dataset", "data.jsonl", "--seq-len", "20"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert answer.returncode == (changed != "nothing"), answer.stderr
    assert (f"lmd-hf: the ranks see different {changed}s; pin" in answer.stderr) == (changed != "nothing")


DISAGREE = """
import os, sys
from lmd_hf.errors import LmdError, SettingsError
from lmd_hf.run.world import join
world = join("cpu")
try:
    if sys.argv[1] == "see":
        world.check_same({"commit": str(world.rank)})
    elif sys.argv[1] == "die":
        if world.rank == 1:
            os._exit(0)
        world.gather("after")
    else:
        def fail():
            if world.rank == 1:
                raise SettingsError("only here")
        world.together(fail)
except LmdError as error:
    sys.stdout.write(f"{world.rank} {error}\\n")
    sys.stdout.flush()
if sys.argv[1] != "die":
    world.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "first", "second"),
    [("see", "0 the ranks see different", "1 the ranks see different"), ("fail", "0 rank 1: only here", "1 only here")],
)
def test_an_error_of_one_rank_is_everybodys(tmp_path, what, first, second):
    script = tmp_path / "script.py"
    script.write_text(DISAGREE)
    answer = launch_script(script, what)
    assert answer.returncode == 0, answer.stderr
    assert first in answer.stdout
    assert second in answer.stdout


@pytest.mark.slow
def test_the_others_hear_in_one_line_that_a_rank_has_died(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISAGREE)
    answer = launch_script(script, "die")
    assert answer.stdout.startswith("0 another process of this run has ended or cannot be reached"), answer.stderr
    assert "what is finished is kept" in answer.stdout


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_name_the_remedy():
    answer = launch([*TORCHRUN, "--nproc_per_node", "2"], "analyze", "/nowhere", GLOO_SOCKET_IFNAME="nowhere")
    assert answer.returncode == 1
    assert "lmd-hf: the processes of this run do not reach each other" in answer.stderr
    assert "set GLOO_SOCKET_IFNAME on each" in answer.stderr


@pytest.mark.slow
def test_three_processes_and_two_machines_give_the_same(save, tmp_path):
    expected = plain(analyze(save("qwen3")))
    fresh = {"HF_ASSETS_CACHE": str(tmp_path / "three")}
    three = launch([*TORCHRUN, "--nproc_per_node", "3"], "analyze", save("qwen3"), "--json", **fresh)
    assert rows(three.stdout) == expected
    machines = [
        subprocess.Popen(
            [*TORCHRUN, "--nnodes", "2", "--node_rank", str(n), "--nproc_per_node", "1", "--master_addr", "127.0.0.1",
             "--master_port", "29617", "-m", "lmd_hf", "analyze", str(save("qwen3")), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_ASSETS_CACHE": str(tmp_path / f"machine {n}")},
        )
        for n in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=300) for machine in machines]
    assert [m.returncode for m in machines] == [0, 0], outputs
    assert rows(outputs[0][0]) == expected
    assert outputs[1][0] == ""


@pytest.mark.slow
def test_accelerate_starts_several_processes_too(save):
    """As it does on GPUs: through its multi-GPU launcher, which starts torchrun's."""
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", "0"]
    answer = launch(
        [*ACCELERATE, *flags], "analyze", save("llama"), "--json", "--device", "cpu", ACCELERATE_USE_CPU="true"
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["environment"]["processes"] == 2
