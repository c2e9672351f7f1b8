"""Two models side by side, from headers alone: which matrices are the same one. Pure.

A pair has the same name; or a name that differs by a prefix, as in a wrapped or a headless model; or the same place
(stack, block, role, layer, expert), as where one model stores a fused matrix or stacked experts and the other does not.
Nothing is paired that fits more than one partner.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from lmd_hf.changes import Matching, Pair, Unmatched
from lmd_hf.errors import SettingsError
from lmd_hf.matrix.cost import EIGEN_FLOPS
from lmd_hf.records import Alias, Inventory, MatrixRef, Settings, Skipped
from lmd_hf.run.plan import nothing_left, selector
from lmd_hf.weights.families import find_role


Key = tuple[str, str]  # name and part
Refs = dict[Key, MatrixRef]
Fits = Callable[[MatrixRef, MatrixRef], bool]
VECTORS = 9  # of a k × k symmetric matrix, eigenvectors included: 9 k³ floating-point operations (as EIGEN_FLOPS)


def match(base: Inventory, tuned: Inventory, settings: Settings) -> Matching:
    """Pair the matrices and vectors of two models, and list what has no partner, with the reason.

    A selection is one of the base's matrices; vectors are compared only without one. Raises `SettingsError` for
    settings that cannot be read, a metric other than `identity`, an adapter beside a model, and a selection that leaves
    nothing.
    """
    wanted, wanted_tuned = selector(base.selected, settings), selector(tuned.selected, settings)
    if settings.metric != "identity":
        raise SettingsError(f"compare works in the identity metric, not in '{settings.metric}'; leave the metric out")
    for side, it, other in (("base", base, tuned), ("tuned", tuned, base)):
        if _is_adapted(it) and not _is_adapted(other):
            told = "is an adapter, or wrapped by one, whose updates are no matrices of the other model"
            raise SettingsError(f"the {side} model {told}; merge it (peft's merge_and_unload), or compare two adapters")
    left, right = _with_tied(base), _with_tied(tuned)
    found, renamings = _pair_up(left, right, _fitting(left, right))
    order = {key: index for index, key in enumerate(left)}
    found.sort(key=lambda pair: order[pair.base.name, pair.base.part])
    ties = [{alias.name for alias in inventory.aliases if not alias.stored} for inventory in (base, tuned)]
    pairs = [
        replace(p, tied="base" if p.base.name in ties[0] else "tuned" if p.tuned.name in ties[1] else "")
        for p in found
        if wanted(p.base) and not (p.base.name in ties[0] and p.tuned.name in ties[1])
    ]
    if base.selected and not any(wanted(ref) for ref in left.values()):
        raise nothing_left(settings)
    paired = ({(p.base.name, p.base.part) for p in found}, {(p.tuned.name, p.tuned.part) for p in found})
    alone = [
        *_alone("base", [r for r in base.selected if wanted(r)], paired[0], right, tuned),
        *_alone("tuned", [r for r in tuned.selected if wanted_tuned(r)], paired[1], left, base),
    ]
    vectors: tuple[tuple[str, str], ...] = ()
    if not (settings.roles or settings.layers or settings.match):
        vectors, lone = _vectors(base.skipped, tuned.skipped, renamings, found)
        alone += lone + _skipped(base.skipped, tuned.skipped)
    return Matching(
        pairs=tuple(pairs),
        vectors=vectors,
        unmatched=tuple(alone),
        parameters=base.parameters,
        notes=tuple(f"{side}: {note}" for side, i in (("base", base), ("tuned", tuned)) for note in i.notes),
    )


def _is_adapted(inventory: Inventory) -> bool:
    """Whether updates stand beside the matrices, or in their place."""
    return any(ref.stored == "lora" or ".base_layer." in ref.name for ref in inventory.selected)


def _with_tied(inventory: Inventory) -> Refs:
    """Every matrix, and last those that are not stored because they repeat another, such as a tied head."""
    refs = {(ref.name, ref.part): ref for ref in inventory.selected}
    tied = [_tied(a, ref) for a in inventory.aliases if not a.stored for ref in inventory.selected if ref.name == a.of]
    return refs | {(ref.name, ref.part): ref for ref in tied}


def _tied(alias: Alias, of: MatrixRef) -> MatrixRef:
    """The matrix that `alias` names: a head looks at the entries of its embedding the other way round."""
    role = find_role(alias.name.removesuffix(".weight"))
    ref = replace(of, name=alias.name)
    if role is None or {role.role, of.role} != {"embed", "head"}:
        return ref
    return replace(
        ref, role=role.role, block="", layer=None, norm=None, shape=of.shape[::-1], transposed=not of.transposed
    )


def _fitting(left: Refs, right: Refs) -> Fits:
    """Whether two matrices can be compared: equal shapes, or two vocabularies of different length."""
    vocabularies = [{ref.shape[1] for ref in refs.values() if ref.role == "embed"} for refs in (left, right)]

    def fits(a: MatrixRef, b: MatrixRef) -> bool:
        if a.shape == b.shape:
            return True
        if a.role == b.role == "embed":
            return a.shape[0] == b.shape[0]
        both = a.shape[0] in vocabularies[0] and b.shape[0] in vocabularies[1]  # else the rows are classes, not tokens
        return a.role == b.role == "head" and a.shape[1] == b.shape[1] and both

    return fits


def _pair_up(left: Refs, right: Refs, fits: Fits) -> tuple[list[Pair], list[tuple[str, str]]]:
    """All pairs, the surest kind first, and the renamings (prefix of the base, prefix of the tuned) that were used."""
    left, right = dict(left), dict(right)
    pairs: list[Pair] = []

    def take(found: Iterable[tuple[MatrixRef, MatrixRef]], matched: str) -> int:
        before = len(pairs)
        for a, b in list(found):
            if left.pop((a.name, a.part), None) and right.pop((b.name, b.part), None):
                pairs.append(_pair(a, b, matched))
        return len(pairs) - before

    take(_by_name(left, right, ("", ""), fits), "name")
    renamings = [r for r in _renamings(left, right, fits) if take(_by_name(left, right, r, fits), "prefix")]
    take(_by_place(left, right, lambda ref: (_place(ref), ref.shape), fits), "place")
    take(_by_place(left, right, _place, fits), "place")
    return pairs, renamings


def _pair(a: MatrixRef, b: MatrixRef, matched: str) -> Pair:
    """The pair with what it has in common, and its cost: three spectra, two sets of vectors; in memory both matrices,
    one of them in float64, and bases of subspaces of up to half their dimension."""
    shape = (min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1]))
    short, long = min(shape), max(shape)
    flops = 5 * long * short**2 + (3 * EIGEN_FLOPS + 2 * VECTORS) * short**3
    stored = sum((8 if ref.dtype == "F64" else 4) * math.prod(ref.shape) for ref in (a, b))
    return Pair(a, b, matched, "", shape, flops, stored + 3 * 8 * short * long + 4 * 8 * short**2)


def _by_name(left: Refs, right: Refs, renaming: tuple[str, str], fits: Fits) -> Iterator[tuple[MatrixRef, MatrixRef]]:
    old, new = renaming
    for (name, part), a in left.items():
        b = right.get((new + name.removeprefix(old), part)) if name.startswith(old) else None
        if b is not None and fits(a, b) and (old == new or _agree(a, b)):
            yield a, b


def _agree(a: MatrixRef, b: MatrixRef) -> bool:
    return a.role == b.role and a.layer == b.layer and (a.stack == b.stack or "" in (a.stack, b.stack))


def _renamings(left: Refs, right: Refs, fits: Fits) -> list[tuple[str, str]]:
    """(prefix of the base, prefix of the tuned) by which names differ, the one that explains most matrices first; none
    that another one with the same prefix on a side explains as well."""
    tails = defaultdict(list)
    for b in right.values():
        tails[_tail(b)].append(b)
    votes = Counter(
        _prefixes(a.name, b.name) for a in left.values() for b in tails[_tail(a)] if fits(a, b) and _agree(a, b)
    )
    ranked = sorted(votes, key=lambda renaming: (-votes[renaming], renaming))
    rivals = Counter((side, r[side], votes[r]) for r in ranked for side in (0, 1))
    return [r for r in ranked if r != ("", "") and all(rivals[side, r[side], votes[r]] == 1 for side in (0, 1))]


def _tail(ref: MatrixRef) -> Key:
    """The name from the number of the layer on, else its last two components."""
    numbered = re.search(r"(?<=\.)\d+\..*", ref.name)
    return (numbered.group() if numbered else ".".join(ref.name.split(".")[-2:]), ref.part)


def _prefixes(a: str, b: str) -> tuple[str, str]:
    """What stands before the longest common end of two dotted names."""
    ours, theirs = a.split("."), b.split(".")
    common = 0
    while common < min(len(ours), len(theirs)) and ours[-1 - common] == theirs[-1 - common]:
        common += 1
    first, second = (".".join(words[: len(words) - common]) for words in (ours, theirs))
    return (f"{first}." if first else "", f"{second}." if second else "")


def _by_place(
    left: Refs, right: Refs, key: Callable[[MatrixRef], Any], fits: Fits
) -> Iterator[tuple[MatrixRef, MatrixRef]]:
    """Matrices whose place is theirs alone in either model."""
    sides = []
    for refs in (left, right):
        places = defaultdict(list)
        for ref in refs.values():
            if ref.role != "other":  # which says nothing
                places[key(ref)].append(ref)
        sides.append({place: found[0] for place, found in places.items() if len(found) == 1})
    for place, a in sides[0].items():
        if place in sides[1] and fits(a, sides[1][place]):
            yield a, sides[1][place]


def _place(ref: MatrixRef) -> tuple[Any, ...]:
    named = re.search(r"\bexperts\.(\d+)\.", ref.name)
    expert = ref.expert if ref.expert is not None else int(named.group(1)) if named else None
    low_rank = ref.part if ref.part in ("a", "b") else ""
    return ref.stack, ref.block, ref.role, ref.layer, expert, low_rank


def _alone(side: str, refs: list[MatrixRef], paired: set[Key], others: Refs, other: Inventory) -> Iterator[Unmatched]:
    """Matrices of one side without a partner; where the other side has the name, what keeps them apart."""
    where = "tuned" if side == "base" else "base"
    skipped = {item.name: item.reason for item in other.skipped}
    for ref in refs:
        if (ref.name, ref.part) in paired:
            continue
        namesake = others.get((ref.name, ref.part))
        reason = f"no partner in the {where} model"
        if namesake is not None and namesake.shape != ref.shape:
            reason = f"the shape differs: {' × '.join(map(str, namesake.shape))} in the {where} model"
        elif ref.name in skipped:
            reason = f"skipped in the {where} model: {skipped[ref.name]}"
        yield Unmatched(side, ref.name, ref.part, ref.shape, reason)


def _vectors(
    base: tuple[Skipped, ...], tuned: tuple[Skipped, ...], renamings: list[tuple[str, str]], found: list[Pair]
) -> tuple[tuple[tuple[str, str], ...], list[Unmatched]]:
    """Vectors of one shape and one name, renamed as the matrices are, or biases of a pair; and the others."""
    left, right = (
        {item.name: item for item in side if item.reason == "vector" and 0 not in item.shape} for side in (base, tuned)
    )
    candidates = [
        (name, new + name.removeprefix(old))
        for old, new in (("", ""), *renamings)
        for name in left
        if name.startswith(old)
    ]
    candidates += [(_bias(pair.base.name), _bias(pair.tuned.name)) for pair in found]
    pairs: dict[str, str] = {}
    taken: set[str] = set()
    for name, other in candidates:
        free = name in left and other in right and name not in pairs and other not in taken
        if free and left[name].shape == right[other].shape:
            pairs[name] = other
            taken.add(other)
    lone = [("base", item) for item in left.values() if item.name not in pairs]
    lone += [("tuned", item) for item in right.values() if item.name not in taken]
    ordered = tuple((name, pairs[name]) for name in left if name in pairs)
    return ordered, [Unmatched(side, i.name, "", i.shape, "a vector with no partner") for side, i in lone]


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _skipped(base: tuple[Skipped, ...], tuned: tuple[Skipped, ...]) -> list[Unmatched]:
    """What neither model's inventory reads as a matrix or a vector; once where it is the same in both."""
    both = set(base) & set(tuned)
    sides = [("both" if item in both else "base", item) for item in base]
    sides += [("tuned", item) for item in tuned if item not in both]
    return [Unmatched(s, item.name, "", item.shape, item.reason) for s, item in sides if item.reason != "vector"]
