"""Small multilayer perceptrons: built from a generator, trained on all data at once, seen from inside."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


Loss = Callable[[Tensor, Tensor], Tensor]


class Power(nn.Module):
    """x ↦ x^degree."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree

    def forward(self, x: Tensor) -> Tensor:
        """x^degree, entry by entry."""
        return x**self.degree


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "GELU": nn.GELU,
    "x²": lambda: Power(2),
    "x³": lambda: Power(3),
}


def perceptron(sizes: Sequence[int], random: torch.Generator, *, activation: str = "ReLU") -> nn.Sequential:
    """Linear layers of these sizes with the activation between them, float32, drawn as torch's own `nn.Linear` draws
    them: weights and biases uniform on ±1/√fan_in."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.Linear(fan_in, fan_out)
        bound = 1 / math.sqrt(fan_in)
        for parameter in (layer.weight, layer.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=random)
        layers += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def linears(model: nn.Sequential) -> list[nn.Linear]:
    """The linear layers in order."""
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def fit(
    model: nn.Module, x_NI: Tensor, y: Tensor, *, steps: int, loss: Loss = nn.functional.mse_loss, decay: float = 1e-4
) -> float:
    """Train by full-batch Adam (rate 1e-3, L2 penalty `decay`), in place; the last loss. `loss` takes (output, y)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=decay)
    value = math.nan
    for _ in range(steps):
        optimizer.zero_grad()
        current = loss(model(x_NI), y)
        current.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value = current.item()
    return value


@torch.no_grad()
def layer_inputs(model: nn.Sequential, x_NI: Tensor) -> list[Tensor]:
    """What each linear layer is given, float64 rows."""
    inputs = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(x_NI.to(torch.float64))
        x_NI = layer(x_NI)
    return inputs
