"""Where the input of every matrix shows while the model runs: which module applies it, which inputs are the same."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lmd_hf.compat import Target, checkpoint_key_map
from lmd_hf.records import MatrixRef
from lmd_hf.run.loading import Batch, evaluating, forward


FEW = 4  # rows that show whether a module applies its matrix
AGREES = 0.05  # relative error of W·x + b against the module's output: bf16 stays below, another matrix does not
ONE_HOT = "an embedding's inputs are one-hot tokens"
STACKED = "one parameter holds several matrices, such as experts, and one module applies them"


@dataclass
class Call:
    """A module's inputs, kept so that equal memory means the same input, and a few rows of the first and its output as
    they were then: what comes later may write over both."""

    inputs: list[Tensor]
    x: Tensor
    y: Tensor | None


@dataclass(frozen=True)
class Tap:
    """Where the input of a matrix shows: at `module`, and at `input`, the first of all modules with the same input.
    `x` and `wx` are a few rows of its input and of its output without the bias; `biased` says whether there is one."""

    module: str
    input: str
    biased: bool
    x: Tensor = field(repr=False)
    wx: Tensor = field(repr=False)

    def fits(self, w_OI: Tensor) -> bool:
        """Whether the module's output is W·x + b, as far as its few rows show."""
        x, wx = self.x.to(w_OI), self.wx.to(w_OI)
        return bool(torch.linalg.norm(x @ w_OI.T - wx) <= AGREES * torch.linalg.norm(wx))


def find_taps(model: nn.Module, refs: Sequence[MatrixRef], batch: Batch) -> list[Tap | str]:
    """For every matrix the tap, or why its input does not show. Runs the model once, on `batch`."""
    names = sorted({name for ref in refs for name in _weight_names(ref)})
    targets = checkpoint_key_map(model, names)
    modules = dict(model.named_modules())
    found = [_module_of(modules, ref, targets) for ref in refs]
    with _recording(model, {path for path in found if path in modules}) as calls:
        with evaluating(model):
            forward(model, batch)
        first: dict[Any, str] = {}
        leader = {path: first.setdefault(_same(call.inputs), path) for path, call in calls.items()}
        taps: list[Tap | str] = []
        for ref, path in zip(refs, found, strict=True):
            if path not in calls:
                taps.append("its module was not run" if path in modules else path)
            else:
                taps.append(_tap(ref, model.get_submodule(path), path, leader[path], calls[path]))
    return taps


def _weight_names(ref: MatrixRef) -> tuple[str, str]:
    """The stored name, and that of the weight where it is stored packed (`x.qweight`)."""
    return ref.name, f"{ref.name.rpartition('.')[0]}.weight"


def _module_of(modules: dict[str, nn.Module], ref: MatrixRef, targets: dict[str, Target]) -> str:
    """The path of the module that applies a matrix, or, in words, why there is none."""
    if ref.role == "embed":
        return ONE_HOT
    if ref.role == "conv":
        return "a convolution's input are patches"
    if ref.expert is not None:
        return STACKED
    for name in _weight_names(ref):
        target = targets[name]
        path = target.name.removesuffix(".weight")
        if target.pieces:
            path = _piece(path, target.pieces, ref)
        if target.converted and not target.pieces:
            return STACKED
        if isinstance(modules.get(path), nn.Embedding):
            return ONE_HOT
        if isinstance(getattr(modules.get(path), "weight", None), Tensor):
            return path
    return "no module of its own shows its input"


def _piece(path: str, pieces: tuple[str, ...], ref: MatrixRef) -> str:
    """The module that got this matrix's block of rows of a tensor that is cut into equal pieces while loading."""
    wanted = pieces[ref.rows[0][0] // ref.shape[0]] if ref.rows else pieces[0]
    end = next((piece for piece in pieces if path.endswith(piece)), "")
    return path.removesuffix(end) + wanted


@contextmanager
def _recording(model: nn.Module, paths: set[str]) -> Iterator[dict[str, Call]]:
    """{path: its calls} of the modules that run, while the context lasts."""
    calls: dict[str, Call] = {}

    def hook(path: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = first_tensor(args, kwargs)
            if x is not None and path in calls:
                calls[path].inputs.append(x)
            elif x is not None:
                y = first_tensor(output if isinstance(output, tuple) else (output,), {})
                calls[path] = Call([x], _few(x), None if y is None else _few(y))

        return record

    handles = [model.get_submodule(p).register_forward_hook(hook(p), with_kwargs=True) for p in sorted(paths)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: Iterable[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """What a module is given, or gives: its first tensor."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _few(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])[-FEW:].to("cpu", torch.float64, copy=True)


def _same(inputs: list[Tensor]) -> tuple[Any, ...]:
    """Equal for modules that are given the very same memory."""
    return tuple((x.data_ptr(), x.shape, x.stride()) for x in inputs)


def _tap(ref: MatrixRef, module: nn.Module, path: str, leader: str, call: Call) -> Tap | str:
    x, y = call.x, call.y
    if x.shape[1] != ref.shape[1] or y is None:
        return f"its module's input has no rows of {ref.shape[1]:,} numbers"
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and bias.shape == y.shape[1:]:
        y = y - bias.detach().to("cpu", torch.float64)
    if y.shape[1] != ref.shape[0]:
        y = torch.cat([y[:, slice(*piece)] for piece in ref.rows], dim=1) if ref.rows else y
    if y.shape != (len(x), ref.shape[0]):
        return "its module gives something else than W·x + b"
    return Tap(path, leader, isinstance(bias, Tensor), x, y)
