"""What is claimed of attention heads beside the modules that hold them, for every model type of transformers.

    python benchmarks/head_claims.py [TYPE …]

A small random model of each type (`tiny_models.py`) says itself how many heads an attention has and what multiplies
its scores (its attributes), whether it norms queries and keys (its children), and whether it rotates them (it runs once
more with a rotation by nothing, and what it gives changes or not). Printed are the types whose heads are formed, how
many of the claims could be compared, and every one that differs. Some attributes mean something else than their name
says; `EXPLAINED` has them with the reason.
"""

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from architectures import class_of
from tiny_models import BUILD, build
from torch import nn
from tqdm import tqdm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmd_hf.circuits import HeadRef
from lmd_hf.weights.heads import list_heads
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
SCALES = ("scaling", "scale", "softmax_scale")
NORM_OF_SCORES = re.compile(
    r"(?<!indexer)(?:^|[._])(?:q|k|qk|query|key)_?(?:layer_?)?(?:norm|layernorm|ln)$|norm_[qk]$"
)
EXPLAINED = {
    "dia": "rotary: its decoder passes rotations by their place",
    "esm": "scale: the queries are scaled before",
    "openai_privacy_filter": "scale: its root multiplies queries and keys",
    "llama4": "qk_norm: a function, without a module",
    "llama4_text": "qk_norm: a function, without a module",
    "gemma4_vision": "qk_norm: the norms are beside a wrapped projection",
}


def heads_of(model: nn.Module) -> dict[str, list[HeadRef]]:
    """{path of an attention: its heads}."""
    result: dict[str, list[HeadRef]] = {}
    for head in list_heads(list_matrices(open_source(model)))[0]:
        result.setdefault(head.q[0].ref.name.rsplit(".", 2)[0], []).append(head)
    return {path: heads for path, heads in result.items() if path in dict(model.named_modules())}


def differences(model: nn.Module) -> Iterator[tuple[str, str, Any, Any]]:
    """(claim, path of the attention, what the module says, what is claimed) for each that can be compared."""
    attentions = heads_of(model)
    rotates = felt_rotations(model, list(attentions))
    for path, heads in attentions.items():
        module, head = model.get_submodule(path), heads[0]
        if (count := first_number(module, COUNTS)) is not None:
            yield "count", path, int(count), len(heads)
        if (scale := first_number(module, SCALES)) is not None:
            same = any(abs(each / head.scale - 1) < 1e-6 for each in (scale, 1 / scale))
            yield "scale", path, head.scale if same else scale, head.scale
        parts = [name for name, part in module.named_modules() if not isinstance(part, nn.Identity)]
        own = [name for name in parts if NORM_OF_SCORES.search(name)]
        yield "qk_norm", path, bool(own), head.qk_norm
        if path in rotates:
            yield "rotary", path, rotates[path], head.rotary


def first_number(module: nn.Module, names: tuple[str, ...]) -> float | None:
    """The first of these attributes that is a number."""
    values = (getattr(module, name, None) for name in names)
    numbers = (value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in values)
    return next((x for x in numbers if isinstance(x, (int, float)) and not isinstance(x, bool) and x), None)


def felt_rotations(model: nn.Module, paths: list[str]) -> dict[str, bool]:
    """{path: whether its output changes where positions are rotated by nothing}, of those that are given rotations, or
    that others of their class are."""
    felt: dict[str, bool | None] = {}

    def compare(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if path in felt:
            return
        felt[path] = None  # the module is called once more below
        turned = kwargs.get("position_embeddings")
        if isinstance(turned, tuple):
            kwargs = {key: value for key, value in kwargs.items() if not key.startswith("past_key_value")}
            still = {**kwargs, "position_embeddings": (torch.ones_like(turned[0]), torch.zeros_like(turned[1]))}
            before, after = (first(module.forward(*args, **each)) for each in (kwargs, still))
            felt[path] = not torch.allclose(before, after, rtol=0, atol=1e-6 * float(before.abs().max()))

    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, output, path=path: compare(path, module, args, kwargs, output),
            with_kwargs=True,
        )
        for path in paths
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    except (*BUILD, IndexError, NotImplementedError):  # it wants images or sound: nothing can be said
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    given = {type(model.get_submodule(path)) for path, value in felt.items() if value is not None}
    return {path: bool(value) for path, value in felt.items() if type(model.get_submodule(path)) in given}


def first(output: Any) -> torch.Tensor:
    """The tensor, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def main() -> None:
    """Print what differs, and one line of counts for each claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    compared, agreeing, formed = Counter(), Counter(), 0
    for model_type in tqdm(options.types or sorted(CONFIG_MAPPING), unit="type"):
        try:
            model = next(build(model_type, class_of(model_type) or ""))
            found = list(differences(model))
        except (*BUILD, StopIteration) as error:
            tqdm.write(f"{model_type}: not built or not run ({type(error).__name__})")
            continue
        formed += bool(found)
        for claim, path, told, claimed in found:
            compared[claim] += 1
            agreeing[claim] += told == claimed
            if told != claimed:
                why = EXPLAINED.get(model_type, "")
                explained = f" ({why})" if why.startswith(f"{claim}:") else ""
                tqdm.write(f"{model_type}: {claim} of {path} is {told}, claimed {claimed}{explained}")
    print(f"{formed} types with heads")
    for claim, count in compared.items():
        print(f"{claim}: {agreeing[claim]} of {count} attentions agree")


if __name__ == "__main__":
    main()
