"""Every stored parameter of a model, exactly once: a matrix to decompose, something skipped with its reason, or an
alias. Reads headers only."""

import math
import re
from dataclasses import replace

from lmd_hf.records import Alias, Inventory, MatrixRef, NormRef, Skipped, Weight
from lmd_hf.weights.adapter import Place, Tree, read_tree
from lmd_hf.weights.families import (
    Config,
    Fused,
    Role,
    fact,
    family_fact,
    find_fused,
    find_norm_paths,
    find_role,
    stack_words,
)
from lmd_hf.weights.formats import FP8, INGREDIENT, is_ingredient, list_weights
from lmd_hf.weights.gguf import in_model_order
from lmd_hf.weights.lora import Piece, merge, stored_pieces, untied
from lmd_hf.weights.named import find_tree
from lmd_hf.weights.order import reading_order
from lmd_hf.weights.source import Source


READABLE = {"F64", "F32", "F16", "BF16", *FP8}
OTHER = Role("", "other")


def list_matrices(source: Source) -> Inventory:
    """The inventory of a source: selected + skipped + stored aliases add up to every parameter that is stored."""
    weights = list_weights(source.tensors, source.config, source.read)
    tree = find_tree(weights, source.config, source.module)
    ties = tree.ties | dict(source.shared)
    if not source.updates:
        return _list(source, weights, tree, ties)
    weights, ties, held = untied(weights, ties, source.updates)
    tree = find_tree(weights, source.config, source.module) if held else tree
    names = {w.tensors[0].name: (tree.places[w.name].module or tree.places[w.name].path, w.name) for w in weights}
    return merge(_list(source, weights, tree, ties), source.updates, names, held)


def list_by_name(source: Source) -> Inventory:
    """What names and shapes alone tell, at once and without importing transformers."""
    weights = list_weights(source.tensors, source.config, source.read)
    return _list(source, weights, read_tree(weights, None, None), dict(source.shared))


def _list(source: Source, weights: tuple[Weight, ...], tree: Tree, ties: dict[str, str]) -> Inventory:
    context = _Context(weights, tree)
    selected: list[MatrixRef] = []
    skipped: list[Skipped] = []
    for weight in weights:
        found = _describe(weight, context)
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            selected += found
    selected = _finish_mlps(selected, context)
    matrices = {context.weight_of[ref.name] for ref in selected}
    stored = {weight.name: weight for weight in weights}
    aliases = tuple(
        Alias(name, stored[of].tensors[0].name, stored[of].shape, stored=False)
        for name, of in sorted(ties.items())
        if name not in stored and of in matrices
    )
    tied = {name: of for name, of in ties.items() if of in stored and stored[of].format == "plain"}
    selected = [replace(ref, tied_to=tied.get(context.weight_of[ref.name])) for ref in selected]
    selected.sort(key=reading_order)
    parameters = sum(
        math.prod(shape) for w in weights for _, shape in stored_pieces(w.format, w.low_rank, w.name, w.shape)
    )
    notes = (*source.notes, *tree.notes)
    return Inventory(tuple(selected), tuple(skipped), aliases, parameters, notes, tree.config.values)


def pieces(ref: MatrixRef) -> list[Piece]:
    """(name, shape) of the stored parameters that a matrix accounts for: its own, or those of its two factors."""
    return stored_pieces(ref.stored, ref.low_rank, ref.name, ref.shape)


class _Context:
    """What describing one tensor needs to know of all the others."""

    def __init__(self, weights: tuple[Weight, ...], tree: Tree) -> None:
        self.tree = tree
        self.by_path = {tree.places[w.name].path.removesuffix(".weight"): w.tensors[0] for w in weights}
        self.weight_of = {tensor.name: w.name for w in weights for tensor in w.tensors}
        self.companions = {t.name: w.tensors[0].name for w in weights for t in w.tensors[1:]}
        paths = [place.module or place.path for place in tree.places.values()]
        self.stacks = _stacks(paths)
        self.lists = {
            split[0]
            for place in tree.places.values()
            if (split := _split_block(place.module or place.path))
            and (role := find_role(place.path, place.inside))
            and (role.block != "" or role.role == "ssm")
        }
        encoder_blocks = [
            (int(m.group(2)), m.group(0)) for p in paths if (m := re.match(r"^(.*\bencoder\.\w+)\.(\d{1,4})(?=\.)", p))
        ]
        self.last_encoder = max(encoder_blocks, default=(0, ""))[1]

    def stack(self, path: str) -> str:
        """The stack that a path belongs to, "" in a model with one stack."""
        components = path.split(".")
        return next((s for s in self.stacks if any(word in components for word in stack_words()[s])), "")

    def config(self, path: str) -> Config:
        """The configuration of the stack that holds `path`."""
        return self.tree.config.of_stack(self.stack(path))

    def layer(self, path: str) -> int | None:
        """Index of the block that holds `path`; `None` outside the lists of blocks."""
        split = _split_block(path)
        return int(split[1]) if split and split[0] in self.lists else None


def _stacks(paths: list[str]) -> list[str]:
    """The stacks that a model really has: two or more of those whose words appear in its paths as numbered blocks."""
    found = [
        stack
        for stack, words in stack_words().items()
        if any(re.search(rf"(?:^|\.)(?:{'|'.join(words)})\..*?\d+\.", path) for path in paths)
    ]
    modal = [stack for stack in found if stack in ("vision", "text", "audio")]
    if len(modal) > 1:
        return modal
    if {"encoder", "decoder"} <= set(found):
        return ["encoder", "decoder"]
    return modal if len(modal) == 1 and len(found) > 1 and "decoder" in found else []


def _split_block(path: str) -> tuple[str, str] | None:
    """(list of blocks, index): `model.layers.3.mlp.up_proj` → (`model.layers`, `3`). No model has 10 000 layers."""
    match = re.match(r"^(.*?)\.(\d{1,4})(?:\.|$)", path)
    return (match.group(1), match.group(2)) if match else None


def _describe(weight: Weight, context: _Context) -> list[MatrixRef] | Skipped:
    place = context.tree.places[weight.name]
    if reason := weight.tensors[0].unread:
        return _skip(weight, reason)
    if (companion := _companion_of(weight, context)) is not None:
        return _skip(weight, f"companion of {companion}")
    ingredient = INGREDIENT if weight.format == "plain" and is_ingredient(weight.name, context.weight_of) else ""
    if reason := weight.unread or ("vector" if place.kind == "vector" else ingredient):
        return _skip(weight, reason)
    if place.kind == "ignored":
        return _skip(weight, "buffer that the model class itself ignores")
    if place.kind == "buffer" or math.prod(weight.shape) == 0:
        reason = "empty" if math.prod(weight.shape) == 0 else "buffer, not a weight"
        wide = sum(size > 1 for size in weight.shape)
        return _skip(weight, "vector" if wide < 2 and reason != "empty" else reason)
    if weight.format == "plain" and (weight.dtype not in READABLE or place.kind == "piece"):
        method = (context.tree.config.values.get("quantization_config") or {}).get("quant_method")
        stored = f"a part of '{place.path}' " if place.kind == "piece" else ""
        stored += f"stored as {weight.dtype}" + (f" by '{method}'" if method else "")
        stored += f" ({declared[0]})" if (declared := weight.tensors[0].declared) else ""
        return _skip(weight, f"{stored}, a format that is not read; save a copy dequantised by its own library")
    return _matrices(weight, place, context)


def _skip(weight: Weight, reason: str) -> Skipped:
    return Skipped(weight.tensors[0].name, weight.shape, reason)


def _companion_of(weight: Weight, context: _Context) -> str | None:
    """The weight that a scale or zero point belongs to; `None` for any other tensor."""
    name = weight.tensors[0].name
    if name in context.companions:
        return context.companions[name]
    stem, _, leaf = name.rpartition(".")
    if leaf not in fact("companions"):
        return None
    names = (f"{stem}.weight", f"{stem}.qweight", f"{stem}.weight_packed", stem)
    return next((known for known in names if known in context.weight_of), f"{stem}.weight")


def _matrices(weight: Weight, place: Place, context: _Context) -> list[MatrixRef] | Skipped:
    """The matrices inside one readable weight: one, one an expert, or one a fused part."""
    path = place.path
    role = find_role(path, place.inside) or (Role("", "embed") if place.kind == "embedding" else OTHER)
    if place.kind in ("conv", "conv_transposed"):
        role = Role("", "conv")
    if place.kind == "parameter":
        return _bare_parameter(weight, place, context)
    stacked = place.kind in ("experts", "experts_transposed")
    flat = place.kind in ("flat", "flat_transposed")
    if not (stacked or flat) and len(weight.shape) != 2 and role.role != "conv":
        return _skip(weight, f"a tensor of {len(weight.shape)} axes with no rule to read it")
    base, config = _base(weight, place, role, context), context.config(place.module or path)
    if weight.format == "lora" and role.parts:  # one row a pair, also where the base's matrix is a fused one
        base = replace(base, part=role.role, role="other")
        role = Role(role.block, "other")
    if place.pieces and weight.shape[0] % len(place.pieces) == 0:
        return _pieces(base, place, context)
    if role.role == "k_v" and find_fused(path, config, place.inside) is None:
        role = Role(role.block, "kv")  # one matrix that serves as both
        base = replace(base, role="kv")
    if role.role == "up" and find_fused(path, config, place.inside) is not None:
        role = Role(role.block, "gate_up")  # by its name a plain one, but a row says that both are in it
        base = replace(base, role="gate_up")
    if not role.parts:
        if role.role == "other" and weight.format != "lora" and re.search(fact("looks_fused"), path.rsplit(".", 1)[-1]):
            return _skip(weight, _no_rule(weight, config))
        refs = [in_model_order(base, config)]
    else:
        rows = _part_rows(base.shape, place, role, config)
        if rows is None:
            return _skip(weight, _no_rule(weight, config))
        refs = [_part(base, part, rows[part]) for part in role.parts]
    refs = [replace(ref, norm=_norm(ref, path, context)) for ref in refs]
    if stacked:
        refs = [_expert(ref, index) for index in range(weight.shape[0]) for ref in refs]
    return refs


def _pieces(whole: MatrixRef, place: Place, context: _Context) -> list[MatrixRef]:
    """Equal blocks of rows, each with the role of the module that transformers loads it into."""
    rows = whole.shape[0] // len(place.pieces)
    refs = []
    for index, path in enumerate(place.pieces):
        beside = f"{place.path.rpartition('.')[0]}.{path.rpartition('.')[2]}"  # the converter may name but the leaf
        role = find_role(path) or find_role(beside) or OTHER
        part = role.role if role is not OTHER else path.rsplit(".", 1)[-1]
        ref = _part(whole, part, ((index * rows, (index + 1) * rows, 1),))
        ref = replace(ref, block=role.block, role=role.role)
        refs.append(replace(ref, norm=_norm(ref, place.path, context)))
    return refs


def _bare_parameter(weight: Weight, place: Place, context: _Context) -> list[MatrixRef] | Skipped:
    """A weight of no known module: a position table (1, N, d) is an embedding; else it is 2-D, or skipped."""
    path = place.path
    wide = tuple(size for size in weight.shape if size > 1)
    if len(wide) < 2:
        return _skip(weight, "vector")
    if len(wide) != 2:
        return _skip(weight, f"a tensor of {len(weight.shape)} axes with no rule to read it")
    embed = re.search(r"embed|position", path.rsplit(".", 1)[-1]) is not None
    role = Role("", "embed") if embed else (find_role(path, place.inside) or OTHER)
    squeezed = replace(weight, shape=wide, tensors=(replace(weight.tensors[0], shape=wide), *weight.tensors[1:]))
    return [_base(squeezed, replace(place, kind="embedding" if embed else "linear"), role, context)]


def _base(weight: Weight, place: Place, role: Role, context: _Context) -> MatrixRef:
    """The whole stored matrix (of one expert): y = W·x with W of shape (out, in), whatever the order on disk."""
    transposed = place.kind in ("conv1d", "embedding", "experts_transposed", "conv_transposed", "flat_transposed")
    sizes = weight.shape[1:] if place.kind.startswith("experts") else weight.shape
    stored = (sizes[0], math.prod(sizes[1:]))
    where = place.module or place.path
    return MatrixRef(
        name=weight.tensors[0].name,
        part=role.part,
        stack=context.stack(where),
        block=role.block,
        role=role.role,
        layer=None if role.role == "head" else context.layer(where),
        shape=(stored[1], stored[0]) if transposed else stored,
        dtype=weight.dtype,
        stored=weight.format,
        tensors=weight.tensors,
        low_rank=weight.low_rank,
        transposed=transposed,
    )


def _part(whole: MatrixRef, role: str, ranges: tuple[tuple[int, int, int], ...]) -> MatrixRef:
    rows = sum(len(range(*piece)) for piece in ranges)
    return replace(whole, part=role, role=role, shape=(rows, whole.shape[1]), rows=ranges)


def _expert(ref: MatrixRef, index: int) -> MatrixRef:
    return replace(ref, part=f"expert {index} {ref.part}".rstrip(), expert=index)


Ranges = tuple[tuple[int, int, int], ...]


def _part_rows(shape: tuple[int, int], place: Place, role: Role, config: Config) -> dict[str, Ranges] | None:
    """Row slices of each part of a fused matrix (out, in); `None` where no rule says how it is laid out."""
    out = shape[0]
    fused = find_fused(place.path, config, place.inside)
    if place.interleaved or (fused is not None and fused.interleaved):
        return {part: ((start, out, len(role.parts)),) for start, part in enumerate(role.parts)}
    if fused is None:
        return None
    sizes = _part_sizes(out, role, fused, config)
    blocks = fused.blocks if isinstance(fused.blocks, int) else _heads(config)[fused.blocks]
    if sizes is None or blocks is None or any(size % blocks for size in sizes.values()):
        return None
    ranges: dict[str, list[tuple[int, int, int]]] = {part: [] for part in role.parts}
    start = 0
    for _ in range(blocks):
        for part in fused.order or role.parts:
            ranges[part].append((start, start + sizes[part] // blocks, 1))
            start += sizes[part] // blocks
    return {part: tuple(pieces) for part, pieces in ranges.items()}


def _part_sizes(out: int, role: Role, fused: Fused, config: Config) -> dict[str, int] | None:
    """Rows of each part in all. Equal parts, unless the configuration's heads say that keys and values are fewer."""
    heads = _heads(config)
    if role.role == "qkv" and heads["size"] and heads["heads"]:
        queries = heads["heads"] * heads["size"]
        for groups in (heads["kv_heads"], 1):
            if groups and out == queries + 2 * groups * heads["size"]:
                return {"q": queries, "k": groups * heads["size"], "v": groups * heads["size"]}
    count = len(role.parts)
    return dict.fromkeys(role.parts, out // count) if out % count == 0 else None


def _heads(config: Config) -> dict[str, int | None]:
    """Query heads, key/value heads and the size of a head, each `None` where the configuration does not tell."""
    heads = config.get("num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden = config.get("hidden_size", "n_embd", "d_model", "embed_dim")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        return {"heads": None, "kv_heads": None, "size": None}
    groups = config.get("num_kv_heads", "num_key_value_heads")
    size = config.get("head_dim") or hidden // heads
    return {"heads": heads, "kv_heads": groups if isinstance(groups, int) else heads, "size": size}


def _no_rule(weight: Weight, config: Config) -> str:
    shape = " × ".join(map(str, weight.shape))
    return (
        f"no rule for '{weight.tensors[0].name}' ({shape}) of model_type '{config.model_type}'; it looks fused: "
        "add a [[fused]] row to families.toml (see gpt_neox)"
    )


def _norm(ref: MatrixRef, path: str, context: _Context) -> NormRef | None:
    """The gain that feeds a matrix, as families.toml names it; `None` where no norm does."""
    places = {}
    if split := _split_block(path):
        places = {"block": f"{split[0]}.{split[1]}", "stack": split[0].rpartition(".")[0]}
        if int(split[1]) > 0:
            places["prev"] = f"{split[0]}.{int(split[1]) - 1}"
        places["sub"] = re.match(r"^(.*\.\d+)(?:\.|$)", path).group(1)  # type: ignore[union-attr]
    if context.last_encoder:
        places["last_encoder"] = context.last_encoder
    config = context.config(path)
    for candidate in find_norm_paths(path, config, places):
        if tensor := context.by_path.get(candidate):
            whole = tensor.file.endswith(".gguf")  # llama.cpp stores γ itself where others store γ − 1
            return NormRef(tensor, 0.0 if whole else family_fact("gain_offset", config) or 0.0)
    return None


def _finish_mlps(refs: list[MatrixRef], context: _Context) -> list[MatrixRef]:
    """Add activation and gating, which depend on the siblings: a `gate` without an `up` beside it is a plain `up`."""
    siblings: dict[tuple[str, str], set[str]] = {}
    for ref in refs:
        for key in _mlp_keys(ref):
            siblings.setdefault(key, set()).add(ref.role)
    result = []
    for ref in refs:
        if ref.block in ("mlp", "moe") and ref.role in ("gate", "up", "down"):
            near, wide = (siblings[key] for key in _mlp_keys(ref))
            roles = near if "down" in near and near & {"gate", "up"} else wide
            if ref.role == "gate" and "up" not in roles:
                ref = replace(ref, role="up")
            place = context.tree.places[context.weight_of[ref.name]]
            config = context.config(place.path)
            activation = place.activation or family_fact("activation", config) or config.get(*fact("activation_keys"))
            named = activation if isinstance(activation, str) else None
            ref = replace(ref, activation=named, gated={"gate", "up"} <= roles)
        result.append(ref)
    return result


def _mlp_keys(ref: MatrixRef) -> tuple[tuple[str, str], tuple[str, str]]:
    """What the matrices of one MLP share: the module around them or, where each stands in one of its own, the layer."""
    split = re.match(r"^(.*\.\d+)\.", ref.name)
    module = ref.name.removesuffix(".weight").rpartition(".")[0]
    return (f"module {module}", ref.block), (split.group(1) if split else ref.stack, ref.block)
