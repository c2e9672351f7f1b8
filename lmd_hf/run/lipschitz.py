"""An upper bound on the Lipschitz constant of a torch model: along its graph, from the norms of its layers."""

import math
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers import activations

from lmd_hf.errors import first_line
from lmd_hf.run.loading import evaluating


# sup |f'|, rounded up; closed forms: GELU Φ(√2) + √2·φ(√2), hardswish 3/2, SELU 1.0507·1.6733; others on a fine grid
GELU, SILU = 1.1290, 1.0999
ACTIVATIONS: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0, nn.ReLU6: 1.0, nn.Tanh: 1.0, nn.Hardtanh: 1.0, nn.Sigmoid: 0.25, nn.Hardsigmoid: 0.1667,
    nn.Softplus: 1.0, nn.Softsign: 1.0, nn.LogSigmoid: 1.0, nn.GELU: GELU, nn.SiLU: SILU, nn.Mish: 1.0887,
    nn.Hardswish: 1.5, nn.SELU: 1.7582, activations.GELUActivation: GELU, activations.NewGELUActivation: GELU,
    activations.GELUTanh: GELU, activations.SiLUActivation: SILU, activations.QuickGELUActivation: SILU,
    activations.LinearActivation: 1.0,
}  # fmt: skip
FUNCTIONS: dict[Callable[..., Any], float] = {
    functional.relu: 1.0, torch.relu: 1.0, functional.relu6: 1.0, torch.tanh: 1.0, functional.tanh: 1.0,
    torch.sigmoid: 0.25, functional.sigmoid: 0.25, functional.gelu: GELU, functional.silu: SILU, torch.sin: 1.0,
    torch.cos: 1.0, torch.flatten: 1.0, functional.softplus: 1.0, functional.mish: 1.0887, torch.neg: 1.0,
    torch.reshape: 1.0, operator.neg: 1.0,
}  # fmt: skip
SUMS = (operator.add, operator.iadd, torch.add, operator.sub, torch.sub)
KEEP = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout)  # in evaluation mode; same numbers, elsewhere
METHODS = {"relu": 1.0, "tanh": 1.0, "sigmoid": 0.25, "flatten": 1.0, "view": 1.0, "reshape": 1.0}
UNTRACEABLE = (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, KeyError, NotImplementedError)
_ONE_AT_A_TIME = threading.Lock()  # torch.fx exchanges the call of every module of the process while it traces
_ROUNDING = 1 + 1e-10  # of a norm computed in float64


class NoBoundError(Exception):
    """A part of the model has no Lipschitz constant, or none that is known here; the text says which."""


class _Tracer(fx.Tracer):
    """Follows a forward pass down to the modules whose constants are known, and to torch's own."""

    def __init__(self, constants: dict[str, float | None]) -> None:
        super().__init__()
        self.constants = constants

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module stays one step of the graph."""
        known = self.constants.get(module_qualified_name) is not None
        return known or super().is_leaf_module(m, module_qualified_name)


def lipschitz_bound(model: nn.Module) -> float:
    """L with ‖f(x) − f(y)‖ ≤ L·‖x − y‖ for all x and y, Euclidean norms, the model in evaluation mode.

    Along the graph of the model (torch.fx): a layer multiplies by its largest singular value σ₁, an activation by
    sup |f'| (GELU 1.1290, SiLU 1.0999, ReLU 1), a sum of branches adds, scaling multiplies. A convolution counts
    σ₁ of its kernel as a matrix times √(how many windows an entry is in). A bound, and often a loose one: the product
    of norms ignores which directions the layers pass on. Raises `NoBoundError` for attention, normalisation across
    features, products of branches, values that are written over before they are used again, and whatever else has no
    constant, or no known one. While torch.fx follows the
    graph, no other thread of the process may run a model.
    """
    modules = dict(model.named_modules())
    constants = {name: module_bound(module) for name, module in modules.items()}
    if (whole := constants[""]) is not None:
        return whole
    try:
        with _ONE_AT_A_TIME, evaluating(model):  # a pass that asks whether it trains takes the other branch
            graph = _Tracer(constants).trace(model)
    except UNTRACEABLE as error:
        raise NoBoundError(f"its graph cannot be followed ({first_line(error)})") from None
    bounds: dict[fx.Node, float | None] = {}  # None: does not depend on the input
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs += 1
            bounds[node] = 1.0
        elif node.op == "get_attr":
            bounds[node] = None
        elif node.op == "output":
            return _of(node.args[0], bounds) or 0.0
        else:
            bounds[node] = _through(node, bounds, modules)
        if inputs > 1:
            raise NoBoundError("it has several inputs")
    raise NoBoundError("it returns nothing")


def _of(value: Any, bounds: dict[fx.Node, float | None]) -> float | None:
    """The constant of one argument: `None` for a number or a parameter."""
    if isinstance(value, (tuple, list, dict)):
        raise NoBoundError("it passes several tensors at once")
    return bounds[value] if isinstance(value, fx.Node) else None


def _through(node: fx.Node, bounds: dict[fx.Node, float | None], modules: dict[str, nn.Module]) -> float | None:
    """The constant after one step of the graph."""
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if any(node < user for user in _written_over(node, modules)):
        raise NoBoundError(f"{name} writes over what is used again")
    if node.op == "call_function" and node.target in SUMS and not node.kwargs:
        moving = [bound for value in node.args if (bound := _of(value, bounds)) is not None]
        return sum(moving) if moving else None
    if node.op == "call_function" and (scaling := _scaling(node)) is not None:
        bound = _of(scaling[1], bounds)
        return None if bound is None else scaling[0] * bound
    before = _of(node.args[0], bounds) if node.args else None
    if any(
        isinstance(value, fx.Node) and bounds[value] is not None for value in (*node.args[1:], *node.kwargs.values())
    ):
        raise NoBoundError(f"{name} joins branches, which has no constant")
    if node.op == "call_module":
        constant = module_bound(modules[name])
        if constant is None:
            raise NoBoundError(f"no Lipschitz constant is known for {name} ({type(modules[name]).__name__})")
    else:
        table: dict[Any, float] = FUNCTIONS if node.op == "call_function" else METHODS
        if node.target not in table:
            raise NoBoundError(f"no Lipschitz constant is known for {name}")
        constant = table[node.target]
    return None if before is None else constant * before


def _written_over(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, ...]:
    """The steps that use what this one writes its result over, itself among them; none where it writes elsewhere."""
    told = vars(modules[str(node.target)]) if node.op == "call_module" else node.kwargs
    first = node.args[0] if node.args else None
    is_inplace = node.target is operator.iadd or told.get("inplace")
    return tuple(first.users) if is_inplace and isinstance(first, fx.Node) else ()


def _scaling(node: fx.Node) -> tuple[float, Any] | None:
    """(factor, what it scales) of a product or quotient with one number; dividing a number by a tensor is none."""
    if node.target not in (operator.mul, operator.truediv):
        return None
    first, second = node.args
    if isinstance(second, (int, float)) and second:
        return abs(second) if node.target is operator.mul else 1 / abs(second), first
    return (abs(first), second) if isinstance(first, (int, float)) and node.target is operator.mul else None


def module_bound(module: nn.Module) -> float | None:
    """The Lipschitz constant of one module in evaluation mode, or a bound on it; `None` where none is known, as for a
    subclass of torch's that computes something else."""
    if (constant := ACTIVATIONS.get(type(module))) is not None:
        return constant
    torchs: Any = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules."))
    if type(module).forward is not torchs.forward:
        return None
    if isinstance(module, nn.Linear):
        return _norm(module.weight)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.padding_mode == "zeros":
        windows = math.prod(map(_windows, module.kernel_size, module.stride, module.dilation))
        groups = module.weight.flatten(1).chunk(module.groups)
        return math.sqrt(windows) * max(map(_norm, groups))
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and module.running_var is not None:
        gain = 1.0 if module.weight is None else module.weight.detach().double().abs()
        return float((gain / (module.running_var.double() + module.eps).sqrt()).max())
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.PReLU):
        return max(1.0, float(module.weight.detach().abs().max()))
    if isinstance(module, (nn.ELU, nn.CELU)):
        return max(1.0, abs(module.alpha)) if isinstance(module, nn.ELU) else 1.0
    return 1.0 if isinstance(module, KEEP) else None


def _windows(kernel: int, stride: int, dilation: int) -> int:
    """In how many windows an entry lies, along one axis, at most."""
    return math.ceil(kernel / stride) if dilation == 1 else kernel


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double().cpu(), 2)) * _ROUNDING
