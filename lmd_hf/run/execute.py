"""Doing the work: the only place where tensors live. One rank is a world of one."""

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmd_hf.errors import FormatError, NoDataError, SourceError
from lmd_hf.matrix.batched import exact_each
from lmd_hf.matrix.kernels import count_unfit
from lmd_hf.matrix.metrics import Metric, norm
from lmd_hf.matrix.spectrum import Spectrum
from lmd_hf.records import UNREAD, Alias, Factored, MatrixRef, MatrixReport, Plan, Results, Skipped, Work
from lmd_hf.run.factors import is_written, write_factors
from lmd_hf.run.in_data import Round, Sight, input_metric, measure_in_data, rounds
from lmd_hf.run.journal import PLACE, Journal, Keys, content_key, place_key
from lmd_hf.run.measure import Spectra, measure, procedure, read_metric, to_row
from lmd_hf.run.read_ahead import ReadAhead, reading_ahead
from lmd_hf.run.shares import batched
from lmd_hf.run.sums import Sums, shared_sums
from lmd_hf.run.workers import BATCHED_ON, pick_devices, upload, with_room, worker_count, worker_pool
from lmd_hf.run.world import World
from lmd_hf.weights.inventory import pieces
from lmd_hf.weights.source import FileSource, Source
from lmd_hf.weights.stored import Stored, read_stored


T = TypeVar("T")
Outcome = MatrixReport | tuple[Skipped, ...] | Alias
Begun = Future[Spectra]


@dataclass(frozen=True)
class HeadStart:
    """Spectra under way, by `_entries`, and the reads that feed them."""

    spectra: dict[Any, tuple[Work, Begun]]
    reads: ReadAhead

    def take_over(self) -> dict[Any, Begun]:
        """Begin nothing more; what remains is done, under way, or has its bytes here or on their way."""
        self.reads.close()
        kept = {key: future for key, (work, future) in self.spectra.items() if self.reads.begun(work)}
        rest = {key: future for key, (_, future) in self.spectra.items() if key not in kept and not future.cancel()}
        return kept | rest


def unfinished(plan: Plan, source: Source, journal: Journal) -> list[Work]:
    """The works of a plan for one rank that have to be read, in its order."""
    return Bench(plan, source, Output(journal), pick_devices(plan.settings.device)).unfinished()


@contextmanager
def head_start(plan: Plan, source: Source, journal: Journal) -> Iterator[HeadStart]:
    """Spectra of a provisional plan, computed in the background until `execute` takes over with the final one.

    A spectrum depends on which entries of a stored tensor form the matrix, not on role or orientation, so what was
    planned from names alone stays valid wherever the final plan cuts the same matrix.
    """
    bench = Bench(plan, source, Output(journal), pick_devices(plan.settings.device))
    works = bench.unfinished()
    workers = worker_count(works, bench.devices, source)
    with worker_pool(workers, len(works), bench.devices) as pool, reading_ahead(source, works) as reads:
        yield HeadStart({_entries(w.ref): (w, pool.submit(bench.spectra, reads, w)) for w in reads.works}, reads)


@dataclass(frozen=True)
class Output:
    """What is written when a matrix is finished: its spectrum, and its factors where there is a folder for them."""

    journal: Journal = field(default_factory=Journal)
    factors: Path | None = None


@dataclass(frozen=True)
class Share:
    """What one rank has done: outcomes by their place in the plan, and what it cost."""

    outcomes: dict[int, Outcome]
    reused: int


def execute(
    plan: Plan,
    source: Source,
    *,
    world: World | None = None,
    output: Output | None = None,
    ahead: HeadStart | None = None,
    progress: Callable[[Work], None] | None = None,
) -> Results:
    """Decompose this rank's share of a plan, most expensive matrix first, gather the others' and return rows in the
    plan's order; on every rank the same.

    The pieces of matrices that are cut come first, so that their owners, who take those up last, need not wait. On the
    CPU one worker thread a core, each with one BLAS thread: small eigenproblems do not profit from more. A
    matrix that cannot be done becomes `Skipped`; the others go on. What the journal of `output` holds is not computed
    again, nor read where its file's hash is known; `ahead` holds what a head start has done or is doing.
    `progress` is called, in this thread, after each matrix. In the metric `data` the model runs first, and again where
    its inputs do not fit the memory at one time; nothing of that is journalled.
    """
    started = time.perf_counter()
    world = world or World()
    bench = Bench(plan, source, output or Output(), pick_devices(plan.settings.device))
    indices = plan.shards[world.rank]
    shares: list[Share] = []
    notes: list[str] = []
    decomposing = 0.0
    for sighted in rounds(plan, source, bench.device, world):
        begun = time.perf_counter()
        notes += sighted.notes
        with shared_sums(plan, bench.is_known, source, world=world, device=bench.device) as sums:
            shares.append(world.together(partial(_do_round, bench, sighted, indices, sums, ahead, progress)))
        decomposing += time.perf_counter() - begun
    workers = worker_count([plan.works[index] for index in indices], bench.devices, source)
    results = _results(world.gather(_merged(shares)), environment(bench.devices, workers))
    timing = {} if plan.settings.data is None else {"run": time.perf_counter() - started - decomposing}
    timing["execute"] = decomposing
    return replace(results, timing=timing, notes=(*notes, *_unseen(results.matrices)))


def _do_round(
    bench: "Bench",
    sighted: Round,
    indices: tuple[int, ...],
    sums: Sums,
    ahead: HeadStart | None,
    progress: Callable[[Work], None] | None,
) -> Share:
    """This rank's matrices of one round; last, one after the other, those that others have helped with."""
    mine = tuple(index for index in indices if index in sighted.indices and index not in sums.mine)
    bench = replace(bench, sights=sighted.seen)
    shares = [_do(bench, mine, ahead.take_over() if ahead is not None else {}, progress)]
    for index in sums.mine:
        helped = replace(bench, grams={bench.plan.works[index]: sums.of(index)})
        shares.append(_do(helped, (index,), {}, progress))
    return _merged(shares)


def _merged(shares: list[Share]) -> Share:
    """The shares of one rank, of one round after the other; what was reused is counted from the beginning."""
    outcomes = {index: outcome for share in shares for index, outcome in share.outcomes.items()}
    return replace(shares[-1], outcomes=outcomes)


def _unseen(matrices: tuple[MatrixReport, ...]) -> tuple[str, ...]:
    """In which rows, and why, the metric `data` is not what it is."""
    counts = Counter(matrix.metric_note for matrix in matrices if matrix.metric_note is not None)
    return tuple(f"identity metric for {count} of {len(matrices)} matrices: {why}" for why, count in counts.items())


def _do(
    bench: "Bench", indices: tuple[int, ...], begun: dict[Any, Begun], progress: Callable[[Work], None] | None
) -> Share:
    places = {bench.plan.works[index]: index for index in indices}
    ready = {work for work in places if _entries(work.ref) in begun or bench.is_finished(work)}
    works = [work for work in places if work not in ready]
    outcomes: dict[int, Outcome] = {}
    workers = worker_count(list(places), bench.devices, bench.source)
    with worker_pool(workers, len(places), bench.devices) as pool, reading_ahead(bench.source, works) as reads:
        jobs: list[tuple[tuple[Work, ...], Begun | None]]
        jobs = [((work,), begun.get(_entries(work.ref))) for work in places if work in ready]
        jobs += [(batch, None) for batch in bench.batches(reads.works)]
        futures = {pool.submit(bench.outcomes, reads, batch, known): batch for batch, known in jobs}
        for future in as_completed(futures):
            for work, outcome in zip(futures[future], future.result(), strict=True):
                outcomes[places[work]] = outcome
                if progress is not None:
                    progress(work)
    return Share(outcomes, bench.output.journal.reused)


def _results(shares: list[Share], here: dict[str, Any]) -> Results:
    outcomes = {index: outcome for share in shares for index, outcome in share.outcomes.items()}
    ordered = [outcomes[index] for index in sorted(outcomes)]
    totals = {"processes": len(shares), "reused": sum(share.reused for share in shares)}
    return Results(
        matrices=tuple(o for o in ordered if isinstance(o, MatrixReport)),
        skipped=tuple(piece for o in ordered if isinstance(o, tuple) for piece in o),
        aliases=tuple(o for o in ordered if isinstance(o, Alias)),
        environment=here | totals,
        timing={},
    )


def _entries(ref: MatrixRef) -> tuple[Any, ...]:
    """Which stored entries form the matrix: two that agree here have the same singular values."""
    return ref.tensors, ref.stored, ref.expert, ref.rows, ref.low_rank


@dataclass(frozen=True)
class Bench:
    """Where one matrix is worked on: read, compared with the journal, decomposed, journalled."""

    plan: Plan
    source: Source
    output: Output
    devices: tuple[torch.device, ...]
    sights: dict[Work, Sight] = field(default_factory=dict)
    grams: dict[Work, torch.Tensor | None] = field(default_factory=dict)
    found: dict[Work, Spectrum] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The first of the devices, which are all of one type."""
        return self.devices[0]

    @cached_property
    def _hashes(self) -> dict[str, str | None]:
        return {file.name: file.sha256 for file in self.source.identity.files}

    def place(self, work: Work) -> str:
        """The journal's key of a matrix that has not been read."""
        return place_key(work.ref, self._hashes, self.plan.settings.metric, procedure(work), self.device)

    def is_finished(self, work: Work) -> bool:
        """Whether the journal holds it for sure. Of a matrix that may repeat another, only reading tells."""
        place = self.place(work)
        return work.ref.tied_to is None and self.output.journal.has(place) and self._has_factors(work.ref, place)

    def is_known(self, work: Work) -> bool:
        """As `is_finished`; where no hash tells the place, by the entries themselves, if anything was ever kept."""
        if self.place(work) != PLACE or not self.output.journal.places:
            return self.is_finished(work)
        stored = _or_skipped(work.ref, partial(read_stored, self.source, work.ref))
        if not isinstance(stored, Stored):
            return False
        key = content_key(work.ref, stored, None, procedure(work), self.device)
        return self.output.journal.has(key) and self._has_factors(work.ref, key)

    def unfinished(self) -> list[Work]:
        """Those of one rank that have to be read, in the plan's order."""
        return [work for index in self.plan.shards[0] if not self.is_finished(work := self.plan.works[index])]

    def spectra(self, reads: ReadAhead, work: Work) -> Spectra:
        """Of one matrix, which is read for it."""
        with reads.taking(work):
            return self._decomposed(reads, work, read_stored(reads, work.ref))

    def outcome(self, reads: ReadAhead, work: Work, begun: Begun | None) -> Outcome:
        """The row of one matrix, or why there is none; `begun` holds its spectra where a head start has them."""
        ref = work.ref
        if begun is not None and ref.tied_to is None and self._is_identity() and begun.exception() is None:
            return to_row(ref, begun.result(), kernel=work.kernel)
        if self.is_finished(work) and (kept := self.output.journal.find(self.place(work))):
            return to_row(ref, kept, kernel=work.kernel)
        with reads.taking(work):
            return _or_skipped(ref, lambda: self._measured(reads, work, read_stored(reads, ref)))

    def batches(self, works: Sequence[Work]) -> list[tuple[Work, ...]]:
        """The works in their order, small ones of one shape together where the device is one that they do not fill."""
        together = self.device.type in BATCHED_ON and self._is_identity()
        return batched(works) if together else [(work,) for work in works]

    def outcomes(self, reads: ReadAhead, batch: tuple[Work, ...], begun: Begun | None = None) -> list[Outcome]:
        """The row of one matrix, or the rows of several of one shape, whose spectra are found at once."""
        if len(batch) == 1:
            return [self.outcome(reads, batch[0], begun)]
        with ExitStack() as taken:
            for work in batch:
                taken.enter_context(reads.taking(work))
            read = {work: _or_skipped(work.ref, partial(read_stored, reads, work.ref)) for work in batch}
            stored = {work: each for work, each in read.items() if isinstance(each, Stored)}
            dense = {w: s.matrix for w, s in stored.items() if isinstance(s.matrix, torch.Tensor)}
            helped = replace(self, found=self._found(dense))
            return [
                _or_skipped(work.ref, partial(helped._measured, reads, work, each))
                if isinstance(each, Stored)
                else each
                for work, each in read.items()
            ]

    def _found(self, dense: dict[Work, torch.Tensor]) -> dict[Work, Spectrum]:
        """The spectra of matrices of one shape, but for those that hold no numbers."""
        spectra = with_room(lambda device: _at_once(list(dense.values()), device), self.device)
        return {work: each for work, each in zip(dense, spectra, strict=True) if isinstance(each, Spectrum)}

    def _is_identity(self) -> bool:
        return self.plan.settings.metric == "identity"

    def _measured(self, reads: ReadAhead, work: Work, stored: Stored) -> Outcome:
        ref, w = work.ref, stored.matrix
        if ref.tied_to is not None and isinstance(w, torch.Tensor) and torch.equal(w, _repeated(reads, ref, w.device)):
            return Alias(ref.name, ref.tied_to, ref.shape, stored=True)
        try:
            return to_row(ref, self._decomposed(reads, work, stored), kernel=work.kernel)
        except ValueError as error:  # NaN or infinity, in the matrix or in the gain that feeds it
            if isinstance(w, Factored):
                return _skipped(ref, str(error))
            part, bad = f"{ref.part}: " if ref.part else "", count_unfit(w)
            return _skipped(ref, f"{part}{error}" + (f" ({bad} of {w.numel()} entries)" if bad else ""))

    def _decomposed(self, reads: ReadAhead, work: Work, stored: Stored) -> Spectra:
        if self.plan.settings.data is not None:
            return self._in_data(work, stored)
        gain = read_metric(reads, work.ref, self.plan.settings.metric)
        journal = self.output.journal
        if journal.folder is None and self.output.factors is None:
            return self._computed(work, stored, gain)
        keys = Keys(content_key(work.ref, stored, gain, procedure(work), self.device), self.place(work))
        spectra = journal.find(keys.content)
        if spectra is None:
            spectra = self._computed(work, stored, gain)
            journal.add(keys, spectra)
        self._write_factors(work.ref, stored, None if gain is None else norm(gain), keys)
        return spectra

    def _computed(self, work: Work, stored: Stored, gain: torch.Tensor | None) -> Spectra:
        if work in self.found:
            return Spectra(self.found[work], None, stored.rounding)
        gram = self.grams.pop(work, None)
        return with_room(lambda device: measure(work, _moved(stored, device), gain, gram=gram), self.device)

    def _in_data(self, work: Work, stored: Stored) -> Spectra:
        sight = self.sights[work]
        spectra = with_room(lambda device: measure_in_data(work, _moved(stored, device), sight), self.device)
        metric = input_metric(sight) if spectra.metric == "data" else None
        told = None if metric is None else metric.power_times(1.0, torch.eye(work.ref.shape[1], dtype=torch.float64))
        if self.output.factors is not None:
            key = content_key(work.ref, stored, told, procedure(work), self.device)
            self._write_factors(work.ref, stored, metric, Keys(key, PLACE))
        return spectra

    def _has_factors(self, ref: MatrixRef, key: str) -> bool:
        folder, rank = self.output.factors, self.plan.settings.rank
        return folder is None or is_written(folder, ref, rank, key)

    def _write_factors(self, ref: MatrixRef, stored: Stored, metric: Metric | None, keys: Keys) -> None:
        if self.output.factors is not None and not self._has_factors(ref, keys.content):
            rank, told = self.plan.settings.rank, (keys.content, keys.place)
            folder = self.output.factors
            with_room(
                lambda device: write_factors(folder, ref, _moved(stored, device), metric, rank=rank, keys=told),
                self.device,
            )


def _moved(stored: Stored, device: torch.device) -> Stored:
    return stored if isinstance(stored.matrix, Factored) else replace(stored, matrix=upload(stored.matrix, device))


def _at_once(matrices: list[torch.Tensor], device: torch.device) -> list[Spectrum | ValueError]:
    return exact_each([upload(w, device) for w in matrices]) if matrices else []


def _or_skipped(ref: MatrixRef, step: Callable[[], T]) -> T | tuple[Skipped, ...]:
    """What a step gives, or why a matrix has none."""
    try:
        return step()
    except (NoDataError, ValueError) as error:  # no data, or packed tensors that do not fit together
        return _skipped(ref, str(error))
    except (SourceError, FormatError) as error:  # the file is gone, or damaged since: what is done stays done
        return _skipped(ref, f"{UNREAD}: {error}")


def _skipped(ref: MatrixRef, reason: str) -> tuple[Skipped, ...]:
    return tuple(Skipped(name, shape, reason) for name, shape in pieces(ref))


def _repeated(source: Source, ref: MatrixRef, device: torch.device) -> torch.Tensor:
    """The matrix that `ref` is tied to, in the orientation of `ref`."""
    of = next(tensor for tensor in source.tensors if tensor.name == ref.tied_to)
    value = source.read(of).to(device)
    return value.T if ref.transposed else value


def environment(devices: tuple[torch.device, ...], workers: int) -> dict[str, Any]:
    """What ran the work: versions, devices and threads."""
    names = Counter(torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),  # importing it would take seconds
        "device": ", ".join(f"{count} × {name}" if count > 1 else name for name, count in names.items()),
        "processes": 1,
        "threads": workers,
    }


def traffic(*sources: Source, world: World | None = None) -> dict[str, int]:
    """What all ranks have fetched of the sources from the Hub by now, and of how many files; {} where none is there."""
    links = {id(s.connection): s.connection for s in sources if isinstance(s, FileSource) and s.connection}.values()
    mine = [(link.bytes_fetched, frozenset(link.files_touched)) for link in links]
    shares = (world or World()).gather(mine)
    if not links:
        return {}
    touched = [frozenset().union(*(share[i][1] for share in shares)) for i in range(len(links))]
    return {
        "bytes_fetched": sum(fetched for share in shares for fetched, _ in share),
        "files_touched": sum(map(len, touched)),
    }
