"""While one model is analysed, the weights of the next are fetched: each byte once, within bounds, and at no risk."""

import json
import re
import threading
import time

import pytest

from lmd_hf.errors import SourceError
from lmd_hf.hub import annotate as annotate_module
from lmd_hf.hub import batch
from lmd_hf.hub.annotate import SUMMARY
from lmd_hf.hub.batch import annotate_each, work_off
from lmd_hf.hub.queue import Queue
from lmd_hf.run.journal import clear_kept
from lmd_hf.weights import ranged


FIRST = 12_000  # bytes: a header, in one request
PATIENCE = 30  # seconds
FAMILIES = ["llama", "bert", "gpt2", "mixtral"]  # names that tell all, names alone, fused parts, experts


@pytest.fixture(autouse=True)
def in_pieces(impatient):
    impatient(FIRST)


@pytest.fixture
def put(hub, save):
    """A function that puts so many tiny models of a family on the Hub; their names, which no cache knows."""

    def put(family, count=2):
        files = {path.name: path.read_bytes() for path in save(family).iterdir()}
        names = [f"ahead/{family}-{i}-{time.time_ns() % 10**6}" for i in range(count)]
        for name in names:
            hub.add(name, {**files, "README.md": f"# {family}\n".encode()})
        return names

    return put


@pytest.fixture
def meanwhile(monkeypatch):
    """A function that has something done, with the model's name, before each analysis."""

    def arrange(step):
        plain = annotate_module.analyze_one

        def analyze(source, *others):
            step(source.identity.id)
            return plain(source, *others)

        monkeypatch.setattr(annotate_module, "analyze_one", analyze)

    return arrange


def ranges(hub, name):
    """The bytes of the weights that were asked for, after the header."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", r) for _, path, r in hub.requests if path.startswith(f"/cdn/{name}/")]
    return sorted((int(m[1]), int(m[2]) + 1) for m in found if m[1] != "0")


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("lmd_hf.ahead", "lmd_hf.look"))]


def numbers(outcome):
    return json.loads(outcome.draft.files[SUMMARY]) | {"model": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_the_next_model_come_meanwhile_each_byte_once_and_change_nothing(hub, put, meanwhile, family):
    names = put(family, 3)
    ahead = {}

    def look(model):
        if model != names[-1]:
            following = names[names.index(model) + 1]
            wait_for(lambda: ranges(hub, following), f"nothing of {following} was fetched ahead")
            ahead[following] = ranges(hub, following)

    meanwhile(look)
    outcomes = list(annotate_each(names))
    assert [outcome.status for outcome in outcomes] == ["drafted"] * 3
    assert list(ahead) == names[1:]
    assert ranges(hub, names[0]) == ranges(hub, names[1]) == ranges(hub, names[2])  # of the first nothing came ahead
    assert numbers(outcomes[0]) == numbers(outcomes[1]) == numbers(outcomes[2])


def test_what_was_fetched_ahead_counts_as_fetched(hub, put, meanwhile, monkeypatch):
    names, fetched = put("bert"), []
    plain = annotate_module.analyze_one

    def analyze(*arguments):
        report = plain(*arguments)
        fetched.append(report.environment["bytes_fetched"])
        return report

    monkeypatch.setattr(annotate_module, "analyze_one", analyze)
    meanwhile(lambda model: model == names[0] and wait_for(lambda: ranges(hub, names[1]), "nothing came ahead"))
    list(annotate_each(names))
    assert fetched[0] == fetched[1] > 0


def test_no_more_comes_ahead_than_there_is_room_for(hub, put, meanwhile, monkeypatch):
    room = 20_000
    monkeypatch.setattr("lmd_hf.pipeline.room_ahead", lambda: room)
    names = put("llama")
    ahead = []

    def look(model):
        if model == names[0]:
            wait_for(lambda: ranges(hub, names[1]), "nothing came ahead")
            wait_for(lambda: not [t for t in readers() if "ahead" in t.name and t.is_alive()] or full(), "it goes on")
            ahead.extend(ranges(hub, names[1]))

    def full():
        return sum(stop - start for start, stop in ranges(hub, names[1])) > room // 2

    meanwhile(look)
    assert [outcome.status for outcome in annotate_each(names)] == ["drafted"] * 2
    assert room // 2 < sum(stop - start for start, stop in ahead) <= room
    assert sum(stop - start for start, stop in ranges(hub, names[1])) > 2 * room


@pytest.mark.parametrize("fault", ["error", "busy", "cut", "length", "revoked"])
def test_what_goes_wrong_ahead_is_read_at_its_turn(hub, put, meanwhile, monkeypatch, fault):
    """For good while the first is analysed, so that the reads ahead give up; then the Hub is well again."""
    monkeypatch.setattr(ranged, "TRIES", 2)
    names = put("bert")
    token = hub.token

    def look(model):
        if model == names[0]:
            wait_for(lambda: ranges(hub, names[1]), "nothing was tried ahead")
            wait_for(lambda: all(t.name.startswith("lmd_hf.look") for t in readers()), "the reads ahead go on")
            hub.always, hub.token = "", token

    hub.always = fault
    meanwhile(look)
    assert [outcome.status for outcome in annotate_each(names)] == ["drafted"] * 2


def test_a_read_under_way_is_awaited_and_not_made_again(hub, put, monkeypatch):
    """The second model's turn comes while its first reads hang."""
    names = put("llama")
    release, read, analyze = threading.Event(), ranged.RemoteFile.read_into, annotate_module.analyze_one

    def hang(file, start, view):
        if threading.current_thread().name.startswith("lmd_hf.ahead"):
            release.wait(PATIENCE)
        read(file, start, view)

    def look(source, *others):
        if source.identity.id == names[0]:
            wait_for(lambda: any(t.name.startswith("lmd_hf.ahead") for t in threading.enumerate()), "nothing ahead")
        else:
            assert any(each.running() for each in source.ahead._reads.values())
            threading.Timer(0.3, release.set).start()
        return analyze(source, *others)

    monkeypatch.setattr(ranged.RemoteFile, "read_into", hang)
    monkeypatch.setattr(annotate_module, "analyze_one", look)
    assert [outcome.status for outcome in annotate_each(names)] == ["drafted"] * 2
    assert ranges(hub, names[0]) == ranges(hub, names[1])


@pytest.mark.parametrize("error", [SourceError("the Hub is gone"), ZeroDivisionError("a mistake of ours")])
def test_where_fetching_ahead_fails_the_model_is_opened_afresh(hub, put, monkeypatch, caplog, error):
    """A read of its own has failed for good, as of the tensors that tell how a quantised model is packed."""
    names = put("llama")

    def fail(begun):
        begun.source.connection.fault = "gave up"
        raise error

    monkeypatch.setattr(batch, "fetch", fail)
    assert [outcome.status for outcome in annotate_each(names)] == ["drafted"] * 2
    assert ("nothing was fetched ahead" in caplog.text) is not isinstance(error, SourceError)


def test_a_model_that_another_process_takes_is_let_go(hub, put, meanwhile, tmp_path):
    names = put("llama", 3)
    queue = Queue(tmp_path / "q.sqlite")
    queue.add(names)
    taken = []

    def look(model):
        if model == names[0]:
            wait_for(lambda: len(ranges(hub, names[1])) == ranged.CONNECTIONS, "nothing came ahead")
            taken.append(queue.take())

    meanwhile(look)
    hub.faults = ["slow"] * ranged.CONNECTIONS  # what is under way of the second stays so, for ten seconds
    outcomes = list(work_off(queue, how="pull", token="hf_test_token"))
    assert [outcome.model for outcome in outcomes] == [names[0], names[2]]
    assert [outcome.status for outcome in outcomes] == ["written"] * 2
    assert taken[0].model == names[1]
    wait_for(lambda: not readers(), "reads of an abandoned model go on")
    assert len(ranges(hub, names[1])) <= ranged.CONNECTIONS


def test_an_interrupt_ends_the_reads_ahead_at_once(hub, put, meanwhile):
    names = put("llama")

    def look(model):
        wait_for(lambda: ranges(hub, names[1]), "nothing came ahead")
        raise KeyboardInterrupt

    meanwhile(look)
    hub.always = "slow"
    with pytest.raises(KeyboardInterrupt):
        list(annotate_each(names))
    wait_for(lambda: not readers(), "reads go on after an interrupt")
    assert len(ranges(hub, names[1])) <= ranged.CONNECTIONS  # those that were under way


def test_nothing_is_fetched_of_a_model_that_opts_out_or_whose_matrices_are_known(hub, put, meanwhile):
    names = put("llama")
    list(annotate_each(names[:1]))
    known = put("llama", 1)
    hub.repos[names[1]].commit({"model.safetensors": b"", "README.md": b"---\nlmd: false\n---\n"})
    outcomes = list(annotate_each([*known, names[1]]))
    assert [outcome.status for outcome in outcomes] == ["drafted", "left"]
    assert not ranges(hub, names[1])
    hub.requests.clear()
    source = annotate_module.begin(names[0]).source
    assert annotate_module.fetch(annotate_module.Begun(None, None, source)).source.ahead._reads == {}
    clear_kept()
    assert annotate_module.fetch(annotate_module.Begun(None, None, source)).source.ahead._reads != {}


def test_a_model_whose_turn_has_come_is_looked_at_and_no_more(hub, put, monkeypatch):
    """The look takes longer than the model before, which is left alone."""
    names = put("llama")
    release, plain, fetched = threading.Event(), batch.begin, []

    def slow(model, **options):
        release.wait(PATIENCE)
        return plain(model, **options)

    monkeypatch.setattr(batch, "begin", slow)
    monkeypatch.setattr(batch, "fetch", lambda begun: fetched.append(begun) or begun)
    scout = batch._Scout({"how": "dry", "force": False, "token": None})
    scout.look_at(names[0])
    threading.Timer(0.2, release.set).start()
    assert scout.take(names[0]).look.repo_id == names[0]
    assert not fetched
    scout.close()
