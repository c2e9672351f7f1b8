"""The heads of every model type of the installed transformers: does each row belong to the head that is claimed, and is
the scale of the scores the module's own?

    python benchmarks/heads.py [TYPE …]

(a) Each type in full size on the meta device: `HeadRef.scale` beside the attribute that its attention module scales by.
(b) A small random model of the type is run: the queries of each key/value head's group × c and its keys / c change no
output, nor do its values × c and the output's columns / c, with another c (a power of two) for each group; each half
alone does. What the output does not feel (queries that are normalised, layers that dummy inputs do not reach) is
counted apart. Failures are listed by name.
"""

import argparse
import multiprocessing
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import transformers
from architectures import TookTooLongError, class_of
from forward_pass import FELT, SAME, difference, flat
from small_inputs import RUN_ERRORS, whole
from tiny_models import BUILD, SETTINGS, build
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmd_hf.circuits import HeadRef, HeadRows
from lmd_hf.weights.heads import list_heads
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


SCALES = ("scaling", "scale", "softmax_scale", "attn_scale")  # what attention modules call it
SAME_SCALE = 1e-9
# modules whose attribute is not all of the scale: it is applied to queries and keys each, or before the rotation
SPLIT = {"EsmSelfAttention", "OpenAIPrivacyFilterAttention"}
SECONDS = 120


def attentions(heads: tuple[HeadRef, ...]) -> list[list[HeadRef]]:
    """The heads of one attention each."""
    return [list(group) for _, group in groupby(heads, key=lambda head: head.o.ref)]


def stated_scale(model: nn.Module, name: str) -> tuple[str, float] | None:
    """(class, scale) of the innermost module around a projection that has one."""
    modules = dict(model.named_modules())
    parts = name.split(".")[:-1]
    while parts:
        module = modules.get(".".join(parts))
        for key in SCALES:
            value = getattr(module, key, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return type(module).__name__, float(value)
        if parts[-1].isdigit():
            return None
        parts.pop()
    return None


def check_scales(name: str, kind: str) -> tuple[Counter[str], list[str]]:
    """(a) for one type."""
    counts: Counter[str] = Counter()
    failures = []
    with torch.device("meta"):
        model = getattr(transformers, kind)(CONFIG_MAPPING[name](**SETTINGS.get(name, {})))
    heads, unformed = list_heads(list_matrices(open_source(model)))
    counts["attentions without heads"] += len(unformed)
    for group in attentions(heads):
        found = stated_scale(model, group[0].name)
        if found is None or found[0] in SPLIT:
            counts["scale not stated"] += 1
        elif abs(found[1] - group[0].scale) <= SAME_SCALE * found[1]:
            counts["scale agrees"] += 1
        else:
            counts["scale differs"] += 1
            failures.append(f"{name}: {group[0].name} has scale {group[0].scale:.6g}, {found[0]} {found[1]:.6g}")
    return counts, failures


def places(rows: HeadRows) -> torch.Tensor:
    """Which rows of the stored matrix these are."""
    ref = rows.ref
    stored = torch.cat([torch.arange(*piece) for piece in ref.rows]) if ref.rows else torch.arange(ref.shape[0])
    return stored[rows.start : rows.stop]


def scale_rows(weights: dict[str, torch.Tensor], rows: HeadRows, factor: float) -> None:
    """Rows × factor, in place, in the order in which they are stored."""
    weight = weights[rows.ref.name]
    if rows.ref.transposed:
        weight.view(weight.shape[0], -1)[:, places(rows)] *= factor
    else:
        weight.view(weight.shape[0], -1)[places(rows)] *= factor


def scale_columns(weights: dict[str, torch.Tensor], rows: HeadRows, factor: float) -> None:
    """Columns × factor, of an output matrix."""
    weight = weights[rows.ref.name]
    flat_weight = weight.view(weight.shape[0], -1)
    (flat_weight if rows.ref.transposed else flat_weight.T)[rows.start : rows.stop] *= factor


def scale_scores(weights: dict[str, torch.Tensor], group: list[HeadRef], *, queries: bool, keys: bool) -> None:
    """Queries × c and keys / c, with a c for each key/value head; rows that all heads share are left."""
    done = set()
    for head in group:
        factor = 2.0 ** (head.kv_head % 3 + 1)
        start = 0
        for part in head.k:
            size = part.stop - part.start
            if len({other.kv_head for other in group if part in other.k}) == 1:
                asked = HeadRows(head.q[0].ref, head.q[0].start + start, head.q[0].start + start + size)
                if queries:
                    scale_rows(weights, asked, factor)
                if keys and part not in done:
                    scale_rows(weights, part, 1 / factor)
                done.add(part)
            start += size


def scale_values(weights: dict[str, torch.Tensor], group: list[HeadRef], *, values: bool, outputs: bool) -> None:
    """Values × c and the output's columns / c, with a c for each key/value head."""
    done = set()
    for head in group:
        factor = 2.0 ** (head.kv_head % 3 + 1)
        if outputs:
            scale_columns(weights, head.o, 1 / factor)
        if values and head.v not in done:
            scale_rows(weights, head.v, factor)
        done.add(head.v)


def outputs(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What comes out, without randomness."""
    torch.manual_seed(2)
    with torch.no_grad():
        return list(flat(model(**inputs)))


def change(
    model: Any, inputs: dict[str, Any], base: list[torch.Tensor], apply: Any, groups: list[list[HeadRef]]
) -> float:
    """How much the output changes when weights are scaled; they are put back."""
    weights = {name: value.data for name, value in model.named_parameters(remove_duplicate=False)}
    names = {rows.ref.name for group in groups for h in group for rows in (*h.q, *h.k, h.v, h.o)}
    before = {name: weights[name].clone() for name in names}
    try:
        for group in groups:
            apply(weights, group)
        return difference(base, outputs(model, inputs))
    except RUN_ERRORS:
        return float("inf")
    finally:
        for name, value in before.items():
            weights[name].copy_(value)


def check_rows(name: str, kind: str) -> tuple[Counter[str], list[str]]:
    """(b) for one type."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for model in build(name, kind):
        heads, _ = list_heads(list_matrices(open_source(model)))
        groups = attentions(heads)
        if not groups:
            return counts, failures
        for inputs in whole(model):
            base = outputs(model, inputs)
            for verdict, label in judge(model, inputs, base, groups):
                counts[verdict] += 1
                if "differ" in verdict:
                    failures.append(f"{name}: {verdict} at {label}")
            return counts, failures
    counts["does not run"] += 1
    return counts, failures


def judge(model: Any, inputs: Any, base: list[torch.Tensor], groups: list[list[HeadRef]]) -> Iterator[tuple[str, str]]:
    """A verdict on the scores and one on the values of every attention."""
    kinds = {
        "queries and keys": (
            lambda w, g: scale_scores(w, g, queries=True, keys=True),
            lambda w, g: scale_scores(w, g, queries=True, keys=False),
        ),
        "values and outputs": (
            lambda w, g: scale_values(w, g, values=True, outputs=True),
            lambda w, g: scale_values(w, g, values=False, outputs=True),
        ),
    }
    for kind, (both, half) in kinds.items():
        for group in groups:
            felt = change(model, inputs, base, half, [group])
            if felt < FELT:
                yield f"{kind}: not felt", group[0].name
                continue
            same = change(model, inputs, base, both, [group]) < SAME
            if not same and (group[0].qk_norm or type(model).__name__.startswith("Doge")):
                yield f"{kind}: a norm over all heads follows, or values enter the scores", group[0].name
                continue
            yield f"{kind}: {'agree' if same else 'differ'}", group[0].name


def stop(*_: object) -> None:
    """Ends a check that takes too long."""
    raise TookTooLongError


def check(name: str) -> tuple[Counter[str], list[str]]:
    """Everything about one type."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, stop)
    kind = class_of(name)
    if kind is None:
        return Counter({"no class": 1}), []
    counts: Counter[str] = Counter({"types": 1})
    failures: list[str] = []
    for stage in (check_scales, check_rows):
        signal.alarm(SECONDS)
        try:
            found, failed = stage(name, kind)
        except BUILD:
            found, failed = Counter({f"{stage.__name__}: not built": 1}), []
        except TookTooLongError:
            found, failed = Counter({f"{stage.__name__}: more than {SECONDS} s": 1}), []
        finally:
            signal.alarm(0)
        counts += found
        failures += failed
    return counts, failures


def main() -> None:
    """Check the types that are named, or all, and print what agrees and what does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    names = parser.parse_args().types or sorted(CONFIG_MAPPING)
    total: Counter[str] = Counter()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=20) as pool:
        for counts, failures in pool.imap(check, names):
            total += counts
            for failure in failures:
                print(failure, flush=True)
    for verdict, count in sorted(total.items()):
        print(f"{verdict}: {count}")


if __name__ == "__main__":
    main()
