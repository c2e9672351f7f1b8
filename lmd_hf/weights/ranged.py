"""Byte ranges of the files of a Hub repository: in parallel, resumed where a connection broke, checked for length."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from lmd_hf.compat import redirect_errors, unreachable_errors
from lmd_hf.errors import SourceError
from lmd_hf.weights.answers import demanded_wait


CONNECTIONS = 8  # at one time, to one repository
PIECE = 2**20  # bytes: a read is spread over the connections, but in no smaller pieces than this
TRIES = 6  # in a row that bring no byte; the waits between them add up to a quarter of a minute
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds, doubling
LONGEST_DEMAND = 300.0  # seconds: the Hub counts requests in windows of five minutes
SHA256_LENGTH = 64
BUSY = (408, 429)  # and whatever is 500 or more


class _Again(Exception):
    """This try brought nothing, the next may; `seconds` is how long the server asks to wait, if it does."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass
class Connection:
    """What the files of one repository share: its headers, its threads, what was fetched, and a fault that ends it.

    `cached(name)` is the path of a file that is on disk already. `end` is for what no further try can heal, so that a
    thousand matrices do not each wait for a Hub that is gone; whatever waits to try again stops waiting.
    """

    repo_id: str
    headers: dict[str, str] = field(repr=False)  # with the token
    cached: Callable[[str], Path | None]
    bytes_fetched: int = 0
    files_touched: set[str] = field(default_factory=set)
    fault: str = ""
    ended: threading.Event = field(default_factory=threading.Event)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(CONNECTIONS, "lmd_hf.fetch"))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, file: str, size: int) -> None:
        """Add what has arrived of a file."""
        with self.lock:
            self.bytes_fetched += size
            self.files_touched.add(file)

    def end(self, fault: str) -> SourceError:
        """Read nothing more, for this reason."""
        self.fault = f"{self.repo_id}: {fault}"
        self.ended.set()
        return SourceError(self.fault)

    def apart(self) -> "Connection":
        """The same threads, for other reads: with counts and a fault of its own."""
        fresh = replace(self, bytes_fetched=0, files_touched=set(), fault="")
        fresh.lock, fresh.ended = threading.Lock(), threading.Event()
        return fresh


@dataclass
class RemoteFile:
    """One file at a pinned commit, read as a `Path` is: `open`, `seek`, `readinto`.

    The redirect to the storage is followed once and its end used until it expires; the token stays with the Hub.
    Every answer must agree with `size` and `sha256`, which the commit's listing gave. Raises `SourceError` for what no
    further try can heal, and again at once on every later read.
    """

    connection: Connection
    name: str
    url: str
    size: int
    sha256: str | None
    found: tuple[str, str] = ("", "")  # where the redirects ended, and the ETag there
    fault: str = ""

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator["_Cursor"]:
        """The file at its first byte; `mode` is there to be called like `Path.open`."""
        yield _Cursor(self)

    def read_range(self, start: int, stop: int) -> bytes:
        """Those bytes."""
        data = bytearray(max(0, min(stop, self.size) - start))
        self.read_into(start, memoryview(data))
        return bytes(data)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill `view` from `start` on, over several connections at once."""
        step = max(PIECE, -(-len(view) // CONNECTIONS))
        pieces = [
            self.connection.pool.submit(self._read_piece, start + at, view[at : at + step])
            for at in range(0, len(view), step)
        ]
        for piece in pieces:
            piece.result()

    def _read_piece(self, start: int, view: memoryview) -> None:
        reached = tries = 0
        while reached < len(view):
            if fault := self.fault or self.connection.fault:
                raise SourceError(fault)
            reason, wait = "the answer ends early", None
            try:
                for size in self._stream(start + reached, view[reached:]):
                    reached, tries = reached + size, 0
                    if self.connection.fault and reached < len(view):
                        break
            except redirect_errors():
                raise self._lost("redirects in a circle; try again later") from None
            except _Again as again:
                reason, wait = str(again), again.seconds
            except unreachable_errors() as error:
                reason = str(error) or type(error).__name__
            if reached < len(view) and not self.connection.fault:
                tries += 1
                self._pause(tries, reason, wait)

    def _pause(self, tries: int, reason: str, wait: float | None) -> None:
        if tries == TRIES or (wait or 0) > LONGEST_DEMAND:
            again = f"try again in {wait:.0f} seconds" if wait else "check the connection and run again"
            raise self.connection.end(f"gave up reading from the Hub ({reason}); {again}")
        self.connection.ended.wait(min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT) if wait is None else wait)

    def _stream(self, start: int, view: memoryview) -> Iterator[int]:
        """Write what one request brings into `view`, and say how much as it comes."""
        session: Any = get_session()
        url = self.found[0] or self.url
        headers = {**self.connection.headers, "range": f"bytes={start}-{start + len(view) - 1}"}
        if not _same_origin(url, self.url):  # the token is for the Hub alone
            headers.pop("authorization", None)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
            self._check(answer, start)
            reached = 0
            try:
                for chunk in answer.iter_raw():
                    part = chunk[: len(view) - reached]
                    view[reached : reached + len(part)] = part
                    reached += len(part)
                    yield len(part)
                    if reached == len(view):
                        break
            finally:
                self.connection.count(self.name, reached)

    def _check(self, answer: Any, start: int) -> None:
        """Is this answer what was asked for, of the file that was listed?"""
        status, where = answer.status_code, str(answer.url)
        if status in BUSY or status >= 500:
            raise _Again(f"it answers {status}", demanded_wait(answer.headers))
        if status >= 400 and not _same_origin(where, self.url) and status != 416:
            self.found = ("", "")  # a signed address expires
            raise _Again(f"its storage answers {status}")
        if status >= 400 and status != 416:
            raise self._refused(status, answer.headers.get("X-Error-Code"))
        encoding, part = answer.headers.get("Content-Encoding", "identity"), answer.headers.get("Content-Range", "")
        if encoding != "identity":
            raise self._lost(f"arrives as {encoding}, which nobody asked for; --download reads whole files")
        total = part.rpartition("/")[2] or answer.headers.get("Content-Length")
        if total != str(self.size):
            raise self._lost(f"has {total} bytes where its commit lists {self.size}; it was replaced: run again")
        if status not in (200, 206) or (status == 200 and start):
            raise self._lost(f"cannot be read in parts (its server answers {status}); --download reads whole files")
        if status == 206 and not part.lower().startswith(f"bytes {start}-"):
            raise self._lost("is sent from another byte than was asked for; --download reads whole files")
        linked = [hop.headers.get("X-Linked-Etag", "").strip('W/"') for hop in answer.history]
        tag = answer.headers.get("ETag", "")
        place, before = self.found
        hashes = {seen for seen in linked if len(seen) == SHA256_LENGTH}
        if (where == place and tag != before) or (self.sha256 and hashes - {self.sha256}):
            raise self._lost("was replaced while it was read; run again")
        self.found = (where, tag)

    def _lost(self, what: str) -> SourceError:
        self.fault = f"{self.connection.repo_id}: {self.name} {what}"
        return SourceError(self.fault)

    def _refused(self, status: int, code: str | None) -> SourceError:
        if status == 404:
            return self._lost("is no longer there; run again")
        remedy = "gated; accept its terms on its page, then `hf auth login`"
        if code != "GatedRepo":
            remedy = f"the Hub refuses {self.name} ({status}); has the token expired? `hf auth login`, then run again"
        return self.connection.end(remedy)


@dataclass
class _Cursor:
    file: RemoteFile
    at: int = 0

    def seek(self, at: int) -> None:
        """Go to a byte."""
        self.at = at

    def readinto(self, view: memoryview) -> int:
        """Fill `view`; the number of bytes that the file had."""
        self.file.read_into(self.at, view)
        self.at += len(view)
        return len(view)


def _same_origin(url: str, other: str) -> bool:
    return urlsplit(url)[:2] == urlsplit(other)[:2]
