"""Eigenvalues of one large symmetric matrix on the CPU, in two stages that keep to the cache.

LAPACK's one-stage reduction reads the whole trailing matrix once for every column: k/3 · 8k² bytes, and past some 2,500
columns, where the matrix leaves the cache, memory sets its pace (half again as much for every worker beside it). Here a
panel of `WIDTH` columns is reduced by one QR decomposition and applied by matrix products, so that the matrix is read
once a panel; what is left is a band, whose reduction is some 6·WIDTH·k² operations in a few megabytes.

Shapes: k × k the matrix, m × m what is left of it, w = WIDTH or less the width of a panel.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np


WIDTH = 48  # of the band: 32 to 64 measure alike, narrower ones read the matrix too often, wider ones cost in the band
ROWS = 256  # of the matrix updated at a time, so that the product need not leave the cache


def eigenvalues(a_KK: np.ndarray) -> np.ndarray:
    """All eigenvalues, ascending, of the symmetric float64 matrix whose lower triangle is `a`, which is overwritten.

    Orthogonal similarities throughout (Householder panels as in Bischof, Lang & Sun, ACM TOMS 26:581, 2000; rotations
    in LAPACK's `dsbtrd`; QL in `dsterf`), so the values are those of A + E, ‖E‖₂ ≤ c·u·‖A‖₂ with c a low power of k
    (Higham 2002, §19.3), as for the one-stage solver; on the tests' matrices c stays below k/100.
    """
    for start in range(0, len(a_KK), ROWS):  # what reads a block on the diagonal reads the whole of it
        block = a_KK[start : start + ROWS, start : start + ROWS]
        block[:] = np.tril(block) + np.tril(block, -1).T
    band = _to_band(a_KK)
    order, width = band.shape[0], band.shape[1] - 1
    diagonal, beside, unused, work = np.empty(order), np.empty(order), np.empty(1), np.empty(order)
    _lapack("dsbtrd", b"N", b"L", order, width, band, width + 1, diagonal, beside, unused, 1, work)
    _lapack("dsterf", order, diagonal, beside)
    return diagonal


def _to_band(a_KK: np.ndarray) -> np.ndarray:
    """A matrix with the same eigenvalues and `WIDTH` diagonals below the main one, in rows of LAPACK's band storage.

    A panel P = Q·R is replaced by R, and the rest A by Qᵀ·A·Q = A − V·Yᵀ − Y·Vᵀ, where Q = I − V·T·Vᵀ (compact WY,
    Schreiber & Van Loan 1989), Z = A·V·T and Y = Z − ½·V·(Tᵀ·Vᵀ·Z).
    """
    k = len(a_KK)
    product = np.empty(ROWS * k)
    for left in range(0, k - WIDTH - 1, WIDTH):
        top = left + WIDTH
        r, v, t = _reflectors(a_KK[top:, left:top])
        a_KK[top : top + len(r), left:top] = r
        cuts = [(max(start, top), min(start + ROWS, k)) for start in range(top // ROWS * ROWS, k, ROWS)]
        vt, z = v @ t, np.zeros_like(v)
        for start, stop in cuts:  # A·V·T from the lower half; the blocks on the diagonal are whole
            i, j = start - top, stop - top
            z[i:j] += a_KK[start:stop, top:stop] @ vt[:j]
            z[:i] += a_KK[start:stop, top:start].T @ vt[i:j]
        y = z - v @ (t.T @ (v.T @ z) / 2)
        vy, yv = np.hstack([v, y]), np.hstack([y, v]).T
        for start, stop in cuts:
            out = product[: (stop - start) * (stop - top)].reshape(stop - start, stop - top)
            a_KK[start:stop, top:stop] -= np.matmul(vy[start - top : stop - top], yv[:, : stop - top], out=out)
    width = min(WIDTH, k - 1)
    band = np.zeros((k, width + 1))
    for offset in range(width + 1):
        band[: k - offset, offset] = a_KK.diagonal(-offset)
    return band


def _reflectors(panel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R, V and T of panel = (I − V·T·Vᵀ)·R. T = (I + D·U)⁻¹·D with D = diag(τ), U the strict upper triangle of VᵀV."""
    packed, tau = np.linalg.qr(panel, mode="raw")
    w = len(tau)
    r, v = np.triu(packed.T[:w]), np.tril(packed.T[:, :w], -1)
    np.fill_diagonal(v, 1)
    t = np.linalg.solve(np.eye(w) + tau[:, None] * np.triu(v.T @ v, 1), np.diag(tau))
    return r, v, t


def _lapack(name: str, *arguments: Any) -> None:
    """Call a LAPACK routine by way of the table that SciPy publishes for compiled code. Unlike the functions of
    `scipy.linalg.lapack`, this lets other threads run, and the reduction of a band takes a second."""
    info = ctypes.c_int(0)
    converted = [
        ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a if isinstance(a, bytes) else _integer(a)
        for a in arguments
    ]
    _routine(name)(*converted, ctypes.byref(info))
    if info.value:
        raise ArithmeticError(f"{name} failed with {info.value}")


def _integer(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


@cache
def _routine(name: str) -> Any:
    from scipy.linalg import cython_lapack  # late: few plans hold matrices that are so large

    capsule = cython_lapack.__pyx_capi__[name]
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None)(get_pointer(capsule, get_name(capsule)))
