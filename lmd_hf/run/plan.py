"""What will be done, from headers alone: selection, kernel and cost. Pure."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Protocol

from lmd_hf.circuits import HeadRef, MlpRef
from lmd_hf.errors import SettingsError
from lmd_hf.matrix.cost import EXACT_SIDE, exact_bytes, exact_flops, sketch_bytes, sketch_flops, sketch_pays
from lmd_hf.records import ROLES, Data, Inventory, MatrixRef, ModelIdentity, Plan, Settings, Skipped, Work
from lmd_hf.run.asked import check_types
from lmd_hf.run.shares import share_out
from lmd_hf.weights.heads import head_matrices, list_heads, unformed_notes
from lmd_hf.weights.inventory import pieces
from lmd_hf.weights.mlps import list_mlps, mlp_matrices


SHARED = (("q", "k", "v", "kv"), ("gate", "up"))  # roles that read the same input
EXPERTS = r"(?<!shared_)experts\."  # one tensor each, and loaded into one parameter


class Named(Protocol):
    """A matrix that can be selected, planned or measured."""

    @property
    def name(self) -> str:
        """Its tensor."""
        ...

    @property
    def role(self) -> str:
        """What it is for."""
        ...

    @property
    def layer(self) -> int | None:
        """The index of its block."""
        ...


def make_plan(inventory: Inventory, identity: ModelIdentity, settings: Settings, world_size: int = 1) -> Plan:
    """Which matrices are done, at what cost, by which of `world_size` ranks (`share_out`).

    Unselected matrices become `Skipped` with the reason `not selected`. Raises `SettingsError` for an unknown role,
    metric or kernel, a layer list that cannot be read, and a selection that leaves nothing.
    """
    chosen = list(filter(selector(inventory.selected, settings), inventory.selected))
    if inventory.selected and not chosen:
        raise nothing_left(settings)
    kept = set(map(id, chosen))
    others = [ref for ref in inventory.selected if id(ref) not in kept]
    unselected = [Skipped(name, shape, "not selected") for ref in others for name, shape in pieces(ref)]
    works = tuple(_work(ref, settings) for ref in chosen)
    shards, cut = share_out(works, settings, world_size, distant=identity.commit is not None)
    return Plan(
        identity=identity,
        settings=settings,
        works=works,
        shards=shards,
        pieces=cut,
        skipped=inventory.skipped + tuple(unselected),
        aliases=inventory.aliases,
        parameters=inventory.parameters,
        notes=(*inventory.notes, *_unfolded(chosen, settings, identity), *_unformed(inventory, chosen, settings)),
    )


def plan_heads(inventory: Inventory, settings: Settings) -> tuple[HeadRef, ...]:
    """The heads of which a matrix is selected; none where they are not asked for."""
    if not settings.heads:
        return ()
    is_chosen = selector(inventory.selected, settings)
    return tuple(head for head in list_heads(inventory)[0] if any(map(is_chosen, head_matrices(head))))


def plan_mlps(inventory: Inventory, settings: Settings) -> tuple[MlpRef, ...]:
    """The MLPs of which a matrix is selected; none where heads are not asked for."""
    if not settings.heads:
        return ()
    is_chosen = selector(inventory.selected, settings)
    return tuple(mlp for mlp in list_mlps(inventory.selected) if any(map(is_chosen, mlp_matrices(mlp))))


def _unfolded(chosen: list[MatrixRef], settings: Settings, identity: ModelIdentity) -> tuple[str, ...]:
    if settings.metric != "norm" or any(ref.norm for ref in chosen):
        return ()
    return (f"no norm is known to feed a matrix of model_type '{identity.model_type}': norm is the identity here",)


def _unformed(inventory: Inventory, chosen: list[MatrixRef], settings: Settings) -> tuple[str, ...]:
    if not settings.heads:
        return ()
    names = {ref.name for ref in chosen}
    return unformed_notes(each for each in list_heads(inventory)[1] if each.name in names)


def selector(rows: Iterable[Named], settings: Settings) -> Callable[[Named], bool]:
    """Whether a matrix is selected, `rows` telling which layer is the last. `SettingsError` for bad settings."""
    _check(settings)
    layers = _wanted_layers(settings.layers, rows)
    return lambda row: _is_chosen(row, settings, layers)


def nothing_left(settings: Settings) -> SettingsError:
    """The error for a selection that leaves nothing."""
    return SettingsError(
        f"the selection leaves no matrix: roles {settings.roles or 'all'}, layers '{settings.layers or 'all'}', "
        f"match '{settings.match or '*'}'; `lmd-hf plan` lists what there is"
    )


def _check(settings: Settings) -> None:
    check_types(settings)
    for role in settings.roles:
        if role not in ROLES:
            raise SettingsError(f"no role '{role}'; known: {', '.join(ROLES)}")
    _check_choices(settings)
    _check_data(settings.metric, settings.data)
    if not 0 < settings.tolerance < 1:
        raise SettingsError(f"tolerance is {settings.tolerance}; it is relative, so give a number between 0 and 1")


def _check_choices(record: Settings | Data) -> None:
    """The fields of a record that say themselves which values they know."""
    for field in dataclasses.fields(record):
        known, value = field.metadata.get("choices"), getattr(record, field.name)
        if known is not None and value not in known:
            raise SettingsError(f"no {field.name} '{value}'; known: {', '.join(known)}")


def _check_data(metric: str, data: Data | None) -> None:
    if metric != "data":
        if data is not None:
            raise SettingsError(f"a dataset is for the metric 'data', not for '{metric}'; add --metric data")
        return
    if data is None or not data.dataset:
        kinds = "a Hub id, a .jsonl, .json, .parquet, .csv or .txt file, or an image folder"
        raise SettingsError(f"the metric 'data' needs a dataset: give --dataset, {kinds}")
    check_types(data)
    _check_choices(data)
    for name in ("samples", "seq_len", "batch_size", "neighbours"):
        if getattr(data, name) < 1:
            raise SettingsError(f"{name} is {getattr(data, name)}; give 1 or more")
    if data.tokens < 0:
        raise SettingsError(f"tokens is {data.tokens}; give their number, or 0 to have it chosen")


def _wanted_layers(text: str, rows: Iterable[Named]) -> set[int] | None:
    """`0-3,-1` as a set of layer indices; a negative one counts from the last layer. `None` for all."""
    if not text:
        return None
    count = 1 + max((row.layer for row in rows if row.layer is not None), default=-1)
    wanted: set[int] = set()
    for piece in text.split(","):
        start, dash, stop = (
            piece.strip().partition("-") if not piece.strip().startswith("-") else (piece.strip(), "", "")
        )
        try:
            first, last = int(start), int(stop) if dash else int(start)
        except ValueError:
            raise SettingsError(f"cannot read layers '{text}'; write numbers and ranges such as 0-3,-1") from None
        wanted |= {index + count if index < 0 else index for index in range(first, last + 1)}
    return wanted


def _is_chosen(row: Named, settings: Settings, layers: set[int] | None) -> bool:
    return (
        (not settings.roles or row.role in settings.roles)
        and (layers is None or row.layer in layers)
        and (not settings.match or fnmatch.fnmatchcase(row.name, settings.match))
    )


def _work(ref: MatrixRef, settings: Settings) -> Work:
    short, long = min(ref.shape), max(ref.shape)
    kernel = _kernel(settings.kernel, short)
    if ref.stored == "lora" and ref.low_rank is not None:
        rank = ref.low_rank.right.shape[0] // ref.low_rank.experts
        flops, memory = 2.0 * (short + long) * rank**2, 3 * 8 * (short + long) * rank
        return Work(ref, kernel, flops, memory, settings.tolerance)
    entry = 8 if ref.dtype == "F64" or ref.low_rank is not None else 4
    folded = settings.metric == "data" or (settings.metric == "norm" and ref.norm is not None)
    if kernel == "sketch" and sketch_pays(short):
        flops, beside = sketch_flops(long, short), sketch_bytes(long, short, 8 if folded else entry)
    else:
        flops, beside = exact_flops(long, short), exact_bytes(short)
    packed = 0 if ref.stored == "plain" and ref.low_rank is None else 8 * short * long  # what unpacking needs beside W
    memory = entry * short * long + beside + packed
    if folded:
        flops, memory = 2 * flops, memory + 8 * short * long
    if settings.metric == "data":  # the metric's own eigenvectors, and those of two Gram matrices
        flops, memory = (
            flops + 9.0 * ref.shape[1] ** 3 + 18.0 * short**3,
            memory + 8 * (3 * ref.shape[1] ** 2 + 3 * short**2),
        )
    return Work(ref, kernel, flops, memory, settings.tolerance)


def expected_inputs(refs: Iterable[MatrixRef]) -> dict[tuple[object, ...], int]:
    """{input: its width} of the matrices whose input shows while the model runs, as far as headers tell: one for q, k
    and v of a block, one for gate and up, one for all k and v that read the encoder's output, one for every other
    matrix, none for embeddings, convolutions and experts."""
    widths: dict[tuple[object, ...], int] = {}
    for ref in refs:
        if ref.role in ("embed", "conv") or ref.expert is not None or re.search(EXPERTS, ref.name):
            continue
        shared = next((roles for roles in SHARED if ref.role in roles and ref.part != "b"), None)
        if ref.block == "cross_attention" and ref.role in ("k", "v"):
            key: tuple[object, ...] = (ref.stack, "encoded")
        elif shared is None or ref.layer is None or ref.block == "cross_attention":
            key = (ref.name,)
        else:
            key = (ref.stack, ref.layer, ref.block, shared)
        widths[(*key, ref.shape[1])] = ref.shape[1]
    return widths


def _kernel(asked: str, short: int) -> str:
    """`auto` decides by cost: exact as long as that takes minutes."""
    if asked == "auto":
        return "sketch" if short > EXACT_SIDE else "exact"
    return asked
