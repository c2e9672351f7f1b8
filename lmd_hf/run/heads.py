"""The Hopfield reading of every attention head, one attention at a time."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from lmd_hf.circuits import HeadRef, HeadReport, HeadRows, Heads
from lmd_hf.errors import FormatError, NoDataError, SourceError
from lmd_hf.matrix.batched import cores_each
from lmd_hf.matrix.capacity import head_capacity_log10
from lmd_hf.matrix.dimension import participation_ratio
from lmd_hf.matrix.hopfield import Core, core_of, fold, ov_circuit, qk_circuit, read_core, token_norm
from lmd_hf.records import UNREAD, Factored, MatrixRef
from lmd_hf.run.workers import (
    BATCHED_ON,
    count_workers,
    fitting,
    pick_device,
    single_torch_threads,
    with_room,
    worker_pool,
)
from lmd_hf.run.world import World
from lmd_hf.weights.heads import head_matrices
from lmd_hf.weights.source import Source
from lmd_hf.weights.stored import read_gain, read_matrix


Attention = tuple[HeadRef, ...]  # its heads, which share the matrices
Outcome = HeadReport | str  # a row, or why there is none
Reduce = Callable[..., list[Core | ValueError]]  # products to their cores


@dataclass(frozen=True)
class Read:
    """A matrix as stored, and the gain of the norm that feeds it."""

    matrix: Tensor
    gain: Tensor | None


Matrices = Mapping[MatrixRef, Read]


@dataclass(frozen=True)
class Factors:
    """The thin factors of a head, float64: W_Q (d × I), W_K (d × J), W_V (e × J), W_O (O × e)."""

    w_q_DI: Tensor
    w_k_DJ: Tensor
    w_v_EJ: Tensor
    w_o_OE: Tensor


@dataclass(frozen=True)
class Cores:
    """What is read of a head once its long sides are gone; norms are ‖W_Q‖_F and ‖W_K‖_F as the model has them."""

    qk: Core
    ov: Core
    query_norm: float
    key_norm: float


def measure_heads(
    heads: tuple[HeadRef, ...], source: Source, *, folded: bool, device: str = "cpu", world: World | None = None
) -> Heads:
    """A row for each head, in their order, the same on every rank; `folded`: with the gains of the norms before them.

    Each rank takes every `world.size`-th attention, and its threads one after the other; what is read is let go before
    the next. In float64: on a GPU the long sides of all heads of an attention at once, and what is left of each, d × d,
    on the CPU. A head that cannot be done (NaN, no data, bytes that do not come) is a note.
    """
    world = world or World()
    where = pick_device(device)
    attentions = [tuple(group) for _, group in groupby(heads, key=lambda head: head.o.ref)]
    done = world.shared_out(attentions, lambda mine: _measured(mine, source, folded, where))
    outcomes = [outcome for attention in done for outcome in attention]
    return Heads(
        tuple(outcome for outcome in outcomes if isinstance(outcome, HeadReport)),
        tuple(outcome for outcome in outcomes if isinstance(outcome, str)),
    )


def _measured(attentions: list[Attention], source: Source, folded: bool, device: torch.device) -> list[list[Outcome]]:
    """One attention after the other, its heads shared out to the threads."""
    workers = count_workers([_bytes(heads[0]) for heads in attentions], torch.device("cpu"))
    with single_torch_threads(), worker_pool(workers, sum(map(len, attentions))) as pool:
        return [_attention(heads, source, folded, device, pool) for heads in attentions]


def _bytes(head: HeadRef) -> int:
    """What the cores of a head take while they are made."""
    return sum(3 * 8 * (rows.stop - rows.start) * head.o.ref.shape[0] for rows in (*head.q, *head.k))


def _attention(
    heads: Attention, source: Source, folded: bool, device: torch.device, pool: ThreadPoolExecutor
) -> list[Outcome]:
    """The rows of all heads of one attention, or why there are none."""
    try:
        matrices = read_matrices(heads[0], source)
    except (SourceError, FormatError) as error:
        return [f"heads of '{heads[0].name}' {UNREAD}: {error}"]
    except (NoDataError, ValueError) as error:
        return [f"heads of '{heads[0].name}' left out: {error}"]
    if device.type in BATCHED_ON:
        cores = with_room(lambda where: _cores_there(heads, matrices, folded, where), device)
        return list(pool.map(lambda head, each: _row(head, each, folded), heads, cores))
    here = {ref: replace(read, matrix=read.matrix.cpu()) for ref, read in matrices.items()}
    return list(pool.map(lambda head: _row(head, _cores([head], here, folded, _one_by_one)[0], folded), heads))


def read_matrices(head: HeadRef, source: Source) -> dict[MatrixRef, Read]:
    """Every matrix of an attention, dequantised, and the gains that feed them."""
    matrices = {ref: Read(read_matrix(source, ref), read_gain(source, ref)) for ref in head_matrices(head)}
    for rows in (*head.q, *head.k):
        if rows.after is not None:  # every head multiplies with it
            whole = matrices[rows.after.ref]
            matrices[rows.after.ref] = Read(whole.matrix.to(torch.float64), whole.gain)
    return matrices


def factors_of(head: HeadRef, matrices: Matrices, *, folded: bool) -> Factors:
    """The thin factors of a head; `folded`: with the gains of the norms that feed them, where there are any."""
    w_q_DI, w_k_DJ = _asked_and_found(head, matrices, folded)
    w_o_OE = matrices[head.o.ref].matrix[:, head.o.start : head.o.stop].to(torch.float64)
    return Factors(w_q_DI, w_k_DJ, _share(head.v, matrices, folded), w_o_OE)


def _asked_and_found(head: HeadRef, matrices: Matrices, folded: bool) -> tuple[Tensor, Tensor]:
    """W_Q and W_K."""
    w_q_DI = torch.cat([_share(rows, matrices, folded) for rows in head.q])
    return w_q_DI, torch.cat([_share(rows, matrices, folded) for rows in head.k])


def _share(rows: HeadRows, matrices: Matrices, folded: bool) -> Tensor:
    """The rows of W, or of the product of a low-rank pair."""
    read = matrices[rows.ref]
    w = fold(read.matrix[rows.start : rows.stop], read.gain if folded else None)
    return w if rows.after is None else w @ _share(rows.after, matrices, folded)


def _cores_there(heads: Attention, matrices: Matrices, folded: bool, device: torch.device) -> list[Cores | ValueError]:
    """Of all heads of an attention on a device, as many at once as its memory takes."""
    there = {ref: replace(read, matrix=read.matrix.to(device)) for ref, read in matrices.items()}
    size = fitting([_bytes(head) for head in heads], len(heads), device)
    parts = [heads[start : start + size] for start in range(0, len(heads), size)]
    return [each for part in parts for each in _cores(part, there, folded, cores_each)]


def _cores(heads: Sequence[HeadRef], matrices: Matrices, folded: bool, reduce: Reduce) -> list[Cores | ValueError]:
    """Of several heads of one attention, which have one shape, where the matrices are."""
    used = [factors_of(head, matrices, folded=folded) for head in heads]
    one_stream = _is_of_one_stream(heads[0], used[0])
    pairs = list(zip(heads, used, strict=True))
    qk = reduce([qk_circuit(u.w_q_DI, u.w_k_DJ, head.scale) for head, u in pairs], one_stream=one_stream)
    ov = reduce([ov_circuit(u.w_o_OE, u.w_v_EJ) for u in used], one_stream=one_stream)
    return [
        Cores(asked, written, *_norms(head, u, matrices, folded))
        if isinstance(asked, Core) and isinstance(written, Core)
        else next(each for each in (asked, written) if isinstance(each, ValueError))
        for (head, u), asked, written in zip(pairs, qk, ov, strict=True)
    ]


def _one_by_one(products: Sequence[Factored], *, one_stream: bool) -> list[Core | ValueError]:
    """As `cores_each`, by `core_of`."""
    found: list[Core | ValueError] = []
    for product in products:
        try:
            found.append(core_of(product, one_stream=one_stream))
        except ValueError as error:
            found.append(error)
    return found


def _is_of_one_stream(head: HeadRef, used: Factors) -> bool:
    return head.block == "attention" and used.w_q_DI.shape[1] == used.w_k_DJ.shape[1] == used.w_o_OE.shape[0]


def _norms(head: HeadRef, used: Factors, matrices: Matrices, folded: bool) -> tuple[float, float]:
    """‖W_Q‖_F and ‖W_K‖_F with the gains before them, as the model has them."""
    w_q, w_k = (used.w_q_DI, used.w_k_DJ) if folded else _asked_and_found(head, matrices, True)
    return token_norm(w_q), token_norm(w_k)


def _row(head: HeadRef, cores: Cores | ValueError, folded: bool) -> Outcome:
    if isinstance(cores, ValueError):
        return f"head {head.head} of '{head.name}' left out: {cores}"
    qk, ov = read_core(cores.qk), read_core(cores.ov)
    ratio = participation_ratio(qk.values.numpy())
    return HeadReport(
        name=head.name,
        stack=head.stack,
        layer=head.layer,
        block=head.block,
        head=head.head,
        kv_head=head.kv_head,
        qk_singular_values=tuple(qk.values.tolist()),
        ov_singular_values=tuple(ov.values.tolist()),
        qk_participation_ratio=ratio,
        ov_participation_ratio=participation_ratio(ov.values.numpy()),
        qk_symmetric_energy=qk.symmetric_energy,
        qk_eigenvalue_score=qk.eigenvalue_score,
        inverse_temperature=float(qk.values[0]),
        copying_score=ov.eigenvalue_score,
        capacity_log10=head_capacity_log10(
            ratio, scale=head.scale, query_norm=cores.query_norm, key_norm=cores.key_norm
        ),
        error_bound=max(qk.error_bound, ov.error_bound),
        conventions=_conventions(head, folded),
    )


def _conventions(head: HeadRef, folded: bool) -> dict[str, object]:
    """What was done and what was left out, in words that a program can read."""
    outer = (head.q[0].after or head.q[0]).ref.norm
    return {
        "scale": head.scale,
        "norm_folded": folded and outer is not None,
        "norm": None if outer is None else outer.tensor.name,
        "biases": list(head.biases),
        "qk_norm": head.qk_norm,
        "soft_cap": head.soft_cap,
        "rotary": head.rotary,
        "low_rank": any(rows.after is not None for rows in (*head.q, *head.k)),
    }
