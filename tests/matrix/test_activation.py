"""Growth and effective degrees of activation functions: every one that transformers knows, and harder ones."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from lmd_hf.matrix.activation import effective_degree, energy_degree, growth_exponent


GROWTH = {
    "gelu": 1, "gelu_10": 0, "gelu_fast": 1, "gelu_new": 1, "gelu_python": 1, "gelu_pytorch_tanh": 1,
    "gelu_python_tanh": 1, "gelu_accurate": 1, "hardswish": 1, "laplace": 0, "leaky_relu": 1, "linear": 1, "mish": 1,
    "quick_gelu": 1, "relu": 1, "relu2": 2, "relu6": 0, "sigmoid": 0, "silu": 1, "sqrtsoftplus": 0.5, "swish": 1,
    "tanh": 0, "prelu": 1, "xielu": 2,
}  # fmt: skip


def test_the_table_has_every_activation_of_transformers():
    assert set(GROWTH) >= set(ACT2CLS), "new in transformers: look up its growth at +∞ and add it here"


@pytest.mark.parametrize("name", sorted(set(GROWTH) & set(ACT2CLS)))
def test_every_activation_of_transformers(name):
    activation = ACT2FN[name]
    before = {key: value.clone() for key, value in getattr(activation, "state_dict", dict)().items()}
    assert growth_exponent(activation) == GROWTH[name]
    degree = max(2, 1 + math.floor(GROWTH[name]))
    assert energy_degree(activation) == degree
    assert energy_degree(activation, gated=True) == degree + 1
    assert effective_degree(activation) == pytest.approx(by_hermite(activation), rel=0.02)
    for key, value in before.items():  # float64 is taken of a copy
        assert torch.equal(activation.state_dict()[key], value)
        assert activation.state_dict()[key].dtype == value.dtype


def by_hermite(activation, degrees=4000):
    """Σk·a_k²/Σa_k² itself, the coefficients a_k by the trapezoidal rule on a fine grid; what is above `degrees`, where
    a kink leaves a_k² ∝ k^{-5/2}, is missing."""
    x = np.linspace(-12, 12, 60_001)
    module = copy.deepcopy(activation).double() if isinstance(activation, nn.Module) else activation
    with torch.no_grad():
        f = module(torch.from_numpy(x)).numpy() * np.exp(-(x**2) / 4)
    previous, current = np.zeros_like(x), np.exp(-(x**2) / 4) / (2 * math.pi) ** 0.5
    squares = []
    for k in range(degrees):
        squares.append((np.trapezoid(f * current, x)) ** 2)
        previous, current = current, (x * current - math.sqrt(k) * previous) / math.sqrt(k + 1)
    squares = np.array(squares[1:])
    return float((np.arange(1, degrees) * squares).sum() / squares.sum())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("linear", 1.0),
        ("relu", math.pi / (math.pi - 1)),
        ("gelu", 1.318845),
        ("silu", 1.212081),
        ("tanh", 1.177807),
    ],
)
def test_effective_degree(name, value):
    assert effective_degree(ACT2FN[name]) == pytest.approx(value, abs=1e-6)


def test_effective_degree_of_closed_forms():
    assert effective_degree(torch.square) == pytest.approx(2, abs=1e-9)
    assert effective_degree(lambda x: x**3) == pytest.approx(1.8, abs=1e-9)
    assert effective_degree(torch.exp) == pytest.approx(math.e / (math.e - 1), abs=1e-9)  # a_k² ∝ 1/k!
    assert effective_degree(torch.relu) == pytest.approx(1.466942, abs=1e-6)


@pytest.mark.parametrize("kink", [0.0, 1.0, 0.3777, -1.23456789, math.pi, 1 / 3, 6.5])
def test_kinks_cost_no_accuracy_wherever_they_lie(kink):
    """relu(x − c): E f'² = Q(c), E f = φ(c) − c·Q(c), E f² = (1 + c²)·Q(c) − c·φ(c)."""
    q, density = norm.sf(kink), norm.pdf(kink)
    variance = (1 + kink**2) * q - kink * density - (density - kink * q) ** 2
    assert effective_degree(lambda x: torch.relu(x - kink)) == pytest.approx(q / variance, rel=1e-6)
    assert effective_degree(lambda x: torch.relu(x - kink) + 2 * torch.relu(-x - 0.1)) is not None


def test_two_kinks_close_together():
    """A ramp of width w, clamp(x, c, c + w): E f'² = P(c < x < c + w), and its variance by integrating tails."""
    c, w = 0.123, 1e-3
    inside = norm.cdf(c + w) - norm.cdf(c)
    x = np.linspace(c, c + w, 20_001)
    first, second = np.trapezoid(norm.sf(x), x), 2 * np.trapezoid((x - c) * norm.sf(x), x)
    assert effective_degree(lambda x: torch.clamp(x, c, c + w)) == pytest.approx(inside / (second - first**2), rel=1e-6)


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0])
def test_the_spread_of_the_inputs_matters_for_bends_and_not_for_powers(spread):
    assert effective_degree(torch.relu, spread=spread) == pytest.approx(math.pi / (math.pi - 1), abs=1e-9)
    assert effective_degree(lambda x: x**3, spread=spread) == pytest.approx(1.8, abs=1e-9)
    tanh, narrow = effective_degree(torch.tanh, spread=spread), effective_degree(torch.tanh, spread=0.01)
    assert narrow == pytest.approx(1, abs=1e-3)
    assert tanh > narrow


@pytest.mark.parametrize(
    "function", [torch.ones_like, lambda x: x * 0 + 1, torch.sign, lambda x: (x > 0.3).to(x), lambda x: x.abs().sqrt()]
)
def test_no_effective_degree_for_constants_jumps_and_slopes_without_a_mean_square(function):
    assert effective_degree(function) is None


def test_degrees_outside_an_mlp_and_of_any_callable():
    assert energy_degree(None) == 2
    assert energy_degree(torch.square) == 3
    assert energy_degree(lambda x: x**4) == 5
    assert energy_degree(lambda x: x * x.abs().sqrt()) == 2  # x^1.5: the whole part
    assert growth_exponent(lambda x: x * x.abs().sqrt()) == 1.5
    assert growth_exponent(lambda x: torch.log1p(x.abs())) == 0
    assert growth_exponent(lambda x: torch.exp(-(x**2))) == 0
    assert growth_exponent(lambda x: -(x**3)) == 3
    assert growth_exponent(torch.exp) == math.inf
    with pytest.raises(ValueError, match="outgrows every power"):
        energy_degree(torch.exp)


def test_learned_parameters_count_as_they_are():
    steep = nn.PReLU(init=1.0)
    assert effective_degree(steep) == pytest.approx(1)
    assert effective_degree(nn.PReLU(init=0.0)) == pytest.approx(math.pi / (math.pi - 1))
    assert steep.weight.dtype == torch.float32


@pytest.mark.parametrize("function", [nn.Softmax(dim=-1), nn.GLU(), lambda x: x.sum()])
def test_what_is_no_activation_is_refused(function):
    for measure in (effective_degree, growth_exponent):
        with pytest.raises(ValueError, match="each entry alone"):
            measure(function)


def test_a_function_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        effective_degree(torch.log)
