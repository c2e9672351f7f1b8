"""Reading ahead: the bytes of the next matrices are on their way while the present ones are decomposed."""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lmd_hf.changes import Pair
from lmd_hf.records import MatrixRef, TensorRef, Work
from lmd_hf.weights.source import Source


READERS = 8  # enough small reads at one time to hide the latency of each
ROOM = 16 * 2**20  # bytes read ahead, or one read if that is longer


@dataclass(frozen=True)
class Span:
    """Rows start…stop of one stored tensor."""

    tensor: TensorRef
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """What reading it costs."""
        return (self.tensor.stop - self.tensor.start) * (self.stop - self.start) // max(1, self.tensor.shape[0])


def spans(ref: MatrixRef) -> list[Span]:
    """The rows of each stored tensor that a matrix needs: its expert's, those its slices reach over, or all."""
    found = []
    for tensor in ref.tensors:
        if not tensor.shape or math.prod(tensor.shape) == 0:
            continue
        start, stop = 0, tensor.shape[0]
        if ref.expert is not None and stop == ref.tensors[0].shape[0]:
            start, stop = ref.expert, ref.expert + 1
        elif ref.rows and not ref.transposed and ref.stored == "plain":
            start, stop = min(row[0] for row in ref.rows), max(row[1] for row in ref.rows)
        found.append(Span(tensor, start, stop))
    return found


def merged(wanted: Iterable[Span]) -> list[Span]:
    """The same rows with none named twice: the parts of an interleaved projection overlap, and are read once."""
    result: list[Span] = []
    for span in sorted(wanted, key=lambda span: (span.tensor.file, span.tensor.start, span.tensor.name, span.start)):
        last = result[-1] if result else None
        if last is not None and last.tensor == span.tensor and span.start < last.stop:
            result[-1] = Span(last.tensor, last.start, max(last.stop, span.stop))
        else:
            result.append(span)
    return result


class ReadAhead:
    """A source whose reads begin before they are asked for: in the order of `works`, which puts those together that
    share what they read, and no more than `ROOM` bytes ahead of the works that were taken up. What is read is let go
    when the last work that needs it is done.

    `refs` tells the matrix that each work reads of this source. Works must be taken up in the order of `works`.
    """

    def __init__(self, source: Source, refs: Mapping[Any, MatrixRef]) -> None:
        self.identity, self.config, self.module = source.identity, source.config, source.module
        self.tensors, self.shared, self.notes = source.tensors, source.shared, source.notes
        self.updates = source.updates
        self._source = source
        self._homes: dict[TensorRef, list[Span]] = {}
        for span in merged(span for ref in refs.values() for span in spans(ref)):
            self._homes.setdefault(span.tensor, []).append(span)
        self.needs = {work: {home for span in spans(ref) if (home := self._home(span))} for work, ref in refs.items()}
        self.works = gathered(self.needs)
        self._users = Counter(need for needs in self.needs.values() for need in needs)
        self._reads: dict[Span, Future[Tensor]] = {}
        self._ahead: set[Span] = set()  # begun for works that nobody has taken up yet
        self._taken: set[Span] = set()
        self._closed = False
        self._change = threading.Condition()

    def _home(self, span: Span) -> Span | None:
        """What is read in one go and holds that span, if anything does."""
        homes = self._homes.get(span.tensor, ())
        return next((home for home in homes if home.start <= span.start and span.stop <= home.stop), None)

    def read(self, tensor: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start…stop, from what was read ahead where it was."""
        span = Span(tensor, start, tensor.shape[0] if stop is None and tensor.shape else stop or 0)
        home = self._home(span)
        future = self._reads.get(home) if home is not None else None
        if home is None or future is None:
            return self._source.read(tensor, start, stop)
        return future.result()[span.start - home.start : span.stop - home.start]

    @contextmanager
    def taking(self, work: Any) -> Iterator[None]:
        """Take a work up: its reads are no longer ahead, and are let go of afterwards."""
        needs = self.needs.get(work, set())
        with self._change:
            self._taken |= needs
            self._ahead -= needs
            self._change.notify_all()
            self._change.wait_for(lambda: self._closed or needs <= self._reads.keys())
        try:
            yield
        finally:
            with self._change:
                self._users.subtract(needs)
                for need in needs:
                    if not self._users[need]:
                        self._reads.pop(need, None)

    def begun(self, work: Any) -> bool:
        """Whether every byte of a work has arrived or is on its way."""
        return self.needs[work] <= self._reads.keys()

    def order(self) -> list[Span]:
        """All that is read, in the order in which the works need it."""
        return list(dict.fromkeys(need for work in self.works for need in self.needs[work]))

    def close(self) -> None:
        """Begin no further read."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def feed(self, pool: ThreadPoolExecutor) -> None:
        """Begin every read, in order, each as soon as there is room."""
        for span in self.order():
            with self._change:
                self._change.wait_for(partial(self._may_begin, span))
                if self._closed:
                    return
                self._reads[span] = pool.submit(self._source.read, span.tensor, span.start, span.stop)
                if span not in self._taken:
                    self._ahead.add(span)
                self._change.notify_all()

    def _may_begin(self, span: Span) -> bool:
        if self._closed or span in self._taken or not self._ahead:
            return True
        return span.bytes + sum(ahead.bytes for ahead in self._ahead) <= ROOM


def gathered(*needs: Mapping[Any, set[Span]]) -> list[Any]:
    """The works in their order, but for those that need what an earlier one needs, in any of the sources: they follow
    it."""
    first: dict[tuple[int, Span], int] = {}
    found: dict[Any, int] = {}
    for place, work in enumerate(needs[0]):
        wanted = [(side, need) for side, of in enumerate(needs) for need in of[work]]
        for need in wanted:
            first.setdefault(need, place)
        found[work] = min((first[need] for need in wanted), default=0)
    return sorted(found, key=lambda work: found[work])


@contextmanager
def reading_ahead(source: Source, works: Sequence[Work]) -> Iterator[ReadAhead]:
    """The works' reads, begun in the background until the block ends."""
    reads = ReadAhead(source, {work: work.ref for work in works})
    with _feeding(reads):
        yield reads


@contextmanager
def reading_pairs(base: Source, tuned: Source, pairs: Sequence[Pair]) -> Iterator[tuple[ReadAhead, ReadAhead]]:
    """As `reading_ahead`, of two models at once, which have one order."""
    left, right = ReadAhead(base, {p: p.base for p in pairs}), ReadAhead(tuned, {p: p.tuned for p in pairs})
    left.works = right.works = gathered(left.needs, right.needs)
    with _feeding(left), _feeding(right):
        yield left, right


@contextmanager
def _feeding(reads: ReadAhead) -> Iterator[None]:
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="lmd_hf.read")
    threading.Thread(target=reads.feed, args=(pool,), daemon=True).start()
    try:
        yield
    finally:
        reads.close()
        pool.shutdown(wait=False, cancel_futures=True)
