"""The webhook server: what it takes, what it refuses, and that nothing is lost under load."""

import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from types import SimpleNamespace

import pytest

from lmd_hf.errors import FormatError, SettingsError
from lmd_hf.hub.queue import Queue
from lmd_hf.hub.webhook import LARGEST, PATH, read_event, serving


SECRET = "a secret that nobody guesses"
COMMIT = "ab" * 20


def payload(name="org/model", commit=COMMIT, ref="refs/heads/main", **more):
    event = {"action": "update", "scope": "repo.content"} | more.pop("event", {})
    return {"event": event, "repo": {"type": "model", "name": name, "id": "1"} | more.pop("repo", {}),
            "updatedRefs": [{"ref": ref, "oldSha": "0" * 40, "newSha": commit}], "webhook": {"id": "w", "version": 3},
            **more}  # fmt: skip


def test_a_change_of_main_is_an_event():
    event = read_event(json.dumps(payload()).encode())
    assert (event.model, event.commit) == ("org/model", COMMIT)


@pytest.mark.parametrize(
    "other",
    [
        payload(ref="refs/pr/3"),
        payload(repo={"type": "dataset"}),
        payload(event={"scope": "discussion.comment"}),
        payload(event={"action": "delete"}),
        payload(commit=None),
        {**payload(), "updatedRefs": None},
    ],
)
def test_what_does_not_concern_us(other):
    assert read_event(json.dumps(other).encode()) is None


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b'{"event": 1, "repo": 2}', json.dumps(payload(name="../etc/passwd x")).encode(),
     json.dumps(payload(name=3)).encode(), json.dumps(payload(commit="; rm -rf")).encode(),
     json.dumps({**payload(), "updatedRefs": [1]}).encode(), b"\xff\xfe"],
)  # fmt: skip
def test_what_is_no_payload(body):
    with pytest.raises(FormatError):
        read_event(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server whose worker does nothing but count."""
    done = []

    def count(queue, **_):
        while (entry := queue.take()) is not None:
            done.append((entry.model, entry.commit))
            queue.finish(entry, "done", "")
            yield from ()

    monkeypatch.setattr("lmd_hf.hub.webhook.work_off", count)
    queue = Queue(tmp_path / "q.sqlite")
    with serving(queue, secret=SECRET) as (port, ended):
        yield SimpleNamespace(done=done, queue=queue, port=port, ended=ended, url=f"http://127.0.0.1:{port}")


def post(server, body, secret=SECRET, path=PATH):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"X-Webhook-Secret": secret} if secret else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_events_are_queued_once_and_worked_off(server):
    assert [post(server, payload()) for _ in range(2)] == [202, 202]
    assert post(server, payload(ref="refs/pr/1")) == 200
    wait_for(lambda: server.done == [("org/model", COMMIT)])
    with urllib.request.urlopen(f"{server.url}/status") as answer:
        assert json.load(answer) == {"message": "lmd_hf annotator", "done": 1}


@pytest.mark.parametrize(
    ("status", "options"),
    [
        (401, {"secret": ""}),
        (401, {"secret": SECRET[:-1]}),
        (401, {"secret": "ü"}),
        (404, {"path": "/elsewhere"}),
        (400, {"body": b"{"}),
        (413, {"body": b"x" * (LARGEST + 1)}),
    ],
)
def test_refusals(server, status, options):
    try:
        assert post(server, options.pop("body", payload()), **options) == status
    except urllib.error.URLError:  # the server hung up while a body too large was still being sent
        assert status == 413
    assert server.queue.entries() == []


def test_no_secret_no_server(tmp_path):
    with pytest.raises(SettingsError, match="secret"), serving(Queue(tmp_path / "q"), secret=""):
        pass
    with (
        pytest.raises(SettingsError, match="port is 99999999"),
        serving(Queue(tmp_path / "q"), secret="x", port=99999999),
    ):
        pass


def test_what_waits_is_worked_off_after_a_restart(tmp_path, monkeypatch):
    queue = Queue(tmp_path / "q.sqlite")
    queue.add(["org/old"], commit=COMMIT)
    done = []
    monkeypatch.setattr("lmd_hf.hub.webhook.work_off", lambda queue, **_: iter(filter(None, [take(queue, done)])))
    with serving(queue, secret=SECRET):
        wait_for(lambda: done == ["org/old"])


def test_a_worker_that_dies_is_told(tmp_path, monkeypatch):
    def die(queue, **_):
        raise RuntimeError("no more disk")

    monkeypatch.setattr("lmd_hf.hub.webhook.work_off", die)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with serving(Queue(tmp_path / "q.sqlite"), secret=SECRET) as (_, ended):
        assert ended.wait(20)


def take(queue, done):
    if (entry := queue.take()) is not None:
        done.append(entry.model)
        queue.finish(entry, "done", "")


@pytest.mark.slow
def test_a_thousand_events_from_twenty_connections_none_lost_none_twice(server, caplog):
    draw = random.Random(0)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
    for each in slow:  # clients that begin a request and never end it
        each.sendall(f"POST {PATH} HTTP/1.1\r\nX-Webhook-Secret: {SECRET}\r\nContent-Length: 99\r\n\r\n".encode())
    kinds = ["good"] * 960 + ["malformed"] * 10 + ["secret"] * 20 + ["large"] * 10
    draw.shuffle(kinds)
    jobs, told, slowest, lock = list(enumerate(kinds)), Counter(), [0.0], threading.Lock()

    def client():
        while True:
            with lock:
                if not jobs:
                    return
                index, kind = jobs.pop()
            begun = time.perf_counter()
            try:
                if kind == "good":
                    status = post(server, payload(name=f"org/m{index}"))
                elif kind == "malformed":
                    status = post(server, b'{"event": ')
                elif kind == "secret":
                    status = post(server, payload(name=f"evil/m{index}"), secret=f"guess {index}")
                else:
                    status = post(server, b"x" * 5_000_000)
            except urllib.error.URLError:  # hung up on while sending 5 MB
                status = 413
            with lock:
                told[kind, status] += 1
                if kind == "good":
                    slowest.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=client) for _ in range(20)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - begun
    assert told == {("good", 202): 960, ("malformed", 400): 10, ("secret", 401): 20, ("large", 413): 10}
    wait_for(lambda: len(server.done) == 960, 60)
    assert len(set(server.done)) == 960
    assert not any(model.startswith("evil/") for model, _ in server.done)
    assert SECRET not in caplog.text
    assert seconds < 60  # the aim is 10 s, on a machine that does nothing else
    for each in slow:
        each.close()
