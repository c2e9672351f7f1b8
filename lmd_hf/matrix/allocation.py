"""How many axes each of several matrices keeps, so that a budget of parameters loses the least.

A matrix of O × I entries, of which K axes are kept as factors, costs K·(O + I + 1) parameters and leaves out the energy
E(K) = Σ_{i>K} s'_i²: in the metric of data exactly the mean squared error of its outputs. Its loss is

    L(K) = c · E(K)            where it is known what an error costs (`slope` c, for instance in nats), else
    L(K) = (E(K) / E(0))²      for with unknown weights h of the shares e = E(K)/E(0), the worst that any h of length 1
                               makes of them is max Σ h·e = ‖e‖, the root of Σ L.

Costs and losses are additive and L is convex in K, so at the optimum one more axis saves the same loss per parameter in
every matrix, with one μ for all (Everett 1963, Operations Research 11, 399; Shoham & Gersho 1988, IEEE Trans. ASSP 36,
1445, for bits):

    (L(K) − L(K+1)) / (O + I + 1) = μ          with a slope: c · s'²_{K+1} / (O + I + 1) = μ

A matrix may also stay whole: O·I parameters, no loss. That is the end of its curve, and a jump on the lower convex hull
of the points (cost, L): past the axis from which the jump saves more per parameter than single axes do, it stays whole.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmd_hf.errors import SettingsError


@dataclass(frozen=True)
class Curve:
    """One matrix: its shape (O, I), the leading s'² (descending) of as many axes as pay, the sum of the `rest`, and
    what a unit of energy that is left out costs, `None` where nobody knows."""

    shape: tuple[int, int]
    energies: np.ndarray
    rest: float
    slope: float | None = None

    @property
    def whole(self) -> int:
        """Parameters of the matrix as it is."""
        return self.shape[0] * self.shape[1]

    @property
    def axis(self) -> int:
        """Parameters of one axis."""
        return self.shape[0] + self.shape[1] + 1

    def left_out(self) -> np.ndarray:
        """E(K)/E(0) for K = 0 … of as many axes as pay; all 0 for a matrix of zeros."""
        tails = self.rest + np.append(np.cumsum(self.energies[::-1])[::-1], 0.0)
        return tails / tails[0] if tails[0] > 0 else tails

    def losses(self) -> np.ndarray:
        """L(K) for the same K."""
        if self.slope is None:
            return self.left_out() ** 2
        return self.slope * (float(self.energies.sum()) + self.rest) * self.left_out()


def most_axes(shape: tuple[int, int]) -> int:
    """The most axes whose factors have fewer parameters than the matrix itself."""
    return (shape[0] * shape[1] - 1) // (shape[0] + shape[1] + 1)


def within_budget(curves: Sequence[Curve], budget: int, *, whole: bool = True) -> tuple[int | None, ...]:
    """How many axes each matrix keeps, at least one, or `None` where it stays whole; at most `budget` parameters.
    Without `whole` none does.

    Optimal for the parameters that it spends as long as every step of the hull fits; the last steps before the budget
    may not, and then smaller ones fill it, so the loss is above the optimum by less than one step of one matrix.
    Raises `SettingsError` for a budget below one axis in each.
    """
    least = sum(curve.axis for curve in curves)
    if budget < least:
        told = f"{budget:,} parameters are too few: one axis in each of {len(curves)} matrices takes {least:,}"
        raise SettingsError(f"{told}; give a larger ratio, or fewer matrices (roles)")
    losses = [curve.losses() for curve in curves]
    turns = [_turn(curve, e) if whole else 0 for curve, e in zip(curves, losses, strict=True)]
    kept: list[int | None] = [1] * len(curves)
    left = budget - least

    def step(place: int) -> tuple[float, int, int | None] | None:
        """(loss per parameter that it saves, parameters, what is kept then) of the next step of a matrix."""
        axes, curve, e = kept[place], curves[place], losses[place]
        if axes is None:
            return None
        if axes == turns[place]:
            cost, saved, after = curve.whole - axes * curve.axis, e[axes], None
        elif axes < len(curve.energies):
            cost, saved, after = curve.axis, e[axes] - e[axes + 1], axes + 1
        else:
            return None
        return (float(saved) / cost, cost, after) if saved > 0 else None

    waiting = [(-found[0], place) for place in range(len(curves)) if (found := step(place))]
    heapq.heapify(waiting)
    while waiting:
        _, place = heapq.heappop(waiting)
        found = step(place)
        assert found is not None, "only the steps of a matrix itself change its next one"
        _, cost, after = found
        if cost <= left:
            left -= cost
            kept[place] = after
        elif after is None:
            turns[place] = 0  # whole it does not fit; single axes may
        else:
            continue
        if found := step(place):
            heapq.heappush(waiting, (-found[0], place))
    return tuple(kept)


def by_energy(curves: Sequence[Curve], energy: float) -> tuple[int | None, ...]:
    """The least number of axes, at least one, that carry the share `energy` of Σs'² in each matrix;
    `None` where that many do not pay. Raises `SettingsError` for a share outside (0, 1)."""
    if not 0 < energy < 1:
        raise SettingsError(f"energy is {energy}; it is the share that every matrix keeps, so give one between 0 and 1")
    least = 1 - energy * (1 - 1e-12)  # nine of ten equal values carry 0.9, which is a bit more in floating point
    found = [np.flatnonzero(curve.left_out() <= least) for curve in curves]
    return tuple(max(int(each[0]), 1) if len(each) else None for each in found)


def _turn(curve: Curve, e: np.ndarray) -> int:
    """From how many axes on the matrix had better stay whole: where the line to (O·I, 0) runs below the curve."""
    axes = np.arange(1, len(e))
    return int(axes[np.argmin(e[1:] / (curve.whole - axes * curve.axis))])
