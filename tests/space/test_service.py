"""The Space without a browser: which models may be asked for, the store, workers and their limits, the endpoints."""

import ast
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

import lmd_hf
from lmd_hf.weights.source import EMBEDDED_ID


SPACE = Path(__file__).parents[2] / "spaces_app"


def outside(source):
    """Names of lmd_hf that a source uses and that are not public."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lmd_hf":
            yield node.module
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lmd_hf."))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lmd_hf":
            yield from () if node.attr in lmd_hf.__all__ else (node.attr,)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("lmd_hf.interactive", "interactive"):
            yield from () if node.attr in lmd_hf.interactive.__all__ else (node.attr,)


@pytest.mark.parametrize("path", sorted(SPACE.glob("*.py")), ids=lambda path: path.name)
def test_the_space_uses_public_names_alone(path):
    assert list(outside(path.read_text())) == []
    assert path.read_text().count("\n") <= 400


@pytest.mark.parametrize(
    "source", ["from lmd_hf.api import plan", "import lmd_hf\nlmd_hf.run", "import lmd_hf.hub.queue"]
)
def test_the_guard_can_fail(source):
    assert list(outside(source))


@pytest.mark.parametrize(("decomposed", "share"), [(9_999, "99.9%"), (10_000, "100.0%"), (5_000, "50.0%")])
def test_a_plan_covers_all_only_when_nothing_is_missing(decomposed, share):
    import fragments

    lists = dict.fromkeys(("matrices", "skipped", "notes"), ())
    sizes = dict.fromkeys(("expected_seconds", "bytes_to_fetch", "memory_bytes"), 0)
    assert f"({share})" in fragments.plan({**lists, **sizes, "decomposed": decomposed, "parameters": 10_000})


def test_the_front_matter_says_what_runs():
    text = (SPACE / "README.md").read_text()
    told = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))
    assert told["sdk"] == "gradio"
    assert f"gradio=={told['sdk_version']} " in (SPACE.parent / "constraints.txt").read_text()
    assert (SPACE / told["app_file"]).is_file()
    assert "write-discussions" in told["hf_oauth_scopes"]
    assert len(told["short_description"]) <= 60
    assert "lmd-hf[space]" in (SPACE / "requirements.txt").read_text()


@pytest.mark.parametrize(
    "model",
    ["/etc", "../x", "a/../b", ".hidden/x", "~/x", "a/b/c", "org/na me", "file.safetensors/..", "x" * 200, "a//b"],
)
def test_no_path_is_a_model(model):
    from catalogue import AskedWrongly, Catalogue

    with pytest.raises(AskedWrongly, match="not a Hub id"):
        Catalogue({}).look(model)


def test_local_folders_go_by_their_names_alone(minilm):
    from catalogue import AskedWrongly, Catalogue

    known = Catalogue({"local: minilm": minilm})
    assert known.look("local: minilm").place == str(minilm)
    assert not known.look("local: minilm").on_hub
    with pytest.raises(AskedWrongly):
        known.look(str(minilm))
    assert known.suggest("mini")[0] == "local: minilm"


@pytest.mark.parametrize(
    ("words", "roles"), [("MLP down", {"down"}), ("zzz", set()), ("zzz down", set()), ("(", set())]
)
def test_the_table_is_searched_where_rows_without_a_layer_are(words, roles):
    from actions import table

    report = lmd_hf.analyze(EMBEDDED_ID)
    assert any(matrix.layer is None for matrix in report.matrices)
    assert set(table(report, words)["role"]) == roles
    assert len(table(report)) == len(report.matrices)


def test_only_what_is_public_may_be_shared(hub, model_files):
    from catalogue import AskedWrongly, Catalogue

    commit = hub.add("org/open", model_files)
    hub.add("org/gated", model_files, gated=True)
    hub.add("org/secret", model_files, private=True)
    known = Catalogue({})
    assert known.look("org/open").shared
    assert known.look("org/open").key == ("org/open", commit)
    for name in ("org/gated", "org/secret"):
        assert not known.look(name, token=hub.token).shared
        with pytest.raises(AskedWrongly, match="sign in"):
            known.look(name)
    assert hub.token not in repr(known.look("org/secret", token=hub.token))
    with pytest.raises(AskedWrongly, match="no revision"):
        known.look("org/open", "absent")


def test_the_store_lets_go_of_the_oldest():
    from store import Store

    store = Store(room=100)
    for name in "abc":
        store.add(name, name.upper(), 40)
        store.find("a")
    assert [store.find(name) for name in "abc"] == ["A", None, "C"]


@pytest.fixture
def jobs():
    from jobs import Jobs, Limits

    made = Jobs(Limits(seconds=60, memory=4 * 2**30, fetch=1e9, at_once=1))
    yield made
    made.close()


def asked(jobs, **changes):
    model = {"id": "the model", "place": EMBEDDED_ID, "revision": None, "token": False}
    return jobs.ask("analyze", model=model, limits={**jobs.limits.of_plan(), **changes}, session="me")


def test_a_worker_tells_plan_progress_and_report(jobs):
    answers = list(asked(jobs))
    assert [next(iter(answer)) for answer in answers] == ["plan", *["progress"] * 29, "done"]
    assert answers[0]["plan"]["refusal"] == ""
    assert [answer["progress"][:2] for answer in answers[1:-1]] == [[i, 29] for i in range(1, 30)]
    report = lmd_hf.Report.from_json(answers[-1]["done"])
    assert report.model.id == "the model"
    assert len(report.heads) == 16


@pytest.mark.slow
def test_a_worker_is_stopped_refused_bounded(jobs):
    from jobs import Failed, Jobs, Limits

    answers = asked(jobs)
    next(answers)
    threading.Timer(0.0, jobs.stop, ["me"]).start()
    with pytest.raises(Failed, match="It was stopped"):
        list(answers)
    assert jobs.line == []
    running, waiting = asked(jobs), asked(jobs)
    next(running)
    assert next(waiting) == {"waiting": 1}
    jobs.stop("me")
    with pytest.raises(Failed, match="It was stopped"):
        list(waiting)
    running.close()
    with pytest.raises(Failed, match=r"too large for this Space.*lmd-hf analyze"):
        list(asked(jobs, memory_bytes=1))
    short = Jobs(Limits(seconds=0.2, memory=4 * 2**30, fetch=1e9, at_once=1))
    with pytest.raises(Failed, match="longer than the 0 seconds"):
        list(asked(short))
    short.close()


@pytest.mark.slow
def test_every_endpoint_answers(app, hub, model_files):
    from gradio_client import Client

    hub.add("org/model", model_files)
    client = Client(app.url, verbose=False)
    told = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    ours = (
        "plan",
        "analyze",
        "compare",
        "card",
        "summary",
        "map",
        "spectrum",
        "factors",
        "directions",
        "page",
        "search",
    )
    assert all(told[f"/{name}"]["description"] for name in ours)

    def ask(name, *words, **more):
        return client.predict(*words, api_name=f"/{name}", **more)

    assert ask("plan", EMBEDDED_ID)["decomposed"] == 999_424
    report = lmd_hf.Report.from_dict(ask("analyze", "org/model"))
    assert report.model.id == "org/model"
    assert ask("card", "org/model").startswith("## Layer Matrix Decomposition")
    assert "parameters decomposed" in ask("summary", "org/model")
    assert len(ask("map", "org/model", measure="stable rank")) == len(report.matrices)
    name = report.matrices[1].name
    assert ask("spectrum", "org/model", name)["name"] == name
    errors = ask("factors", "org/model", name)["error"]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    assert len(ask("directions", "org/model", "head 2", layer=1)["directions"]) == 4
    assert ask("compare", "org/model", EMBEDDED_ID)["matrices"][0]["identical"]
    assert "<!doctype html>" in ask("page", "org/model")
    assert EMBEDDED_ID in ask("search", "stdlib")


def test_the_worker_leaves_quietly_when_nothing_is_asked():
    ended = subprocess.run([sys.executable, SPACE / "worker.py"], stdin=subprocess.DEVNULL, capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, b"")
