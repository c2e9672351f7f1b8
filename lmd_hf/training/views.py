"""A matrix as it stood at one step: its S' and its leading directions, and how far another step is from that.

Shapes: O = out, I = in, k = min(O, I), K = directions kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmd_hf.matrix.change import Side, rounding_errors, rounding_floor
from lmd_hf.matrix.cost import sketch_pays
from lmd_hf.matrix.krylov import krylov
from lmd_hf.matrix.lmd import decompose_product
from lmd_hf.matrix.metrics import norm
from lmd_hf.matrix.subspaces import leading_subspaces, principal_angles
from lmd_hf.records import Factored, MatrixReport
from lmd_hf.weights.stored import Stored


DIRECTIONS = 32  # kept of a matrix: two bases of them are 1 MB for 4,096 × 4,096, also where n' is in the hundreds
KRYLOV = 1e-3  # relative residual of directions that come from a sketch


@dataclass(frozen=True)
class View:
    """σ(W) in the metric used, bases of the leading singular subspaces (float32, in descending order), and the cut:
    the latent dimension n', at most K. `gap` is σ_cut − σ_cut+1, `floor` what rounding the entries can move it by."""

    step: int
    sigma: np.ndarray
    left: Tensor
    right: Tensor
    cut: int
    gap: float
    floor: float


@dataclass(frozen=True)
class Moved:
    """How far a matrix moved from `since` to a later step, in the words of `run.convergence.judge_change`: of the
    leading min(n', 32) directions."""

    stack: str
    layer: int | None
    since: int
    identical: bool
    base_norm: float
    spectrum_drift: float | None
    latent_dim: int | None
    left_cos2: float | None
    right_cos2: float | None
    degenerate: bool

    @property
    def cos2(self) -> float | None:
        """The mean of both sides."""
        return None if self.left_cos2 is None or self.right_cos2 is None else (self.left_cos2 + self.right_cos2) / 2


def look(step: int, row: MatrixReport, stored: Stored, gain: Tensor | None) -> View:
    """The view of a matrix whose numbers are `row`; `gain` is that of its norm where the metric has one."""
    sigma = row.singular_values
    if row.latent_dim is None or sigma[0] == 0:
        return View(step, sigma, torch.empty(row.shape[0], 0), torch.empty(row.shape[1], 0), 0, 0.0, 0.0)
    left, right = _bases(stored.matrix, gain, min(DIRECTIONS, len(sigma)), row)
    cut = min(row.latent_dim, left.shape[1])
    following = float(sigma[cut]) if cut < len(sigma) else 0.0
    floor = 0.0
    if isinstance(stored.matrix, Tensor):
        floor = rounding_floor(rounding_errors(Side(stored.matrix, stored.rounding.relative, stored.rounding.absolute)))
    return View(step, sigma, left, right, cut, float(sigma[cut - 1]) - following, floor)


def _bases(w: Tensor | Factored, gain: Tensor | None, count: int, row: MatrixReport) -> tuple[Tensor, Tensor]:
    if isinstance(w, Factored):
        whole = decompose_product(w)
        return _kept(whole.u, count), _kept(whole.v, count)
    if gain is not None:
        w = norm(gain.to(w.device)).power_times(0.5, w.to(torch.float64).T).T
    if row.kernel == "sketch" and sketch_pays(min(w.shape)):
        tall = w.shape[0] >= w.shape[1]
        w_LS = w if tall else w.T
        found = next(krylov(w_LS if w.dtype == torch.float64 else w_LS.float(), seed=0, tolerance=KRYLOV, most=count))
        sides = (found.left, found.right) if tall else (found.right, found.left)
        return _kept(sides[0], count), _kept(sides[1], count)
    left, right = leading_subspaces(w, count)
    return _kept(left.flip(1), count), _kept(right.flip(1), count)


def _kept(basis: Tensor, count: int) -> Tensor:
    return basis[:, :count].to("cpu", torch.float32).contiguous()


def moved(then: View, now: View, row: MatrixReport) -> Moved:
    """From one view to a later one: ‖σ' − σ‖/‖σ‖ over the values that both have, and the mean cos² of the principal
    angles between their leading subspaces, cut where the earlier one was."""
    common = min(len(then.sigma), len(now.sigma))
    size = float(np.linalg.norm(then.sigma))
    change = float(np.linalg.norm(now.sigma[:common] - then.sigma[:common]))
    cut = min(then.cut, now.left.shape[1])
    identical = change == 0 and torch.equal(then.left, now.left) and torch.equal(then.right, now.right)
    cosines: list[float | None] = [None, None]
    if cut:
        sides = ((then.left, now.left), (then.right, now.right))
        cosines = [principal_angles(a[:, :cut].double(), b[:, :cut].double())[0] for a, b in sides]
    return Moved(
        stack=row.stack,
        layer=row.layer,
        since=then.step,
        identical=identical,
        base_norm=size,
        spectrum_drift=change / size if size > 0 else None,
        latent_dim=cut or None,
        left_cos2=cosines[0],
        right_cos2=cosines[1],
        degenerate=any(view.gap <= view.floor for view in (then, now)),
    )


def to_tensors(view: View) -> dict[str, Tensor]:
    """The view as named tensors; `from_tensors` reads them back."""
    numbers = torch.tensor([view.step, view.cut, view.gap, view.floor], dtype=torch.float64)
    sides = {"left": view.left.clone(), "right": view.right.clone()}  # a view may be written under several names
    return {"sigma": torch.from_numpy(view.sigma.copy()), **sides, "numbers": numbers}


def from_tensors(tensors: Mapping[str, Any]) -> View:
    """The view back from `to_tensors`."""
    step, cut, gap, floor = tensors["numbers"].tolist()
    return View(int(step), tensors["sigma"].numpy(), tensors["left"], tensors["right"], int(cut), gap, floor)
