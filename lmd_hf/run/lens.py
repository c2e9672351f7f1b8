"""Stored directions as tokens: what a matrix or a head listens for and writes, in the model's own vocabulary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lmd_hf.circuits import HeadRef
from lmd_hf.compat import checkpoint_key_map
from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.matrix.hopfield import fold, ov_circuit
from lmd_hf.matrix.lmd import LMD, decompose, decompose_product
from lmd_hf.records import Inventory, MatrixRef
from lmd_hf.run.asked import TEXT, WHOLE, check_type
from lmd_hf.run.heads import factors_of, read_matrices
from lmd_hf.run.loading import evaluating, forward, load_model, origin
from lmd_hf.run.taps import ONE_HOT, first_tensor
from lmd_hf.weights.families import Config
from lmd_hf.weights.heads import list_heads
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import FileSource, Source, open_source
from lmd_hf.weights.stored import read_gain
from lmd_hf.weights.stored import read_matrix as stored_matrix


READERS = ("q", "k", "v", "kv", "gate", "up", "router")  # roles whose input is the stream
WRITERS = ("o", "down")  # roles whose output is added to it
CHUNK = 2**14  # tokens of the vocabulary compared at a time
Near = tuple[tuple[str, float], ...]  # tokens and cosines, the nearest first


@dataclass(frozen=True)
class Direction:
    """One singular direction. `reads` are the tokens nearest to its V and `writes` to its U, `…_opposite` to their
    negatives (V and U turn round together); `None` where that side is not the stream. With a text, `share` is its part
    of the energy of all answers, and `answers` holds (token, answer) for the tokens of the text that stir it most."""

    index: int
    strength: float
    reads: Near | None
    reads_opposite: Near | None
    writes: Near | None
    writes_opposite: Near | None
    share: float | None = None
    answers: Near | None = None


@dataclass(frozen=True)
class Directions:
    """The directions of one matrix or head; `lens` says through what they are read."""

    model: str
    part: str
    lens: str
    text: str | None
    directions: tuple[Direction, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.part}", f"lens: {self.lens}"]
        for each in self.directions:
            told = "" if each.share is None else f", {each.share:.0%} of what answers"
            lines.append(f"direction {each.index} (strength {each.strength:.3g}{told})")
            for name in ("reads", "reads_opposite", "writes", "writes_opposite", "answers"):
                if found := getattr(each, name):
                    tokens = "  ".join(f"{token!r} {value:.2f}" for token, value in found)
                    lines.append(f"  {name.replace('_', ' ')}: {tokens}")
        return "\n".join(lines)


def read_matrix(model: str | Path | nn.Module | FileSource, part: str, *, layer: int | None = None) -> Tensor:
    """One matrix of a model, (out, in) as in y = W·x, as its forward pass uses it: dequantised, split, turned round.

    `part` names it as for `read_directions`, or is the name of its tensor (with its part, where one tensor holds
    several matrices). The entries have the type in which they are stored, or float32. Raises as `read_directions`.
    """
    source = open_source(model)
    found = _choose(list_matrices(source), part, layer)
    if isinstance(found, HeadRef):
        raise SettingsError(f"'{part}' is a head, which has four matrices; name one of them (q, k, v, o)")
    return stored_matrix(source, found)


def read_directions(
    model: str | Path | nn.Module | FileSource,
    part: str,
    *,
    layer: int | None = None,
    text: str | None = None,
    axes: int = 4,
    tokens: int = 6,
) -> Directions:
    """The leading singular directions of a matrix, or of a head's OV circuit, as the tokens nearest to them.

    `part` names one matrix of `layer` by its role, with as many more words as it takes (`down`, `decoder attention q`,
    `up expert 3`), or a head (`head 2`). The gain γ of the norm that feeds it is folded in, W·diag(γ). V is read
    through the model's embedding, U through its output head with the gain of the last norm: cosines with the vectors of
    all tokens, nothing centred. That is a lens on one matrix, not what the network does: `lens` says which.
    With `text` the model runs on it, and the directions are those that answer most: the answer of direction i to an
    input x of the matrix is uᵢᵀWx. Raises `SettingsError` where `part` names none or several, and what `analyze` does.
    """
    for name, value in (("axes", axes), ("tokens", tokens)):
        check_type(name, value, WHOLE)
        if value < 1:
            raise SettingsError(f"{name} is {value}; give 1 or more")
    if text is not None:
        check_type("text", text, TEXT)
    source = open_source(model)
    inventory = list_matrices(source)
    subject = _subject(source, _choose(inventory, part, layer))
    answered = None if text is None else _answers(source, subject, text)
    strongest = range(len(subject.lmd.s_K)) if answered is None else answered.order
    chosen = list(strongest)[:axes]
    words = _words(source)
    nothing: list[tuple[Near | None, Near | None]] = [(None, None)] * len(chosen)
    reads, writes, told = nothing, nothing, []
    if subject.reads:
        reads, told = _near(_embedding(source, inventory), subject.lmd.v[:, chosen], words, tokens), ["V: embedding"]
    if subject.writes:
        head, name = _head(source, inventory)
        writes, told = _near(head, subject.lmd.u[:, chosen], words, tokens), [*told, f"U: {name}"]
    directions = tuple(
        Direction(i, subject.lmd.s_K[i].item(), *reads[place], *writes[place], *_answer(answered, i, tokens))
        for place, i in enumerate(chosen)
    )
    lens = f"{', '.join(told) or 'neither side is the stream'}; cosines, nothing centred; {subject.gain}"
    return Directions(source.identity.id, subject.label, lens, text, directions)


@dataclass(frozen=True)
class _Subject:
    """What is read: its factors, the matrix that is given the input, and whether its sides are the stream."""

    label: str
    lmd: LMD
    entry: MatrixRef
    reads: bool
    writes: bool
    gain: str
    apply: Any  # W as a function of rows of inputs


def _choose(inventory: Inventory, part: str, layer: int | None) -> MatrixRef | HeadRef:
    check_type("part", part, TEXT)
    words = part.split()
    number = words.index("head") + 1 if "head" in words else 0
    if number and number < len(words) and words[number].isdigit():
        wanted = set(words[: number - 1] + words[number + 1 :])
        heads, _ = list_heads(inventory)
        fits: list[Any] = [h for h in heads if h.layer == layer and h.head == int(words[number])]
        fits = [head for head in fits if wanted <= {head.stack, head.block}]
    else:
        fits = [ref for ref in inventory.selected if ref.layer == layer and set(words) <= _words_of(ref)]
    if len(fits) == 1:
        return fits[0]  # type: ignore[no-any-return]
    where = "outside the layers" if layer is None else f"in layer {layer}"
    if not fits:
        raise SettingsError(
            f"nothing is called '{part}' {where}; give a role (q, k, v, o, gate, up, down …) or 'head 0'"
        )
    listed = ", ".join(f"'{_label(fit)}' ({fit.name})" for fit in fits[:4])
    raise SettingsError(f"'{part}' {where} may be {len(fits)} things: {listed}; add a word that tells them apart")


def _words_of(ref: MatrixRef) -> set[str]:
    return {ref.stack, ref.block, ref.role, *ref.part.split(), ref.name}


def _label(found: MatrixRef | HeadRef) -> str:
    own = (
        f"head {found.head}"
        if isinstance(found, HeadRef)
        else " ".join(dict.fromkeys([found.role, *found.part.split()]))
    )
    layer = "" if found.layer is None else f"layer {found.layer}"
    return " ".join(filter(None, (layer, found.stack, found.block, own)))


def _subject(source: Source, found: MatrixRef | HeadRef) -> _Subject:
    """The decomposition, with the gains that feed it folded in, and W without them."""
    if isinstance(found, HeadRef):
        matrices = read_matrices(found, source)
        entry = (found.v.after or found.v).ref
        own, used = (factors_of(found, matrices, folded=folded) for folded in (False, True))
        lmd = decompose_product(ov_circuit(used.w_o_OE, used.w_v_EJ))
        return _Subject(_label(found), lmd, entry, True, True, _gain(entry), lambda x: x @ own.w_v_EJ.T @ own.w_o_OE.T)
    w = stored_matrix(source, found).to(torch.float64)
    lmd = decompose(fold(w, read_gain(source, found)))
    reads, writes = found.role in READERS and found.part != "b", found.role in WRITERS and found.part != "a"
    return _Subject(_label(found), lmd, found, reads, writes, _gain(found), lambda x: x @ w.T)


def _gain(ref: MatrixRef) -> str:
    return "no gain of a norm known" if ref.norm is None else f"folded in: {ref.norm.tensor.name}"


# --- the vocabulary ----------------------------------------------------------------------------------------------


def _embedding(source: Source, inventory: Inventory) -> Tensor:
    """The vectors of all tokens (vocabulary × width), as stored."""
    size = Config(inventory.config).get("vocab_size")
    tables = [ref for ref in inventory.selected if ref.role == "embed" and ref.layer is None]
    if not tables:
        raise SettingsError("the model has no embedding to read directions through")
    named = [ref for ref in tables if ref.shape[1] == size]
    return stored_matrix(source, named[0] if named else max(tables, key=lambda ref: ref.shape[1])).T


def _head(source: Source, inventory: Inventory) -> tuple[Tensor, str]:
    """(what each token's logit reads from the stream (vocabulary × width), with the last norm's gain; its name)."""
    size = Config(inventory.config).get("vocab_size")
    heads = [ref for ref in inventory.selected if ref.role == "head" and ref.shape[0] == size]
    if not heads:
        return _embedding(
            source, inventory
        ), "the embedding in the place of the output head, without the last norm's gain"
    w = stored_matrix(source, heads[0])
    if heads[0].norm is None:
        return w, f"output head {heads[0].name}"
    return fold(w, read_gain(source, heads[0])), f"output head {heads[0].name} with the last norm's gain"


def _near(table_VN: Tensor, axes_NK: Tensor, words: Any, count: int) -> list[tuple[Near | None, Near | None]]:
    """The tokens nearest to each axis and to its negative, by cosine."""
    if table_VN.shape[1] != axes_NK.shape[0]:
        return [(None, None)] * axes_NK.shape[1]
    axes = axes_NK.to(torch.float32).cpu()
    starts = range(0, len(table_VN), CHUNK)  # a whole vocabulary in float32 is large
    parts = [normalize(table_VN[i : i + CHUNK].to("cpu", torch.float32), dim=-1) @ axes for i in starts]
    cosines_VK = torch.cat(parts)
    found: list[tuple[Near | None, Near | None]] = []
    for column in cosines_VK.T:
        ends = [(sign * column).topk(min(count, len(column))) for sign in (1, -1)]
        plus, minus = (tuple((words(int(i)), v.item()) for v, i in zip(*end, strict=True)) for end in ends)
        found.append((plus, minus))
    return found


def _words(source: Source) -> Any:
    """{id: token} as a function; ids themselves where there is no tokenizer."""
    try:
        tokenizer = _tokenizer(source)
    except SourceError:
        return lambda index: f"#{index}"
    return lambda index: tokenizer.decode([index])


def _tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    return origin(source).load(AutoTokenizer.from_pretrained, trust_remote_code=False)


# --- a text ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answered:
    """The answers (tokens × directions) to a text, and its tokens."""

    values_TK: Tensor
    tokens: list[str]

    @property
    def order(self) -> list[int]:
        """Directions by the energy of their answers, the strongest first."""
        energies: list[int] = self.values_TK.square().sum(0).argsort(descending=True).tolist()
        return energies


def _answers(source: Source, subject: _Subject, text: str) -> _Answered:
    if subject.entry.role == "embed":
        raise SettingsError(f"a text cannot be put to '{subject.entry.name}': {ONE_HOT}")
    tokenizer = _tokenizer(source)
    batch = dict(tokenizer(text, return_tensors="pt"))
    model = load_model(source, origin(source), "cpu")
    path = checkpoint_key_map(model, [subject.entry.name])[subject.entry.name].name.removesuffix(".weight")
    if path not in dict(model.named_modules()):
        raise SettingsError(f"no module of its own applies '{subject.entry.name}', so a text cannot be put to it")
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (x := first_tensor(args, kwargs)) is not None:
            seen.append(x.detach())

    handle = model.get_submodule(path).register_forward_pre_hook(record, with_kwargs=True)
    try:
        with evaluating(model):
            forward(model, {n: v for n, v in batch.items() if n in ("input_ids", "attention_mask", "token_type_ids")})
    finally:
        handle.remove()
    x_TI = seen[0].reshape(-1, seen[0].shape[-1]).to("cpu", torch.float64)
    said = [tokenizer.decode([index]) for index in batch["input_ids"][0].tolist()]
    return _Answered(subject.apply(x_TI) @ subject.lmd.u, said)


def _answer(answered: _Answered | None, index: int, count: int) -> tuple[float | None, Near | None]:
    """(share of the energy of all answers, the tokens that stir direction `index` most)."""
    if answered is None:
        return None, None
    column = answered.values_TK[:, index]
    whole = answered.values_TK.square().sum().item()
    share = column.square().sum().item() / whole if whole > 0 else None
    first = column.abs().topk(min(count, len(column))).indices.tolist()
    return share, tuple((answered.tokens[i], column[i].item()) for i in first)
