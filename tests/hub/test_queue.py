"""The queue: nothing is lost, nothing done twice, by however many processes and however they end."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lmd_hf.errors import OutputError, SettingsError
from lmd_hf.hub import annotate as annotate_module
from lmd_hf.hub.batch import annotate_each, listed, work_off
from lmd_hf.hub.queue import ATTEMPTS, Queue


TESTS = Path(__file__).parents[1]


def test_models_are_taken_once_in_order_and_end_in_a_state(tmp_path):
    queue = Queue(tmp_path / "q.sqlite")
    assert queue.add(["a/1", "a/2", "a/1"]) == 2
    assert queue.add(["a/2", "a/3"]) == 1
    first, second = queue.take(), queue.take()
    assert [first.model, second.model] == ["a/1", "a/2"]
    queue.finish(first, "done", "pull request #1 opened", "https://x")
    queue.finish(second, "left", "opted out")
    queue.finish(queue.take(), "done", "")
    assert queue.take() is None
    assert [(e.model, e.state) for e in queue.entries()] == [("a/1", "done"), ("a/2", "left"), ("a/3", "done")]
    assert queue.entries()[0].url == "https://x"


def test_a_model_that_fails_is_tried_again_but_not_for_ever(tmp_path):
    queue = Queue(tmp_path / "q.sqlite")
    queue.add(["a/1"])
    for _ in range(ATTEMPTS):
        queue.finish(queue.take(), "failed", "no such Hub repository")
    assert queue.take() is None
    (entry,) = queue.entries()
    assert (entry.state, entry.attempts, entry.told) == ("failed", ATTEMPTS, "no such Hub repository")


def take_and_die(path):
    Queue(path).take()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_dead_process_held_waits_again_and_what_a_living_one_holds_does_not(tmp_path):
    path = tmp_path / "q.sqlite"
    queue = Queue(path)
    queue.add(["a/1", "a/2"])
    process = multiprocessing.get_context("spawn").Process(target=take_and_die, args=(path,))
    process.start()
    process.join()
    assert queue.take().model == "a/1"
    assert queue.take().model == "a/2"
    assert queue.take() is None


def test_a_model_that_ends_every_process_is_given_up(tmp_path, monkeypatch):
    import lmd_hf.hub.queue as module

    queue = Queue(tmp_path / "q.sqlite")
    queue.add(["a/huge", "a/2"])
    monkeypatch.setattr(module, "_lives", lambda _: False)  # as if each had died of it
    taken = [queue.take().model for _ in range(module.DEATHS)]
    assert set(taken) == {"a/huge"}
    assert queue.take().model == "a/2"
    assert next((e.state, e.told) for e in queue.entries()) == ("failed", "the process ended in the middle of it")


def test_a_living_process_keeps_its_model_when_the_clock_is_set(tmp_path, monkeypatch):
    """On Linux the time at which a process began is counted from a start of the machine that moves with the clock."""
    queue = Queue(tmp_path / "q.sqlite")
    queue.add(["a/1"])
    assert queue.take().model == "a/1"
    began, boot = psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil, "LINUX", True)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: began(process) + 3600)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot() + 3600)
    assert queue.take() is None


def take_all(path, results):
    queue = Queue(path)
    while (entry := queue.take()) is not None:
        queue.finish(entry, "done", "")
        results.put(entry.model)


@pytest.mark.slow
def test_several_processes_share_a_queue(tmp_path):
    path, context = tmp_path / "q.sqlite", multiprocessing.get_context("spawn")
    Queue(path).add(f"a/{i}" for i in range(100))
    results = context.Queue()
    processes = [context.Process(target=take_all, args=(path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    taken = [results.get(timeout=60) for _ in range(100)]
    for process in processes:
        process.join()
    assert sorted(taken) == sorted(f"a/{i}" for i in range(100))


def test_a_file_that_is_no_queue_is_one_clear_error(tmp_path):
    path = tmp_path / "q.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 99)
    with pytest.raises(OutputError, match="cannot be used"):
        Queue(path).take()


def test_a_list_of_models_is_a_text_file(tmp_path):
    path = tmp_path / "models.txt"
    path.write_text(
        "# ours\norg/a\n\norg/b  # the second\nhttps://huggingface.co/org/c\nhttps://huggingface.co/org/d/\n",
        encoding="utf-8-sig",
    )
    assert listed(path) == ["org/a", "org/b", "org/c", "org/d"]
    with pytest.raises(SettingsError, match="one model a line"):
        listed(tmp_path / "none.txt")


def add_models(hub, save, count):
    files = {path.name: path.read_bytes() for path in save("llama").iterdir()}
    names = [f"batch/m{i}-{time.time_ns() % 10**6}" for i in range(count)]
    for name in names:
        hub.add(name, {**files, "README.md": f"# {name}\n".encode()})
    return names


def test_a_batch_tells_of_every_model_and_one_error_stops_no_other(hub, save, tmp_path):
    names = add_models(hub, save, 3)
    hub.repos[names[1]].gated = True
    queue = Queue(tmp_path / "q.sqlite")
    queue.add([*names, "batch/none"])
    outcomes = list(work_off(queue, how="pull", token="hf_other_token", skip=[names[2]]))
    told = {outcome.model: (outcome.status, outcome.reason) for outcome in outcomes}
    assert told[names[0]] == ("written", "pull request #1 opened")
    assert told[names[1]][0] == "failed"
    assert "gated" in told[names[1]][1]
    assert told[names[2]] == ("left", "on the skip list")
    assert "no such Hub repository" in told["batch/none"][1]
    assert len(outcomes) == 2 + 2 * ATTEMPTS
    assert {e.model: e.state for e in queue.entries()} == {
        names[0]: "done", names[1]: "failed", names[2]: "left", "batch/none": "failed",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["org/m@main", "not a model", "/some/folder", "org/m/tree/main"])
def test_what_is_no_id_fails_alone_and_leaves_the_queue_usable(hub, save, tmp_path, wrong):
    names = add_models(hub, save, 2)
    queue = Queue(tmp_path / "q.sqlite")
    queue.add([wrong, *names])
    outcomes = list(work_off(queue, how="pull", token="hf_test_token"))
    told = f"{wrong}: not the id of a repository on the Hub; write org/name"
    assert {f"{o.model}: {o.reason}" for o in outcomes if o.status == "failed"} == {told}
    assert {e.model: e.state for e in queue.entries()} == {wrong: "failed", names[0]: "done", names[1]: "done"}


def test_a_dry_batch_writes_nothing(hub, save):
    names = add_models(hub, save, 2)
    assert [o.status for o in annotate_each(names)] == ["drafted", "drafted"]
    assert not any(hub.repos[name].pulls for name in names)


def test_the_next_model_is_looked_at_while_one_is_analysed(hub, save, tmp_path, monkeypatch):
    names = add_models(hub, save, 3)
    queue = Queue(tmp_path / "q.sqlite")
    queue.add(names)
    seen = {}
    analysed = annotate_module.analyze_one

    def analyze(source, *others, **known):
        model = source.identity.id
        following = names[names.index(model) + 1] if model != names[-1] else model
        deadline = time.monotonic() + 20
        while not (told := [p for _, p, _ in hub.requests if following in p and p.endswith("model.safetensors")]):
            assert time.monotonic() < deadline, "the headers of the next model were not fetched"
            time.sleep(0.01)
        seen[model] = told
        return analysed(source, *others, **known)

    monkeypatch.setattr(annotate_module, "analyze_one", analyze)
    outcomes = list(work_off(queue, how="pull", token="hf_test_token"))
    assert [outcome.status for outcome in outcomes] == ["written"] * 3
    assert list(seen) == names


def test_what_changes_between_the_look_and_its_turn_is_seen(hub, save, monkeypatch):
    """The second model's card opts out while the first is being analysed."""
    names = add_models(hub, save, 2)
    outcomes = annotate_each(names, how="pull", token="hf_test_token")
    assert next(outcomes).status == "written"
    repo = hub.repos[names[1]]
    repo.commit({**repo.commits[repo.branches["main"]], "README.md": b"---\nlmd: false\n---\n"})
    assert next(outcomes).reason == "its card opts out (lmd: false)"
    assert not repo.pulls


RUN = """
import sys
from lmd_hf.hub.batch import work_off
from lmd_hf.hub.queue import Queue
for outcome in work_off(Queue(__import__("pathlib").Path(sys.argv[1])), how="pull", token="hf_test_token"):
    print(outcome.model, outcome.status, flush=True)
"""


def requests_of_a_model(hub, save):
    before = len(hub.requests)
    (outcome,) = annotate_each(add_models(hub, save, 1), how="pull", token="hf_test_token")
    assert outcome.status == "written"
    return len(hub.requests) - before


@pytest.mark.slow
def test_a_batch_that_is_killed_at_any_moment_annotates_every_model_exactly_once(hub, save, tmp_path):
    names = add_models(hub, save, 20)
    queue = Queue(tmp_path / "q.sqlite")
    queue.add(names)
    draw = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "HF_ENDPOINT": hub.url}
    kills, of_a_model = 0, requests_of_a_model(hub, save)
    while any(e.state in ("waiting", "running") for e in queue.entries()):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(queue.path)], env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path
        )
        if kills < 30:
            # counted in requests, so that a fast machine is killed as often as a slow one, at any of the steps
            enough = len(hub.requests) + draw.randint(1, 3 * of_a_model // 2)
            while len(hub.requests) < enough and process.poll() is None:
                time.sleep(0.001)
            process.kill()
            kills += process.wait(600) == -9
        assert process.wait(600) in (0, -9)
    assert kills >= 20
    assert {e.state for e in queue.entries()} <= {"done", "left"}
    assert [len(hub.repos[name].pulls) for name in names] == [1] * 20
