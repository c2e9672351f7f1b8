"""Who does what: every matrix has a rank that owns it, a large one may be summed by several, and small ones of one
shape may be done at once. Pure.

Loads are floating-point operations.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmd_hf.matrix.cost import eigen_flops, gram_flops
from lmd_hf.records import Piece, Settings, Work
from lmd_hf.weights.stored import lies_in_rows


EVEN = 0.05  # imbalance up to which nothing is cut: busiest rank over the mean, minus one
GRAIN = 1024  # rows in a piece, at least and in steps: sending a k × k sum takes as long as making some 500 rows of it
LEAST_FLOPS = 2e9  # of a matrix, to be cut: less than that is done before it could be shared
CUTTABLE = ("F32", "F16", "BF16")  # float64 is scaled by its largest entry, which no piece knows

BATCH_SIDE = 128  # short side up to which many at once pay on a GPU: benchmarks/gpu.py --batches
BATCH_BYTES = 2**28

Shards = tuple[tuple[int, ...], ...]
Pieces = tuple[tuple[Piece, ...], ...]


@dataclass(order=True)
class _Level:
    """What a rank has to do so far; ranks compare by load."""

    load: float
    rank: int


def share_out(works: Sequence[Work], settings: Settings, ranks: int, *, distant: bool = False) -> tuple[Shards, Pieces]:
    """(whose each matrix is, what is cut of some of them), by index into `works`, for each rank.

    Longest processing time first: always the next most expensive matrix to the least loaded rank. Where that leaves the
    busiest rank more than `EVEN` above the mean, what would not fit below that is cut: its owner keeps the eigenvalues,
    and the Gram product of its long side is shared among the ranks that are below the mean. Of `distant` files, which
    are fetched, only what can be fetched in pieces is cut.
    """
    whole = _longest_first(works, ranks, cuttable=frozenset(), limit=float("inf"))[0]
    nothing: Pieces = ((),) * ranks
    if not works or imbalance(loads(works, whole, nothing)) <= EVEN:
        return whole, nothing
    able = [_can_cut(work) and (lies_in_rows(work.ref) or not distant) for work in works]
    cuttable = frozenset(index for index in range(len(works)) if settings.metric == "identity" and able[index])
    mean = sum(work.flops for work in works) / ranks
    owners, cut, levels = _longest_first(works, ranks, cuttable=cuttable, limit=(1 + EVEN) * mean)
    pieces = _filled(works, cut, levels, mean)
    shared = loads(works, owners, pieces)
    return (owners, pieces) if max(shared) < max(loads(works, whole, nothing)) else (whole, nothing)


def loads(works: Sequence[Work], shards: Shards, pieces: Pieces) -> list[float]:
    """What each rank has to do."""
    cut = {piece.work for mine in pieces for piece in mine}
    return [
        sum(eigen_flops(min(works[i].ref.shape)) if i in cut else works[i].flops for i in owned)
        + sum(gram_flops(piece.stop - piece.start, min(works[piece.work].ref.shape)) for piece in mine)
        for owned, mine in zip(shards, pieces, strict=True)
    ]


def imbalance(loads: Iterable[float]) -> float:
    """Busiest rank over the mean, minus one."""
    values = list(loads)
    mean = sum(values) / len(values)
    return max(values) / mean - 1 if mean else 0.0


def _can_cut(work: Work) -> bool:
    ref = work.ref
    plain = ref.stored == "plain" and ref.low_rank is None and ref.dtype in CUTTABLE and ref.tied_to is None
    return plain and work.kernel == "exact" and max(ref.shape) >= 2 * GRAIN and work.flops >= LEAST_FLOPS


def _longest_first(
    works: Sequence[Work], ranks: int, *, cuttable: frozenset[int], limit: float
) -> tuple[Shards, list[int], list[_Level]]:
    """(owners, what was cut because it would have passed the limit, and how loaded each rank is without its sums)."""
    levels = [_Level(0.0, rank) for rank in range(ranks)]
    shards: list[list[int]] = [[] for _ in range(ranks)]
    cut: list[int] = []
    for index in sorted(range(len(works)), key=lambda i: (-works[i].flops, i)):
        level = heapq.heappop(levels)
        shards[level.rank].append(index)
        if index in cuttable and level.load + works[index].flops > limit:
            cut.append(index)
            level.load += eigen_flops(min(works[index].ref.shape))
        else:
            level.load += works[index].flops
        heapq.heappush(levels, level)
    return tuple(map(tuple, shards)), cut, levels


def _filled(works: Sequence[Work], cut: list[int], levels: list[_Level], mean: float) -> Pieces:
    """The sums, in pieces that fill the least loaded rank up to the mean, then the next."""
    pieces: list[list[Piece]] = [[] for _ in levels]
    heapq.heapify(levels)
    for index in cut:
        long, short = max(works[index].ref.shape), min(works[index].ref.shape)
        start = 0
        while start < long:
            level = heapq.heappop(levels)
            room = round((mean - level.load) / gram_flops(GRAIN, short))
            stop = start + GRAIN * max(1, room)
            stop = long if long - stop < GRAIN else stop
            pieces[level.rank].append(Piece(index, start, stop))
            level.load += gram_flops(stop - start, short)
            heapq.heappush(levels, level)
            start = stop
    return tuple(map(tuple, pieces))


def batched(works: Sequence[Work]) -> list[tuple[Work, ...]]:
    """The works in their order, runs of small ones of one shape in batches of `BATCH_BYTES` in memory."""
    batches: list[list[Work]] = []
    for work in works:
        last = batches[-1] if batches else []
        alike = last and _is_small(work) and _is_small(last[0]) and last[0].ref.shape == work.ref.shape
        if alike and sum(each.bytes for each in (*last, work)) <= BATCH_BYTES:
            last.append(work)
        else:
            batches.append([work])
    return [tuple(batch) for batch in batches]


def _is_small(work: Work) -> bool:
    return work.kernel == "exact" and min(work.ref.shape) <= BATCH_SIDE and work.ref.low_rank is None
