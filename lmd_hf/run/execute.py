"""Doing the work: the only place where tensors live. One rank is a world of one."""

import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmd_hf.errors import FormatError, NoDataError, SourceError
from lmd_hf.matrix.spectrum import Spectrum
from lmd_hf.records import UNREAD, Alias, Factored, MatrixRef, MatrixReport, Plan, Results, Skipped, Work
from lmd_hf.run.measure import measure, spectrum_for, to_row
from lmd_hf.run.read_ahead import ReadAhead, reading_ahead
from lmd_hf.run.workers import pick_device, worker_count, worker_pool
from lmd_hf.weights.inventory import pieces
from lmd_hf.weights.source import FileSource, Source
from lmd_hf.weights.stored import Rounding, Stored, read_stored


Outcome = MatrixReport | tuple[Skipped, ...] | Alias
Begun = Future[tuple[Spectrum, Rounding]]


@dataclass(frozen=True)
class HeadStart:
    """Spectra under way, by `_entries`, and the reads that feed them."""

    spectra: dict[Any, tuple[Work, Begun]]
    reads: ReadAhead

    def take_over(self) -> dict[Any, Begun]:
        """Begin nothing more; what remains is done, under way, or has its bytes here or on their way."""
        self.reads.close()
        kept = {key: future for key, (work, future) in self.spectra.items() if self.reads.begun(work)}
        return kept | {
            key: future for key, (_, future) in self.spectra.items() if key not in kept and not future.cancel()
        }


@contextmanager
def head_start(plan: Plan, source: Source) -> Iterator[HeadStart]:
    """Spectra of a provisional plan, computed in the background until `execute` takes over with the final one.

    A spectrum depends on which entries of a stored tensor form the matrix, not on role or orientation, so what was
    planned from names alone stays valid wherever the final plan cuts the same matrix.
    """
    device = pick_device(plan.settings.device)
    works = [plan.works[index] for index in plan.shards[0]]
    with worker_pool(worker_count(works, device, source), len(works)) as pool, reading_ahead(source, works) as reads:
        yield HeadStart({_entries(w.ref): (w, pool.submit(_spectrum, reads, w, device)) for w in reads.works}, reads)


def execute(
    plan: Plan,
    source: Source,
    *,
    rank: int = 0,
    ahead: HeadStart | None = None,
    progress: Callable[[Work], None] | None = None,
) -> Results:
    """Decompose this rank's share of a plan, most expensive matrix first, and return rows in the plan's order.

    On the CPU one worker thread a core, each with one BLAS thread: small eigenproblems do not profit from more. A
    matrix that cannot be done becomes `Skipped`; the others go on. `ahead` holds what a head start has done or is
    doing. `progress` is called, in this thread, after each matrix.
    """
    started = time.perf_counter()
    spectra = ahead.take_over() if ahead is not None else {}
    device = pick_device(plan.settings.device)
    places = {plan.works[index]: index for index in plan.shards[rank]}
    works = [work for work in places if _entries(work.ref) not in spectra]
    workers = worker_count(list(places), device, source)
    outcomes: dict[int, Outcome] = {}
    with worker_pool(workers, len(places)) as pool, reading_ahead(source, works) as reads:
        done = [work for work in places if _entries(work.ref) in spectra]
        futures = {
            pool.submit(_do, reads, plan, work, device, spectra.get(_entries(work.ref))): work
            for work in (*done, *reads.works)
        }
        for future in as_completed(futures):
            outcomes[places[futures[future]]] = future.result()
            if progress is not None:
                progress(futures[future])
    ordered = [outcomes[index] for index in sorted(outcomes)]
    return Results(
        matrices=tuple(o for o in ordered if isinstance(o, MatrixReport)),
        skipped=tuple(piece for o in ordered if isinstance(o, tuple) for piece in o),
        aliases=tuple(o for o in ordered if isinstance(o, Alias)),
        environment=environment(device, workers, source),
        timing={"execute": time.perf_counter() - started},
    )


def _entries(ref: MatrixRef) -> tuple[Any, ...]:
    """Which stored entries form the matrix: two that agree here have the same singular values."""
    return ref.tensors, ref.stored, ref.expert, ref.rows, ref.low_rank


def _spectrum(reads: ReadAhead, work: Work, device: torch.device) -> tuple[Spectrum, Rounding]:
    with reads.taking(work):
        stored = read_stored(reads, work.ref)
        return spectrum_for(work, _moved(stored, device).matrix), stored.rounding


def _moved(stored: Stored, device: torch.device) -> Stored:
    return stored if isinstance(stored.matrix, Factored) else replace(stored, matrix=stored.matrix.to(device))


def _do(reads: ReadAhead, plan: Plan, work: Work, device: torch.device, begun: Begun | None) -> Outcome:
    ref = work.ref
    if begun is not None and ref.tied_to is None and plan.settings.metric == "identity" and begun.exception() is None:
        return to_row(ref, *begun.result(), kernel=work.kernel)
    try:
        with reads.taking(work):
            return _measured(reads, plan, work, read_stored(reads, ref), device)
    except (NoDataError, ValueError) as error:  # no data, or packed tensors that do not fit together
        return _skipped(ref, str(error))
    except (SourceError, FormatError) as error:  # the file is gone, or damaged since: what is done stays done
        return _skipped(ref, f"{UNREAD}: {error}")


def _skipped(ref: MatrixRef, reason: str) -> tuple[Skipped, ...]:
    return tuple(Skipped(name, shape, reason) for name, shape in pieces(ref))


def _measured(source: Source, plan: Plan, work: Work, stored: Stored, device: torch.device) -> Outcome:
    ref, w = work.ref, stored.matrix
    if ref.tied_to is not None and isinstance(w, torch.Tensor) and torch.equal(w, _repeated(source, plan, ref)):
        return Alias(ref.name, ref.tied_to, ref.shape, stored=True)
    try:
        return measure(source, work, _moved(stored, device), metric=plan.settings.metric)
    except ValueError as error:  # NaN or infinity, in the matrix or in the gain that feeds it
        if isinstance(w, Factored):
            return _skipped(ref, str(error))
        bad = int(w.numel() - torch.isfinite(w).sum().item())
        part = f"{ref.part}: " if ref.part else ""
        return _skipped(ref, f"{part}{error}" + (f" ({bad} of {w.numel()} entries)" if bad else ""))


def _repeated(source: Source, plan: Plan, ref: MatrixRef) -> torch.Tensor:
    """The matrix that `ref` is tied to, in the orientation of `ref`."""
    of = next(tensor for tensor in source.tensors if tensor.name == ref.tied_to)
    value = source.read(of)
    return value.T if ref.transposed else value


def environment(device: torch.device, workers: int, *sources: Source) -> dict[str, Any]:
    """What ran the work: versions, device and threads, and what was fetched from the Hub."""
    import transformers

    links = [s.connection for s in sources if isinstance(s, FileSource) and s.connection is not None]
    fetched = {
        "bytes_fetched": sum(link.bytes_fetched for link in links),
        "files_touched": sum(len(link.files_touched) for link in links),
    }
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": 1,
        "threads": workers,
        **(fetched if links else {}),
    }
