"""PEFT LoRA adapters: pairs of thin factors, each the update ΔW = s·B·A of one matrix of the base, never multiplied
out; and the base with the updates added."""

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmd_hf.errors import SourceError
from lmd_hf.records import Factored, Inventory, LowRank, MatrixRef, TensorRef, Weight
from lmd_hf.weights.grids import real


ROOT = "base_model.model."  # PEFT's wrapper around the model
ENDS = re.compile(r"^(.*)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
READ = "LORA"
USUAL = 8  # PEFT's own lora_alpha and r
LARGEST_RANK = 2**31
MOST_REPEATS = 3  # in a pattern: matching costs some (length of the path)^repeats, and more where groups are repeated
REPEATS = re.compile(r"(?<!\()[*+?{]")
REPEATED_GROUP = re.compile(r"\)[*+{]")
# what a configuration may ask for beside W + s·B·A: of the product, of the sum, and of W before the training
OTHER_PRODUCTS = {
    "kasa_config": "KaSA puts a diagonal between B and A, and takes a part of the base's weights away",
    "use_bdlora": "BD-LoRA stores of a factor its diagonal blocks alone",
    "use_qalora": "QA-LoRA pools the inputs of A",
}
OTHER_SUMS = {
    "alora_invocation_tokens": "aLoRA adds its updates from certain tokens on",
    "layer_replication": "its base repeats layers",
}
MOVED = re.compile("pissa|olora|corda|loftq|lora_ga")
Piece = tuple[str, tuple[int, ...]]
Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json tells of the pairs. `parameters` are the ends of the names of parameters that have pairs
    of their own, perhaps one for every expert. `no_product` says why updates are no s·B·A, `no_sum` why the base with
    those added is not the tuned model; "" where they are."""

    kind: str
    base: str | None
    revision: str | None
    alpha: float
    rank: int
    square_root: bool
    alphas: Patterns
    ranks: Patterns
    parameters: tuple[str, ...]
    no_product: str
    no_sum: str

    def scale(self, name: str) -> float:
        """α/r, or α/√r where rsLoRA says so (Kalajdzievski 2023, eq. 6), with the module's own α and r."""
        alpha, rank = self._own(self.alphas, name, self.alpha), self.rank_of(name)
        return float(alpha / math.sqrt(rank) if self.square_root else alpha / rank)

    def rank_of(self, name: str) -> int:
        """r of the pair of a module or of a parameter."""
        return int(self._own(self.ranks, name, self.rank))

    def parameters_of(self, path: str) -> list[str]:
        """The parameters of a module that may have pairs, as PEFT's `_inject_parameters` names them."""
        ends = (end.rpartition(".") for end in self.parameters)
        return [f"{path}.{leaf}" for module, _, leaf in ends if f".{path}".endswith(f".{module or 'experts'}")]

    @staticmethod
    def _own(patterns: Patterns, name: str, usual: float) -> float:
        """The first pattern that fits the end of a name, as `peft.utils.get_pattern_key` looks it up."""
        return next((value for pattern, value in patterns if pattern.match(name)), usual)


def is_adapter(config: dict[str, Any] | None) -> bool:
    """Whether a configuration is that of a PEFT adapter."""
    return config is not None and "peft_type" in config


def read_adapter(config: dict[str, Any]) -> Adapter:
    """The adapter's configuration; `SourceError` if a number in it is none, or a pattern cannot be matched in time."""
    kind = str(config["peft_type"])
    told = config if kind == READ else {}  # other kinds mean other things by these names: an OFT adapter's r may be 0
    no_product = _first_told(told, OTHER_PRODUCTS)
    try:
        return Adapter(
            kind=kind,
            base=_text(config, "base_model_name_or_path"),
            revision=_text(config, "revision"),
            alpha=_alpha(told.get("lora_alpha")),
            rank=_rank(told.get("r")),
            square_root=bool(told.get("use_rslora")),
            alphas=_patterns(told.get("alpha_pattern"), _alpha),
            ranks=_patterns(told.get("rank_pattern"), _rank),
            parameters=tuple(map(str, told.get("target_parameters") or ())),
            no_product=no_product,
            no_sum=no_product or _moved(told) or _first_told(told, OTHER_SUMS),
        )
    except (TypeError, ValueError, OverflowError, re.error) as error:
        raise SourceError(f"adapter_config.json: {error}; save the adapter again") from None


def _first_told(told: dict[str, Any], reasons: dict[str, str]) -> str:
    return next((reason for key, reason in reasons.items() if told.get(key)), "")


def _moved(told: dict[str, Any]) -> str:
    begun = str(told.get("init_lora_weights")).lower()
    return f"{begun} began it with a part of the base's weights moved into B and A" if MOVED.match(begun) else ""


def _text(config: dict[str, Any], key: str) -> str | None:
    if not isinstance(value := config.get(key), str | None):
        raise TypeError(f"{key} is {value!r}, no text")
    return value


def _alpha(value: Any) -> float:
    alpha = float(USUAL if value is None else value)
    if not math.isfinite(alpha):
        raise ValueError(f"lora_alpha is {alpha}")
    return alpha


def _rank(value: Any) -> int:
    rank = operator.index(USUAL if value is None else value)
    if not 0 < rank < LARGEST_RANK:
        raise ValueError(f"r is {rank}, and no rank")
    return rank


def _patterns(values: Any, read: Callable[[Any], float]) -> Patterns:
    return tuple((_pattern(str(key)), read(value)) for key, value in dict(values or {}).items())


def _pattern(key: str) -> re.Pattern[str]:
    """A pattern for the ends of names. One that may take for ever is refused: the file may be anybody's."""
    if REPEATED_GROUP.search(key) or len(REPEATS.findall(key)) > MOST_REPEATS:
        raise ValueError(f"the pattern '{key}' repeats too much to be matched in time")
    return re.compile(rf"(.*\.)?({key})$")


def adapter_note(config: dict[str, Any]) -> str:
    """What a reader of the report should know of the rows."""
    adapter = read_adapter(config)
    base = adapter.base or "a base that it does not name"
    if adapter.kind != READ:
        return f"a PEFT adapter of kind {adapter.kind} for {base}: its tensors are read one by one, not as updates"
    dora = "; DoRA's magnitudes rescale the rows of base + update, and are not in it" if config.get("use_dora") else ""
    beside = f"; with them the base is not yet the tuned model: {adapter.no_sum}" if adapter.no_sum else ""
    return f"a LoRA adapter for {base}: each row is an update s·B·A, s = α/r as its configuration says{dora}{beside}"


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


def _fitted(adapter: Adapter, path: str, a: TensorRef, b: TensorRef) -> tuple[float, int, str]:
    """(s, experts, what is wrong) of a pair. Its rank is the configuration's r, times the experts where its module has
    parameters with pairs; which of them it belongs to is not stored, so that all must have one s and r."""
    parameters = adapter.parameters_of(path.replace(".base_layer", ""))
    told = {(adapter.scale(name), adapter.rank_of(name)) for name in parameters or [path]}
    scale, rank = min(told)
    if adapter.no_product:
        return scale, 1, adapter.no_product
    experts = max(1, a.shape[0] // rank) if parameters else 1
    if len(told) == 1 and a.shape[0] == experts * rank == b.shape[1] == math.prod(b.shape[1:]):
        return scale, experts, ""
    shapes = " and ".join(" × ".join(map(str, tensor.shape)) for tensor in (a, b))
    ranks = " or ".join(str(r) for _, r in sorted(told))
    return scale, 1, f"its factors A and B are {shapes}, and r is {ranks} in adapter_config.json"


def _weight(adapter: Adapter, path: str, a: TensorRef, b: TensorRef, magnitude: TensorRef | None) -> Weight:
    scale, experts, unfit = _fitted(adapter, path, a, b)
    low_rank = LowRank(b, a, scale, magnitude, experts, unfit)
    shape = (b.shape[0], math.prod(a.shape[1:]))
    tensors = (a, b) if magnitude is None else (a, b, magnitude)
    path = path.removesuffix(".base_layer")  # of nested wrappers around one module
    return Weight(f"{path}.weight", (experts, *shape) if experts > 1 else shape, a.dtype, "lora", tensors, low_rank)


def read_factors(pair: LowRank, expert: int | None, read: Callable[[TensorRef], Tensor]) -> Factored:
    """B (O × r) and A (r × I) of one pair, of one expert where experts' factors lie in one tensor (PEFT's
    `ParamWrapper`: A in blocks of r rows, B's columns in turn). `ValueError` where they are not what the adapter's
    configuration says."""
    if pair.unfit:
        raise ValueError(pair.unfit)
    a, b = real(read(pair.right), "A"), real(read(pair.left), "B")
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
    magnitude = real(magnitude, "magnitude")
    if magnitude.numel() != len(whole):
        raise ValueError(f"the adapter's magnitude has {magnitude.numel()} entries")
    lengths = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
    return whole * (magnitude.to(torch.float64).reshape(-1, 1) / lengths)


def stored_pieces(stored: str, low_rank: LowRank | None, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """(name, shape) of what is stored of a matrix (or of all experts' matrices): itself, or a pair's two factors."""
    if stored != "lora" or low_rank is None:
        return [(name, shape)]
    sharing = low_rank.experts if len(shape) == 2 else 1
    (rows, *inputs), (outputs, *columns) = low_rank.right.shape, low_rank.left.shape
    right, left = (rows // sharing, math.prod(inputs)), (outputs, math.prod(columns) // sharing)
    return [(low_rank.right.name, right), (low_rank.left.name, left)]


def untied(
    weights: tuple[Weight, ...], ties: dict[str, str], adapter: tuple[Weight, ...]
) -> tuple[tuple[Weight, ...], dict[str, str], dict[str, TensorRef]]:
    """(weights, ties, held) of a base whose adapter has saved one of two tied weights whole, which unties them: another
    weight for each name that the base does not store, the ties that are left, and the tensor that has its numbers."""
    saved = {_path(weight.name) for weight in _wholes(adapter)}
    is_saved = {name: _match(_path(name), saved) is not None for name in {*ties, *ties.values()}}
    stored = {weight.name: weight for weight in weights}
    held: dict[str, TensorRef] = {}
    left: dict[str, str] = {}
    first: dict[str, str] = {}  # of those that keep the base's numbers; the others are tied to it
    added = []
    for name, of in sorted(ties.items()):
        if of not in stored or stored[of].format != "plain" or not (is_saved[name] or is_saved[of]):
            left[name] = of
        elif not is_saved[name] and first.setdefault(of, name) != name:
            left[name] = first[of]
        elif name not in stored:
            (held[name],) = stored[of].tensors
            added.append(replace(stored[of], name=name, tensors=(replace(held[name], name=name),)))
    return (*weights, *added), left, held


def merge(
    base: Inventory, adapter: tuple[Weight, ...], names: dict[str, tuple[str, str]], held: dict[str, TensorRef]
) -> Inventory:
    """The base's inventory with the adapter's updates in it, and its whole modules in place of the base's.

    `names` gives of every matrix of the base, by its stored name, what the model's class calls it, as do adapters, and
    what the checkpoint does, as do adapters made when the class was another. A path matches if it is the same, or one
    ends in the other and no other does. What matches nothing, or is of another shape, is named in the notes;
    `SourceError` if no update matches. `held` are the tensors to read in place of those of that name.
    """
    paths = {ref.name: tuple(map(_path, names[ref.name])) for ref in base.selected}
    known = [set(ways) for ways in zip(*paths.values(), strict=True)]
    changes = [*(weight for weight in adapter if weight.low_rank is not None), *_wholes(adapter)]
    placed: dict[str | None, list[Weight]] = {}
    for weight in changes:
        found = (_match(_path(weight.name), ways) for ways in known)
        placed.setdefault(next(filter(None, found), None), []).append(weight)
    selected, used = [], set()
    for ref in base.selected:
        changed = replace(ref, tensors=(held[ref.name],)) if ref.name in held else ref
        for weight in (weight for path in dict.fromkeys(paths[ref.name]) for weight in placed.get(path, ())):
            if (result := _changed(changed, weight)) is not None:
                changed = result
                used.add(weight)
        selected.append(changed)
    if not any(weight.low_rank is not None for weight in used):
        remedy = "give the base that it was made for; updates of stacked experts are merged by peft alone"
        raise SourceError(f"no pair of the adapter belongs to a matrix of the base; {remedy}")
    lost = [_path(weight.name) for weight in changes if weight not in used]
    told = f"{len(lost)} weights of the adapter match no matrix of the base and are left out, first"
    notes = [f"{told} '{lost[0]}'"] if lost else []
    added = sum(math.prod(ref.shape) for ref in selected) - sum(math.prod(ref.shape) for ref in base.selected)
    return replace(base, selected=tuple(selected), parameters=base.parameters + added, notes=(*base.notes, *notes))


def _wholes(adapter: tuple[Weight, ...]) -> list[Weight]:
    """The matrices of the modules that were saved whole."""
    parts = {tensor.name for weight in adapter if weight.low_rank is not None for tensor in weight.tensors}
    alone = (weight for weight in adapter if weight.low_rank is None and weight.tensors[0].name not in parts)
    return [weight for weight in alone if len(weight.shape) > 1]


def _path(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".base_layer")


def _match(path: str, paths: set[str]) -> str | None:
    if path in paths:
        return path
    ends = [other for other in paths if other.endswith(f".{path}") or path.endswith(f".{other}")]
    return ends[0] if len(ends) == 1 else None


def _changed(ref: MatrixRef, weight: Weight) -> MatrixRef | None:
    """A matrix of the base with the adapter's update, or the module that the adapter saved whole in its place, perhaps
    with more tokens; `None` where that is of another shape."""
    if weight.low_rank is not None:
        return replace(ref, low_rank=weight.low_rank)
    stored = weight.tensors[0]
    rows, columns = flat = stored.shape[0], math.prod(stored.shape[1:])
    shape = (columns, rows) if ref.transposed else flat
    if ref.expert is not None:
        fits, shape = stored.shape == ref.tensors[0].shape, ref.shape
    elif ref.rows:
        fits = shape[1] == ref.shape[1] and shape[0] >= max(stop for _, stop, _ in ref.rows)
        shape = ref.shape
    else:
        fits = columns == ref.shape[0 if ref.transposed else 1]
    whole = replace(ref, tensors=(stored,), dtype=stored.dtype, stored="plain", shape=shape, tied_to=None)
    return whole if fits else None
