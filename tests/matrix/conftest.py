"""Matrices with a spectrum that is chosen, not drawn."""

import pytest
import torch
from threadpoolctl import threadpool_limits


@pytest.fixture
def build():
    """A function (rows, columns, spectrum, seed) → float64 matrix; no spectrum: i.i.d., variance 1/n."""

    def make(rows, columns, spectrum=None, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        if spectrum is None:
            return normal(rows, columns) / max(rows, columns) ** 0.5
        k = min(rows, columns)
        u, v = torch.linalg.qr(normal(rows, k)).Q, torch.linalg.qr(normal(columns, k)).Q
        return (u * torch.as_tensor(spectrum, dtype=torch.float64)) @ v.T

    return make


@pytest.fixture
def one_thread():
    """BLAS on one thread: on a busy machine, threads that wait for each other make small products ten times slower."""
    with threadpool_limits(limits=1):
        yield
