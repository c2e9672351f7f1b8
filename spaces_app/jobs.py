"""Workers from the outside: started, followed, stopped, bounded in time and memory. One request, one process."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


WORKER = Path(__file__).with_name("worker.py")
GIB = 2**30
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


@dataclass
class Jobs:
    """The workers of this Space. `running` are those of each visitor's session, `spare` one that is warm already."""

    limits: Limits
    running: dict[str, set[subprocess.Popen[str]]] = field(default_factory=dict)
    spare: subprocess.Popen[str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    empty: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def warm_up(self) -> None:
        """Have a worker ready that has imported torch."""
        with self.lock:
            if self.spare is None or self.spare.poll() is not None:
                self.spare = self._start("--warm")

    def ask(self, what: str, *, session: str = "", private: bool = False, **request: Any) -> Iterator[dict[str, Any]]:
        """The worker's answers as they come, the last of them {"done": …}. Raises `Failed`.

        A private request has a home of its own, without anything that others left or will find.
        """
        with self._worker(private) as worker, self._noted(session, worker):
            late = threading.Event()
            timer = threading.Timer(self.limits.seconds, lambda: (late.set(), worker.kill()))
            timer.daemon = True
            timer.start()
            try:
                yield from self._answers(worker, {"what": what, "memory": self.limits.memory, **request})
            except _Ended:
                reason = (
                    f"it took longer than {self.limits.seconds:,.0f} seconds; choose a smaller model"
                    if late.is_set()
                    else (
                        "it was stopped"
                        if worker.returncode == -9
                        else "the worker ran out of memory; choose a smaller model"
                    )
                )
                raise Failed(f"Nothing came of it: {reason}.") from None
            finally:
                timer.cancel()

    def stop(self, session: str) -> None:
        """End whatever runs for this visitor."""
        for worker in list(self.running.get(session, ())):
            worker.kill()

    def close(self) -> None:
        """End all workers."""
        for session in list(self.running):
            self.stop(session)
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

    @contextmanager
    def _noted(self, session: str, worker: subprocess.Popen[str]) -> Iterator[None]:
        self.running.setdefault(session, set()).add(worker)
        try:
            yield
        finally:
            self.running[session].discard(worker)
            if not self.running[session]:
                self.running.pop(session, None)

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
