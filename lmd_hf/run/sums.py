"""Gram products that several ranks share: each sums its rows of the long side and sends the sum to the matrix's owner.

Sums are sent at once and received when their owner has done all else, so no rank waits for one that waits. A rank that
cannot read its rows says so in place of the sum; the owner then sums the whole by itself, and finds the reason.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lmd_hf.errors import FormatError, SourceError
from lmd_hf.matrix.kernels import lower_gram
from lmd_hf.records import Piece, Plan, Work
from lmd_hf.run.workers import upload, with_room, worker_pool
from lmd_hf.run.world import World
from lmd_hf.weights.source import Source
from lmd_hf.weights.stored import read_long


ROWS = 1024  # of a k × k sum in one message


@dataclass(frozen=True)
class Sums:
    """The shared sums of this rank's own matrices, `mine`; `kept` holds what this rank has summed of them."""

    plan: Plan
    world: World
    mine: tuple[int, ...]
    kept: dict[Piece, Tensor | None]

    def of(self, index: int) -> Tensor | None:
        """The Gram matrix (its lower triangle), once every piece is there; `None` if one of them could not be summed.
        To be asked for in the order of `mine`."""
        short = min(self.plan.works[index].ref.shape)
        gram, complete = torch.zeros(short, short, dtype=torch.float64), True
        for rank, pieces in enumerate(self.plan.pieces):
            for piece in (piece for piece in pieces if piece.work == index):
                own = rank == self.world.rank
                complete &= self._keep(gram, piece) if own else self._receive(gram, rank)
        return gram if complete else None

    def _keep(self, gram: Tensor, piece: Piece) -> bool:
        part = self.kept.pop(piece)
        if part is not None:
            gram += part
        return part is not None

    def _receive(self, gram: Tensor, rank: int) -> bool:
        if not self.world.receive(torch.empty(1, dtype=torch.int64), rank).item():
            return False
        for block in _blocks(gram):
            block += self.world.receive(torch.empty(block.shape, dtype=torch.float64), rank)
        return True


@contextmanager
def shared_sums(
    plan: Plan, is_known: Callable[[Work], bool], source: Source, *, world: World, device: torch.device
) -> Iterator[Sums]:
    """This rank's pieces, summed and on their way to the owners. All ranks enter, and leave after the owners have
    received them. What its owner knows already, from its journal, is not summed again."""
    if not any(plan.pieces):
        yield Sums(plan, world, (), {})
        return
    cut = {piece.work for pieces in plan.pieces for piece in pieces}
    owned = [i for i in plan.shards[world.rank] if i in cut and not is_known(plan.works[i])]
    owners = {index: rank for rank, indices in enumerate(world.gather(owned)) for index in indices}
    kept: dict[Piece, Tensor | None] = {}
    sending: list[Callable[[], None]] = []
    wanted = [piece for piece in plan.pieces[world.rank] if piece.work in owners]
    for piece in sorted(wanted, key=lambda piece: _turn(piece, plan, owners)):
        part = _summed(plan.works[piece.work], piece, source, device)
        if owners[piece.work] == world.rank:
            kept[piece] = part
        else:
            messages = [torch.tensor([0 if part is None else 1])]
            messages += [] if part is None else [block.contiguous() for block in _blocks(part)]
            sending += [world.send(message, owners[piece.work]) for message in messages]
    yield Sums(plan, world, tuple(owned), kept)
    for arrived in sending:
        arrived()


def _turn(piece: Piece, plan: Plan, owners: dict[int, int]) -> tuple[int, int]:
    """When a piece is sent: as its owner asks for it."""
    return plan.shards[owners[piece.work]].index(piece.work), piece.start


def _summed(work: Work, piece: Piece, source: Source, device: torch.device) -> Tensor | None:
    """The lower triangle of this piece's Gram product, in main memory; `None` where its rows cannot be read."""
    try:
        rows = read_long(source, work.ref, piece.start, piece.stop)
        with worker_pool(1, 1) as pool:  # every core for one product; a GPU's stream stays this worker's
            step = partial(with_room, lambda where: lower_gram(upload(rows, where)).cpu(), device)
            return pool.submit(step).result()
    except (SourceError, FormatError, ValueError):
        return None


def _blocks(gram: Tensor) -> list[Tensor]:
    """The lower triangle in blocks of rows, up to the diagonal's block."""
    return [gram[start : start + ROWS, : start + ROWS] for start in range(0, len(gram), ROWS)]
