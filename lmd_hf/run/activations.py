"""What goes into the matrices while the model runs: moments and rows of their inputs, over a dataset.

A pass over the data fills accumulators for as many inputs as fit the memory; ranks share the batches, not the inputs.
Which tokens are used is drawn with a seed from each batch's place, so that neither ranks nor groups change the answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from lmd_hf.errors import SettingsError
from lmd_hf.records import Data
from lmd_hf.run.batches import Batches
from lmd_hf.run.loading import Batch, evaluating, forward
from lmd_hf.run.taps import first_tensor
from lmd_hf.run.world import World


LEAST_TOKENS = 4096  # of the sample, where its size is left to us
ROWS = {"complete": 2048, "knn": 4096}  # for neighbour graphs; the metric itself is one of them with knn
FLUSH = 1024  # rows at a time into the second moments
Drawn = tuple[Tensor, Tensor, Tensor]  # keys, rows (or their places), examples


@dataclass(frozen=True)
class Observed:
    """One input over the data: `count` rows, drawn uniformly, have this mean and this covariance, divisor `count`
    (float64; `None` where only the graph is wanted); `rows` are a uniform sample of them, of the `examples` that they
    come from."""

    count: int
    mean: Tensor
    covariance: Tensor | None
    rows: Tensor
    examples: Tensor


def passes(widths: dict[str, int], graph: str, limit: float) -> list[list[str]]:
    """The inputs (name: width), in order, in groups that fit into `limit` bytes; one wider than that is by itself."""
    groups: list[list[str]] = []
    room = 0.0
    for name, width in widths.items():
        if input_bytes(width, graph) > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= input_bytes(width, graph)
    return groups


def input_bytes(width: int, graph: str) -> int:
    """What one input takes: its moments, the metric made of them with its basis, and its rows with what is pending."""
    return 3 * 8 * width**2 + (3 * ROWS[graph] + 3 * FLUSH) * 4 * width


def observe(
    model: nn.Module, batches: Batches, inputs: Iterable[str], data: Data, *, tokens: int, world: World
) -> dict[str, Observed]:
    """One pass over the data: every named module's input, over the batches of all ranks; the same on every rank."""
    taps = {name: _Accumulator(tokens, ROWS[data.graph], moments=data.graph == "complete") for name in inputs}
    world.together(lambda: _run(model, batches, taps, world))
    return {name: tap.result(world) for name, tap in taps.items()}


def needed_tokens(widths: Iterable[int], data: Data, batches: Batches) -> int:
    """How many tokens the covariances use: `data.tokens`, or twice the widest input.

    Raises `SettingsError` where there are not more tokens than the widest input has dimensions.
    """
    widest = max(widths, default=0)
    tokens = data.tokens or max(2 * widest, LEAST_TOKENS)
    there = tokens if batches.tokens is None else min(tokens, batches.tokens)
    if there <= widest and data.tokens and data.tokens <= widest:
        raise SettingsError(f"tokens is {data.tokens}; the metric of the widest input needs {widest + 1:,} or more")
    if there <= widest:
        told = f"{data.dataset}: {batches.examples} examples give {there:,} tokens, too few for the metric"
        raise SettingsError(f"{told}: the widest input needs {widest + 1:,}; raise --samples or --seq-len")
    return tokens


@dataclass
class _Accumulator:
    """Running moments of one input and its reservoir.

    Moments are those about `shift`, the mean of the first rows: about zero, a mean that is far larger than the spread
    would leave nothing but rounding of the covariance.

    Both write into memory of their own that is taken once: rows kept piece by piece between the passes' own short-lived
    tensors would leave the heap full of holes, a gigabyte of them on a model of 90 MB.
    """

    tokens: int
    most: int
    moments: bool
    count: int = 0
    pending: int = 0
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    shift: Tensor | None = None
    total: Tensor | None = None
    squares: Tensor | None = None
    kept: "_Reservoir | None" = None

    def add(self, keys: Tensor, rows: Tensor, examples: Tensor) -> None:
        """Take in rows that were drawn, each with its key."""
        if not len(rows):
            return
        if self.kept is None or self.total is None:
            width = rows.shape[1]
            self.rows = rows.new_empty(FLUSH, width, dtype=torch.float64)
            self.shift = rows.mean(0, dtype=torch.float64)
            self.total = self.rows.new_zeros(width)
            self.squares = self.rows.new_zeros(width, width) if self.moments else None
            self.kept = _Reservoir(self.most, width)
        self.count += len(rows)
        while len(rows):
            some = min(len(rows), FLUSH - self.pending)
            self.rows[self.pending : self.pending + some] = rows[:some]
            self.pending += some
            self.kept.add(keys[:some], rows[:some], examples[:some])
            keys, rows, examples = keys[some:], rows[some:], examples[some:]
            if self.pending == FLUSH:
                self.flush()

    def flush(self) -> None:
        """Pending rows into the sums."""
        rows, self.pending = self.rows[: self.pending], 0
        if self.total is not None and self.shift is not None:
            self.total += rows.sub_(self.shift).sum(0)
        if self.squares is not None:
            _add_products(self.squares, rows)

    def result(self, world: World) -> Observed:
        """What all ranks have seen together."""
        self.flush()
        shares = world.gather((self.count, None if self.kept is None else self.kept.smallest()))
        parts = [part for _, part in shares if part is not None]
        if not parts:
            return Observed(0, torch.zeros(0), None, torch.zeros(0, 0), torch.zeros(0))
        count, width = sum(seen for seen, _ in shares), parts[0][1].shape[1]
        nothing = torch.zeros(width).double()
        total, shift = (nothing if each is None else each.cpu() for each in (self.total, self.shift))
        mean = world.add_up(total + self.count * shift) / count
        covariance = None
        if self.moments:
            squares = torch.zeros(width, width).double() if self.squares is None else self.squares.cpu()
            off, whole = shift - mean, squares.tril() + squares.tril(-1).T
            whole.addr_(total, off).addr_(off, total).addr_(off, off, alpha=self.count)  # now they are about the mean
            covariance = world.add_up(whole) / count
        self.shift = self.total = self.squares = self.kept = None
        self.rows = self.rows[:0].clone()
        keys, rows, examples = (torch.cat(each) for each in zip(*parts, strict=True))
        _, rows, examples = _smallest(keys, rows, examples, self.most)
        return Observed(count, mean, covariance, rows, examples)


class _Reservoir:
    """The rows with the smallest keys, a uniform sample that ranks can merge: at least `most` of those seen, fewer than
    twice as many and `FLUSH`."""

    def __init__(self, most: int, width: int) -> None:
        room = 2 * most + FLUSH
        self.most, self.filled = most, 0
        self.keys = torch.empty(room, dtype=torch.float64)
        self.rows = torch.empty(room, width)
        self.examples = torch.empty(room, dtype=torch.long)

    def add(self, keys: Tensor, rows: Tensor, examples: Tensor) -> None:
        """Take in at most `FLUSH` rows."""
        place = slice(self.filled, self.filled + len(rows))
        self.keys[place], self.rows[place], self.examples[place] = keys, rows, examples
        self.filled += len(rows)
        if self.filled > 2 * self.most:
            kept = self.smallest()
            self.filled = 0
            self.add(*kept)

    def smallest(self) -> Drawn:
        """What is kept, in the order of the keys."""
        seen = slice(self.filled)
        return _smallest(self.keys[seen], self.rows[seen], self.examples[seen], self.most)


def _add_products(squares: Tensor, rows: Tensor) -> None:
    """Add XᵀX to what is in the lower triangle; on a CPU to nothing else, which takes half the time."""
    if rows.device.type != "cpu":
        squares.addmm_(rows.T, rows)
        return
    from scipy.linalg.blas import dsyrk  # late: weights alone do not need it

    dsyrk(1.0, rows.numpy().T, beta=1.0, c=squares.numpy().T, overwrite_c=1)


def _smallest(keys: Tensor, rows: Tensor, examples: Tensor, most: int) -> Drawn:
    order = keys.argsort(stable=True)[:most]
    return keys[order], rows[order], examples[order]


def _run(model: nn.Module, batches: Batches, taps: dict[str, _Accumulator], world: World) -> None:
    handles = []
    try:
        current: list[_Draw] = []
        for name, tap in taps.items():
            handles.append(model.get_submodule(name).register_forward_hook(_hook(tap, current), with_kwargs=True))
        hidden = None if world.rank == 0 else True
        share = batches.share(world)
        bar = tqdm(share, total=-(-len(batches) // world.size), desc="running the model", leave=False,
                   disable=hidden, delay=2, name="lmd_hf.analyze")  # fmt: skip
        with evaluating(model):
            for index, batch in bar:
                current[:] = [_Draw(index, batch, batches)]
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _hook(tap: _Accumulator, current: list["_Draw"]) -> Any:
    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        if (x := first_tensor(args, kwargs)) is not None:
            rows = x.detach().reshape(-1, x.shape[-1])
            keys, places, examples = current[0].drawn(len(rows), tap.tokens)
            tap.add(keys, rows[places.to(rows.device)], examples)

    return take


@dataclass(frozen=True)
class _Draw:
    """Which rows of one batch are used: those whose key, uniform in [0, 1), lies below the share that is wanted."""

    index: int
    batch: Batch
    batches: Batches
    memory: dict[tuple[int, int], Drawn] = field(default_factory=dict)

    def drawn(self, rows: int, tokens: int) -> Drawn:
        """(keys, places, examples) of the rows to take, where a module sees `rows` rows of this batch.

        As many as there are places in the attention mask are tokens, and padding is left out; any other number is so
        many rows of each example, or, where that does not divide, rows of no known example.
        """
        if (rows, tokens) not in self.memory:
            self.memory[rows, tokens] = self._draw(rows, tokens)
        return self.memory[rows, tokens]

    def _draw(self, rows: int, tokens: int) -> Drawn:
        size = len(next(iter(self.batch.values())))
        keys = torch.rand(rows, generator=torch.Generator().manual_seed(self.index), dtype=torch.float64)
        each, rest = divmod(rows, size)
        examples = torch.zeros(rows, dtype=torch.long) if rest or not each else torch.arange(rows) // each
        mask = self.batch.get("attention_mask")
        if mask is not None and mask.numel() == rows:
            there = float(self.batches.tokens or 1)
            keys = keys.masked_fill(mask.flatten().cpu() == 0, 1.0)
        else:
            there = rows / size * self.batches.examples
        places = (keys < min(1.0, tokens / max(there, 1))).nonzero()[:, 0]
        return keys[places], places, examples[places] + self.index * self.batches.batch_size
