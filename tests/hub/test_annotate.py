"""Annotating over the loopback Hub with the real client: what is written, what is left alone, what is survived."""

import json
import re
import threading
import time

import pytest
from huggingface_hub import HfApi

import lmd_hf
from lmd_hf.errors import FormatError, LmdError, SettingsError, SourceError
from lmd_hf.hub import repository, section
from lmd_hf.hub.annotate import FIGURE, SUMMARY, annotate
from lmd_hf.hub.etiquette import TITLE, opted_out


TOKEN, OTHER = "hf_test_token", "hf_other_token"
CARD = "---\nlicense: mit\ntags:\n- tiny  # as it is\n---\n# A model\n\nText.\n"


@pytest.fixture
def model(hub, save, request):
    """A small LLaMA on the Hub under a name of its own, for the client's cache outlives a test."""
    name = "org/" + re.sub(r"\W+", "-", request.node.name)[:60].strip("-") + f"-{time.time_ns() % 10**6}"
    files = {path.name: path.read_bytes() for path in save("llama").iterdir()}
    hub.add(name, {**files, "README.md": CARD.encode()})
    return name


def files_of(hub, model, revision="main"):
    repo = hub.repos[model]
    return repo.commits[repo.branches[revision]]


def posts(hub, kind):
    return [path for method, path, _ in hub.requests if method == "POST" and f"/{kind}/" in path]


def test_a_dry_run_writes_nothing_and_shows_the_whole_change(hub, model):
    outcome = annotate(model)
    assert outcome.status == "drafted"
    assert not [r for r in hub.requests if r[0] == "POST"]
    diff = outcome.draft.diff()
    assert [line for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")] == []
    assert "+- lmd\n" in diff
    assert section.remove(outcome.draft.after) == CARD.replace("as it is\n", "as it is\n- lmd\n")


def test_a_pull_request_holds_the_section_its_numbers_and_the_figure_and_is_not_opened_twice(hub, model):
    commit = hub.repos[model].branches["main"]
    outcome = annotate(model, how="pull", token=TOKEN)
    assert (outcome.status, outcome.reason) == ("written", "pull request #1 opened")
    (pull,) = hub.repos[model].pulls
    assert (pull.title, pull.author) == (TITLE, "tester")
    for said in ("automatically", "lmd_hf", commit, "lmd: false"):
        assert said in pull.description
    before, after = files_of(hub, model), files_of(hub, model, "refs/pr/1")
    assert {name for name in after if before.get(name) != after[name]} == {"README.md", SUMMARY, FIGURE}
    marks = section.find(after["README.md"].decode()).fields
    assert marks["commit"] == commit
    assert json.loads(after[SUMMARY])["model"]["commit"] == commit
    assert after[FIGURE].startswith(b"<?xml")
    again = annotate(model, how="pull", token=TOKEN)
    assert (again.status, again.reason) == ("left", "pull request #1 proposes these numbers")
    assert len(posts(hub, "commit")) == 1


def test_other_weights_renew_the_open_pull_request(hub, model, save):
    annotate(model, how="pull", token=TOKEN)
    other = {path.name: path.read_bytes() for path in save("qwen2").iterdir()}
    hub.repos[model].commit({**files_of(hub, model), **other})
    outcome = annotate(model, how="pull", token=TOKEN)
    assert (outcome.status, outcome.reason) == ("written", "pull request #1 renewed")
    assert len(hub.repos[model].pulls) == 1
    card = files_of(hub, model, "refs/pr/1")["README.md"].decode()
    assert section.find(card).fields["commit"] == hub.repos[model].branches["main"]


def test_a_refusal_is_respected_unless_forced(hub, model):
    annotate(model, how="pull", token=TOKEN)
    hub.repos[model].pulls[0].status = "closed"
    outcome = annotate(model, how="pull", token=TOKEN)
    assert outcome.status == "left"
    assert "#1 was closed unmerged" in outcome.reason
    assert annotate(model, how="pull", force=True, token=TOKEN).reason == "pull request #2 opened"


def merge(hub, model):
    hub.repos[model].commit(files_of(hub, model, "refs/pr/1"))
    hub.repos[model].pulls[0].status = "merged"


def test_after_a_merge_only_other_numbers_are_worth_a_new_one(hub, model, save):
    annotate(model, how="pull", token=TOKEN)
    merge(hub, model)
    assert annotate(model, how="pull", token=TOKEN).reason == "its card has these numbers"
    other = {path.name: path.read_bytes() for path in save("qwen2").iterdir()}
    hub.repos[model].commit({**files_of(hub, model), **other})
    assert annotate(model, how="pull", token=TOKEN).reason == "pull request #2 opened"


def test_a_section_that_was_removed_after_the_merge_stays_away(hub, model):
    annotate(model, how="pull", token=TOKEN)
    merge(hub, model)
    hub.repos[model].commit({**files_of(hub, model), "README.md": CARD.encode()})
    assert "was removed later" in annotate(model, how="pull", token=TOKEN).reason


def test_opting_out_holds_even_against_force(hub, model):
    hub.repos[model].commit({**files_of(hub, model), "README.md": b"---\nlmd: false\n---\n"})
    for force in (False, True):
        assert annotate(model, how="pull", force=force, token=TOKEN).reason == "its card opts out (lmd: false)"
    assert not [r for r in hub.requests if "cdn" in r[1]]


@pytest.mark.parametrize(
    ("metadata", "is_out"),
    [
        ("lmd: false", True), ('lmd: "false"', True), ("lmd: 'No'", True), ("LMD: off", True), ("{lmd: false}", True),
        ("lmd: 0", True), ("lmd:\n  false", True), ("tags: [a\nlmd: false # please", True),
        ('tags: [a\n"lmd": false', True), ("tags: [a\n lmd : 'no'", True), ("tags: [a\r\nlmd: false\r", True),
        ("lmd: true", False), ("lmd: falsehood", False), ("tags: [lmd]", False), ("tags: [a\nlmd: falsehood", False),
        ("tags: [a\nfoolmd: false", False), ("x: {lmd: false}", False), ("just text", False),
        ("lmd: false\nx: !!int _", True), ("x: !!timestamp soon", False),
    ],
)  # fmt: skip
def test_an_opt_out_is_respected_however_it_is_written(metadata, is_out):
    assert opted_out(f"---\n{metadata}\n---\n# card\n") is is_out


def test_somebody_else_with_our_title_is_no_reason_but_with_our_numbers_is(hub, model):
    api = HfApi(token="hf_third_token")
    from huggingface_hub import CommitOperationAdd

    api.create_commit(model, [CommitOperationAdd("notes.md", b"x")], commit_message=TITLE, create_pr=True)
    assert annotate(model, how="pull", token=TOKEN).reason == "pull request #2 opened"
    assert annotate(model, how="pull", token=OTHER).reason == "pull request #2 of tester proposes these numbers"


def test_two_annotators_at_once_leave_one_open_pull_request(hub, model, save, monkeypatch):
    meet = threading.Barrier(2)
    plain = repository.open_pull

    def together(*arguments, **options):
        meet.wait(60)
        return plain(*arguments, **options)

    monkeypatch.setattr(repository, "open_pull", together)
    done = []
    threads = [threading.Thread(target=lambda: done.append(annotate(model, how="pull", token=TOKEN))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2
    assert [pull.number for pull in hub.repos[model].pulls if pull.status == "open"] == [1]
    monkeypatch.undo()
    merge(hub, model)  # that the other was closed, by ourselves, is no refusal
    other = {path.name: path.read_bytes() for path in save("qwen2").iterdir()}
    hub.repos[model].commit({**files_of(hub, model), **other})
    assert annotate(model, how="pull", token=TOKEN).status == "written"


@pytest.mark.parametrize(
    "kind", ["info", "whoami", "discussions", "tree", "resolve", "validate", "preupload", "commit"]
)
@pytest.mark.parametrize("status", [pytest.param(429, marks=pytest.mark.slow), 500])
def test_a_call_that_fails_once_is_made_again(hub, model, kind, status):
    hub.failing[kind] = [status]
    assert annotate(model, how="pull", token=TOKEN).reason == "pull request #1 opened"
    assert not hub.failing[kind]
    assert len(hub.repos[model].pulls) == 1


def test_an_answer_that_was_lost_opens_no_second_pull_request(hub, model):
    hub.failing["commit"] = [-500]
    outcome = annotate(model, how="pull", token=TOKEN)
    assert (outcome.status, outcome.reason) == ("left", "pull request #1 proposes these numbers")
    assert len(hub.repos[model].pulls) == 1


@pytest.mark.slow
def test_a_hub_that_keeps_failing_is_an_error_with_nothing_written(hub, model):
    hub.failing["commit"] = [500] * 50
    with pytest.raises(SourceError, match="later"):
        annotate(model, how="pull", token=TOKEN)
    assert not hub.repos[model].pulls


def test_a_card_that_changed_meanwhile_keeps_the_change(hub, model, monkeypatch):
    import lmd_hf.hub.annotate as module

    plain = module.analyze_one

    def slow(*arguments, **options):
        report = plain(*arguments, **options)
        hub.repos[model].commit({**files_of(hub, model), "README.md": (CARD + "\nNew words.\n").encode()})
        return report

    monkeypatch.setattr(module, "analyze_one", slow)
    assert annotate(model, how="pull", token=TOKEN).reason == "pull request #1 opened"
    assert "New words." in files_of(hub, model, "refs/pr/1")["README.md"].decode()


def test_what_others_changed_on_the_branch_stays_when_it_is_renewed(hub, model, save):
    annotate(model, how="pull", token=TOKEN)
    ours = files_of(hub, model, "refs/pr/1")
    edited = ours["README.md"].decode() + "\nA maintainer's words.\n"
    hub.repos[model].commit({**ours, "README.md": edited.encode()}, "refs/pr/1")
    other = {path.name: path.read_bytes() for path in save("qwen2").iterdir()}
    hub.repos[model].commit({**files_of(hub, model), **other})
    assert annotate(model, how="pull", token=TOKEN).reason == "pull request #1 renewed"
    renewed = files_of(hub, model, "refs/pr/1")["README.md"].decode()
    assert section.remove(renewed) == section.remove(edited)
    assert section.find(renewed).fields != section.find(edited).fields


def test_pushing_to_an_own_repository_and_to_a_foreign_one(hub, model):
    hub.repos[model].owner = "tester"
    assert annotate(model, how="push", token=TOKEN).reason == "committed to main"
    assert section.find(files_of(hub, model)["README.md"].decode()) is not None
    assert annotate(model, how="push", token=TOKEN).reason == "its card has these numbers"
    hub.repos[model].owner = "somebody"
    hub.repos[model].commit({**files_of(hub, model), "README.md": CARD.encode()})
    with pytest.raises(SourceError, match="write access"):
        annotate(model, how="push", token=TOKEN)


def test_a_model_without_a_card_gets_one(hub, model):
    files = dict(files_of(hub, model))
    del files["README.md"]
    hub.repos[model].commit(files)
    assert annotate(model, how="pull", token=TOKEN).status == "written"
    assert files_of(hub, model, "refs/pr/1")["README.md"].decode().startswith("---\ntags:\n- lmd\n---\n")


@pytest.mark.parametrize(
    ("prepare", "error", "text"),
    [
        (lambda repo, files: setattr(repo, "gated", True), SourceError, "gated"),
        (lambda repo, files: setattr(repo, "private", True), SourceError, "no such Hub repository"),
        (lambda repo, files: repo.commit({}), SourceError, "no weights"),
        (lambda repo, files: repo.commit({**files, "README.md": b"\xff\xfe"}), FormatError, "UTF-8"),
        (lambda repo, files: repo.commit({**files, "README.md": b"```\n"}), FormatError, "never closed"),
    ],
)
def test_what_cannot_be_annotated_says_why(hub, model, prepare, error, text):
    prepare(hub.repos[model], dict(files_of(hub, model)))
    with pytest.raises(error, match=text):
        annotate(model, how="pull", token=OTHER)


def test_broken_metadata_is_left_as_it_is_and_the_hub_s_refusal_is_told(hub, model):
    broken = "---\ntags: [a\n---\n# x\n"
    hub.repos[model].commit({**files_of(hub, model), "README.md": broken.encode()})
    dry = annotate(model)
    assert section.remove(dry.draft.after) == broken
    assert "not valid YAML" in dry.draft.notes[0]
    with pytest.raises(SourceError, match="refuses its card's metadata"):
        annotate(model, how="pull", token=TOKEN)


def test_a_disabled_repository_is_left_alone(hub, model):
    hub.repos[model].disabled = True
    assert "disabled" in annotate(model, how="pull", token=TOKEN).reason


def test_writing_without_a_token_is_told_before_any_work(hub, model):
    with pytest.raises(SettingsError, match="token"):
        annotate(model, how="pull", token=False)
    assert not [r for r in hub.requests if "cdn" in r[1]]


def test_no_token_is_ever_shown(hub, model, capsys, caplog):
    hub.failing["commit"] = [500] * 50
    with pytest.raises(LmdError) as failed:
        annotate(model, how="pull", token=TOKEN)
    shown = capsys.readouterr()
    assert TOKEN not in str(failed.value) + shown.out + shown.err + caplog.text


def test_a_report_of_this_commit_is_written_without_a_look_at_the_weights(hub, save):
    name = "org/known"
    files = {path.name: path.read_bytes() for path in save("llama").iterdir()}
    hub.add(name, {**files, "README.md": b"# known\n"})
    report = lmd_hf.analyze(name, heads=True, token="hf_test_token")
    before = len(hub.requests)
    outcome = lmd_hf.annotate(name, how="pull", token="hf_test_token", report=report)
    assert outcome.status == "written"
    assert not any(path.endswith("model.safetensors") for _, path, _ in hub.requests[before:])
