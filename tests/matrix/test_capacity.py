"""Capacities against the published closed forms; degrees of activation functions against their exact values."""

import math

import pytest
import torch
from transformers.activations import ACT2FN

from lmd_hf.matrix.capacity import capacity_log10, effective_degree, energy_degree


@pytest.mark.parametrize(("degree", "patterns"), [(2, 10.857), (3, 361.91), (4, 7238.24), (5, 103403.45)])
def test_krotov_hopfield_capacity_at_100(degree, patterns):
    assert 10 ** capacity_log10(100.0, degree) == pytest.approx(patterns, rel=1e-4)


def test_no_capacity_below_three_dimensions():
    assert capacity_log10(2.9, 2) is None
    assert capacity_log10(None, 2) is None
    assert capacity_log10(3.0, 2) is not None


def test_one_more_degree_multiplies_capacity_by_the_dimension():
    """The paper: a kernel of degree n raises capacity by the power n − 1."""
    gain = capacity_log10(1000.0, 4) - capacity_log10(1000.0, 3)
    assert gain == pytest.approx(math.log10(1000 / 5))  # (2·4−3)!!/(2·3−3)!! = 5


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
    assert effective_degree(ACT2FN[name]) == pytest.approx(value, abs=2e-6)


def test_effective_degree_of_polynomials():
    assert effective_degree(lambda x: x**2) == pytest.approx(2, abs=1e-9)
    assert effective_degree(lambda x: x**3) == pytest.approx(1.8, abs=1e-9)
    assert effective_degree(lambda x: x * 0 + 1) is None


@pytest.mark.parametrize(
    ("name", "degree"),
    [("linear", 2), ("relu", 2), ("gelu", 2), ("gelu_new", 2), ("silu", 2), ("quick_gelu", 2), ("relu2", 3),
     ("tanh", 2), ("sigmoid", 2)],
)  # fmt: skip
def test_energy_degree(name, degree):
    assert energy_degree(ACT2FN[name]) == degree
    assert energy_degree(ACT2FN[name], gated=True) == degree + 1


def test_degrees_outside_an_mlp():
    assert energy_degree(None) == 2
    assert energy_degree(torch.square) == 3
