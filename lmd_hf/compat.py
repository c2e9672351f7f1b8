"""The one place for feature detection: what differs between versions of Python and of our packages."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lmd_hf.shared import SharedSetting


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "Target",
    "checkpoint_key_map",
    "let_go_of_blas",
    "local_processes",
    "local_rank",
    "output_to_errors",
    "rank",
    "redirect_errors",
    "resolve_commit",
    "run_experts_on_cpu",
    "tomllib",
    "unreachable_errors",
    "without_tf32",
]

_precision = SharedSetting()


@dataclass(frozen=True)
class Target:
    """What a checkpoint tensor becomes: the parameter `name`, or what a converter makes of it, alone or with others.

    `pieces` are the ends of the parameters that it is cut into along its first axis, in order, if that is all that is
    done to it.
    """

    name: str
    converted: bool = False
    pieces: tuple[str, ...] = ()


def rank() -> int:
    """The rank that torchrun or `accelerate launch` gave this process; 0 for a process by itself."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def local_rank() -> int:
    """Which of this machine's processes this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_processes() -> int:
    """How many processes of this run share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def checkpoint_key_map(model: Any, names: list[str]) -> dict[str, Target]:
    """{checkpoint name: what it becomes in the model}.

    Through the renamings and converters that transformers 5 itself loads with; where a version lacks them, or knows
    no better name, a tensor keeps its own.
    """
    parameters = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        prefix = f"{model.base_model_prefix}."
        return {name: Target(name if name in parameters else _with_prefix(name, prefix, parameters)) for name in names}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    result = {}
    for name in names:
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and name in parameters:
            target, source = name, None
        converter = next((c for c in converters if source in c.source_patterns), None)
        result[name] = Target(target, source is not None, _pieces(converter))
    return result


def _pieces(converter: Any) -> tuple[str, ...]:
    """The targets of a converter that only cuts its one source along the first axis (and perhaps orders the rows of
    every head for another form of rotary position, which no singular value feels); none for any other."""
    operations = [type(operation).__name__ for operation in converter.operations] if converter is not None else []
    if operations not in (["Chunk"], ["Chunk", "PermuteForRope"]) or converter.operations[0].dim != 0:
        return ()
    return tuple(re.sub(r"[\\^$]|\.weight$", "", pattern).strip(".") for pattern in converter.target_patterns)


def _with_prefix(name: str, prefix: str, parameters: dict[str, Any]) -> str:
    candidates = (name, prefix + name, name.removeprefix(prefix))
    return next((c for c in candidates if c in parameters), name)


def resolve_commit(api: Any, repo_id: str, revision: str | None) -> str:
    """The commit that a revision of a model repository means now (from the cache when offline)."""
    from huggingface_hub import errors

    if hasattr(api, "resolve_revision"):
        try:
            return str(api.resolve_revision(repo_id, revision=revision).resolved)
        except errors.RevisionResolutionError as error:
            if isinstance(error.__cause__, errors.HfHubHTTPError):  # 5xx: a Hub that answers is not out of reach
                raise error.__cause__ from None
            raise
    return str(api.model_info(repo_id, revision=revision).sha)


def unreachable_errors() -> tuple[type[Exception], ...]:
    """What the Hub client raises when there is no answer: its HTTP library's errors, and newer ones of its own."""
    from huggingface_hub import errors

    own = [getattr(errors, name, None) for name in ("RevisionResolutionError", "OfflineModeIsEnabled")]
    return (_httpx().TransportError, errors.LocalEntryNotFoundError, *(error for error in own if error is not None))


def redirect_errors() -> tuple[type[Exception], ...]:
    """What the Hub client's HTTP library raises for redirects without end."""
    return (_httpx().TooManyRedirects,)


def _httpx() -> Any:
    try:
        from huggingface_hub.utils import httpx
    except ImportError:
        import httpx
    return httpx


def run_experts_on_cpu(model: Any) -> None:
    """Let a model of transformers run its experts one by one where torch cannot multiply them as groups on a CPU, which
    transformers takes for granted (torch 2.8)."""
    import torch

    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key("aten::_grouped_mm", "CPU"):
        model.set_experts_implementation("eager")


def let_go_of_blas() -> None:
    """Let every thread set how many threads BLAS uses: since threadpoolctl 3.8 only the one that did it first can, for
    as long as it lives, and what others set is ignored in silence."""
    import threadpoolctl

    controller = getattr(threadpoolctl, "OpenBLASController", None)
    clear = getattr(controller, "clear_controlling_thread", None)
    if clear is not None:
        clear()


@contextmanager
def output_to_errors() -> Iterator[None]:
    """What native code writes to stdout in this context goes to stderr: gloo tells there, in torch 2.8, how many ranks
    it is connected to, in the middle of what is to be JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 on a GPU keep its 24 bits in this context, whatever the settings ask for. torch 2.9 has a new
    setting, and refuses to read the old one once the new one was set, as the Trainer does for `tf32=True`."""
    _precision.enter(_full_precision)
    try:
        yield
    finally:
        _precision.leave()


def _full_precision() -> Callable[[], object]:
    from torch import backends

    matmul = backends.cuda.matmul
    name, full = ("fp32_precision", "ieee") if hasattr(backends, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    # what only came from the setting above it goes on following that
    return lambda: setattr(matmul, name, "none" if before == getattr(backends, name, None) else before)
