"""The hands: which device, how many matrices at one time, how many threads each."""

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import psutil
import torch
from threadpoolctl import threadpool_limits

from lmd_hf.compat import let_go_of_blas, local_processes, local_rank
from lmd_hf.errors import SettingsError, first_line
from lmd_hf.records import Work
from lmd_hf.shared import SharedSetting
from lmd_hf.weights.source import FileSource, Source


MEMORY_SHARE = 0.5  # of the memory that is free, for the matrices being worked on at one time
LARGEST_SHARE = 3  # where the network sets the pace: of the largest matrix in float64, or
STREAMS = 4  # matrices at one time on a GPU: one is decomposed, one on its way, and two fill what small kernels leave
BATCHED_ON = ("cuda",)  # small matrices together; on a CPU a core is filled by one matrix
MEMORY_PER_CORE = 48 * 2**20  # bytes for each core, if that is more
MEMORY_AHEAD = 2**29  # bytes of a model whose turn has not come: all of a small one, or
AHEAD_SHARE = 0.1  # of the memory that is free, if that is less

FALLS_BACK = (torch.OutOfMemoryError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
NO_ROOM = ("out of memory", "ALLOC_FAILED")  # so CUDA says it where torch asks for no memory itself, and cuSOLVER

T = TypeVar("T")
_first_call = threading.Lock()
_blas = SharedSetting()
_torch_threads = threading.Lock()
_torch_before: list[int] = []  # what each thread found; the first alone found what is to be put back


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the accelerator if there is one that does float64, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU here")
        if device.type == "cuda" and device.index is None:  # a rank's own; worker threads would all take the first
            device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        with _first_call:  # which loads a GPU's eigensolvers, and must not come from two threads together
            torch.linalg.eigvalsh(torch.zeros(1, 1, dtype=torch.float64, device=device))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingsError(f"device '{name}' cannot be used ({first_line(error)}); try cpu") from None
    return device


def pick_devices(name: str) -> tuple[torch.device, ...]:
    """As `pick_device`; where the name leaves the choice, and no other process shares them, every GPU."""
    device = pick_device(name)
    if device.type != "cuda" or name not in ("auto", "cuda") or local_processes() > 1:
        return (device,)
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def worker_count(works: list[Work], devices: tuple[torch.device, ...], source: Source) -> int:
    """How many matrices are worked on at one time.

    What comes over a network comes slowly: there, memory is kept to that of the largest matrix, whatever is free.
    """
    limit = math.inf
    if works and isinstance(source, FileSource) and source.connection is not None:
        largest = max(8 * math.prod(work.ref.shape) for work in works)
        limit = max(LARGEST_SHARE * largest, MEMORY_PER_CORE * _cores())
    sizes = [work.bytes for work in works]
    return max(1, min(len(devices) * count_workers(sizes, devices[0], limit), len(sizes)))


def count_workers(sizes: list[int], device: torch.device, limit: float = math.inf) -> int:
    """As many workers as fit of the largest jobs (bytes in memory) into what is free and below `limit`: one a core, or
    `STREAMS` on a GPU, each with a stream of its own."""
    if device.type not in ("cpu", "cuda"):
        return 1
    return fitting(sizes, _cores() if device.type == "cpu" else STREAMS, device, limit)


def fitting(sizes: list[int], most: int, device: torch.device, limit: float = math.inf) -> int:
    """How many of the largest jobs (bytes in memory), `most` or fewer, fit into what is free and below `limit`."""
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE
    else:
        room = psutil.virtual_memory().available * MEMORY_SHARE / local_processes()
    return min(most, len(sizes), max(1, int(min(room, limit) // max(1, *sizes)))) if sizes else 1


def room_ahead() -> int:
    """How many bytes may wait in memory for the turn of their model."""
    return int(min(MEMORY_AHEAD, AHEAD_SHARE * psutil.virtual_memory().available / local_processes()))


_hand = threading.local()  # a worker thread's device
_streams = threading.local()


def with_room(step: Callable[[torch.device], T], device: torch.device) -> T:
    """A step on that device, or on the CPU where the device, which others may use too, has no memory left for it, or
    its solver does not converge, as LAPACK's may."""
    try:
        return step(device)
    except FALLS_BACK:
        pass
    except RuntimeError as error:
        if not any(word in str(error) for word in NO_ROOM):
            raise
    return step(torch.device("cpu"))


def upload(matrix: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The matrix on this worker's device, or on `device` in a thread that has none of its own, in its stored type; on
    the CPU where that is asked for.

    On a GPU this thread works in a stream of its own from here on, and the copy, from pinned memory, leaves the other
    threads' kernels running; what is there already, the matrix or a metric that it meets, may still be written by the
    stream that made it.
    """
    device = device if device.type == "cpu" else getattr(_hand, "device", device)
    if device.type != "cuda":
        return matrix.to(device)
    if getattr(_streams, "device", None) != device:
        _streams.device, _streams.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(_streams.stream)
    _streams.stream.wait_stream(torch.cuda.default_stream(device))
    if matrix.is_cuda:
        _streams.stream.wait_stream(torch.cuda.default_stream(matrix.device))
        return matrix.to(device)
    return matrix.pin_memory().to(device, non_blocking=True)


def _cores() -> int:
    """The cores that are this process's own: those it may run on, shared with the other ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_processes())


@contextmanager
def worker_pool(workers: int, matrices: int, devices: tuple[torch.device, ...] = ()) -> Iterator[ThreadPoolExecutor]:
    """Worker threads that share the cores, and the devices in turn. On an interrupt, what has not started is dropped at
    once.

    BLAS gets more than one thread where matrices are fewer than cores, not where memory keeps workers few: LAPACK's
    eigenvalues of a 2,048 × 2,048 matrix took four to twelve times as long on two threads as on one.
    """
    turns = itertools.cycle(devices)
    pool = ThreadPoolExecutor(
        workers,
        thread_name_prefix="lmd_hf",
        initializer=(lambda: setattr(_hand, "device", next(turns))) if devices else None,
    )
    _blas.enter(partial(_limited_blas, max(1, _cores() // max(1, matrices))))
    finished = False
    try:
        yield pool
        finished = True
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if finished:
            _blas.leave()
        else:  # restoring waits for a BLAS call under way; an interrupt must not
            threading.Thread(target=_blas.leave, daemon=True).start()


def _limited_blas(threads: int) -> Callable[[], object]:
    limits = threadpool_limits(limits=threads, user_api="blas")
    let_go_of_blas()

    def restore() -> None:
        limits.restore_original_limits()
        let_go_of_blas()

    return restore


@contextmanager
def single_torch_threads() -> Iterator[None]:
    """Worker threads that begin in this context run torch's own operations on one thread each: threads of several
    operations that wait for each other made QR and eigenvalues of thin factors twelve times slower."""
    with _torch_threads:
        _torch_before.append(torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _torch_threads:
            # each for itself: it is one number for new threads, and one for each thread that is there
            torch.set_num_threads(_torch_before[0])
            _torch_before.pop()
