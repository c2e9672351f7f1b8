"""The attention heads of a model: which rows of which matrices each one has, and the scale of its scores.

From the inventory alone. How many heads there are, how wide they are and how the model scales their scores comes from
its configuration, with the exceptions in families.toml ([[heads]]); every width must agree with the shapes of the
matrices, else the attention is listed with the reason and not guessed at.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lmd_hf.circuits import HeadRef, HeadRows
from lmd_hf.records import Inventory, MatrixRef
from lmd_hf.weights.families import Config, fact, find_heads, stack_words


BLOCKS = ("attention", "cross_attention")
ROLES = ("q", "k", "v", "kv", "o")
Key = tuple[str, str]  # role, and the part of a low-rank pair
Members = dict[Key, MatrixRef]
Share = tuple[int, tuple[HeadRows, ...], tuple[HeadRows, ...], HeadRows, HeadRows]  # kv_head, q, k, v, o


@dataclass(frozen=True)
class Unformed:
    """An attention whose heads cannot be told apart, by the name of its first matrix, and why."""

    name: str
    reason: str


class _UnknownError(Exception):
    """Why the heads of one attention cannot be formed."""


def list_heads(inventory: Inventory) -> tuple[tuple[HeadRef, ...], tuple[Unformed, ...]]:
    """(the heads, layer by layer; the attentions whose heads cannot be formed)."""
    vectors = {skipped.name for skipped in inventory.skipped}
    heads: list[HeadRef] = []
    unformed = []
    for refs in _attentions(inventory.selected):
        try:
            heads += _form(refs, _config(inventory, refs[0]), vectors)
        except _UnknownError as error:
            unformed.append(Unformed(refs[0].name, str(error)))
    return tuple(heads), tuple(unformed)


def head_matrices(head: HeadRef) -> tuple[MatrixRef, ...]:
    """Every matrix that a head has a share of."""
    rows = [*head.q, *head.k, head.v, head.o]
    return tuple(dict.fromkeys(each.ref for own in rows for each in (own, own.after) if each is not None))


def unformed_notes(unformed: Iterable[Unformed]) -> tuple[str, ...]:
    """One line for each reason: how many attentions it concerns, and the first of them."""
    names: dict[str, list[str]] = {}
    for each in unformed:
        names.setdefault(each.reason, []).append(each.name)
    return tuple(
        f"heads of {len(found)} attention{'s' if len(found) > 1 else ''} not formed (first '{found[0]}'): {reason}"
        for reason, found in names.items()
    )


def _config(inventory: Inventory, ref: MatrixRef) -> Config:
    """The configuration of the part of a composite model that a path names, else the whole."""
    whole, parts = Config(inventory.config), ref.name.split(".")
    named = (stack for stack, words in stack_words().items() if any(word in parts for word in words))
    return next((inner for stack in named if (inner := whole.of_stack(stack)) is not whole), whole)


# --- which matrices make one attention ---------------------------------------------------------------------------


def _attentions(refs: Iterable[MatrixRef]) -> list[list[MatrixRef]]:
    """The matrices of one attention each: those of one layer and block or, where these are several, of one module."""
    layers: dict[tuple[Any, ...], list[MatrixRef]] = {}
    for ref in refs:
        if ref.block in BLOCKS and ref.role in ROLES:
            layers.setdefault((ref.stack, ref.layer, ref.block), []).append(ref)
    found: list[list[MatrixRef]] = []
    for (_, layer, _), group in layers.items():
        if layer is not None and len({_key(ref) for ref in group}) == len(group):
            found.append(group)
            continue
        modules: dict[str, list[MatrixRef]] = {}
        for ref in group:
            modules.setdefault(_module(ref.name), []).append(ref)
        found += modules.values()
    return found


def _key(ref: MatrixRef) -> Key:
    return ref.role, ref.part if ref.part in ("a", "b") else ""


def _module(name: str) -> str:
    """The attention that holds a tensor: its name up to the last part that says so, or the first of several in a row
    (`attention.attention.query` beside `attention.output.dense`), else the module around it."""
    parts = name.split(".")
    said = [re.search("att", part, re.IGNORECASE) is not None for part in parts[:-1]]
    places = [place for place, says in enumerate(said) if says and not (place and said[place - 1])]
    return ".".join(parts[: places[-1] + 1] if places else parts[:-2])


# --- the heads of one attention ----------------------------------------------------------------------------------


def _form(refs: list[MatrixRef], config: Config, vectors: set[str]) -> list[HeadRef]:
    """The heads of one attention; `_UnknownError` says why there are none."""
    one = {_key(ref): ref for ref in refs}
    if any(ref.expert is not None for ref in refs):
        raise _UnknownError("its heads are experts, which are chosen for each token")
    if len(one) < len(refs):
        raise _UnknownError("several matrices have the same role in it")
    if any(ref.stored == "lora" for ref in refs):
        raise _UnknownError("an adapter alone holds but updates of its matrices; give its base to see the heads")
    first = refs[0]
    row = find_heads(first.name.removesuffix(".weight"), config)
    if reason := row.get("reason"):
        raise _UnknownError(reason)
    shares = _latent(one, config) if ("kv", "b") in one else _plain(one, config, row)
    scale = _scale(row, config, sum(rows.stop - rows.start for rows in shares[0][1]), first.layer)
    return [
        HeadRef(
            name=q[0].ref.name,
            stack=first.stack,
            layer=first.layer,
            block=first.block,
            head=head,
            kv_head=kv_head,
            q=q,
            k=k,
            v=v,
            o=o,
            scale=scale,
            biases=tuple(role for (role, part), ref in one.items() if part != "a" and _has_bias(ref, vectors)),
            qk_norm=bool(row.get("qk_norm")) or _has_qk_norm(refs, config, vectors),
            soft_cap=config.get(*fact("soft_cap_keys")),
            rotary=first.block == "attention" and _is_rotary(row, config, first.layer),
        )
        for head, (kv_head, q, k, v, o) in enumerate(shares)
    ]


def _plain(one: Members, config: Config, row: dict[str, Any]) -> list[Share]:
    """Queries, keys and values head after head, each in a matrix of its own. H heads share H_kv of keys and values:
    head h has ⌊h·H_kv/H⌋. Where the queries are `gated`, every other block of their rows is not theirs."""
    if lacking := [role for role in "qkvo" if (role, "") not in one]:
        raise _UnknownError(f"there is no matrix that is its {' and no matrix that is its '.join(lacking)} alone")
    q, k, v, o = (one[role, ""] for role in "qkvo")
    count = _count(config, q, row)
    step = 2 if row.get("gate") else 1
    size = _divided(q, count * step)
    if "count_key" not in row and size not in (known := _sizes(config, count)):
        stated = ", ".join(map(str, sorted(known))) or "nothing"
        raise _UnknownError(f"its {count} heads have {size} rows of queries each, the configuration says {stated}")
    groups = _divided(k, size, parts=False)
    value = _divided(v, groups)
    if count % groups or o.shape[1] != count * value:
        raise _UnknownError(
            f"{count} heads over {groups} of keys with values of {value} do not fit {o.shape[1]} outputs"
        )
    return [
        (kv := head * groups // count, (_rows(q, head * step, size),), (_rows(k, kv, size),), _rows(v, kv, value),
         _rows(o, head, value))
        for head in range(count)
    ]  # fmt: skip


def _latent(one: Members, config: Config) -> list[Share]:
    """Multi-head latent attention (DeepSeek-V2): W_Q = b·a or one matrix, keys = [kv_b·kv_a; rotary rows of kv_a, which
    all heads share], values = kv_b·kv_a."""
    if lacking := [f"{role} {part}".strip() for role, part in (("kv", "a"), ("o", "")) if (role, part) not in one]:
        raise _UnknownError(f"its low-rank pairs lack {', '.join(lacking)}")
    pair = one.get(("q", "b"))
    q, q_a = (pair, one.get(("q", "a"))) if pair is not None else (one.get(("q", "")), None)
    kv_a, kv_b, o = one["kv", "a"], one["kv", "b"], one["o", ""]
    count = _count(config, kv_b, {})
    plain, rotary, value = (config.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if q is None or not all(isinstance(size, int) for size in (plain, rotary, value)):
        raise _UnknownError("its low-rank pairs are not those of DeepSeek's latent attention")
    rank, size = kv_b.shape[1], plain + rotary
    fits = q.shape[0] == count * size and kv_b.shape[0] == count * (plain + value) and o.shape[1] == count * value
    if not fits or kv_a.shape[0] != rank + rotary or (q_a is not None and q_a.shape[0] != q.shape[1]):
        raise _UnknownError(f"{count} heads of {plain} + {rotary} and values of {value} do not fit its low-rank pairs")
    down, shared = HeadRows(kv_a, 0, rank), HeadRows(kv_a, rank, rank + rotary)
    asked = None if q_a is None else HeadRows(q_a, 0, q_a.shape[0])
    shares: list[Share] = []
    for head in range(count):
        start = head * (plain + value)
        middle, stop = start + plain, start + plain + value
        keys = (HeadRows(kv_b, start, middle, down), shared)
        queries = HeadRows(q, head * size, (head + 1) * size, asked)
        shares.append((head, (queries,), keys, HeadRows(kv_b, middle, stop, down), _rows(o, head, value)))
    return shares


def _rows(ref: MatrixRef, place: int, size: int) -> HeadRows:
    return HeadRows(ref, place * size, (place + 1) * size)


def _divided(ref: MatrixRef, by: int, *, parts: bool = True) -> int:
    if by < 1 or ref.shape[0] % by:
        what = f"{by} heads" if parts else f"heads of {by} rows"
        raise _UnknownError(f"the {ref.shape[0]} rows of its {ref.role} are no whole number of {what}")
    return ref.shape[0] // by


# --- what the configuration tells --------------------------------------------------------------------------------


def _count(config: Config, ref: MatrixRef, row: dict[str, Any]) -> int:
    """The heads where the row says that they are told, or of the side that a path names, else of all."""
    sides = [f"{side}_attention_heads" for side in ("encoder", "decoder") if side in (ref.stack, *ref.name.split("."))]
    own = row.get("count_key")
    count = config.get(*sides[-1:], *fact("head_count_keys")) if own is None else config.at(own)
    if not isinstance(count, int):
        raise _UnknownError("the configuration does not say how many heads it has")
    return count // row.get("count_divisor", 1)


def _sizes(config: Config, count: int) -> set[int]:
    """The sizes of a head that the configuration names; of one that names none, its widths over the heads: Qwen2-VL's
    vision tower has its own, `embed_dim`, beside the `hidden_size` that it is merged into."""
    named = {size for key in fact("head_size_keys") if isinstance(size := config.get(key), int)}
    widths = [config.values.get(key) for key in fact("width_keys")] + [config.get(*fact("width_keys"))]
    return named or {width // count for width in widths if isinstance(width, int) and width % count == 0}


def _scale(row: dict[str, Any], config: Config, size: int, layer: int | None) -> float:
    """What multiplies the scores: 1/√size, or what the row says in its place."""
    scale = float(row.get("scale", (row.get("terms", 1) * size) ** -0.5))
    if key := row.get("scale_key"):
        scale = _positive(config, key) ** row["scale_power"]
    if key := row.get("factor_key"):
        scale *= _positive(config, key)
    if row.get("yarn"):  # DeepSeek multiplies by what YaRN leaves out of the rotations, squared
        rope = config.get("rope_parameters", "rope_scaling") or {}
        factor, share = rope.get("factor", 1.0), rope.get("mscale_all_dim", 0.0)
        stretched = rope.get("rope_type", rope.get("type", "default")) != "default" and share and factor > 1
        scale *= (0.1 * share * math.log(factor) + 1.0) ** 2 if stretched else 1.0
    return scale / (layer + 1) if row.get("by_layer") and layer is not None else scale


def _positive(config: Config, key: str) -> float:
    value = config.get(key)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _UnknownError(f"the configuration does not say the '{key}' that scales its scores")
    return float(value)


def _has_bias(ref: MatrixRef, vectors: set[str]) -> bool:
    stem = ref.name.removesuffix("weight")
    return f"{stem}bias" in vectors or f"{stem.rpartition('.')[0].rpartition('.')[0]}.{ref.role}_bias" in vectors


def _has_qk_norm(refs: list[MatrixRef], config: Config, vectors: set[str]) -> bool:
    """A norm of queries or keys after their projection: by its gain, or by the configuration where it has none."""
    modules = [ref.name.split(".")[:-2] for ref in refs if ref.role != "o"]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
    around = "".join(f"{part}." for part, *_ in shared)
    pattern = re.compile(fact("qk_norm"))
    gains = any(name.startswith(around) and pattern.search(name[len(around) :]) for name in vectors)
    return gains or any(config.get(key) is True for key in fact("qk_norm_keys"))


def _is_rotary(row: dict[str, Any], config: Config, layer: int | None) -> bool:
    if any(_of_layer(config, key, layer, 1) in (0, None) for key in fact("rotary_by_layer")):
        return False
    kind = _of_layer(config, "layer_types", layer, "")
    rotations = config.get("rope_parameters")
    if isinstance(rotations, dict) and kind in rotations and rotations[kind] is None:
        return False
    rotary = row.get("rotary")
    if isinstance(rotary, str):
        return kind == rotary or not config.get("sliding_window")
    if rotary is not None:
        return bool(rotary)
    named = config.get("position_embedding_type", "position_embeddings_type") == "rotary"
    return named or any(config.get(key) not in (None, False, {}) for key in fact("rotary_keys"))


def _of_layer(config: Config, key: str, layer: int | None, default: Any) -> Any:
    """The entry for a layer of a list that the configuration may hold."""
    entries = config.get(key)
    return entries[layer] if isinstance(entries, list) and layer is not None and layer < len(entries) else default
