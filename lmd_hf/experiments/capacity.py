"""Capacity: how many random patterns dense associative memories of degree 2, 3, 4 and softmax recall, by dimension.

The paper says that a kernel of degree n raises the capacity by the power n − 1 (Krotov & Hopfield 2016); the criteria
of recall, the dimensions and the fit are this project's.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from lmd_hf.experiments.catalogue import EXPERIMENTS
from lmd_hf.experiments.figures import panels
from lmd_hf.experiments.outcome import Cell, Check, Outcome, Row, averaged, counted, significant
from lmd_hf.experiments.seeding import each, generator
from lmd_hf.matrix.capacity import softmax_capacity_log10


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "capacity"
FEW, NONE = "1 % of the bits wrong", "half of the patterns without any wrong bit"
WRONG_BITS = 0.01  # of criterion FEW
RECALLED = 0.1  # softmax: distance from the pattern after one step, of the patterns' norm
HALF = 0.5  # of the patterns
SOFTMAX_RATE = 0.6225  # of ln N by dimension, β = κ = 1: 1 − max_t (t + ½ ln(1 − t²))
SHARE = 0.9  # a claim holds on at least nine of ten seeds
START = 16  # patterns to begin with
CHUNK = 4096  # patterns in arithmetic at once
METHOD = (
    "Random ±1 patterns, d bits each, in memories with energy −Σ(ξ·σ)^a (Krotov & Hopfield 2016, their exact "
    "update); all bits of at least 64 stored patterns (65,536 bits) are updated once from the pattern itself. "
    f"Capacity: the number of patterns with {FEW} (the law is a pure power of d then), or {NONE} remain (the law has "
    "a factor 1/ln d); the count at which that is reached is found by doubling and a line through five counts "
    "around it, without knowing the law. The exponent is the slope of ln K against ln d, least squares, for each "
    "seed; the interval is Student's over the seeds. Finite d shifts it: `expected here` fits the same line to the "
    "exact signal-to-noise ratio at these d. Softmax: points on the sphere of radius √d, β = 1, one step from the "
    "stored point; recalled when it stays within 10 % of the norm, N where half are; its rate is what the mean of "
    "exp(x·y) over the sphere gives for large d."
)


@dataclass(frozen=True)
class Setup:
    """Dimensions for each degree and for softmax; stored patterns are asked for until so many bits are, at least
    `asked` of them (or all)."""

    dimensions: tuple[tuple[int, tuple[int, ...]], ...] = (
        (2, (1024, 2048, 4096, 8192)),
        (3, (128, 256, 512, 1024)),
        (4, (64, 96, 128, 192, 256)),
    )
    softmax: tuple[int, ...] = (12, 14, 16, 18, 20, 22, 24)
    asked: int = 64
    bits: int = 2**16


@dataclass(frozen=True)
class Trial:
    """One seed: ln K by (degree, criterion), each over its dimensions, and ln N of the softmax memory."""

    polynomial: dict[tuple[int, str], tuple[float, ...]]
    softmax: tuple[float, ...]


def run(seeds: Sequence[int], setup: Setup = Setup()) -> Outcome:
    """Find the capacities for each seed and fit how they grow."""
    trials = each(lambda seed: _trial(seed, setup), seeds, what=NAME)
    tables: dict[str, Sequence[Row]] = {
        "exponents": [_exponent_row(a, dims, c, trials) for a, dims in setup.dimensions for c in (FEW, NONE)],
        "capacities": _capacities(trials, setup),
        "softmax": _softmax_rows(trials, setup),
    }
    figures = {"capacity": _figure(trials, setup)}
    return Outcome(NAME, EXPERIMENTS[NAME], METHOD, judge(trials, setup), tuple(seeds), tables, figures)


def judge(trials: Sequence[Trial], setup: Setup = Setup()) -> tuple[Check, ...]:
    """The stated rules, applied to ln K and ln N."""
    checks = []
    for degree, dims in setup.dimensions:
        mean, half = _interval(_slopes(trials, (degree, FEW), dims))
        checks.append(
            Check(
                f"degree {degree}, {FEW}: {degree - 1} lies in the 95 % interval of the fitted exponent",
                f"{mean:.4f} ± {half:.4f}; finite d alone would give {expected_slope(degree, dims):.4f}",
                abs(mean - (degree - 1)) <= half,
            )
        )
    strict = {a: _interval(_slopes(trials, (a, NONE), dims)) for a, dims in setup.dimensions}
    checks.append(
        Check(
            "without any wrong bit the factor 1/ln d lowers the exponent: a − 1 lies above its 95 % interval",
            ", ".join(f"degree {a}: {mean:.3f} ± {half:.3f}" for a, (mean, half) in strict.items()),
            all(mean + half < a - 1 for a, (mean, half) in strict.items()),
        )
    )
    better = [_misfit(setup.softmax, t.softmax) < _misfit(np.log(setup.softmax), t.softmax) for t in trials]
    rates = [_slope(setup.softmax, t.softmax) for t in trials]
    mean, half = _interval(rates)
    checks.append(
        Check(
            f"softmax: ln N grows with d, and a line in d fits better than one in ln d on at least {SHARE:.0%}",
            f"{mean:.4f} ± {half:.4f} a dimension (large d: {SOFTMAX_RATE}); better {counted(better)}",
            mean - half > 0 and sum(better) >= SHARE * len(trials),
        )
    )
    return tuple(checks)


def update_errors(patterns_KD: Tensor, degree: int, asked: int) -> Tensor:
    """Which bits of the first `asked` of K stored ±1 patterns flip when all are updated at once, asked × D; ½ for ties.

    Bit i becomes the sign of Σ_μ F(ξ_μi + o_μi) − F(−ξ_μi + o_μi), F = x^a and o_μi the overlap of pattern μ with the
    state without bit i (Krotov & Hopfield 2016, eq. 4). With c = ξ_μi·σ_i and o the whole overlap, that is
    2σ_i·Σ_μ c·G(o − c), G(x) = Σ_{k odd} C(a, k)·x^{a−k}; as c² = 1 it falls into two polynomials of o, one times c.
    """
    state_MD = patterns_KD[:asked].float()
    linear, free = _polynomials(degree)
    field_MD = torch.zeros_like(state_MD, dtype=torch.float64)
    for chunk in torch.split(patterns_KD, CHUNK):
        xi_KD = chunk.float()
        overlap_MK = state_MD @ xi_KD.T
        field_MD += (_value(linear, overlap_MK) @ xi_KD) * state_MD
        field_MD += _value(free, overlap_MK).sum(1, dtype=torch.float64)[:, None]
    return (field_MD < 0).double() + (field_MD == 0).double() / 2


def _polynomials(degree: int) -> tuple[list[int], list[int]]:
    """Coefficients by power of o of what multiplies c, and of the rest, in c·G(o − c)."""
    linear, free = [0] * degree, [0] * degree
    for k in range(1, degree + 1, 2):
        power = degree - k
        for j in range(power + 1):  # c·(−c)^j is c for even j, −1 for odd j
            target, sign = (linear, 1) if j % 2 == 0 else (free, -1)
            target[power - j] += sign * math.comb(degree, k) * math.comb(power, j)
    return linear, free


def _value(coefficients: Sequence[int], x: Tensor) -> Tensor:
    total = torch.full_like(x, float(coefficients[-1]))
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def softmax_failures(points_ND: Tensor, asked: int) -> Tensor:
    """Which of the first `asked` points one step of softmax attention, β = 1, moves by more than 10 % of their norm."""
    state_MD = points_ND[:asked]
    moved = torch.softmax(state_MD @ points_ND.T, dim=1) @ points_ND - state_MD
    return moved.norm(dim=1) > RECALLED * state_MD.norm(dim=1)


def crossing(rate: Callable[[int], float], target: float, start: int) -> float:
    """ln K where a rate that grows with K reaches `target`.

    K doubles from `start` until the target is passed; around the crossing of that bracket the rate is taken at five K
    from 2^−½ to 2^½ of it, and the least-squares line of its probit over ln K is solved for the target. (Halving the
    bracket until it is narrow stops at the first passage of a noisy rate, and so too low, the more the smaller d.)
    """
    low = high = start
    while rate(high) < target:
        low, high = high, 2 * high
    middle = math.log(low) + math.log(high / low) / 2
    if low < high and _probit(rate(high)) > _probit(rate(low)):
        share = (_probit(target) - _probit(rate(low))) / (_probit(rate(high)) - _probit(rate(low)))
        middle = math.log(low) + share * math.log(high / low)
    counts = [max(2, round(math.exp(middle + step * math.log(2) / 4))) for step in range(-2, 3)]
    slope, offset = np.polyfit(np.log(counts), [_probit(rate(count)) for count in counts], 1)
    return float((_probit(target) - offset) / slope)


def _probit(rate: float) -> float:
    return float(ndtri(min(max(rate, 1e-5), 1 - 1e-5)))


def expected_slope(degree: int, dims: Sequence[int]) -> float:
    """The slope that finite d leaves under criterion FEW: of ln K, K = 1 + G(d−1)²/(z²·E G(o)²), exactly over o, the
    overlap of two random patterns of d − 1 bits, z the 1 % quantile of the normal law."""
    logs = []
    for d in dims:
        n = d - 1
        overlaps = 2.0 * np.arange(n + 1) - n
        weights = _binomial(n)
        signal, noise = float(_odd(degree, np.array([float(n)]))[0]), float(weights @ _odd(degree, overlaps) ** 2)
        logs.append(math.log(1 + signal**2 / noise / float(ndtri(WRONG_BITS)) ** 2))
    return _slope(np.log(dims), logs)


def _binomial(n: int) -> np.ndarray:
    logs = np.array([-math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)])
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def _odd(degree: int, x: np.ndarray) -> np.ndarray:
    """G of `update_errors`."""
    return np.polyval([math.comb(degree, k) * (k % 2) for k in range(1, degree + 1)], x)


def _trial(seed: int, setup: Setup) -> Trial:
    found: dict[tuple[int, str], tuple[float, ...]] = {}
    for degree, dims in setup.dimensions:
        pairs = [_polynomial(seed, degree, d, max(setup.asked, setup.bits // d)) for d in dims]
        found[degree, FEW], found[degree, NONE] = zip(*pairs, strict=True)
    return Trial(found, tuple(_softmax(seed, d, setup.asked) for d in setup.softmax))


def _polynomial(seed: int, degree: int, d: int, asked: int) -> tuple[float, float]:
    """ln K under both criteria; the patterns of a larger K begin with those of a smaller one."""
    random = generator(f"{NAME}/degree {degree}/{d}", seed)
    patterns: list[Tensor] = []
    seen: dict[int, tuple[float, float]] = {}

    def rates(count: int) -> tuple[float, float]:
        while sum(map(len, patterns)) < count:
            patterns.append(torch.randint(2, (CHUNK, d), generator=random, dtype=torch.int8) * 2 - 1)
        if count not in seen:
            wrong = update_errors(torch.cat(patterns)[:count], degree, asked)
            seen[count] = float(wrong.mean()), float((wrong.sum(1) > 0).double().mean())
        return seen[count]

    few = crossing(lambda count: rates(count)[0], WRONG_BITS, START)
    return few, crossing(lambda count: rates(count)[1], HALF, START)


def _softmax(seed: int, d: int, asked: int) -> float:
    random = generator(f"{NAME}/softmax/{d}", seed)
    points = torch.empty(0, d)

    def rate(count: int) -> float:
        nonlocal points
        if len(points) < count:
            more = torch.randn(count - len(points), d, generator=random)
            points = torch.cat([points, math.sqrt(d) * more / more.norm(dim=1, keepdim=True)])
        return float(softmax_failures(points[:count], asked).double().mean())

    return crossing(rate, HALF, START)


def _slope(x: Sequence[float] | np.ndarray, y: Sequence[float]) -> float:
    return float(np.polyfit(np.asarray(x, dtype=float), y, 1)[0])


def _misfit(x: Sequence[float] | np.ndarray, y: Sequence[float]) -> float:
    """Sum of the squared residuals of the least-squares line."""
    line = np.polyfit(np.asarray(x, dtype=float), y, 1)
    return float(((np.polyval(line, x) - y) ** 2).sum())


def _slopes(trials: Sequence[Trial], key: tuple[int, str], dims: Sequence[int]) -> list[float]:
    return [_slope(np.log(dims), trial.polynomial[key]) for trial in trials]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of Student's 95 % interval; of one value the half-width is 0."""
    if len(values) < 2:
        return values[0], 0.0
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stdtrit(len(values) - 1, 0.975)) * error


def _exponent_row(degree: int, dims: Sequence[int], criterion: str, trials: Sequence[Trial]) -> Row:
    mean, half = _interval(_slopes(trials, (degree, criterion), dims))
    return {
        "degree a": degree,
        "criterion": criterion,
        "d": f"{dims[0]}…{dims[-1]}",
        "a − 1": degree - 1,
        "exponent": significant(mean),
        "95 % half-width": significant(half, 3),
        "expected here": significant(expected_slope(degree, dims)) if criterion == FEW else None,
    }


def _capacities(trials: Sequence[Trial], setup: Setup) -> list[Row]:
    rows: list[Row] = []
    for degree, dims in setup.dimensions:
        for place, d in enumerate(dims):
            few, none = ([math.exp(t.polynomial[degree, c][place]) for t in trials] for c in (FEW, NONE))
            law = d ** (degree - 1) / math.prod(range(1, 2 * degree - 2, 2))
            cells: dict[str, Cell] = {"degree a": degree, "d": d, **averaged(f"K, {FEW}", few)}
            cells |= {
                "K of the law, 1 %": significant(law / float(ndtri(WRONG_BITS)) ** 2),
                **averaged(f"K, {NONE}", none),
            }
            rows.append(cells | {"K = d^(a−1)/(2(2a−3)!! ln d)": significant(law / (2 * math.log(d)))})
    return rows


def _softmax_rows(trials: Sequence[Trial], setup: Setup) -> list[Row]:
    rows: list[Row] = []
    for place, d in enumerate(setup.softmax):
        bound = softmax_capacity_log10(d, d / (d - 1))
        cells = averaged("N", [math.exp(t.softmax[place]) for t in trials])
        rows.append(
            {"d": d, **cells, "N of the theorem (p = 0.001)": None if bound is None else significant(10**bound)}
        )
    return rows


def _figure(trials: Sequence[Trial], setup: Setup) -> "Figure":
    figure, axes = panels(("polynomial: 1 % of the bits wrong", "softmax: half of the points recalled"))
    for degree, dims in setup.dimensions:
        mean, half = _interval(_slopes(trials, (degree, FEW), dims))
        values = [[math.exp(t.polynomial[degree, FEW][place]) for t in trials] for place in range(len(dims))]
        middle = [statistics.fmean(each) for each in values]
        (line,) = axes[0].plot(
            dims, middle, "o-", markersize=3, label=f"a = {degree}: exponent {mean:.3f} ± {half:.3f}"
        )
        law = [middle[0] * (d / dims[0]) ** (degree - 1) for d in dims]
        axes[0].plot(dims, law, "--", color=line.get_color(), linewidth=0.8)
    axes[0].set(xscale="log", yscale="log", xlabel="d", ylabel="patterns K")
    axes[0].legend(fontsize="x-small", title="dashed: slope a − 1", title_fontsize="x-small")
    for trial in trials:
        axes[1].plot(setup.softmax, np.exp(trial.softmax), ".-", color="tab:blue", linewidth=0.6, alpha=0.5)
    axes[1].set(yscale="log", xlabel="d", ylabel="points N")
    return figure
