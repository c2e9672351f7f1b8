"""The five factors of one matrix as pictures, and what a cut at n' keeps and loses.

Shapes: W (out × in) ≈ U·Odist·S'·Idist·Vᵀ with K axes. A picture of at most `SIDE` cells a side shows the mean of each
block of entries. Means of blocks are linear, P W Qᵀ = (P·U·Odist)·S'·(Idist·Vᵀ·Qᵀ), so the pictures of W', cut
anywhere, come exactly from the small factors alone.
"""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from lmd_hf.report.measures import COLORMAP, SIGNED


SIDE = 96  # cells of a picture along a side
SHOWN = 320  # pixels of its longer side
AXES = 48  # latent axes that the pictures of U, S' and V show


@dataclass(frozen=True)
class Factors:
    """Of one matrix, small enough to send: block means of W (P × Q), of U·Odist (P × K) and of Idist·Vᵀ (K × Q), S'
    (K), the first axes of Odist and Idist, `shape` of W and its `square`, ‖W‖_F²."""

    shape: tuple[int, int]
    w_PQ: np.ndarray
    projection_PK: np.ndarray
    s_K: np.ndarray
    similarity_KQ: np.ndarray
    odist_KK: np.ndarray
    idist_KK: np.ndarray
    square: float

    @classmethod
    def of(cls, w_OI: Any, lmd: Any) -> "Factors":
        """From a matrix and its `decompose`."""
        w = _array(w_OI)
        projection, similarity = _array(lmd.projection), _array(lmd.similarity)
        return cls(
            shape=(w.shape[0], w.shape[1]),
            w_PQ=_blocks(_blocks(w).T).T,
            projection_PK=_blocks(projection),
            s_K=_array(lmd.s_K),
            similarity_KQ=_blocks(similarity.T).T,
            odist_KK=_array(lmd.odist)[:AXES, :AXES],
            idist_KK=_array(lmd.idist)[:AXES, :AXES],
            square=float((w**2).sum()),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: arrays as shapes and float32 bytes."""
        return {
            name: {"shape": value.shape, "float32": base64.b64encode(value.astype("<f4").tobytes()).decode()}
            if isinstance(value, np.ndarray)
            else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Factors":
        """Back from `to_dict`."""
        arrays = {
            name: np.frombuffer(base64.b64decode(value["float32"]), dtype="<f4").astype(float).reshape(value["shape"])
            for name, value in values.items()
            if isinstance(value, dict)
        }
        return cls(**{**values, **arrays, "shape": tuple(values["shape"])})

    def error(self, cut: int) -> float:
        """‖W − W'‖ / ‖W‖ when the leading `cut` axes are kept: √(1 − Σs'²/‖W‖²), in the identity metric."""
        kept = float((self.s_K[:cut] ** 2).sum())
        return math.sqrt(max(0.0, 1 - kept / self.square)) if self.square else 0.0


def pictures(factors: Factors, cut: int) -> str:
    """W, its five factors, and what a cut at n' = `cut` keeps and loses, as HTML."""
    kept = (factors.projection_PK[:, :cut] * factors.s_K[:cut]) @ factors.similarity_KQ[:cut]
    scale = _scale(factors.w_PQ)
    rows, columns = factors.shape
    spread = np.diag(factors.s_K[:AXES])
    first = [
        ("U", f"where it writes: {rows} outputs × leading axes", _signed(factors.projection_PK[:, :AXES])),
        ("Odist", "the metric of its outputs", _signed(factors.odist_KK)),
        ("S'", "how sharply it separates, axis by axis", _plain(spread)),
        ("Idist", "the metric of its inputs", _signed(factors.idist_KK)),
        ("Vᵀ", f"what it listens for: leading axes × {columns} inputs", _signed(factors.similarity_KQ[:AXES])),
    ]
    error = factors.error(cut)
    second = [
        ("W", f"the matrix, {rows} × {columns}", _signed(factors.w_PQ, scale)),
        (f"W' at n' = {cut}", f"keeps {1 - error**2:.1%} of the energy", _signed(kept, scale)),
        ("W − W'", f"what is lost: {error**2:.1%} of the energy", _signed(factors.w_PQ - kept, scale)),
    ]
    told = (
        f"Keeping {cut:,} of {min(factors.shape):,} axes leaves a relative error ‖W − W'‖ / ‖W‖ of <b>{error:.3f}</b>"
        + (
            "; no other matrix of that rank is closer (Eckart–Young)."
            if len(factors.s_K) == min(factors.shape)
            else "."
        )
    )
    return (
        f'<section class="lmd-pictures" aria-label="Factors"><p>{told}</p>'
        f"<div>{''.join(_framed(*each) for each in second)}</div><div>{''.join(_framed(*each) for each in first)}</div>"
        "<p class='lmd-note'>Every cell is the mean of a block of entries; orange below zero, purple above. Without "
        "data the metrics Odist and Idist are the identity.</p></section>"
    )


def _framed(name: str, told: str, image: str) -> str:
    return f'<figure><img src="{image}" alt="{name}: {told}"><figcaption><b>{name}</b> {told}</figcaption></figure>'


def _signed(values: np.ndarray, scale: float | None = None) -> str:
    scale = scale or _scale(values)
    return _image(values / scale / 2 + 0.5, SIGNED)


def _plain(values: np.ndarray) -> str:
    return _image(values / (float(values.max()) or 1.0), COLORMAP)


def _scale(values: np.ndarray) -> float:
    return float(np.quantile(np.abs(values), 0.995)) or float(np.abs(values).max()) or 1.0


def _image(places: np.ndarray, colors: str) -> str:
    """A PNG in the page itself, its cells enlarged to whole pixels."""
    pixels = (matplotlib.colormaps[colors](np.clip(places, 0, 1))[:, :, :3] * 255).astype(np.uint8)
    grow = max(1, SHOWN // max(pixels.shape[:2]))
    stream = io.BytesIO()
    Image.fromarray(pixels.repeat(grow, axis=0).repeat(grow, axis=1)).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _blocks(values_NK: np.ndarray) -> np.ndarray:
    """Means of at most `SIDE` blocks of rows."""
    rows = len(values_NK)
    if rows <= SIDE:
        return values_NK
    edges = np.linspace(0, rows, SIDE + 1).round().astype(int)
    return np.add.reduceat(values_NK, edges[:-1], axis=0) / np.diff(edges)[:, None]


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.cpu().double().numpy() if hasattr(tensor, "cpu") else tensor, dtype=np.float64)
