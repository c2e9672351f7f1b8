"""A small server that turns the Hub's webhooks into entries of the queue, and a thread that works the queue off.

On the standard library's threading server and not on huggingface_hub's `WebhooksServer`: that one starts a gradio app,
compares secrets in a time that tells how much of them was right, and reads bodies of any size.
"""

import hmac
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lmd_hf.errors import FormatError, SettingsError
from lmd_hf.hub.batch import work_off
from lmd_hf.hub.queue import Queue


PATH = "/webhooks/annotate"
LARGEST = 1 << 20  # bytes of a body: the Hub's are some kilobytes
SLOWEST = 10.0  # seconds that a client may take for a request
MAIN = "refs/heads/main"
_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A change of main of a model repository."""

    model: str
    commit: str


def read_event(body: bytes) -> Event | None:
    """The change that a payload tells of; `None` for what does not concern us: data sets and Spaces, discussions,
    settings, deletions, and pull requests (refs/pr/*), our own among them.

    Raises `FormatError` for what is no payload of a Hub webhook.
    """
    try:
        payload = json.loads(body)
        event, repo = payload["event"], payload["repo"]
        action, scope, kind, name = event["action"], event["scope"], repo["type"], repo["name"]
        moved = {each["ref"]: each.get("newSha") for each in payload.get("updatedRefs") or []}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError("not a payload of a Hub webhook") from None
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise FormatError("a payload without the name of a repository")
    commit = moved.get(MAIN)
    if kind != "model" or action not in ("create", "update") or not str(scope).startswith("repo.content"):
        return None
    if commit is None:
        return None
    if not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
        raise FormatError("a payload whose main is at no commit")
    return Event(name, commit)


@dataclass
class Annotator:
    """The queue, the thread that works it off, and what the server needs: `secret` is the one given to the Hub."""

    queue: Queue
    secret: str = field(repr=False)
    options: dict[str, Any]
    awake: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        """Work off what waits, again whenever something was added, until told to stop. Whatever else ends this stops
        the whole: a server that takes events and does nothing with them would be worse than none."""
        try:
            while not self.stopping.is_set():
                self.awake.clear()
                for outcome in work_off(self.queue, **self.options):
                    log.info("%s: %s, %s", outcome.model, outcome.status, outcome.reason)
                    if self.stopping.is_set():
                        return
                self.awake.wait()
        finally:
            self.stopping.set()

    def stop(self) -> None:
        """Take no further model; the one under way goes back to the queue if the process ends before it is done."""
        self.stopping.set()
        self.awake.set()


@contextmanager
def serving(
    queue: Queue, *, secret: str, host: str = "127.0.0.1", port: int = 0, options: dict[str, Any] | None = None
) -> Iterator[tuple[int, threading.Event]]:
    """A server under way, with its worker: its port, and what is set when the worker has ended. Raises
    `SettingsError` without a secret, and where the port is none or taken."""
    if not secret:
        raise SettingsError(
            "a webhook without a secret takes orders from anybody; set WEBHOOK_SECRET, here and on the Hub"
        )
    if not 0 <= port < 2**16:
        raise SettingsError(f"port is {port}; give one from 1 to 65535, or 0 for any that is free")
    annotator = Annotator(queue, secret, options or {"how": "pull"})
    try:
        server = _Server((host, port), type("Bound", (_Handler,), {"annotator": annotator}))
    except OSError as error:
        raise SettingsError(f"cannot serve on {host}:{port} ({error.strerror}); choose another --port") from None
    threads = [threading.Thread(target=run, daemon=True) for run in (server.serve_forever, annotator.work)]
    for thread in threads:
        thread.start()
    try:
        yield server.server_address[1], annotator.stopping
    finally:
        annotator.stop()
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that hangs up, or is too slow, is none."""


class _Handler(BaseHTTPRequestHandler):
    annotator: Annotator
    timeout = SLOWEST
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """An event: 202 if it was put on the list, 200 if it does not concern us."""
        length = self.headers.get("Content-Length", "")
        given = self.headers.get("X-Webhook-Secret", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self.annotator.secret.encode()):
            return self._answer(401, "wrong or missing secret")
        if self.path != PATH:
            return self._answer(404, f"webhooks go to {PATH}")
        if not length.isdigit() or int(length) > LARGEST:
            return self._answer(413, f"a body of at most {LARGEST:,} bytes, with its length")
        try:
            event = read_event(self.rfile.read(int(length)))
        except FormatError as error:
            return self._answer(400, str(error), keep=True)
        if event is None:
            return self._answer(200, "nothing to do", keep=True)
        new = self.annotator.queue.add([event.model], commit=event.commit)
        self.annotator.awake.set()
        return self._answer(202, "queued" if new else "queued before", keep=True)

    def do_GET(self) -> None:
        """How many models wait, run, are done: no names, for anybody may look."""
        if self.path not in ("/", "/status"):
            return self._answer(404, "see /status")
        counts = Counter(entry.state for entry in self.annotator.queue.entries())
        return self._answer(200, "lmd_hf annotator", keep=True, **counts)

    def _answer(self, status: int, told: str, *, keep: bool = False, **more: int) -> None:
        """As JSON. Where the body was not read, the connection cannot be used again."""
        data = json.dumps({"message": told, **more}).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if not keep:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """To the log, without headers: they hold the secret."""
        log.debug(format, *args)
