"""PEFT LoRA adapters: pairs of thin factors, each the update ΔW = s·B·A of one matrix of the base, never multiplied
out; and the base with the updates added."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmd_hf.errors import SourceError
from lmd_hf.records import Factored, Inventory, LowRank, MatrixRef, TensorRef, Weight


ROOT = "base_model.model."  # PEFT's wrapper around the model
ENDS = re.compile(r"^(.*)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
READ = "LORA"
Piece = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json tells of the pairs."""

    kind: str
    base: str | None
    revision: str | None
    alpha: float
    rank: int
    square_root: bool
    alphas: dict[str, float]
    ranks: dict[str, int]

    def scale(self, path: str) -> float:
        """α/r, or α/√r where rsLoRA says so (Kalajdzievski 2023, eq. 6), with the module's own α and r."""
        alpha, rank = self._own(self.alphas, path, self.alpha), self.rank_of(path)
        return float(alpha / math.sqrt(rank) if self.square_root else alpha / rank)

    def rank_of(self, path: str) -> int:
        """r of the pair at a module's path."""
        return int(self._own(self.ranks, path, self.rank))

    @staticmethod
    def _own(patterns: dict[str, Any], path: str, usual: float) -> float:
        """The first pattern that fits the end of a path, as `peft.utils.get_pattern_key` looks it up."""
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), usual)


def is_adapter(config: dict[str, Any] | None) -> bool:
    """Whether a configuration is that of a PEFT adapter."""
    return config is not None and "peft_type" in config


def read_adapter(config: dict[str, Any]) -> Adapter:
    """The adapter's configuration; `SourceError` if a number in it is none."""
    try:
        return Adapter(
            kind=str(config["peft_type"]),
            base=config.get("base_model_name_or_path"),
            revision=config.get("revision"),
            alpha=float(config.get("lora_alpha") or 8),  # PEFT's own defaults
            rank=int(config.get("r") or 8),
            square_root=bool(config.get("use_rslora")),
            alphas={str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            ranks={str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()},
        )
    except (TypeError, ValueError) as error:
        raise SourceError(f"adapter_config.json: {error}; save the adapter again") from None


def adapter_note(config: dict[str, Any]) -> str:
    """What a reader of the report should know of the rows."""
    adapter = read_adapter(config)
    base = adapter.base or "a base that it does not name"
    if adapter.kind != READ:
        return f"a PEFT adapter of kind {adapter.kind} for {base}: its tensors are read one by one, not as updates"
    dora = "; DoRA's magnitudes rescale the rows of base + update, and are not in it" if config.get("use_dora") else ""
    return f"a LoRA adapter for {base}: each row is an update s·B·A, s = α/r as its configuration says{dora}"


def list_adapter_weights(tensors: Iterable[TensorRef], config: dict[str, Any]) -> tuple[Weight, ...]:
    """The weights of an adapter: one for each pair, as large as the matrix that it updates, and the modules that were
    saved whole. Pairs of another kind than LoRA stay single tensors."""
    adapter = read_adapter(config)
    by_name = {tensor.name: tensor for tensor in tensors}
    pairs: dict[str, dict[str, TensorRef]] = {}
    for tensor in by_name.values():
        if adapter.kind == READ and (match := ENDS.match(tensor.name)):
            pairs.setdefault(match.group(1), {})[match.group(2).removeprefix("lora_")] = tensor
    weights = {}
    for stem, found in pairs.items():
        a, b = (found.get(key) or found.get(f"embedding_{key}") for key in "AB")
        if a is not None and b is not None and len(a.shape) >= 2 and len(b.shape) >= 2:
            magnitude = found.get("magnitude_vector")
            weights[a.name] = _weight(adapter, stem.removeprefix(ROOT), a, b, magnitude)
    claimed = {tensor.name for weight in weights.values() for tensor in weight.tensors}
    lefts = {weight.low_rank.left.name for weight in weights.values() if weight.low_rank is not None}
    return tuple(
        weights.get(name)
        or Weight(name if name in claimed else name.removeprefix(ROOT), tensor.shape, tensor.dtype, "plain", (tensor,))
        for name, tensor in by_name.items()
        if name not in lefts
    )


def _weight(adapter: Adapter, path: str, a: TensorRef, b: TensorRef, magnitude: TensorRef | None) -> Weight:
    rank = adapter.rank_of(path)
    experts = a.shape[0] // rank if len(a.shape) == 2 and a.shape[0] > rank and a.shape[0] % rank == 0 else 1
    low_rank = LowRank(b, a, adapter.scale(path), magnitude, experts)
    shape = (b.shape[0], math.prod(a.shape[1:]))
    tensors = (a, b) if magnitude is None else (a, b, magnitude)
    path = path.removesuffix(".base_layer")  # of nested wrappers around one module
    return Weight(f"{path}.weight", (experts, *shape) if experts > 1 else shape, a.dtype, "lora", tensors, low_rank)


def read_factors(pair: LowRank, expert: int | None, read: Callable[[TensorRef], Tensor]) -> Factored:
    """B (O × r) and A (r × I) of one pair, of one expert where experts' factors lie in one tensor (PEFT's
    `ParamWrapper`: A in blocks of r rows, B's columns in turn)."""
    a, b = read(pair.right), read(pair.left)
    a_RI, b_OR = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    if expert is not None and pair.experts > 1:
        rank = a_RI.shape[0] // pair.experts
        a_RI, b_OR = a_RI[expert * rank : (expert + 1) * rank], b_OR[:, expert :: pair.experts]
    return Factored(b_OR, a_RI, pair.scale)


def multiplied(product: Factored) -> Tensor:
    """s · B · A in float64."""
    return product.scale * (product.left.to(torch.float64) @ product.right.to(torch.float64))


def updated(w_OI: Tensor, update: Factored, magnitude: Tensor | None) -> Tensor:
    """W + s·B·A in float64; with DoRA every row scaled to its magnitude: m·(W + s·B·A)/‖W + s·B·A‖ (Liu et al. 2024,
    eq. 5). `ValueError` where the shapes do not fit."""
    if w_OI.shape != (update.left.shape[0], update.right.shape[1]):
        raise ValueError(f"the adapter's update is {update.left.shape[0]} × {update.right.shape[1]}")
    whole = w_OI.to(torch.float64) + multiplied(update)
    if magnitude is None:
        return whole
    if magnitude.numel() != len(whole):
        raise ValueError(f"the adapter's magnitude has {magnitude.numel()} entries")
    lengths = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
    return whole * (magnitude.to(torch.float64).reshape(-1, 1) / lengths)


def stored_pieces(stored: str, low_rank: LowRank | None, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """(name, shape) of what is stored of a matrix (or of all experts' matrices): itself, or a pair's two factors."""
    if stored != "lora" or low_rank is None:
        return [(name, shape)]
    sharing = low_rank.experts if len(shape) == 2 else 1
    (rank, *inputs), outputs = low_rank.right.shape, low_rank.left.shape[0]
    rank //= sharing
    return [(low_rank.right.name, (rank, math.prod(inputs))), (low_rank.left.name, (outputs, rank))]


def merge(base: Inventory, adapter: tuple[Weight, ...], names: dict[str, str]) -> Inventory:
    """The base's inventory with the adapter's updates in it, and its whole modules in place of the base's.

    `names` gives the module path of every matrix of the base by its stored name. A path matches if it is the same, or
    one ends in the other and no other does. What matches nothing is named in the notes; `SourceError` if nothing does.
    """
    paths = {names[ref.name] for ref in base.selected}
    pairs = {_path(w): w for w in adapter if w.low_rank is not None}
    modules = {_path(w): w for w in adapter if w.low_rank is None and len(w.shape) > 1}
    place = {path: _match(path, paths) for path in (*pairs, *modules)}
    updates = {place[path]: weight for path, weight in pairs.items()}
    wholes = {place[path]: weight for path, weight in modules.items()}
    if not updates.keys() - {None}:
        raise SourceError("no pair of the adapter belongs to a matrix of the base; give the base that it was made for")
    lost = [path for path, there in place.items() if there is None]
    selected, added = [], 0
    for ref in base.selected:
        whole = _replaced(ref, wholes.get(names[ref.name]))
        added += math.prod(whole.shape) - math.prod(ref.shape)
        pair = updates.get(names[ref.name])
        selected.append(whole if pair is None else replace(whole, low_rank=pair.low_rank))
    notes = [f"{len(lost)} weights of the adapter match no matrix of the base, first '{lost[0]}'"] if lost else []
    return replace(base, selected=tuple(selected), parameters=base.parameters + added, notes=(*base.notes, *notes))


def _path(weight: Weight) -> str:
    return weight.name.removesuffix(".weight").removesuffix(".base_layer")


def _match(path: str, paths: set[str]) -> str | None:
    if path in paths:
        return path
    ends = [other for other in paths if other.endswith(f".{path}") or path.endswith(f".{other}")]
    return ends[0] if len(ends) == 1 else None


def _replaced(ref: MatrixRef, weight: Weight | None) -> MatrixRef:
    """A matrix of the base, or the module that the adapter saved whole in its place, perhaps with more tokens."""
    if weight is None or ref.rows or ref.expert is not None:
        return ref
    stored = weight.tensors[0]
    rows, columns = stored.shape[0], math.prod(stored.shape[1:])
    shape = (columns, rows) if ref.transposed else (rows, columns)
    return replace(ref, tensors=(stored,), dtype=stored.dtype, stored="plain", shape=shape, tied_to=None)
