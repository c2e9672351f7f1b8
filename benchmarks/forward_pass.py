"""The claims about a small model against its own forward pass, which knows no table.

The model is saved, opened and listed like any other. Then transformers itself loads a checkpoint of the same names in
which every number says which claimed matrix it belongs to, and where in it (row, column): that follows each claim into
the parameters that compute, whatever is renamed, merged, cut or turned on the way. Scores are q·k, so q × c with k / c
changes no output; nor does v × c with o / c, nor up × c with down / c where the MLP is gated or has ReLU (an MLP
without a gate is given ReLU for this). Where the sizes allow, every row of v and up has a c of its own. All c are
powers of two: floating point adds nothing. A pair counts only if each half alone does change the output. Biases are
zero. What the output does not feel is counted by reason, never as passed.
"""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from small_inputs import RUN_ERRORS, alone, whole
from torch import Tensor, nn

from lmd_hf.compat import run_experts_on_cpu
from lmd_hf.records import MatrixRef
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import Source, open_source
from lmd_hf.weights.stored import read_matrix


SAME, FELT = 1e-5, 1e-4  # relative changes of the output
ATTENTION, MLP = ("attention", "cross_attention"), ("mlp", "moe")
PAIRS = (  # first role × c, the second ones / c
    ("qk", ATTENTION, "q", ("k",)),
    ("vo", ATTENTION, "v", ("o",)),
    ("kv", ATTENTION, "kv", ("q", "o")),
    ("up", MLP, "up", ("down",)),
)
NOT_USED, NORMALISED = "not used on dummy inputs", "its scale is not felt: a norm follows"
Places = list[tuple[str, Tensor, Tensor, Tensor]]  # (parameter, its numbers' indices, rows, columns of the claim)


@dataclass
class Site:
    """The claims that stand in one product: all q and all k of an attention, v and o, up and down of one MLP."""

    pair: str
    path: str
    first: list[int]
    second: list[int]
    node: str = ""  # the module that holds it
    homogeneous: bool = True


# products that a scale does not pass through, by the class that makes them (part of its name) and the pair
UNFIT = (
    ("GptOssExperts", "up", "the product is (up + 1) × gate"),
    ("OpenAIPrivacyFilterExperts", "up", "the product is (up + 1) × gate"),
    ("MiniMaxM3VL", "up", "the product is (up + 1) × gate"),
    ("ConvBert", "qk vo", "queries and keys also make a convolution, whose output is joined to that of the values"),
    ("DeltaAttention", "qk vo", "linear attention: an activation stands between"),
    ("LinearAttention", "qk vo", "linear attention: an activation stands between"),
    ("LightningAttention", "qk vo", "linear attention: an activation stands between"),
    ("Inkling2", "qk", "queries are clipped to a length"),
    ("Inkling2Experts", "up", "a soft cap stands between"),
    ("Zaya", "qk", "a convolution mixes queries and keys"),
    ("DogeAttention", "vo", "the values also make the mask"),
)


@dataclass
class Outcome:
    """What the forward pass said of a type: names of pairs, and {reason: how many} for those it cannot judge."""

    passed: int = 0
    by_row: int = 0
    failed: list[str] = field(default_factory=list)
    untestable: Counter[str] = field(default_factory=Counter)
    whole: int = 0  # judged through the whole model, not through a part of it alone
    matrices: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def judged(self) -> int:
        """How many pairs there is a verdict for."""
        return self.passed + len(self.failed)


def judge_forward(model: nn.Module) -> Outcome:
    """Every claimed pair of a random model."""
    outcome = Outcome()
    model_class: Any = type(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        source = open_source(folder)
        loaded = model_class.from_pretrained(folder, dtype=torch.float32).eval()
        run_experts_on_cpu(loaded)
        refs = [ref for ref in list_matrices(source).selected if ref.block in (*ATTENTION, *MLP)]
        held = follow(source, refs, model_class, loaded.config)
        for index in unlike(source, refs, held, loaded):
            outcome.failed.append(
                f"{refs[index].name} {refs[index].part} is not what is computed with".replace("  ", " ")
            )
    outcome.matrices = len(refs)
    sites = pair_up(refs, outcome)
    for site in sites:
        names = [place[0] for index in (*site.first, *site.second) for place in held[index]]
        site.node = common(names)
        if site.pair == "up" and not refs[site.first[0]].gated:
            site.homogeneous = make_relu(loaded.get_submodule(site.node))
    waiting = list(range(len(sites)))
    for entry, inputs, is_whole in entries(loaded, sites, waiting):
        module = loaded.get_submodule(entry)
        trial = Trial(module, inputs, dict(loaded.named_parameters()), refs, held)
        for index in [i for i in waiting if inside(entry, sites[i].node)]:
            if verdict := trial.verdict(sites[index], loaded):
                waiting.remove(index)
                record(outcome, sites[index], verdict, is_whole)
    outcome.untestable[NOT_USED] += len(waiting)
    outcome.log += [f"not used: {sites[i].pair} {sites[i].path} in {sites[i].node}" for i in waiting]
    return outcome


def record(outcome: Outcome, site: Site, verdict: str, is_whole: bool) -> None:
    """Count a verdict."""
    if verdict in ("rows", "passed"):
        outcome.passed += 1
        outcome.by_row += verdict == "rows"
        outcome.whole += is_whole
    elif verdict == "failed":
        outcome.failed.append(f"{site.pair} of {site.path}")
    else:
        outcome.untestable[verdict] += 1
        outcome.log.append(f"{verdict}: {site.pair} {site.path}")


# --- from claims to parameters -----------------------------------------------------------------------------------


def cut(stored: Tensor, ref: MatrixRef) -> list[Tensor]:
    """Views of the rows (out, in) of a stored tensor that a claim names."""
    w = stored if ref.expert is None else stored[ref.expert]
    w = w.reshape(w.shape[0], -1)
    w = w.T if ref.transposed else w
    return [w[start:stop:step] for start, stop, step in ref.rows or ((0, len(w), 1),)]


def follow(source: Source, refs: list[MatrixRef], model_class: Any, config: Any) -> list[Places]:
    """Where each claim's numbers are in the loaded model: three checkpoints carry claim, row and column."""
    marks = []
    for kind in ("claim", "row", "column"):
        state = {tensor.name: torch.zeros(tensor.shape) for tensor in source.tensors}
        for index, ref in enumerate(refs):
            rows, columns = ref.shape
            value = {
                "claim": torch.full((rows, 1), index + 1.0),
                "row": torch.arange(rows, dtype=torch.float32)[:, None],
                "column": torch.arange(columns, dtype=torch.float32)[None],
            }[kind].expand(rows, columns)
            start = 0
            for piece in cut(state[ref.name], ref):
                piece.copy_(value[start : start + len(piece)].reshape(piece.shape))
                start += len(piece)
        marks.append(model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32))
    rows_of, columns_of = (dict(mark.named_parameters()) for mark in marks[1:])
    held: list[Places] = [[] for _ in refs]
    for name, parameter in marks[0].named_parameters():
        value = parameter.detach().flatten()
        where = torch.nonzero((value >= 1) & (value <= len(refs)) & (value % 1 == 0)).flatten()
        if len(where) == 0 or parameter.ndim < 2:
            continue
        claim = value[where].long()
        order = claim.argsort(stable=True)
        row, column = rows_of[name].detach().flatten()[where], columns_of[name].detach().flatten()[where]
        for index, piece in enumerate(order.split(torch.bincount(claim, minlength=len(refs) + 1).tolist())):
            if len(piece):
                held[index - 1].append((name, where[piece], row[piece].long(), column[piece].long()))
    return held


def unlike(source: Source, refs: list[MatrixRef], held: list[Places], loaded: nn.Module) -> Iterator[int]:
    """Claims whose `read_matrix` is not, entry by entry, what the loaded parameters hold."""
    parameters = dict(loaded.named_parameters())
    for index, ref in enumerate(refs):
        used = torch.full(ref.shape, math.nan)
        for name, where, rows, columns in held[index]:
            used[rows, columns] = parameters[name].detach().flatten()[where]
        if not torch.equal(used, read_matrix(source, ref).float()):
            yield index


def pair_up(refs: list[MatrixRef], outcome: Outcome) -> list[Site]:
    """The pairs among the claims, each at the innermost module that holds both halves."""
    sites: list[Site] = []
    for pair, blocks, first_role, second_roles in PAIRS:
        mine = [(i, ref.role) for i, ref in enumerate(refs) if ref.block in blocks and ref.part not in ("a", "b")]
        pools = [{index for index, found in mine if found == role} for role in (first_role, *second_roles)]
        found = nested(refs, pools)
        sites += [Site(pair, path, first, second) for path, first, second in found]
    taken = {index for site in sites for index in (*site.first, *site.second)}
    for index, ref in enumerate(refs):
        if index not in taken and ref.role in ("q", "k", "v", "kv", "o", "up", "down"):
            low_rank = ref.part in ("a", "b")
            outcome.untestable["a low-rank pair" if low_rank else f"{ref.role} without a partner"] += 1
            outcome.log.append(f"no partner: {ref.role} {ref.part} {ref.name}")
    return sites


def nested(refs: list[MatrixRef], pools: list[set[int]]) -> list[tuple[str, list[int], list[int]]]:
    """(path, first, second): claims grouped at the innermost path that has some of every pool, within a layer."""
    below: dict[str, list[set[int]]] = {}
    for number, pool in enumerate(pools):
        for index in pool:
            for path in above(refs[index]):
                below.setdefault(path, [set() for _ in pools])[number].add(index)
    result = []
    taken: set[int] = set()
    for path in sorted(below, key=lambda path: (-path.count("."), path)):
        groups = [group - taken for group in below[path]]
        if all(groups):
            taken |= set().union(*groups)
            result.append((path, sorted(groups[0]), sorted(set().union(*groups[1:]))))
    return result


def above(ref: MatrixRef) -> list[str]:
    """The paths around a claim, down from its layer: `a.2.b.c` → `a.2`, `a.2.b`; an expert is a path of its own."""
    pieces = ref.name.split(".")
    numbers = [place for place, piece in enumerate(pieces) if piece.isdigit()]
    first = numbers[0] + 1 if numbers and ref.layer is not None else 1
    paths = [".".join(pieces[:count]) for count in range(first, len(pieces))]
    if ref.rows and ref.expert is None:
        paths.append(ref.name)
    if ref.expert is not None:
        paths.append(f"{ref.name.removesuffix('.weight').rpartition('.')[0]}.expert.{ref.expert}")
    return paths


def common(names: list[str]) -> str:
    """The path of the innermost module that holds all these parameters."""
    split = [name.split(".")[:-1] for name in names]
    result = []
    for pieces in zip(*split, strict=False):
        if len(set(pieces)) > 1:
            break
        result.append(pieces[0])
    return ".".join(result)


def inside(entry: str, node: str) -> bool:
    """Whether module `node` is `entry` or within it."""
    return not entry or node == entry or node.startswith(f"{entry}.")


def make_relu(module: nn.Module) -> bool:
    """Give the MLP in `module` the one activation that a scale passes through; `False` if it has none to change."""
    changed = False
    for owner in module.modules():
        for name, value in list(vars(owner).items()) + list(owner.named_children()):
            kind = type(value).__module__
            if (
                isinstance(value, nn.Module)
                and re.search(r"activation", kind)
                and not isinstance(value, nn.Softmax | nn.MultiheadAttention)
            ):
                setattr(owner, name, nn.ReLU())
                changed = True
            elif "act" in name and callable(value) and not isinstance(value, nn.Module):
                setattr(owner, name, torch.relu)
                changed = True
    return changed


# --- trials ------------------------------------------------------------------------------------------------------


def entries(model: Any, sites: list[Site], waiting: list[int]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Modules to run, with inputs: the whole model, then the models in it, then what holds a pair that still waits."""
    for inputs in whole(model):
        yield "", inputs, True
        if not waiting:
            return
    base = next(cls for cls in type(model).__mro__ if cls.__name__ == "PreTrainedModel")
    inner = [path for path, module in model.named_modules() if path and isinstance(module, base)]
    for path in inner:
        if any(inside(path, sites[index].node) for index in waiting):
            for inputs in whole(model.get_submodule(path)):
                yield path, inputs, False
                if not any(inside(path, sites[index].node) for index in waiting):
                    break
    tried = set()
    for index in list(waiting):
        pieces = sites[index].node.split(".")
        for count in range(len(pieces), max(len(pieces) - 3, 0), -1):
            path = ".".join(pieces[:count])
            if path in tried or index not in waiting:
                continue
            tried.add(path)
            module = model.get_submodule(path)
            if not any(module.children()) or re.search("qkv", type(module).__name__, re.IGNORECASE):
                continue  # it has no product in it
            for inputs in alone(module):
                yield path, inputs, False
                if index not in waiting:
                    break


class Trial:
    """One module with one set of inputs: how its output changes with the claims."""

    def __init__(
        self, module: Any, inputs: dict[str, Any], parameters: dict[str, Any], refs: list[MatrixRef], held: list[Places]
    ) -> None:
        self.module, self.inputs, self.parameters, self.refs, self.held = module, inputs, parameters, refs, held
        self.base = self.run()

    def run(self) -> list[Tensor]:
        """All floating-point outputs."""
        torch.manual_seed(2)
        with torch.no_grad():
            return list(flat(self.module(**self.inputs)))

    def change(self, factors: dict[int, tuple[Any, Any]]) -> float:
        """The largest relative change of an output when {claim: (factor of its rows, of its columns)} are applied."""
        before = {}
        with torch.no_grad():
            for index, (by_row, by_column) in factors.items():
                for name, where, rows, columns in self.held[index]:
                    parameter = self.parameters[name]
                    before.setdefault(name, parameter.detach().clone())
                    factor = by_row[rows] if isinstance(by_row, Tensor) else by_row
                    factor = factor * (by_column[columns] if isinstance(by_column, Tensor) else by_column)
                    parameter.data.view(-1)[where] *= factor
            try:
                return difference(self.base, self.run())
            except RUN_ERRORS:
                return math.inf
            finally:
                for name, value in before.items():
                    self.parameters[name].data.copy_(value)

    def verdict(self, site: Site, model: nn.Module) -> str:
        """`rows` or `passed`, `failed`, why it cannot be judged, or "" where the output does not depend on it."""
        noise = {index: (self.signs(index), 1.0) for index in site.first}
        other = {index: (self.signs(index), 1.0) for index in site.second}
        felt = min(self.change(noise), self.change(other)) if site.pair != "kv" else self.change(noise)
        if felt < FELT:
            return ""
        if reason := unfit(site, model):
            return reason
        factors = self.by_row(site, model)
        if factors and self.change(factors) < SAME:
            return "rows"
        first = dict.fromkeys(site.first, (4.0, 1.0))
        second = dict.fromkeys(site.second, (1.0, 0.25))
        half = min(self.change(first), self.change(second))
        if self.change(first | second) < SAME:
            return "passed" if half > FELT else NORMALISED
        return NORMALISED if half < 0.05 * felt else "failed"

    def signs(self, index: int) -> Tensor:
        """A factor for each row that no norm takes out again."""
        torch.manual_seed(3)
        return 4.0 ** torch.randint(-1, 2, (self.refs[index].shape[0],)).float()

    def by_row(self, site: Site, model: nn.Module) -> dict[int, tuple[Any, Any]]:
        """An own factor for each row of v or up and the same column of o or down; nothing if it is not one to one."""
        if site.pair not in ("vo", "up") or len(site.first) != 1 or len(site.second) != 1:
            return {}
        rows, columns = self.refs[site.first[0]].shape[0], self.refs[site.second[0]].shape[1]
        factor = self.signs(site.first[0])
        shared = factor
        if columns != rows:  # grouped queries: a head of values serves several columns
            size = getattr(model.get_submodule(site.node), "head_dim", 0)
            if columns % rows or not isinstance(size, int) or not size or rows % size:
                return {}
            shared = factor.reshape(-1, size).repeat_interleave(columns // rows, 0).flatten()
        return {site.first[0]: (factor, 1.0), site.second[0]: (1.0, 1 / shared)}


def unfit(site: Site, model: nn.Module) -> str:
    """Why a pair cannot be judged by scaling; "" if it can."""
    names = [type(model.get_submodule(path)).__name__ for path in (site.node, site.node.rpartition(".")[0])]
    for part, pairs, reason in UNFIT:
        if site.pair in pairs.split() and any(part in name for name in names):
            return reason
    return "" if site.homogeneous else "no gate, and an activation that cannot be exchanged"


def flat(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output, without caches."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output.detach().clone()
    elif isinstance(output, dict):
        for key, value in output.items():
            if "past" not in str(key) and "cache" not in str(key) and "attentions" not in str(key):
                yield from flat(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from flat(value)


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest change relative to the largest entry; infinite if the outputs are not alike."""
    if [value.shape for value in before] != [value.shape for value in after]:
        return math.inf
    changes = [0.0]
    for old, new in zip(before, after, strict=True):
        finite = torch.isfinite(old)
        if not torch.equal(finite, torch.isfinite(new)):
            return math.inf
        if finite.any():
            scale = old[finite].abs().max().item()
            changes.append((old[finite] - new[finite]).abs().max().item() / (scale or 1.0))
    return max(changes)
