"""A durable list of models to annotate, in one SQLite file that several processes may share."""

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from lmd_hf.errors import OutputError


ATTEMPTS = 3  # of a model that fails, over all runs
DEATHS = 20  # attempts after which a model that was under way when a process ended is the likely cause
PATIENCE = 60.0  # seconds that a writer waits for another process
SAME = 2.0  # seconds between two readings of when one process began, at most: Linux tells them from whole seconds
_turn = threading.Lock()  # for the threads of this one: SQLite has them sleep, in steps that grow to 100 ms
_TABLE = """
CREATE TABLE IF NOT EXISTS models (
    model TEXT NOT NULL, commit_hash TEXT NOT NULL DEFAULT '', state TEXT NOT NULL DEFAULT 'waiting',
    attempts INTEGER NOT NULL DEFAULT 0, told TEXT NOT NULL DEFAULT '', url TEXT, owner TEXT, changed REAL NOT NULL,
    PRIMARY KEY (model, commit_hash)
)"""


@dataclass(frozen=True)
class Entry:
    """One model of the list: `state` is waiting, running, done, left (alone) or failed; `told` the reason or the error;
    `commit` "" for whatever main is."""

    model: str
    commit: str
    state: str
    attempts: int
    told: str
    url: str | None


@dataclass(frozen=True)
class Queue:
    """The file. Every change is one transaction: a process that is killed leaves a row `running`, which the next one
    that looks takes back, once the process is gone."""

    path: Path

    def add(self, models: Iterable[str], *, commit: str = "") -> int:
        """Append the models that are not in the list; returns how many are new."""
        with self._open() as file:
            before = file.total_changes
            rows = [(model, commit, time.time()) for model in models]
            file.executemany("INSERT OR IGNORE INTO models (model, commit_hash, changed) VALUES (?, ?, ?)", rows)
            return file.total_changes - before

    def take(self) -> Entry | None:
        """The next model that waits, now running in this process; `None` when none does."""
        with self._open() as file:
            for (owner,) in file.execute("SELECT DISTINCT owner FROM models WHERE state = 'running'").fetchall():
                if not _lives(owner):
                    file.execute(
                        "UPDATE models SET state = CASE WHEN attempts < ? THEN 'waiting' ELSE 'failed' END, "
                        "told = 'the process ended in the middle of it' WHERE state = 'running' AND owner = ?",
                        (DEATHS, owner),
                    )
            row = file.execute(
                "UPDATE models SET state = 'running', attempts = attempts + 1, owner = ?, changed = ? WHERE rowid = ("
                "SELECT rowid FROM models WHERE state = 'waiting' ORDER BY rowid LIMIT 1) "
                "RETURNING model, commit_hash, state, attempts, told, url",
                (_me(), time.time()),
            ).fetchone()
            return None if row is None else Entry(*row)

    def peek(self) -> str | None:
        """The model that `take` would give now; another process may take it first."""
        with self._open() as file:
            row = file.execute("SELECT model FROM models WHERE state = 'waiting' ORDER BY rowid LIMIT 1").fetchone()
            return None if row is None else str(row[0])

    def finish(self, entry: Entry, state: str, told: str, url: str | None = None) -> None:
        """What became of a model that was taken. A failed one waits again until it was tried `ATTEMPTS` times."""
        if state == "failed" and entry.attempts < ATTEMPTS:
            state = "waiting"
        with self._open() as file:
            file.execute(
                "UPDATE models SET state = ?, told = ?, url = ?, owner = NULL, changed = ? "
                "WHERE model = ? AND commit_hash = ?",
                (state, told, url, time.time(), entry.model, entry.commit),
            )

    def entries(self) -> list[Entry]:
        """The whole list, in the order in which it was given."""
        columns = "model, commit_hash, state, attempts, told, url"
        with self._open() as file:
            return [Entry(*row) for row in file.execute(f"SELECT {columns} FROM models ORDER BY rowid")]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a transaction that has the right to write from its start."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _turn, closing(sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)) as file:
                file.execute(
                    "PRAGMA journal_mode = WAL"
                )  # readers wait for nobody, and a killed writer leaves no trace
                file.execute("PRAGMA synchronous = NORMAL")
                file.execute("BEGIN IMMEDIATE")
                file.execute(_TABLE)
                yield file
                file.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise OutputError(f"{self.path}: the queue cannot be used ({error}); choose another --queue") from None


def _me() -> str:
    """This process, told apart from a later one with its number."""
    return f"{socket.gethostname()}:{os.getpid()}:{_born(os.getpid()):.2f}"


def _lives(owner: str | None) -> bool:
    """Whether the process still runs; of another machine nobody can tell, so it does."""
    host, _, rest = (owner or "::0").partition(":")
    number, _, born = rest.partition(":")
    if owner is None or host != socket.gethostname():
        return owner is not None
    try:
        return abs(_born(int(number)) - float(born)) < SAME
    except psutil.NoSuchProcess:
        return False


def _born(number: int) -> float:
    """When a process began, in seconds that no setting of the clock moves: Linux counts from the start of the machine,
    and the time that it gives moves with the clock."""
    start = psutil.boot_time() if psutil.LINUX else 0.0
    return float(psutil.Process(number).create_time() - start)
