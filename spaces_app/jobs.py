"""Workers from the outside: started, followed, stopped, bounded in time and memory. One request, one process."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


WORKER = Path(__file__).with_name("worker.py")
GIB = 2**30
LONGEST_LINE = 64  # requests, before one is asked to come back
LOOK_AGAIN = 0.3  # seconds between two looks at the line
STOPPED = "It was stopped; ask again to go on."
KEPT_ENVIRONMENT = {
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_XET": "1",
}


class Failed(Exception):
    """A request came to nothing; the text is one sentence with the remedy."""


@dataclass(frozen=True)
class Limits:
    """Of one request: seconds of the whole, expected seconds of work, bytes of memory, bytes from the Hub; and how many
    may run at one time."""

    seconds: float
    memory: int
    fetch: float
    at_once: int

    @classmethod
    def here(cls) -> "Limits":
        """From this machine, or what a Space tells of its hardware (`CPU_CORES`, `MEMORY`); `LMD_SPACE_SECONDS` and
        `LMD_SPACE_MEMORY_GB` set one request's share by hand."""
        cores = int(float(os.environ.get("CPU_CORES") or os.cpu_count() or 1))
        told = os.environ.get("MEMORY", "").removesuffix("Gi")
        memory = min(float(told) * GIB if told else float("inf"), psutil.virtual_memory().total)
        at_once = max(1, min(cores // 2 + 1, int(memory // (4 * GIB))))
        share = float(os.environ.get("LMD_SPACE_MEMORY_GB") or 0.8 * memory / at_once / 1e9) * 1e9
        return cls(float(os.environ.get("LMD_SPACE_SECONDS") or 600), int(share), 20e9, at_once)

    def of_plan(self) -> dict[str, float]:
        """What a plan is held against."""
        return {"expected_seconds": self.seconds, "memory_bytes": self.memory, "bytes_to_fetch": self.fetch}


@dataclass(eq=False)
class Turn:
    """One request in the line: whose it is, its worker once it runs, and whether it was stopped or took too long."""

    session: str
    worker: subprocess.Popen[str] | None = None
    stopped: bool = False
    late: bool = False

    def end(self, *, late: bool = False) -> None:
        """Kill the worker; a turn that has not begun does not begin."""
        self.stopped, self.late = True, late
        if self.worker is not None:
            self.worker.kill()


@dataclass
class Jobs:
    """The workers of this Space. In `line` the first `limits.at_once` run, the others wait; `spare` is a worker that is
    warm already."""

    limits: Limits
    line: list[Turn] = field(default_factory=list)
    spare: subprocess.Popen[str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    empty: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def warm_up(self) -> None:
        """Have a worker ready that has imported torch."""
        with self.lock:
            if self.spare is None or self.spare.poll() is not None:
                self.spare = self._start("--warm")

    def ask(self, what: str, *, session: str = "", private: bool = False, **request: Any) -> Iterator[dict[str, Any]]:
        """{"waiting": how many are before it} until its turn comes, then the worker's answers as they come, the last of
        them {"done": …}. Raises `Failed`.

        A private request has a home of its own, without anything that others left or will find.
        """
        with self._turn(session) as turn:
            while (place := self.line.index(turn)) >= self.limits.at_once and not turn.stopped:
                yield {"waiting": place - self.limits.at_once + 1}
                time.sleep(LOOK_AGAIN)
            if turn.stopped:
                raise Failed(STOPPED)
            with self._worker(private) as turn.worker:
                timer = threading.Timer(self.limits.seconds, turn.end, kwargs={"late": True})
                timer.daemon = True
                timer.start()
                try:
                    yield from self._answers(turn.worker, {"what": what, "memory": self.limits.memory, **request})
                except _Ended:
                    raise Failed(self._reason(turn)) from None
                finally:
                    timer.cancel()

    def _reason(self, turn: Turn) -> str:
        if turn.late:
            return f"It took longer than the {self.limits.seconds:,.0f} seconds of one request; choose a smaller model."
        if turn.stopped:
            return STOPPED
        if turn.worker is not None and turn.worker.returncode == 1:  # a traceback, which the log has
            return (
                "It failed in a way that nobody foresaw: the log of this Space tells how; `lmd-hf analyze` may do it."
            )
        return "It took more memory than there is; choose a smaller model."

    @contextmanager
    def _turn(self, session: str) -> Iterator[Turn]:
        turn = Turn(session)
        with self.lock:
            if len(self.line) >= LONGEST_LINE:
                raise Failed(f"{LONGEST_LINE} requests are waiting already; try again in a minute.")
            self.line.append(turn)
        try:
            yield turn
        finally:
            with self.lock:
                self.line.remove(turn)

    def stop(self, session: str) -> None:
        """End whatever runs or waits for this visitor."""
        for turn in list(self.line):
            if turn.session == session:
                turn.end()

    def close(self) -> None:
        """End all workers."""
        for turn in list(self.line):
            turn.end()
        if self.spare is not None:
            self.spare.kill()

    def _answers(self, worker: subprocess.Popen[str], request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            raise _Ended from None
        for line in worker.stdout:
            told = json.loads(line)
            if "error" in told:
                raise Failed(told["error"])
            yield told
            if "done" in told:
                return
        worker.wait()
        raise _Ended

    @contextmanager
    def _worker(self, private: bool) -> Iterator[subprocess.Popen[str]]:
        with tempfile.TemporaryDirectory() as home:
            if private:
                worker = self._start(home=home)
            else:
                with self.lock:
                    worker, self.spare = self.spare, None
                if worker is None or worker.poll() is not None:
                    worker = self._start()
                threading.Thread(target=self.warm_up, daemon=True).start()
            try:
                yield worker
            finally:
                worker.kill()
                worker.wait()
                for stream in (worker.stdin, worker.stdout):
                    if stream is not None:
                        stream.close()

    def _start(self, *options: str, home: str | None = None) -> subprocess.Popen[str]:
        """In an empty folder, so that no id is a path, and without the token of whoever runs this."""
        environment = {
            name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        }
        environment |= KEPT_ENVIRONMENT | (
            {}
            if home is None
            else {"HF_HOME": home, "HF_ASSETS_CACHE": f"{home}/assets", "HF_HUB_CACHE": f"{home}/hub"}
        )
        return subprocess.Popen(
            [sys.executable, str(WORKER), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=self.empty.name, env=environment, encoding="utf-8",
        )  # fmt: skip


class _Ended(Exception):
    """The worker ended without an answer."""
