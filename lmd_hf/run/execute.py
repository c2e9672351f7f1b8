"""Doing the work: the only place where tensors live. One rank is a world of one."""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from threadpoolctl import threadpool_limits

from lmd_hf.errors import NoDataError, SettingsError
from lmd_hf.matrix.kernels import Spectrum, get_kernel
from lmd_hf.records import Alias, MatrixRef, MatrixReport, Plan, Results, Skipped, Work
from lmd_hf.run.measure import measure, to_row
from lmd_hf.weights.source import Source
from lmd_hf.weights.stored import read_matrix


Outcome = MatrixReport | Skipped | Alias
Ahead = Mapping[Any, Future[Spectrum]]  # by `_entries`
MEMORY_SHARE = 0.5  # of the memory that is free, for the matrices being worked on at one time


@contextmanager
def head_start(plan: Plan, source: Source) -> Iterator[Ahead]:
    """Spectra of a provisional plan, computed in the background until `execute` takes over with the final one.

    A spectrum depends on which entries of a stored tensor form the matrix, not on role or orientation, so what was
    planned from names alone stays valid wherever the final plan cuts the same matrix.
    """
    device = pick_device(plan.settings.device)
    works = [plan.works[index] for index in plan.shards[0]]
    with worker_pool(count_workers([work.bytes for work in works], device)) as pool:
        yield {_entries(w.ref): pool.submit(_spectrum, source, w, device) for w in works}


def execute(
    plan: Plan,
    source: Source,
    *,
    rank: int = 0,
    ahead: Ahead | None = None,
    progress: Callable[[Work], None] | None = None,
) -> Results:
    """Decompose this rank's share of a plan, most expensive matrix first, and return rows in the plan's order.

    On the CPU one worker thread a core, each with one BLAS thread: small eigenproblems do not profit from more. A
    matrix that cannot be done becomes `Skipped`; the others go on. `ahead` holds what a head start has done or is
    doing. `progress` is called, in this thread, after each matrix.
    """
    started = time.perf_counter()
    ahead = {entries: future for entries, future in (ahead or {}).items() if not future.cancel()}
    device = pick_device(plan.settings.device)
    shard = plan.shards[rank]
    workers = count_workers([plan.works[index].bytes for index in shard], device)
    outcomes: dict[int, Outcome] = {}
    with worker_pool(workers) as pool:
        futures = {pool.submit(_do, source, plan, plan.works[index], device, ahead): index for index in shard}
        for future in as_completed(futures):
            outcomes[futures[future]] = future.result()
            if progress is not None:
                progress(plan.works[futures[future]])
    ordered = [outcomes[index] for index in sorted(outcomes)]
    return Results(
        matrices=tuple(o for o in ordered if isinstance(o, MatrixReport)),
        skipped=tuple(o for o in ordered if isinstance(o, Skipped)),
        aliases=tuple(o for o in ordered if isinstance(o, Alias)),
        environment=environment(device, workers),
        timing={"execute": time.perf_counter() - started},
    )


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the accelerator if there is one that does float64, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingsError(f"device '{name}' cannot be used ({str(error).splitlines()[0]}); try cpu") from None
    return device


def count_workers(sizes: list[int], device: torch.device) -> int:
    """One worker a core, as long as so many of the largest jobs (bytes in memory) fit; one on an accelerator."""
    if device.type != "cpu" or not sizes:
        return 1
    free = psutil.virtual_memory().available * MEMORY_SHARE
    fitting = max(1, int(free // max(sizes)))
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
               len(sizes), fitting)  # fmt: skip


@contextmanager
def worker_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Worker threads that share the cores. On an interrupt, what has not started is dropped at once."""
    cores = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lmd_hf")
    limits = threadpool_limits(limits=max(1, cores // workers))
    finished = False
    try:
        yield pool
        finished = True
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if finished:
            limits.restore_original_limits()
        else:  # restoring waits for a BLAS call under way; an interrupt must not
            threading.Thread(target=limits.restore_original_limits, daemon=True).start()


def _entries(ref: MatrixRef) -> tuple[Any, ...]:
    """Which stored entries form the matrix: two that agree here have the same singular values."""
    return ref.tensors, ref.stored, ref.expert, ref.rows


def _spectrum(source: Source, work: Work, device: torch.device) -> Spectrum:
    return get_kernel(work.kernel)(read_matrix(source, work.ref).to(device))


def _do(source: Source, plan: Plan, work: Work, device: torch.device, ahead: Ahead) -> Outcome:
    ref = work.ref
    done = ahead.get(_entries(ref))
    if done is not None and ref.tied_to is None and plan.settings.metric == "identity" and done.exception() is None:
        return to_row(ref, done.result(), kernel=work.kernel)
    try:
        w = read_matrix(source, ref)
    except NoDataError as error:
        return Skipped(ref.name, ref.shape, str(error))
    if ref.tied_to is not None and torch.equal(w, _repeated(source, plan, ref)):
        return Alias(ref.name, ref.tied_to, ref.shape, stored=True)
    try:
        return measure(source, ref, w.to(device), metric=plan.settings.metric, kernel=work.kernel)
    except ValueError as error:  # NaN or infinity, in the matrix or in the gain that feeds it
        bad = int(w.numel() - torch.isfinite(w).sum().item())
        part = f"{ref.part}: " if ref.part else ""
        return Skipped(ref.name, ref.shape, f"{part}{error}" + (f" ({bad} of {w.numel()} entries)" if bad else ""))


def _repeated(source: Source, plan: Plan, ref: MatrixRef) -> torch.Tensor:
    """The matrix that `ref` is tied to, in the orientation of `ref`."""
    of = next(tensor for tensor in source.tensors if tensor.name == ref.tied_to)
    value = source.read(of)
    return value.T if ref.transposed else value


def environment(device: torch.device, workers: int) -> dict[str, Any]:
    """What ran the work: versions, device and threads."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": 1,
        "threads": workers,
    }
