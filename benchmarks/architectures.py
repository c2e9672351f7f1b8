"""Every model type of the installed transformers: is every parameter counted, every role found, every claim true?

    python benchmarks/architectures.py [--out benchmarks/architectures.md] [TYPE …]

Each type is built on the meta device from its default configuration, and its own saved names and shapes are what the
inventory sees. (a) decomposed + skipped = all parameters. (b) A small random model of the type (`tiny_models.py`) is
run: what is claimed of its matrices holds in its forward pass (`forward_pass.py` says how). (c) The outermost modules
that their class calls an attention hold q, k, v and o (keys and values may share one matrix), those that it calls an
MLP hold up and down of matching shapes; and what is read from the saved names has the same stacks, layers and roles as
the module tree itself.
The classes' names are all that this check takes on trust, no table of ours. What fails is listed by name. Types that do
not build from their defaults (a package is missing, a size has no default) are counted apart.
"""

import argparse
import math
import multiprocessing
import re
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from forward_pass import Outcome, judge_forward
from tiny_models import BUILD, MOST, SETTINGS, build
from torch import nn
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmd_hf.records import MatrixRef, TensorRef
from lmd_hf.weights.adapter import BUILD_ERRORS
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


# deformable and gating modules hold no queries and keys
ATTENTION = re.compile(r"(?<!Deformable)(?<!Gated)(?<!Linear)(?<!Delta)(?<!Lightning)(?<!Rwkv)(?<!RwkvSelf)Attention$")
MLP = re.compile(r"(?:MLP|Mlp|FeedForward|FFN)$")
SECONDS = 60  # of processor time at most, for one check of one type
SLOW = f"more than {SECONDS} s"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
FIRST_CHOICE = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "PRETRAINING",
)


@dataclass
class Verdict:
    """What was found about one type; `misses` say why (c) fails."""

    model_type: str
    class_name: str = ""
    not_built: str = ""
    parameters: int = 0
    counted: int = 0
    misses: list[str] = field(default_factory=list)
    small: Outcome | None = None
    not_small: str = ""


class TookTooLongError(BaseException):
    """Ends one check of one type; no handler of ordinary errors may take it for a model that does not run."""


def class_of(model_type: str) -> str | None:
    """The class with the most of the model in it: with a head where there is one."""
    tables = [f"MODEL_FOR_{name}_MAPPING_NAMES" for name in FIRST_CHOICE] + ["MODEL_MAPPING_NAMES"]
    tables += [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_FOR_\w+_NAMES", name)]
    first = None
    for table in tables:
        if found := getattr(modeling_auto, table).get(model_type):
            name = found if isinstance(found, str) else found[0]
            first = first or name
            try:
                configured = getattr(transformers, name).config_class
            except (ImportError, AttributeError):  # a package is missing
                continue
            if configured is CONFIG_MAPPING[model_type]:
                return name
    return first


def saved_source(model: nn.Module, model_type: str) -> Any:
    """What `save_pretrained` would write, as headers."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    tensors = tuple(
        TensorRef(name, "", 0, 0, DTYPES.get(value.dtype, "OTHER"), tuple(value.shape))
        for name, value in revert_weight_conversion(model, state).items()
    )
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "model_type": model_type}
    return SimpleNamespace(config=config, tensors=tensors, module=None, shared=(), notes=(), updates=(), read=None)


def judge(model_type: str) -> Verdict:
    """Build one type and check it."""
    verdict = Verdict(model_type, class_of(model_type) or "")
    if not verdict.class_name:
        verdict.not_built = "no model class of its own"
        return verdict
    try:
        with torch.device("meta"):
            model = getattr(transformers, verdict.class_name)(
                CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
            )
    except BUILD_ERRORS as error:
        verdict.not_built = short(error)
        return verdict
    source = saved_source(model, model_type)
    saved, live = list_matrices(source), list_matrices(open_source(model))
    verdict.parameters = sum(math.prod(tensor.shape) for tensor in source.tensors)
    verdict.counted = sum(math.prod(found.shape) for found in (*saved.selected, *saved.skipped))
    verdict.misses = [*incomplete(model, live.selected), *differences(saved.selected, live.selected)]
    verdict.misses += [f"skipped: {s.name}" for s in saved.skipped if "looks fused" in s.reason][:2]
    return verdict


def judge_small(verdict: Verdict) -> None:
    """The forward pass of a small model; of a larger one where the smallest tells nothing."""
    started = time.process_time()
    try:
        for model in build(verdict.model_type, verdict.class_name):
            try:
                outcome = judge_forward(model)
            except (*BUILD, UnboundLocalError) as error:
                verdict.not_small = short(error)
                continue
            best = verdict.small
            if best is None or (outcome.judged, outcome.whole) > (best.judged, best.whole):
                verdict.small = outcome
            if (
                outcome.matrices == 0
                or (outcome.passed and outcome.whole)
                or time.process_time() - started > SECONDS / 6
            ):
                break
    except BUILD as error:
        verdict.not_small = short(error)


def short(error: BaseException) -> str:
    """An error in a table's cell."""
    text = re.sub(rf"{tempfile.gettempdir()}/\w+", "the folder", (str(error).strip() or " ").splitlines()[0])
    return f"{type(error).__name__}: {text}"[:90].replace("|", "/")


def incomplete(model: nn.Module, refs: tuple[MatrixRef, ...]) -> list[str]:
    """Outermost attention modules without q, k, v, o, and MLPs without up and down; one of each class."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    seen: set[int] = set()
    below: dict[str, list[MatrixRef]] = {}
    for ref in refs:
        for path in above(ref.name):
            below.setdefault(path, []).append(ref)
    for path, module in model.named_modules():
        name = type(module).__name__
        own = {id(parameter) for parameter in module.parameters()}
        if own <= seen:  # shared with a module before it
            continue
        if not taken.isdisjoint(above(path)):
            continue
        mine = below.get(path, [])
        linear = any(isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D" for child in module.modules())
        if ATTENTION.search(name) and linear:
            taken.add(path)
            seen |= own
            roles = {ref.role for ref in mine if ref.block in ("attention", "cross_attention")}
            missing = {"q", "k", "v", "o"} - roles - ({"k", "v"} if "kv" in roles else set())
            if missing:
                found.setdefault(name, f"{path} ({name}): no {', '.join(sorted(missing))}")
        elif MLP.search(name) and any(isinstance(child, nn.Linear) for child in module.children()):
            taken.add(path)
            seen |= own
            roles = {ref.role for ref in mine if ref.block in ("mlp", "moe")}
            shapes = {role: [ref.shape for ref in mine if ref.role == role] for role in ("up", "down")}
            if not {"up", "down"} <= roles:
                found.setdefault(name, f"{path} ({name}): no {', '.join(sorted({'up', 'down'} - roles))}")
            elif {s[0] for s in shapes["up"]} != {s[1] for s in shapes["down"]}:
                found.setdefault(name, f"{path} ({name}): up {shapes['up'][0]} does not feed down {shapes['down'][0]}")
    return list(found.values())


def above(path: str) -> list[str]:
    """The paths of the modules around one: `a.b.c` → `a`, `a.b`."""
    pieces = path.split(".")
    return [".".join(pieces[:count]) for count in range(1, len(pieces))]


def differences(saved: tuple[MatrixRef, ...], live: tuple[MatrixRef, ...]) -> list[str]:
    """Where the saved names tell another stack, layer or role than the module tree does."""
    wanted = ("attention", "cross_attention", "mlp", "moe")
    counts = [Counter((r.stack, r.layer, r.block, r.role) for r in refs if r.block in wanted) for refs in (saved, live)]
    differing = sorted(str(key) for key in counts[0] | counts[1] if counts[0][key] != counts[1][key])
    return (
        [f"saved names differ from the module tree: {differing[0]} and {len(differing) - 1} more"] if differing else []
    )


def timed_out(*_: object) -> None:
    """Ends one type that takes too long."""
    raise TookTooLongError(f"more than {SECONDS} s")


def table(verdicts: list[Verdict]) -> str:
    """The result as Markdown."""
    judged = [v for v in verdicts if v.small and v.small.judged]
    failed = [v for v in judged if v.small and v.small.failed]
    mute = [v for v in verdicts if v.small and v.small.matrices and not v.small.judged]
    bare = sum(1 for v in verdicts if v.small and not v.small.matrices)
    reasons: Counter[str] = Counter()
    for verdict in verdicts:
        reasons += verdict.small.untestable if verdict.small else Counter()
    passed, by_row, whole = (sum(getattr(v.small, key) for v in judged) for key in ("passed", "by_row", "whole"))
    built = [v for v in verdicts if not v.not_built]
    owned = [v for v in verdicts if v.class_name]
    complete = [v for v in built if v.counted == v.parameters]
    right = [v for v in built if not v.misses]
    lines = [
        f"# Architectures of transformers {transformers.__version__}\n",
        "Made by `python benchmarks/architectures.py --out benchmarks/architectures.md`, which says what is checked.\n",
        f"* {len(verdicts)} types, {len(owned)} with a model class, {len(built)} of them build from their defaults",
        f"* (a) every parameter counted: {len(complete)} of {len(built)} ({len(complete) / len(built):.1%})",
        f"* (b) what is claimed holds in the forward pass: {len(judged) - len(failed)} of {len(judged)} "
        f"({(len(judged) - len(failed)) / max(len(judged), 1):.1%}) of the types that shrink below {MOST // 10**6} M "
        f"and have a pair that can be judged: {passed} pairs, {by_row} of them with a factor for every row, "
        f"{whole} through the whole model (the others through the part of it that holds them)",
        f"* beside these {len(mute)} types with no pair that can be judged, {bare} with no attention or MLP, "
        f"{sum(1 for v in owned if not v.small)} that do not shrink",
        f"* (c) every attention and MLP complete, saved names agree: {len(right)} of {len(built)} "
        f"({len(right) / len(built):.1%})\n",
        "## Misses of (c)\n",
        "| type | what |",
        "| --- | --- |",
        *(f"| {v.model_type} | {'; '.join(v.misses)} |" for v in built if v.misses),
        "\n## Failures of (b)\n",
        "| type | what |",
        "| --- | --- |",
        *(f"| {v.model_type} | {'; '.join(v.small.failed)} |" for v in failed if v.small),
        "\n## Pairs that (b) cannot judge\n",
        "| reason | pairs or matrices |",
        "| --- | --- |",
        *(f"| {reason} | {count} |" for reason, count in reasons.most_common()),
        "\n## Types that (b) cannot judge\n",
        "| type | why |",
        "| --- | --- |",
        *(f"| {v.model_type} | {untestable(v.small)} |" for v in mute if v.small),
        *(f"| {v.model_type} | does not shrink: {v.not_small or v.not_built} |" for v in owned if not v.small),
        "\n## Every type that (b) judges\n",
        "| type | pairs passed | with a factor for every row | failed | not judged |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {v.model_type} | {v.small.passed} | {v.small.by_row} | {len(v.small.failed)} | {untestable(v.small)} |"
            for v in judged
            if v.small
        ),
        "\n## Not built\n",
        "| type | why |",
        "| --- | --- |",
        *(f"| {v.model_type} | {v.not_built.replace('|', '/')} |" for v in owned if v.not_built),
    ]
    return "\n".join(lines) + "\n"


def limited(check: Callable[[], Verdict | None]) -> Verdict | None:
    """The check's answer, `None` if it takes too long."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return check()
    except TookTooLongError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def check(model_type: str) -> Verdict:
    """Everything about one type."""
    name = class_of(model_type) or ""
    verdict = limited(lambda: judge(model_type)) or Verdict(model_type, name, not_built=SLOW)
    if name:
        limited(lambda: judge_small(verdict))
        if verdict.small is None:
            verdict.not_small = verdict.not_small or SLOW
    return verdict


def untestable(outcome: Outcome) -> str:
    """The reasons of one type, with their counts."""
    return "; ".join(f"{count} {reason}" for reason, count in outcome.untestable.items() if count)


def main() -> None:
    """Judge every type, or those named, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, timed_out)
    types = options.types or sorted(CONFIG_MAPPING.keys())
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=50) as pool:
        verdicts = list(tqdm(pool.imap(check, types), total=len(types), unit="type"))
    text = table(verdicts)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
