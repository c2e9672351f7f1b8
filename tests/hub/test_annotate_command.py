"""`lmd-hf annotate` and `lmd-hf job` as a user runs them."""

import ast
import json
import os
import subprocess
import sys
import time

import pytest

from lmd_hf.cli import run
from lmd_hf.hub import section
from lmd_hf.weights.source import EMBEDDED_ID


@pytest.fixture
def models(hub, save, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test_token")
    files = {path.name: path.read_bytes() for path in save("llama").iterdir()}
    names = [f"cli/m{i}-{time.time_ns() % 10**6}" for i in range(2)]
    for name in names:
        hub.add(name, {**files, "README.md": b"# x\n"})
    return names


def test_a_dry_run_prints_the_diff_and_writes_nothing(hub, models, capsys):
    assert run(["annotate", models[0]]) == 0
    shown = capsys.readouterr()
    assert "+## Layer Matrix Decomposition" in shown.out
    assert f"{models[0]}: drafted" in shown.err
    assert not hub.repos[models[0]].pulls


def test_pull_requests_for_a_list_and_the_table_at_the_end(hub, models, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("\n".join(models))
    queue = str(tmp_path / "q.sqlite")
    assert run(["annotate", "--from-file", str(tmp_path / "list.txt"), "--queue", queue, "--create-pr"]) == 0
    assert [len(hub.repos[name].pulls) for name in models] == [1, 1]
    assert capsys.readouterr().out.count("pull request #1 opened") == 2
    assert run(["annotate", "--queue", queue, "--create-pr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_author_s_models_are_found_and_json_tells_all(hub, models, capsys):
    assert run(["annotate", "--author", "cli", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {outcome["model"] for outcome in told} >= set(models)
    assert all(outcome["status"] == "drafted" and outcome["diff"] for outcome in told)


def test_a_failure_is_an_exit_code_and_one_line(hub, models, tmp_path, capsys):
    hub.repos[models[0]].gated = True
    hub.token = "another"
    assert run(["annotate", *models]) == 1
    assert f"1 of 2 models failed, first {models[0]}: gated" in capsys.readouterr().err


def test_a_skip_list_and_nothing_at_all(hub, models, tmp_path, capsys):
    (tmp_path / "skip.txt").write_text(models[0])
    assert run(["annotate", models[0], "--skip-list", str(tmp_path / "skip.txt")]) == 0
    assert "on the skip list" in capsys.readouterr().err
    assert run(["annotate"]) == 1
    assert "no model to annotate" in capsys.readouterr().err
    for limit in ("0", "-3"):
        assert run(["annotate", "--author", "cli", "--limit", limit]) == 1
        assert f"limit is {limit}; give 1 or more" in capsys.readouterr().err


def test_a_local_card_is_edited_and_edited_again_without_a_change(tmp_path, capsys):
    card = tmp_path / "README.md"
    card.write_bytes(b"---\r\nlicense: mit\r\n---\r\n# Mine\r\n")
    assert run(["annotate", EMBEDDED_ID, "--to", str(card)]) == 0
    once = card.read_bytes()
    assert section.remove(once.decode()).startswith("---\r\nlicense: mit\r\ntags:\r\n- lmd\r\n---\r\n# Mine\r\n")
    assert json.loads((tmp_path / "lmd" / "summary.json").read_text())["schema"] == "lmd-summary/1"
    assert (tmp_path / "lmd" / "heatmap.svg").is_file()
    assert run(["annotate", EMBEDDED_ID, "--to", str(card)]) == 0
    assert card.read_bytes() == once
    assert run(["annotate", EMBEDDED_ID, EMBEDDED_ID + "2", "--to", str(card)]) == 1


@pytest.fixture
def job(models, tmp_path, capsys):
    """The script for two models."""
    (tmp_path / "list.txt").write_text("\n".join(models))
    assert run(["job", str(tmp_path / "list.txt")]) == 0
    return capsys.readouterr().out


def test_a_job_is_a_script_that_holds_its_list_and_mounts_each_commit(hub, models, job):
    tree = ast.parse(job)
    (listed,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "MODELS"]
    commits = {name: hub.repos[name].branches["main"] for name in models}
    assert ast.literal_eval(listed) == commits
    assert '# dependencies = ["lmd-hf==' in job
    tomllib = pytest.importorskip("tomllib")
    header = job.partition("# /// script\n")[2].partition("# ///\n")[0]
    table = tomllib.loads("".join(line[2:] or "\n" for line in header.splitlines(keepends=True)))["tool"]["hf-jobs"]
    assert table["volumes"] == [
        f"hf://models/{name}@{commit}:/models/{i}:ro" for i, (name, commit) in enumerate(commits.items())
    ]
    assert table["secrets"] == ["HF_TOKEN"]


def test_a_job_reads_what_is_mounted_and_what_has_changed_since_from_the_hub(hub, models, job, tmp_path):
    """The first model's volume is there; the second's is of an older commit than main by now."""
    for place, name in enumerate(models):
        (tmp_path / str(place)).mkdir()
        for path, data in hub.repos[name].commits[hub.repos[name].branches["main"]].items():
            (tmp_path / str(place) / path).write_bytes(data)
    changed = hub.repos[models[1]]
    changed.commit({**changed.commits[changed.branches["main"]], "README.md": b"# y\n"})
    hub.requests.clear()
    with pytest.raises(SystemExit) as ended:
        exec(compile(job.replace("/models", str(tmp_path)), "job.py", "exec"), {"__name__": "__main__"})
    assert ended.value.code == 0
    assert [len(hub.repos[name].pulls) for name in models] == [1, 1]
    weights = [path for _, path, _ in hub.requests if path.endswith("model.safetensors")]
    assert not any(models[0] in path for path in weights)
    assert any(models[1] in path for path in weights)


def test_a_job_for_a_model_that_is_not_there_is_one_line(hub, tmp_path, capsys):
    for name, told in (("org/nothing", "no such folder, and no such Hub repository"), ("org/a@b", "not the id")):
        (tmp_path / "list.txt").write_text(name)
        assert run(["job", str(tmp_path / "list.txt")]) == 1
        assert f"{name}: {told}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("queued", [True, False])
def test_ranks_share_the_models_and_one_prints_the_table(hub, models, tmp_path, queued):
    files = hub.repos[models[0]].commits[hub.repos[models[0]].branches["main"]]
    more = [f"{models[0]}-{i}" for i in range(3)]
    for name in more:
        hub.add(name, files)
    flags = ["--queue", str(tmp_path / "q.sqlite")] if queued else []
    names = [*models, *more, "cli/missing"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lmd_hf", "annotate"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    answer = subprocess.run(
        [*command, *names, *flags, "--create-pr"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert answer.returncode == 1, answer.stderr
    assert [len(hub.repos[name].pulls) for name in names[:-1]] == [1] * 5
    assert answer.stdout.count("pull request #1 opened") == 5  # one table, in which all are
    assert "models failed, first cli/missing" in answer.stderr
    again = subprocess.run(
        [*command, *models, "--create-pr", "--json"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert [(o["model"], o["status"]) for o in json.loads(again.stdout)] == [(name, "left") for name in models]
