"""The encoding theorem on known functions, on the Swiss roll and on handwritten digits."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_swiss_roll
from torch import nn

from lmd_hf import encoding_margin
from lmd_hf.errors import SettingsError


def trained(model, x, y, steps, *, rate=1e-3):
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).sum(1).mean().backward()
        optimizer.step()
    return model


def swiss_roll(count, seed):
    points, angle = make_swiss_roll(count, random_state=seed)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(9)))[0]
    scaled = torch.from_numpy((points - [0, 10, 0]) / 7).float()
    targets = torch.from_numpy(np.stack([(angle - 9.4) / 2.7, (points[:, 1] - 10.5) / 6], 1)).float()
    return scaled @ rotation[:3], targets


def digits(seed):
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    data = torch.from_numpy(x[order] / 16).float(), torch.eye(10)[torch.from_numpy(labels[order])]
    return tuple(part[:1400] for part in data), tuple(part[1400:] for part in data)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_the_theorem_on_the_swiss_roll(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 2))
    data, held_out = swiss_roll(1000, 0), swiss_roll(500, 1)
    trained(model, *data, 300)
    margin = encoding_margin(model, data, held_out=held_out)
    assert 0 < margin.observed <= margin.margin_upper
    assert margin.lipschitz_lower <= margin.lipschitz_upper
    assert margin.margin_lower <= margin.margin_upper
    assert (margin.training, margin.held_out, margin.uncovered) == (1000, 500, 3 / 500)


@pytest.mark.parametrize("away", [1e4, 2.0**27])
def test_where_the_domain_lies_does_not_matter(away):
    """In 20 dimensions, where neighbours are searched by products; the shift itself is exact."""
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0)).double().mul(2**10).round() / 2**10
    near, far = (
        encoding_margin(lambda z, at=at: torch.sin(z - at)[:, :2], (x + at, (x[:, :2] ** 2))) for at in (0.0, away)
    )
    for name in ("covering_radius", "target_slope", "lipschitz_lower", "margin_lower"):
        assert getattr(far, name) == pytest.approx(getattr(near, name), rel=1e-12)


def test_the_theorem_on_digits():
    torch.manual_seed(0)
    data, held_out = digits(0)
    model = trained(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), *data, 300)
    margin = encoding_margin(model, data, held_out=held_out)
    assert 0 < margin.observed <= margin.margin_upper
    correct = (model(held_out[0]).argmax(1) == held_out[1].argmax(1)).float().mean()
    assert correct > 0.9  # it was worth bounding


def test_every_quantity_on_a_line():
    """f(x) = 3x + ½ encodes g(x) = 2x on [0, 1]: all of them are known."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.bias.fill_(0.5)
    x = torch.linspace(0, 1, 11)[:, None]
    away = torch.tensor([[0.25], [1.3]])
    margin = encoding_margin(model, (x, 2 * x), held_out=(away, 2 * away), neighbours=2)
    assert margin.residual == pytest.approx(1.5)
    assert margin.covering_radius == pytest.approx(0.3)
    assert margin.target_slope == pytest.approx(2, rel=1e-5)
    assert margin.lipschitz_lower == pytest.approx(3, rel=1e-5)
    assert margin.lipschitz_upper == pytest.approx(3)
    assert margin.margin_upper == pytest.approx(1.5 + 5 * 0.3, rel=1e-5)
    assert margin.observed == pytest.approx(1.3 + 0.5)
    numbers = {name for name, value in vars(margin).items() if isinstance(value, float)} - {"uncovered"}
    assert set(margin.status) == numbers
    assert margin.status["lipschitz_upper"] == "bound"


def test_a_share_of_the_data_is_set_aside_by_its_seed():
    x = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    data = (x, x.sum(1))  # targets of one number need no axis
    model = nn.Linear(3, 1)
    first = encoding_margin(model, data, held_out=0.25)
    assert (first.training, first.held_out) == (75, 25)
    assert encoding_margin(model, data, held_out=0.25) == first
    assert encoding_margin(model, data, held_out=0.25, seed=1) != first


def test_the_model_is_asked_in_evaluation_mode_and_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 1)).train()
    x = torch.rand(50, 3)
    assert encoding_margin(model, (x, x[:, :1])) == encoding_margin(model, (x, x[:, :1]))
    assert model.training


def test_without_an_upper_bound_the_reason_is_there_and_the_estimate_stays():
    x = torch.rand(60, 4)
    with_norm = encoding_margin(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (x, x))
    assert (with_norm.lipschitz_upper, with_norm.margin_upper) == (None, None)
    assert "LayerNorm" in with_norm.lipschitz_reason
    assert math.isfinite(with_norm.margin_lower)
    plain = encoding_margin(lambda x: 2 * x, (x, x))
    assert (plain.lipschitz_upper, plain.lipschitz_reason) == (None, "not a torch module")
    assert plain.lipschitz_lower == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((torch.rand(12, 2), torch.rand(12, 2)), {}, "10 training points; at least 11"),
        ((torch.rand(50, 2), torch.rand(49, 2)), {"held_out": (torch.rand(5, 2), torch.rand(5, 2))}, "its target"),
        ((torch.rand(50, 2), torch.rand(60, 2)), {}, "50 inputs and 60 targets; each input needs its target"),
        (
            (torch.rand(50, 2),) * 2,
            {"held_out": (torch.rand(5, 2), torch.rand(6, 2))},
            "5 held-out inputs and 6 targets",
        ),
        ((torch.rand(50, 2), torch.rand(50, 2)), {"held_out": 1.5}, "between 0 and 1"),
        ((torch.rand(50, 2), torch.rand(50, 2)), {"held_out": (torch.rand(0, 2), torch.rand(0, 2))}, "0 held-out"),
        ((torch.rand(50, 2), torch.rand(50, 3)), {}, "gives 2 numbers a point and the targets have 3"),
        ((torch.zeros(50, 2), torch.rand(50, 2)), {}, "equal inputs have different targets"),
        ((torch.full((50, 2), math.nan), torch.rand(50, 2)), {}, "NaN or infinity"),
    ],
)
def test_bad_data_is_one_clear_line(data, options, message):
    with pytest.raises(SettingsError, match=message):
        encoding_margin(nn.Identity(), data, **options)
