"""Random numbers from names, and seeds shared out over the cores."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from huggingface_hub.utils import tqdm
from threadpoolctl import threadpool_limits


QUIET_SECONDS = 2  # work shorter than this shows no progress bar
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
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(len(cases), os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with threadpool_limits(1):
            running = [pool.submit(work, case) for case in cases]
            bar = tqdm(running, desc=what, delay=QUIET_SECONDS, disable=None, leave=False, bar_format=_BAR)
            return [task.result() for task in bar]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt waits for nobody
        torch.set_num_threads(threads)
