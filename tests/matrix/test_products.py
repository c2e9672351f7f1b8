"""Products and thin decompositions: the same numbers by numpy and by torch, and orthonormal to rounding."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lmd_hf.matrix import products
from lmd_hf.matrix.products import cast, lengths, orthonormal_rows, times, without


pytestmark = pytest.mark.usefixtures("one_thread")


def test_functions_of_arrays_are_functions_of_tensors_too(build):
    """What a device gets: the undecorated function, called with tensors."""
    x, basis = build(4, 50), torch.linalg.qr(build(50, 6)).Q.T
    scale = torch.arange(1.0, 5, dtype=torch.float64)
    for function, arguments in (
        (products.product, (x, basis.T)),
        (products.without, (x, basis)),
        (products.without, (x[:, None], basis[None].expand(4, -1, -1))),
        (products.scaled, (x, scale)),
        (products.store, (torch.empty(4, 50), x)),
    ):
        on_device = function.__wrapped__(*arguments)
        assert isinstance(on_device, torch.Tensor)
        torch.testing.assert_close(function(*arguments), on_device, rtol=1e-13, atol=1e-13)
    w = build(70, 50).float()
    for turned in (False, True):
        stored, out = (w, 70) if not turned else (w.T, 70)
        buffer = torch.empty(8, stored.shape[1], dtype=torch.float64)
        zero = torch.zeros(out, 4, dtype=torch.float64)
        found = products._times_in_chunks.__wrapped__(zero, stored, x.T, buffer, turned)
        torch.testing.assert_close(found, times(w, x.T, exact=True), rtol=1e-13, atol=1e-13)


def test_without_leaves_what_is_orthogonal(build):
    basis = torch.linalg.qr(build(50, 6)).Q.T
    x = build(4, 50)
    left = without(x, basis)
    torch.testing.assert_close(left @ basis.T, torch.zeros(4, 6, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(without(x, basis[:0]), x)
    torch.testing.assert_close(x - left, (x @ basis.T) @ basis, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spectrum", [np.ones(8), np.logspace(0, -3, 8), np.logspace(0, -9, 8)])
def test_rows_become_orthonormal_and_span_the_same(build, spectrum):
    x = build(8, 60, spectrum)
    once = orthonormal_rows(x)
    twice = orthonormal_rows(once)
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(once @ once.T, eye, rtol=0, atol=1e-8)
    torch.testing.assert_close(twice @ twice.T, eye, rtol=0, atol=1e-14)
    torch.testing.assert_close(without(x, twice), torch.zeros_like(x), rtol=0, atol=1e-12)


def test_dependent_rows_leave_their_span_first(build):
    """Rank 3 of 8 rows: the first three of the basis are what there is, as the end of a Krylov space needs it."""
    x = build(8, 3) @ build(3, 60, seed=1)
    basis = orthonormal_rows(x)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(without(x, basis[:3]), torch.zeros_like(x), rtol=0, atol=1e-12)


def test_lengths_and_casts_keep_float64_where_it_counts():
    x = torch.full((2, 100_000), 0.1, dtype=torch.float32)
    exact = x.double().norm(dim=1).numpy()
    np.testing.assert_allclose(lengths(x), exact, rtol=1e-11)
    assert cast(x, torch.float32) is x
    assert torch.equal(cast(x.double(), torch.float32), x)


@pytest.mark.parametrize("lowest", [1, 1e-3, 1e-7])
def test_small_svds(build, lowest):
    x = build(60, 12, np.geomspace(1, lowest, 12))
    _, true, vh_true = torch.linalg.svd(x, full_matrices=False)
    u, s, vh = products.thin_svd(x)
    torch.testing.assert_close(s, true, rtol=0, atol=1e-14)
    torch.testing.assert_close((u * s) @ vh, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(u.T @ u, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-14)
    s, uh = products.row_svd(x.T)
    torch.testing.assert_close(s, true, rtol=0, atol=1e-8 if lowest < 1e-6 else 1e-12)
    if lowest == 1e-3:
        torch.testing.assert_close((uh @ vh_true.T).abs(), torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)


OLD = not hasattr(torch.backends, "fp32_precision")
SETTINGS = {"old": ("torch.backends.cuda.matmul.allow_tf32", True), "none": ("torch.backends.cuda.matmul", None)}
if not OLD:
    SETTINGS |= {
        "new": ("torch.backends.cuda.matmul.fp32_precision", "tf32"),
        "for all": ("torch.backends.fp32_precision", "tf32"),
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_is_off_in_products_on_a_device_and_as_it_was_afterwards(setting):
    """Where any was asked for, by whichever setting, which torch lets nobody read through the other; two at a time."""
    code = """
import threading, torch
from lmd_hf.matrix.products import by_numpy
NAME = "allow_tf32" if OLD else "fp32_precision"
SET
before, inside, begun = getattr(torch.backends.cuda.matmul, NAME), [], [threading.Event() for _ in range(2)]

@by_numpy
def step(x, own, other):
    begun[own].set()
    begun[other].wait(30)  # both are in it, and the second leaves after the first is back
    if own:
        first.join(30)
    inside.append(getattr(torch.backends.cuda.matmul, NAME))
    return x

x = torch.empty(2, device="meta")
first, second = (threading.Thread(target=step, args=(x, own, 1 - own)) for own in range(2))
first.start(), second.start(), first.join(), second.join()
assert inside == [False if OLD else "ieee"] * 2, inside
assert getattr(torch.backends.cuda.matmul, NAME) == before, "not put back"
"""
    name, value = SETTINGS[setting]
    code = code.replace("OLD", str(OLD)).replace("SET", f"{name} = {value!r}" if value is not None else "")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
