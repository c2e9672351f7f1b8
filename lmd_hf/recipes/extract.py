"""The adapter that is the difference of two models: one pair of matrices in memory at a time.

Shapes: O = out, I = in, r = rank of a module's adapter.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lmd_hf.changes import Pair, Unmatched
from lmd_hf.errors import FormatError, NoDataError, SettingsError, SourceError
from lmd_hf.matrix import dimension
from lmd_hf.matrix.change import Side, Update, measure_update, rounding_errors, rounding_floor
from lmd_hf.matrix.lmd import FACTORS, decompose
from lmd_hf.recipes.modules import names_in
from lmd_hf.records import Alias, Factored, MatrixRef, Settings
from lmd_hf.report.files import text_writer, write_folder
from lmd_hf.run.compare import compare_all
from lmd_hf.run.pairs import match
from lmd_hf.run.plan import EXPERTS
from lmd_hf.run.progress import progress_bar
from lmd_hf.run.world import World
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.lora import ROOT, is_adapter, multiplied
from lmd_hf.weights.skeleton import BUILD_ERRORS, build
from lmd_hf.weights.source import Source, open_source
from lmd_hf.weights.stored import read_stored


ADAPTER, CONFIG, CERTIFICATE = "adapter_model.safetensors", "adapter_config.json", "lmd_extract.json"


@dataclass(frozen=True)
class Extracted:
    """What became of one module's ΔW. `rank` above `update_rank` is none: those values are what rounding explains.

    `error` = ‖ΔW − B·A‖_F of the factors as they are stored, measured, and `relative_error` the same over ‖ΔW‖_F;
    `residual_norm` bounds ‖ΔW − B·A‖₂: so far the module's output can be off for an input of length 1."""

    module: str
    shape: tuple[int, int]
    rank: int
    update_rank: int
    update_norm: float
    error: float
    relative_error: float
    residual_norm: float


@dataclass(frozen=True)
class Extraction:
    """What was written, module by module, what changed and is not in it (`left_out`: tensor and why), and the words of
    the sources (`notes`)."""

    base: str
    tuned: str
    modules: tuple[Extracted, ...]
    parameters: int
    left_out: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self) | {"modules": [asdict(module) for module in self.modules]}


@dataclass(frozen=True)
class _Group:
    """The pairs that make up one module of the base, its name there, and its weight's shape (out, in)."""

    module: str
    pairs: tuple[Pair, ...]
    shape: tuple[int, int]
    embedding: bool
    conv1d: bool
    tied_as: str = ""


def extract(
    base: str | Path | nn.Module,
    tuned: str | Path | nn.Module,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    kernel: str = "exact",
) -> Extraction:
    """Write a PEFT LoRA repository whose adapter turns `base` into `tuned`, and say how closely.

    ΔW = W_tuned − W_base is formed in float64, module by module (parts of a fused projection together), and cut to its
    leading singular triplets, B = U√S, A = √S·Vᵀ, which no other factors of that rank beat (Eckart–Young). Each module
    has a rank of its own: all singular values that rounding the two models to their formats cannot explain, or with
    `energy` the least that hold this share of ‖ΔW‖², at most `rank`, and no more than pays (r(O+I) ≤ O·I). With
    `kernel="sketch"` factors come from a block Krylov space; the error is measured on the stored factors either way.
    Modules that did not change have none. Embeddings are adapted too, and a head that is tied to one with it. Norms,
    biases, experts, convolutions and embeddings that are looked up in a way of their own are listed in `left_out` where
    they changed: with any, the adapter is not all of it.

    `out` gets adapter_model.safetensors (float32), adapter_config.json (α = r) and lmd_extract.json. Raises
    `SettingsError` for a rank below 1, an energy outside (0, 1], equal models or an adapter in place of a model, and
    what `compare` raises.
    """
    _check(rank, energy, kernel)
    first, second = open_source(base), open_source(tuned)
    for source in (first, second):
        if is_adapter(source.config) or any(".base_layer." in tensor.name for tensor in source.tensors):
            raise SettingsError(
                f"{source.identity.id} is an adapter, or wrapped by one; give whole models (merge it, or `unload()`)"
            )
    inventory = list_matrices(first)
    matching = match(inventory, list_matrices(second), Settings())
    groups, barred = _groups(matching.pairs, first, inventory.aliases)
    left_out = {pair.base.name: reason for pair, reason in barred if _differs(pair, first, second)}
    left_out |= _unmatched(matching.unmatched)
    changes = compare_all(replace(matching, pairs=()), first, second)
    left_out |= {
        v.name: f"a vector, changed by up to {v.largest_change:.3g}" for v in changes.vectors if v.largest_change > 0
    }
    tensors: dict[str, Tensor] = {}
    done: list[Extracted] = []
    with progress_bar("extracting", matching.pairs, World()) as count:
        for group in groups:
            try:
                found = _extract(group, first, second, _ranker(rank, energy), kernel)
            except (NoDataError, SourceError, FormatError, ValueError) as error:
                left_out[group.module] = str(error)
                found = None
            if found is not None:
                done.append(found[0])
                tensors |= _named(group, *found[1])
            for pair in group.pairs:
                count(pair)
    if not done:
        left = [f"'{name}': {reason}" for name, reason in left_out.items()]
        why = f" ({len(left)} left out, the first {left[0]})" if left else ""
        raise SettingsError(f"no matrix differs beyond rounding; there is nothing to extract{why}")
    named = {group.module: group for group in groups}
    extraction = Extraction(
        base=first.identity.id,
        tuned=second.identity.id,
        modules=tuple(done),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        left_out=left_out,
        notes=(*matching.notes, *_dequantised(groups)),
    )
    write_folder(
        Path(out),
        {
            ADAPTER: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            CONFIG: text_writer(json.dumps(_config(first, done, named), indent=2) + "\n"),
            CERTIFICATE: text_writer(json.dumps(extraction.to_dict(), indent=1, ensure_ascii=False) + "\n"),
        },
    )
    return extraction


def _check(rank: int | None, energy: float | None, kernel: str) -> None:
    if rank is not None and rank < 1:
        raise SettingsError(f"rank is {rank}; give 1 or more, or leave it out")
    if energy is not None and not 0 < energy <= 1:
        raise SettingsError(f"energy is {energy}; give a share above 0, at most 1")
    if kernel not in FACTORS:
        raise SettingsError(f"no kernel '{kernel}'; known: {', '.join(FACTORS)}")


def _ranker(rank: int | None, energy: float | None) -> Callable[[Update, tuple[int, int]], int]:
    def choose(update: Update, shape: tuple[int, int]) -> int:
        wanted = update.rank
        if energy is not None:
            wanted = min(wanted, dimension.energy_rank(update.singular_values, energy) or 0)
        pays = max(1, shape[0] * shape[1] // sum(shape))
        return min(wanted, pays, rank or wanted)

    return choose


def _groups(
    pairs: Sequence[Pair], base: Source, aliases: Sequence[Alias]
) -> tuple[list[_Group], list[tuple[Pair, str]]]:
    """The modules of the base, each with its pairs; and what is no module of its own."""
    paths, otherwise = names_in(base), _looked_up_otherwise(base)
    ties: dict[str, list[str]] = {}
    for alias in aliases:
        if not alias.stored:
            ties.setdefault(alias.of, []).append(alias.name.removesuffix(".weight"))
    found: dict[str, list[Pair]] = {}
    barred: list[tuple[Pair, str]] = []
    for pair in pairs:
        ref = pair.base
        if ref.expert is not None or ref.role == "conv" or re.search(EXPERTS, ref.name):
            barred.append((pair, "an expert or a convolution: peft has no such pair for it"))
        elif paths.get(ref.name) in otherwise:
            barred.append((pair, "looked up by something else than the ids that it is given: peft would take those"))
        elif pair.shape != ref.shape or pair.shape != pair.tuned.shape:
            barred.append((pair, f"resized from {ref.shape} to {pair.tuned.shape}"))
        elif len(ties.get(ref.name, ())) > 1:
            barred.append((pair, f"tied under several names: {', '.join(ties[ref.name])}"))
        else:
            found.setdefault(ref.name, []).append(pair)
    groups = []
    for name, those in found.items():
        ref = those[0].base
        rows = max(stop for pair in those for _, stop, _ in pair.base.rows) if ref.rows else ref.shape[0]
        embedding = ref.transposed and ref.role == "embed"
        groups.append(
            _Group(
                module=paths.get(name, name.removesuffix(".weight")),  # a tied name is not stored
                pairs=tuple(those),
                shape=(rows, ref.shape[1]),
                embedding=embedding,
                conv1d=ref.transposed and not embedding,
                tied_as=next(iter(ties.get(name, ())), "") if embedding else "",
            )
        )
    return groups, barred


def _looked_up_otherwise(base: Source) -> set[str]:
    """The embeddings whose class computes what it looks up, such as OPT's positions; one that scales it peft knows."""
    try:
        model = base.module or build(base.config or {}, len(base.tensors))
    except BUILD_ERRORS:  # as names tell no class either
        return set()
    found = (item for item in model.named_modules() if isinstance(item[1], nn.Embedding))
    return {path for path, m in found if type(m).forward is not nn.Embedding.forward and not hasattr(m, "embed_scale")}


def _extract(
    group: _Group,
    base: Source,
    tuned: Source,
    choose: Callable[[Update, tuple[int, int]], int],
    kernel: str,
) -> tuple[Extracted, tuple[Tensor, Tensor]] | None:
    """The factors (B, A) of a module's ΔW, float32, and how far they are from it; `None` where rounding explains it."""
    delta_OI = torch.zeros(group.shape, dtype=torch.float64)
    errors = [(torch.zeros(group.shape[0], dtype=torch.float64), torch.zeros(group.shape[1], dtype=torch.float64))] * 2
    squares = 0.0
    for pair in group.pairs:
        rows = _rows(pair.base, group.shape[0])
        sides = [_side(source, ref) for source, ref in ((base, pair.base), (tuned, pair.tuned))]
        delta_OI[rows] = sides[1].matrix.to(torch.float64) - sides[0].matrix.to(torch.float64)
        squares += float(torch.linalg.vector_norm(sides[0].matrix, dtype=torch.float64)) ** 2
        for place, side in enumerate(sides):
            by_row, by_column = rounding_errors(side)
            errors[place] = (errors[place][0].index_copy(0, rows, by_row), errors[place][1] + by_column)
    if not torch.isfinite(delta_OI).all():
        raise ValueError("holds NaN or infinity")
    if not delta_OI.any():
        return None
    update = measure_update(delta_OI, rounding_floor(*errors), squares**0.5)
    rank = choose(update, group.shape)
    if rank == 0:
        return None
    lmd = decompose(delta_OI, rank=rank, kernel=kernel)
    root = lmd.s_K.sqrt()
    b_Or = (lmd.projection * root).to(torch.float32).contiguous()
    a_rI = (root[:, None] * lmd.similarity).to(torch.float32).contiguous()
    missing = delta_OI.sub_(multiplied(Factored(b_Or, a_rI, 1.0)))
    error = float(torch.linalg.vector_norm(missing))
    following = float(update.singular_values[rank]) if rank < len(update.singular_values) else 0.0
    told = Extracted(
        module=group.module,
        shape=group.shape,
        rank=rank,
        update_rank=update.rank,
        update_norm=update.norm,
        error=error,
        relative_error=error / update.norm,
        residual_norm=min(error, following + _rounding(b_Or, a_rI)) if kernel == "exact" else error,
    )
    return told, (b_Or, a_rI)


def _rounding(b_Or: Tensor, a_rI: Tensor) -> float:
    """A bound on what rounding B and A to float32 moves ‖B·A‖₂: 2u‖B‖_F‖A‖_F and a little more."""
    return 2.0**-22 * float(torch.linalg.vector_norm(b_Or)) * float(torch.linalg.vector_norm(a_rI))


def _differs(pair: Pair, base: Source, tuned: Source) -> bool:
    """Whether a matrix that has no adapter is another one in the tuned model, or cannot be told to be the same."""
    if pair.base.shape != pair.tuned.shape:
        return True
    try:
        before, after = (_side(s, ref).matrix for s, ref in ((base, pair.base), (tuned, pair.tuned)))
    except (NoDataError, SourceError, FormatError, ValueError):
        return True
    return not torch.equal(before.double(), after.double())


def _rows(ref: MatrixRef, count: int) -> Tensor:
    whole = torch.arange(count)
    return torch.cat([whole[start:stop:step] for start, stop, step in ref.rows]) if ref.rows else whole


def _side(source: Source, ref: MatrixRef) -> Side:
    stored = read_stored(source, ref)
    matrix = multiplied(stored.matrix) if isinstance(stored.matrix, Factored) else stored.matrix.detach().cpu()
    if matrix.element_size() == 1:
        matrix = matrix.to(torch.float32)
    return Side(matrix, stored.rounding.relative, stored.rounding.absolute)


def _named(group: _Group, b_Or: Tensor, a_rI: Tensor) -> dict[str, Tensor]:
    """The factors under peft's names. An embedding's weight is (tokens, width), ours turned round; a head that is tied
    to it looks at the same entries the other way."""
    if not group.embedding:
        return {f"{ROOT}{group.module}.lora_A.weight": a_rI, f"{ROOT}{group.module}.lora_B.weight": b_Or}
    named = {f"{ROOT}{group.module}.lora_embedding_A": a_rI, f"{ROOT}{group.module}.lora_embedding_B": b_Or}
    if group.tied_as:
        named[f"{ROOT}{group.tied_as}.lora_A.weight"] = b_Or.T.contiguous()
        named[f"{ROOT}{group.tied_as}.lora_B.weight"] = a_rI.T.contiguous()
    return named


def _config(base: Source, done: Sequence[Extracted], groups: dict[str, _Group]) -> dict[str, Any]:
    ranks = {each.module: each.rank for each in done}
    ranks |= {groups[name].tied_as: rank for name, rank in ranks.items() if groups[name].tied_as}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {re.escape(name): ranks[name] for name in sorted(ranks, key=lambda n: (-len(n), n))}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base.identity.id,
        "revision": base.identity.commit,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(group.conv1d for group in groups.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _unmatched(items: Sequence[Unmatched]) -> dict[str, str]:
    """What either model has alone; not what neither is to have an adapter for anyway, unless it can have changed."""
    return {item.name: item.reason for item in items if item.side != "both"}


def _dequantised(groups: Sequence[_Group]) -> tuple[str, ...]:
    kinds = sorted({ref.stored for g in groups for pair in g.pairs for ref in (pair.base, pair.tuned)} - {"plain"})
    return (f"dequantised from {', '.join(kinds)} before the difference was taken",) if kinds else ()
