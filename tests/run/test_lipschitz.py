"""Lipschitz bounds: never below an observed slope, exact where they can be, and absent where there is none."""

import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2CLS, ACT2FN

from lmd_hf.run.lipschitz import ACTIVATIONS, NoBoundError, lipschitz_bound, module_bound


def steepest(model, shape, *, scale=1.0, count=2000):
    """The largest slope over random pairs, near and far."""
    torch.manual_seed(0)
    model = model.double().eval()
    x = scale * torch.randn(count, *shape, dtype=torch.float64)
    far = scale * torch.randn(count, *shape, dtype=torch.float64)
    best = 0.0
    with torch.no_grad():
        for y in (far, x + 1e-3 * far):
            change = (model(x) - model(y)).flatten(1).norm(dim=1)
            best = max(best, float((change / (x - y).flatten(1).norm(dim=1)).max()))
    return best


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x + 0.5 * functional.gelu(self.inner(x)) - 2.0


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def models():
    torch.manual_seed(0)
    yield "mlp", nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 3)), (6,)
    yield "residual", Residual(), (6,)
    norm = nn.BatchNorm1d(8)
    norm.running_var.uniform_(0.1, 2.0)
    norm.weight.data.uniform_(-2, 2)
    yield "batch norm", nn.Sequential(nn.Linear(6, 8), norm, nn.LeakyReLU(1.7), nn.Dropout(0.5)), (6,)
    yield (
        "conv",
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, stride=2, groups=2)),
        (2, 8, 8),
    )
    yield "dilated", nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.ELU(2.0), nn.Flatten(), nn.Linear(24, 2)), (2, 12)


@pytest.mark.parametrize(("name", "model", "shape"), models(), ids=lambda v: v if isinstance(v, str) else "")
def test_the_bound_is_never_below_an_observed_slope(name, model, shape):
    bound = lipschitz_bound(model)
    seen = max(steepest(model, shape, scale=scale) for scale in (0.1, 1.0, 5.0))
    assert 0 < seen <= bound < math.inf


def test_it_is_exact_for_linear_maps_and_multiplies():
    layer = nn.Linear(7, 5)
    sigma = float(torch.linalg.svdvals(layer.weight.detach().double())[0])
    assert lipschitz_bound(layer) == pytest.approx(sigma)
    assert lipschitz_bound(nn.Sequential(layer, nn.ReLU(), nn.Flatten())) == pytest.approx(sigma)
    before = nn.Linear(7, 7)
    first = float(torch.linalg.svdvals(before.weight.detach().double())[0])
    assert lipschitz_bound(nn.Sequential(before, layer)) == pytest.approx(first * sigma)
    assert lipschitz_bound(nn.Sequential(layer, nn.GELU())) == pytest.approx(1.1290 * sigma)
    assert lipschitz_bound(nn.Sequential(layer, nn.SiLU())) == pytest.approx(1.0999 * sigma)


def test_a_residual_branch_adds():
    model = Residual()
    sigma = float(torch.linalg.svdvals(model.inner.weight.detach().double())[0])
    assert lipschitz_bound(model) == pytest.approx(1 + 0.5 * 1.1290 * sigma)


@pytest.mark.parametrize("module", [m for m in ACTIVATIONS if m is not nn.Identity], ids=lambda m: m.__name__)
def test_the_constants_of_activations(module):
    """Within 1e-4 above the largest slope on a fine grid."""
    grid = torch.linspace(-15, 15, 600_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module()(grid).sum(), grid)
    largest = float(slope.abs().max())
    assert largest <= ACTIVATIONS[module] * (1 + 1e-9)
    assert ACTIVATIONS[module] == pytest.approx(largest, abs=3e-4)


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_no_activation_of_transformers_is_steeper_than_its_constant(name):
    constant = module_bound(ACT2FN[name])
    if constant is None:
        return
    grid = torch.linspace(-15, 15, 60_001, dtype=torch.float64, requires_grad=True)
    activation = ACT2FN[name].double() if name == "prelu" else ACT2FN[name]
    (slope,) = torch.autograd.grad(activation(grid).sum(), grid)
    assert float(slope.abs().max()) <= constant * (1 + 1e-9)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return functional.silu(super().forward(x))


class Louder(nn.Identity):
    def forward(self, x):
        return 3 * x


@pytest.mark.parametrize("module", [Doubled(6, 6), Activated(6), Louder()], ids=lambda m: type(m).__name__)
def test_a_subclass_that_computes_something_else_is_not_taken_for_its_parent(module):
    """It is followed inside, or has no bound; as a weight-normalised layer it is still torch's own."""
    assert module_bound(module) is None
    if isinstance(module, Louder):
        assert lipschitz_bound(module) == 3
    else:
        with pytest.raises(NoBoundError):
            lipschitz_bound(nn.Sequential(nn.Linear(6, 6), module))
    assert module_bound(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))) is not None


class Modal(nn.Module):
    def forward(self, x):
        return x if self.training else 10 * x


def test_the_bound_is_that_of_evaluation_mode_whatever_mode_the_model_is_in():
    model = Modal().train()
    assert lipschitz_bound(model) == 10
    assert model.training


class Overwriting(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        y = 1.0 * x
        z = self.activation(y)
        return z + y


@pytest.mark.parametrize("activation", [nn.SiLU(inplace=True), lambda y: functional.relu(y, inplace=True)])
def test_what_is_written_over_and_used_again_has_no_bound(activation):
    with pytest.raises(NoBoundError, match="writes over what is used again"):
        lipschitz_bound(Overwriting(activation))
    assert lipschitz_bound(nn.Sequential(nn.Identity(), nn.SiLU(inplace=True))) == 1.0999
    assert lipschitz_bound(Gathering()) == 2


class Gathering(nn.Module):
    def forward(self, x):
        total = 0
        for branch in (torch.tanh, torch.relu):
            total += branch(x)
        return total


class Squared(nn.Module):
    def forward(self, x):
        return x * x


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_where_there_is_no_bound_the_reason_is_said():
    for model, reason in (
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "LayerNorm"),
        (nn.Sequential(nn.Linear(4, 4), transformers.activations.ReLUSquaredActivation()), "square"),
        (Squared(), "joins branches"),
        (Branching(), "cannot be followed"),
        (nn.MultiheadAttention(4, 1), "cannot be followed"),
        (nn.Bilinear(3, 3, 2), "several inputs"),
    ):
        with pytest.raises(NoBoundError, match=reason):
            lipschitz_bound(model)


def test_a_transformer_has_none():
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(NoBoundError):
        lipschitz_bound(transformers.BertModel(config))
