"""Random numbers from names, and seeds shared out over the cores."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

import torch
from huggingface_hub.utils import tqdm

from lmd_hf.run.workers import single_torch_threads, worker_pool


QUIET_SECONDS = 2  # work shorter than this shows no progress bar
REFRESH_SECONDS = 0.5
_BAR = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}"
Case = TypeVar("Case")
Result = TypeVar("Result")


def seed_of(name: str, seed: int) -> int:
    """A seed below 2³¹ from a name such as `swiss-roll/data` and a number: what is drawn depends on no order."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:4], "big") >> 1


def generator(name: str, seed: int) -> torch.Generator:
    """torch's random numbers of that name and seed."""
    return torch.Generator().manual_seed(seed_of(name, seed))


def each(work: Callable[[Case], Result], cases: Sequence[Case], *, what: str) -> list[Result]:
    """`work` on every case (a seed, or a seed with a condition), several at once with one arithmetic thread each, so
    that the numbers do not depend on the cores; results in the order of `cases`, a bar on stderr after two seconds."""
    cores = os.cpu_count() or 1
    with single_torch_threads(), worker_pool(min(len(cases), cores), max(len(cases), cores)) as pool:
        running = [pool.submit(work, case) for case in cases]
        _show(running, what)
        return [task.result() for task in running]


def _show(running: Sequence[Future[Result]], what: str) -> None:
    """A bar that moves while the first of several long tasks is still at work; what a task raises ends it."""
    started, pending = time.monotonic(), set(running)
    with tqdm(total=len(running), desc=what, delay=QUIET_SECONDS, disable=None, leave=False, bar_format=_BAR) as bar:
        while pending:
            done, pending = wait(pending, timeout=REFRESH_SECONDS, return_when=FIRST_COMPLETED)
            for task in done:
                task.result()
            bar.update(len(done))
            if time.monotonic() - started > QUIET_SECONDS:
                bar.refresh()
