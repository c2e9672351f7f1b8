"""Capacities against the published closed forms and worked values, and against their own inverses."""

import math

import mpmath
import pytest

from lmd_hf.matrix.capacity import (
    capacity_log10,
    classical_capacity,
    head_capacity_log10,
    required_degree,
    softmax_capacity_log10,
)


@pytest.mark.parametrize(("degree", "patterns"), [(2, 10.857), (3, 361.91), (4, 7238.24), (5, 103403.45)])
def test_krotov_hopfield_capacity_at_100(degree, patterns):
    assert 10 ** capacity_log10(100.0, degree) == pytest.approx(patterns, rel=1e-4)


def test_no_capacity_below_three_dimensions():
    assert capacity_log10(2.9, 2) is None
    assert capacity_log10(None, 2) is None
    assert capacity_log10(3.0, 2) is not None
    assert capacity_log10(100.0, 1) is None


def test_one_more_degree_multiplies_capacity_by_the_dimension():
    """The paper: a kernel of degree n raises capacity by the power n − 1."""
    gain = capacity_log10(1000.0, 4) - capacity_log10(1000.0, 3)
    assert gain == pytest.approx(math.log10(1000 / 5))  # (2·4−3)!!/(2·3−3)!! = 5


def test_high_degrees_do_not_overflow():
    d, a = 5000.0, 2000
    factorial = math.prod(range(1, 2 * a - 2, 2))
    exact = (a - 1) * math.log10(d) - math.log10(2) - math.log10(factorial) - math.log10(math.log(d))
    assert capacity_log10(d, a) == pytest.approx(exact, rel=1e-12)


def test_the_classical_load():
    assert classical_capacity(100) == pytest.approx(13.8)


@pytest.mark.parametrize("d", [3.0, 7.5, 40.0, 700.0])
@pytest.mark.parametrize("n", [1, 2, 10, 361.9, 1e6, 1e12])
def test_required_degree_inverts_the_capacity(n, d):
    capacities = {a: capacity_log10(d, a) for a in range(2, 1500)}
    enough = [a for a, k in capacities.items() if k >= math.log10(n)]
    assert required_degree(n, d) == (enough[0] if enough else None)


def test_required_degree_says_where_no_degree_is_enough():
    assert required_degree(362, 100) == 4
    assert required_degree(10, 2.5) is None
    assert required_degree(10, math.inf) is None
    for bad in (0, -3, math.nan):
        with pytest.raises(ValueError, match="at least 1"):
            required_degree(bad, 100)


@pytest.mark.parametrize(
    ("sharpness", "d", "c", "patterns"), [(9.0, 20, 3.15461, 7.41297), (1.0, 75, 1.37188, 10.9732)]
)
def test_the_worked_values_of_ramsauer(sharpness, d, c, patterns):
    assert 10 ** softmax_capacity_log10(d, sharpness) == pytest.approx(patterns, rel=1e-5)
    assert math.sqrt(0.001) * c ** ((d - 1) / 4) == pytest.approx(patterns, rel=1e-4)


@pytest.mark.parametrize("d", [2.5, 20, 75, 768, 4096, 100_000])
@pytest.mark.parametrize("sharpness", [1e-3, 0.3, 5.0, 1e3, 1e9])
@pytest.mark.parametrize("p", [0.001, 1.0])
def test_softmax_capacity_against_the_formula_in_many_digits(d, sharpness, p):
    with mpmath.workdps(40):
        a = mpmath.mpf(2) / (mpmath.mpf(d) - 1) * (1 + mpmath.log(2 * mpmath.mpf(sharpness) * p * (mpmath.mpf(d) - 1)))
        b = mpmath.mpf(2) * sharpness / 5
        c = b / mpmath.lambertw(mpmath.exp(a + mpmath.log(b))).real
        holds = c >= (2 / mpmath.sqrt(p)) ** (mpmath.mpf(4) / (mpmath.mpf(d) - 1)) and sharpness * (d - 1) > 0.05
        k = mpmath.log10(mpmath.sqrt(p)) + (mpmath.mpf(d) - 1) / 4 * mpmath.log10(c)
    found = softmax_capacity_log10(d, sharpness, failure=p)
    assert found == (pytest.approx(float(k), rel=1e-9, abs=1e-9) if holds else None)


def test_softmax_capacity_does_not_exist_where_the_theorem_says_nothing():
    assert softmax_capacity_log10(None, 1.0) is None
    assert softmax_capacity_log10(1.0, 1.0) is None
    assert softmax_capacity_log10(20, 0.0) is None
    assert softmax_capacity_log10(20, math.inf) is None
    assert softmax_capacity_log10(20, 1.0) is None  # c below its condition
    assert softmax_capacity_log10(20, 1e-6) is None  # c of the formula is large, but the balls overlap
    with pytest.raises(ValueError, match="probability"):
        softmax_capacity_log10(20, 1.0, failure=0)


def test_a_heads_capacity_depends_on_the_product_of_its_scale_and_norms_alone():
    d, beta, kappa = 20, 1.0, 3.0  # patterns of norm κ√(d−1), β the scale: the first worked value
    norm = kappa * math.sqrt(d - 1)
    plain = head_capacity_log10(d, scale=beta, query_norm=norm, key_norm=norm)
    assert 10**plain == pytest.approx(7.41297, rel=1e-5)
    assert head_capacity_log10(d, scale=beta / 6, query_norm=2 * norm, key_norm=3 * norm) == pytest.approx(plain)
    assert head_capacity_log10(None, scale=1, query_norm=1, key_norm=1) is None
    assert head_capacity_log10(20, scale=1, query_norm=None, key_norm=1) is None
