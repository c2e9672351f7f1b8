"""Every model type of the installed transformers, from headers alone: is every parameter counted, every role found?

    python benchmarks/architectures.py [--out benchmarks/architectures.md] [TYPE …]

Each type is built on the meta device from its default configuration, and its own saved names and shapes are what the
inventory sees. (a) decomposed + skipped = all parameters. (c) The outermost modules that their class calls an
attention hold q, k, v and o (keys and values may share one matrix), those that it calls an MLP hold up and down of
matching shapes; and what is read from the saved names has the same stacks, layers and roles as the module tree itself.
The classes' names are all that this check takes on trust, no table of ours. What fails is listed by name. Types that do
not build from their defaults (a package is missing, a size has no default) are counted apart.
"""

import argparse
import math
import re
import signal
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub.utils import tqdm
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmd_hf.records import MatrixRef, TensorRef
from lmd_hf.weights.adapter import BUILD_ERRORS
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


ATTENTION = re.compile(r"(?<!Linear)(?<!Delta)(?<!Lightning)(?<!Rwkv)(?<!RwkvSelf)Attention$")
MLP = re.compile(r"(?:MLP|Mlp|FeedForward|FFN)$")
SECONDS = 60  # at most, for one type
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


def class_of(model_type: str) -> str | None:
    """The class with the most of the model in it: with a head where there is one."""
    tables = [f"MODEL_FOR_{name}_MAPPING_NAMES" for name in FIRST_CHOICE] + ["MODEL_MAPPING_NAMES"]
    tables += [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_FOR_\w+_NAMES", name)]
    for table in tables:
        if found := getattr(modeling_auto, table).get(model_type):
            return found if isinstance(found, str) else found[0]
    return None


def saved_source(model: nn.Module, model_type: str) -> Any:
    """What `save_pretrained` would write, as headers."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    tensors = tuple(
        TensorRef(name, "", 0, 0, DTYPES.get(value.dtype, "OTHER"), tuple(value.shape))
        for name, value in revert_weight_conversion(model, state).items()
    )
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "model_type": model_type}
    return SimpleNamespace(config=config, tensors=tensors, module=None, shared=(), notes=())


def judge(model_type: str) -> Verdict:
    """Build one type and check it."""
    verdict = Verdict(model_type, class_of(model_type) or "")
    if not verdict.class_name:
        verdict.not_built = "no model class of its own"
        return verdict
    try:
        with torch.device("meta"):
            model = getattr(transformers, verdict.class_name)(CONFIG_MAPPING[model_type]())
    except BUILD_ERRORS as error:
        verdict.not_built = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:90]
        return verdict
    source = saved_source(model, model_type)
    saved, live = list_matrices(source), list_matrices(open_source(model))
    verdict.parameters = sum(math.prod(tensor.shape) for tensor in source.tensors)
    verdict.counted = sum(math.prod(found.shape) for found in (*saved.selected, *saved.skipped))
    verdict.misses = [*incomplete(model, live.selected), *differences(saved.selected, live.selected)]
    verdict.misses += [f"skipped: {s.name}" for s in saved.skipped if "looks fused" in s.reason][:2]
    return verdict


def incomplete(model: nn.Module, refs: tuple[MatrixRef, ...]) -> list[str]:
    """Outermost attention modules without q, k, v, o, and MLPs without up and down; one of each class."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    below: dict[str, list[MatrixRef]] = {}
    for ref in refs:
        for path in above(ref.name):
            below.setdefault(path, []).append(ref)
    for path, module in model.named_modules():
        name = type(module).__name__
        if not taken.isdisjoint(above(path)):
            continue
        mine = below.get(path, [])
        linear = any(isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D" for child in module.modules())
        if ATTENTION.search(name) and linear:
            taken.add(path)
            roles = {ref.role for ref in mine if ref.block in ("attention", "cross_attention")}
            missing = {"q", "k", "v", "o"} - roles - ({"k", "v"} if "kv" in roles else set())
            if missing:
                found.setdefault(name, f"{path} ({name}): no {', '.join(sorted(missing))}")
        elif MLP.search(name) and any(isinstance(child, nn.Linear) for child in module.children()):
            taken.add(path)
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
    raise TimeoutError(f"more than {SECONDS} s")


def table(verdicts: list[Verdict]) -> str:
    """The result as Markdown."""
    built = [v for v in verdicts if not v.not_built]
    owned = [v for v in verdicts if v.class_name]
    complete = [v for v in built if v.counted == v.parameters]
    right = [v for v in built if not v.misses]
    lines = [
        f"# Architectures of transformers {transformers.__version__}\n",
        "Made by `python benchmarks/architectures.py --out benchmarks/architectures.md`, which says what is checked.\n",
        f"* {len(verdicts)} types, {len(owned)} with a model class, {len(built)} of them build from their defaults",
        f"* (a) every parameter counted: {len(complete)} of {len(built)} ({len(complete) / len(built):.1%})",
        f"* (c) every attention and MLP complete, saved names agree: {len(right)} of {len(built)} "
        f"({len(right) / len(built):.1%})\n",
        "## Misses of (c)\n",
        "| type | what |",
        "| --- | --- |",
        *(f"| {v.model_type} | {'; '.join(v.misses)} |" for v in built if v.misses),
        "\n## Not built\n",
        "| type | why |",
        "| --- | --- |",
        *(f"| {v.model_type} | {v.not_built.replace('|', '/')} |" for v in owned if v.not_built),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Judge every type, or those named, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, timed_out)
    verdicts = []
    for model_type in tqdm(options.types or sorted(CONFIG_MAPPING.keys()), unit="type"):
        signal.alarm(SECONDS)
        try:
            verdicts.append(judge(model_type))
        except TimeoutError as error:
            verdicts.append(Verdict(model_type, class_of(model_type) or "", not_built=str(error)))
        finally:
            signal.alarm(0)
    text = table(verdicts)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
