"""Comparing two models: one pair of matrices at a time in each worker, and never a whole model."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import torch
from torch import Tensor

from lmd_hf.changes import Changes, Matching, MatrixChange, Pair, Unmatched, VectorChange
from lmd_hf.errors import FormatError, NoDataError, SourceError
from lmd_hf.matrix.change import Drift, Side, Update, measure_change
from lmd_hf.matrix.kernels import count_unfit
from lmd_hf.records import UNREAD, Factored, MatrixRef, TensorRef
from lmd_hf.run.execute import environment, traffic
from lmd_hf.run.read_ahead import READERS, ReadAhead, reading_pairs
from lmd_hf.run.workers import count_workers, pick_device, upload, with_room, worker_pool
from lmd_hf.weights.lora import multiplied
from lmd_hf.weights.source import Source
from lmd_hf.weights.stored import read_stored


FLOATS = ("F64", "F32", "F16", "BF16")


def compare_all(
    matching: Matching,
    base: Source,
    tuned: Source,
    *,
    device: str = "auto",
    progress: Callable[[Pair], None] | None = None,
) -> Changes:
    """Measure every pair of a matching, the most expensive first, and return rows in its order.

    A pair that cannot be compared (no data, NaN, infinity) becomes `Unmatched`; the others go on. `progress` is called,
    in this thread, after each matrix.
    """
    started = time.perf_counter()
    where = pick_device(device)
    pairs = matching.pairs
    workers = count_workers([pair.bytes for pair in pairs], where)
    outcomes: dict[int, MatrixChange | Unmatched] = {}
    places = {pair: index for index, pair in enumerate(pairs)}
    order = sorted(pairs, key=lambda pair: -pair.flops)
    with worker_pool(workers, len(pairs)) as pool, reading_pairs(base, tuned, order) as reads:
        futures = {pool.submit(_compare_ahead, pair, *reads, where): pair for pair in reads[0].works}
        for future in as_completed(futures):
            outcomes[places[futures[future]]] = future.result()
            if progress is not None:
                progress(futures[future])
    vectors = _compare_vectors(matching.vectors, base, tuned)
    ordered = [*(outcomes[index] for index in sorted(outcomes)), *vectors]
    return Changes(
        matrices=tuple(o for o in ordered if isinstance(o, MatrixChange)),
        vectors=tuple(o for o in ordered if isinstance(o, VectorChange)),
        unmatched=tuple(o for o in ordered if isinstance(o, Unmatched)),
        environment=environment((where,), workers) | traffic(base, tuned),
        timing={"compare": time.perf_counter() - started},
    )


def _compare_ahead(pair: Pair, base: ReadAhead, tuned: ReadAhead, device: torch.device) -> MatrixChange | Unmatched:
    with base.taking(pair), tuned.taking(pair):
        return with_room(lambda where: _compare_pair(pair, base, tuned, where), device)


def _compare_pair(pair: Pair, base: Source, tuned: Source, device: torch.device) -> MatrixChange | Unmatched:
    rows, columns = pair.shape
    models = (("base", base, pair.base), ("tuned", tuned, pair.tuned))
    sides: list[Side] = []
    for name, source, ref in models:
        try:
            stored = read_stored(source, ref)
        except (NoDataError, SourceError, FormatError, ValueError) as error:
            return Unmatched(name, ref.name, ref.part, ref.shape, _why(error))
        whole = multiplied(stored.matrix) if isinstance(stored.matrix, Factored) else stored.matrix
        common = upload(whole[:rows, :columns], device)
        if common.element_size() == 1:  # torch has no arithmetic on 8-bit floats; wider ones hold them exactly
            common = common.to(torch.float32)
        sides.append(Side(common, stored.rounding.relative, stored.rounding.absolute))
    try:
        return _to_row(pair, *measure_change(*sides))
    except ValueError:  # NaN or infinity
        reasons = ((name, ref, _bad(side.matrix)) for (name, _, ref), side in zip(models, sides, strict=True))
        name, ref, reason = next(item for item in reasons if item[2])
        return Unmatched(name, ref.name, ref.part, ref.shape, reason)


def _why(error: Exception) -> str:
    """What keeps a tensor from being compared: itself, or that its bytes did not come."""
    return f"{UNREAD}: {error}" if isinstance(error, (SourceError, FormatError)) else str(error)


def _bad(w: Tensor) -> str:
    """Why these numbers cannot be compared, "" if they can."""
    bad = count_unfit(w)
    return f"holds NaN or infinity ({bad} of {w.numel()} entries)" if bad else ""


def _to_row(pair: Pair, update: Update, drift: Drift) -> MatrixChange:
    base, tuned = pair.base, pair.tuned
    return MatrixChange(
        name=base.name,
        part=base.part,
        tuned_name=tuned.name,
        tuned_part=tuned.part,
        matched=pair.matched,
        tied=pair.tied,
        stack=base.stack,
        block=base.block,
        role=base.role,
        layer=base.layer,
        shape=pair.shape,
        tokens_added=_tokens(tuned) - _tokens(base),
        dtype=base.dtype,
        tuned_dtype=tuned.dtype,
        identical=update.norm == 0,
        base_norm=update.base_norm,
        update_norm=update.norm,
        relative_update=update.relative,
        update_spectral_norm=update.spectral_norm,
        update_floor=update.floor,
        update_rank=update.rank,
        update_energy=update.energy,
        update_stable_rank=update.stable_rank,
        update_effective_rank=update.effective_rank,
        update_energy_rank_90=update.energy_rank_90,
        update_energy_rank_95=update.energy_rank_95,
        update_energy_rank_99=update.energy_rank_99,
        spectrum_drift=drift.spectrum,
        latent_dim=drift.latent_dim,
        latent_dim_rule=drift.latent_dim_rule,
        left_cos2=drift.left_cos2,
        left_angle=drift.left_angle,
        right_cos2=drift.right_cos2,
        right_angle=drift.right_angle,
        gap=drift.gap,
        degenerate=drift.degenerate,
        error_bound=update.error_bound,
        singular_value_ranks=None,
        singular_values=update.singular_values,
    )


def _tokens(ref: MatrixRef) -> int:
    """The length of the axis along which a vocabulary may be cut."""
    return ref.shape[1] if ref.role == "embed" else ref.shape[0]


def _compare_vectors(names: tuple[tuple[str, str], ...], base: Source, tuned: Source) -> list[VectorChange | Unmatched]:
    ours, theirs = ({tensor.name: tensor for tensor in source.tensors} for source in (base, tuned))
    with ThreadPoolExecutor(READERS) as pool:  # each is a round trip or two where the files are far away
        return list(pool.map(lambda pair: _compare_vector(ours[pair[0]], theirs[pair[1]], base, tuned), names))


def _compare_vector(a: TensorRef, b: TensorRef, base: Source, tuned: Source) -> VectorChange | Unmatched:
    values: list[Tensor] = []
    for side, source, tensor in (("base", base, a), ("tuned", tuned, b)):
        if tensor.dtype not in FLOATS:
            return Unmatched(side, tensor.name, "", tensor.shape, f"a vector stored as {tensor.dtype}")
        flat = replace(tensor, shape=(math.prod(tensor.shape),))  # a scalar has no axis to read along
        try:
            value = source.read(flat).to("cpu", torch.float64)
        except (NoDataError, SourceError, FormatError) as error:
            return Unmatched(side, tensor.name, "", tensor.shape, _why(error))
        if reason := _bad(value):
            return Unmatched(side, tensor.name, "", tensor.shape, reason)
        values.append(value)
    change, size = values[1] - values[0], float(values[0].norm())
    largest = float(change.abs().max())
    relative = 0.0 if largest == 0 else float(change.norm()) / size if size > 0 else None
    return VectorChange(a.name, b.name, a.shape, largest, relative)
