"""How many tokens each head looks at: k₉₀ and its Hopfield class, from the model's own attention over a dataset."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmd_hf.circuits import HeadReport, Heads
from lmd_hf.compat import checkpoint_key_map
from lmd_hf.matrix.hopfield import LEAST_TOKENS, hopfield_class, tokens_in_mass
from lmd_hf.records import Data
from lmd_hf.run.batches import load_batches
from lmd_hf.run.loading import Batch, evaluating, forward, load_again, load_model, origin
from lmd_hf.run.world import World
from lmd_hf.weights.source import Source


EAGER = {"attn_implementation": "eager"}  # attention as it is written, which gives its softmax
SURPLUS = 0.02  # above 1, of the sum of a softmax in a short format
Counted = tuple[Tensor, Tensor]  # k of every head and query, n of every query


@dataclass
class _Attention:
    """The queries of one attention that count: k (heads × queries) and n (queries), batch by batch."""

    name: str
    heads: int
    crossed: bool
    k: list[Tensor] = field(default_factory=list)
    n: list[Tensor] = field(default_factory=list)
    seen: bool = False  # in the present forward pass

    def add(self, softmax_BHQN: Tensor, mask: Tensor | None) -> None:
        """Take in what one forward pass gives; queries that `mask` (batch × queries) rules out do not count."""
        visible_BQ = (softmax_BHQN > 0).any(1).sum(-1)
        counts = visible_BQ >= LEAST_TOKENS
        if mask is not None and mask.shape == counts.shape:
            counts &= mask.bool().to(counts.device)
        self.n.append(visible_BQ[counts].cpu())
        self.k.append(tokens_in_mass(softmax_BHQN.transpose(0, 1)[:, counts]).to("cpu", torch.int32))

    def counted(self) -> Counted | None:
        """All of it; `None` where the model never showed its softmax."""
        return (torch.cat(self.k, dim=1), torch.cat(self.n)) if self.k else None


def with_focus(heads: Heads, source: Source, data: Data, *, device: str, world: World) -> Heads:
    """The heads with k₉₀, its share and class: medians over the unpadded queries that see n ≥ 32 tokens.

    The model runs with its attention computed as it is written, each rank on its share of the batches, and shows the
    softmax of every head. n counts the tokens to which any head of the layer gives weight. A number is `None` where no
    query sees 32 tokens; a note says where the model does not show its softmax. Raises as `load_model` and
    `load_batches` do.
    """
    if not heads.rows:
        return heads
    counted, problem = world.together(lambda: _counted(heads.rows, source, data, device, world))
    if problem:
        return replace(heads, notes=(*heads.notes, f"k90 of the heads not measured: {problem}"))
    found: dict[str, list[Counted]] = {}
    for share in world.gather(counted):
        for name, counts in share.items():
            found.setdefault(name, []).append(counts)
    rows = tuple(_focused(row, found.get(row.name, [])) for row in heads.rows)
    silent = list(dict.fromkeys(row.name for row in heads.rows if row.name not in found))
    lacking = f"k90 of the heads of {len(silent)} attentions not measured (first '{silent[0]}')" if silent else ""
    notes = [f"{lacking}: the model does not show their softmax"] if silent else []
    return replace(heads, rows=rows, notes=(*heads.notes, *notes))


def _focused(row: HeadReport, shares: list[Counted]) -> HeadReport:
    """The row with the medians over all ranks' queries."""
    if not shares:
        return row
    k = np.concatenate([k_HQ[row.head].numpy() for k_HQ, _ in shares])
    n = np.concatenate([n_Q.numpy() for _, n_Q in shares])
    if not len(k):
        return replace(row, queries=0)
    share = float(np.median(k / n))
    return replace(row, k90=float(np.median(k)), k90_share=share, queries=len(k), hopfield_class=hopfield_class(share))


def _counted(
    rows: Sequence[HeadReport], source: Source, data: Data, device: str, world: World
) -> tuple[dict[str, Counted], str]:
    """{name of an attention: k and n} over this rank's batches, or in words why there is nothing."""
    place = origin(source)
    model = load_model(source, place, device)
    with _eager(model) as problem:
        throughout = _is_eager(model)
    if (problem or not throughout) and source.module is None:  # some choose how they attend when they are made
        model = load_again(source, replace(place, options={**place.options, **EAGER}), device)
    batches = load_batches(model, place, data)
    attentions = {}
    for row in rows:  # the last head of each attention tells how many there are at least
        attentions[row.name] = _Attention(row.name, row.head + 1, row.block == "cross_attention")
    with _eager(model) as problem:
        if problem:
            return {}, problem
        with evaluating(model), _watching(model, attentions) as current:
            for _, batch in batches.share(world):
                current.update(batch=batch)
                for attention in attentions.values():
                    attention.seen = False
                forward(model, batch, output_attentions=True)
    return {name: counts for name, a in attentions.items() if (counts := a.counted()) is not None}, ""


def _is_eager(model: nn.Module) -> bool:
    """Whether all parts of the model are; T5's decoder, for one, has had a configuration of its own."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return all(getattr(config, "_attn_implementation", "eager") == "eager" for config in configs)


@contextmanager
def _eager(model: nn.Module) -> Iterator[str]:
    """The model with attention as it is written while the context lasts; gives, in words, why that cannot be."""
    config: Any = getattr(model, "config", None)
    before, change = getattr(config, "_attn_implementation", None), getattr(model, "set_attn_implementation", None)
    if change is None or before is None:
        yield f"{type(model).__name__} has no choice of how attention is computed"
        return
    if before != "eager":
        change("eager")
    try:
        eager = config._attn_implementation == "eager"
        yield "" if eager else f"{type(model).__name__} cannot change how it computes attention; load it with eager"
    finally:
        if before != "eager":
            change(before)


@contextmanager
def _watching(model: nn.Module, attentions: dict[str, _Attention]) -> Iterator[dict[str, Batch]]:
    """Hooks on the modules that hold each attention; what is yielded tells them the present batch."""
    current: dict[str, Batch] = {}

    def hook(attention: _Attention) -> Any:
        def look(_: nn.Module, args: Any, output: Any) -> None:
            if attention.seen or not isinstance(output, tuple):
                return
            found = next((value for value in output if _is_softmax(value, attention.heads)), None)
            if found is not None:
                attention.seen = True
                attention.add(found.detach(), _mask(current["batch"], attention, found.shape[2]))

        return look

    targets = checkpoint_key_map(model, list(attentions))
    handles = [
        model.get_submodule(path).register_forward_hook(hook(attention))
        for name, attention in attentions.items()
        for path in _holders(targets[name].name, model)
    ]
    try:
        yield current
    finally:
        for handle in handles:
            handle.remove()


def _holders(parameter: str, model: nn.Module) -> list[str]:
    """The modules around a projection, from the inside out, as far as the numbered block."""
    modules = dict(model.named_modules())
    parts = parameter.split(".")[:-1]
    found = []
    while parts and not parts[-1].isdigit():
        if (path := ".".join(parts)) in modules:
            found.append(path)
        parts.pop()
    return found


def _is_softmax(value: Any, heads: int) -> bool:
    """Whether an output is (batch, heads, queries, tokens), not below 0, with sums of at most 1 (less with a sink)."""
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] < heads or value.numel() == 0:
        return False
    sums = value.detach().to(torch.float32).sum(-1)
    return bool(value.min() >= 0) and bool(sums.max() <= 1 + SURPLUS) and bool(sums.max() > 0)


def _mask(batch: Batch, attention: _Attention, queries: int) -> Tensor | None:
    """Which queries are no padding: by the mask of the side that asks, told by its length where both are there."""
    decoder = "decoder" in attention.name.split(".") or attention.crossed
    name = "decoder_attention_mask" if decoder and "decoder_attention_mask" in batch else "attention_mask"
    mask = batch.get(name)
    return mask if mask is not None and mask.shape[-1] == queries else None
