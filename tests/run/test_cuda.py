"""The same numbers on a GPU as on a CPU. These tests need one; elsewhere they are skipped."""

import json
import subprocess
import sys

import models
import numpy as np
import pytest
import torch

import lmd_hf
from lmd_hf.matrix.dimension import effective_rank
from lmd_hf.matrix.kernels import KERNELS, exact
from lmd_hf.records import Data
from lmd_hf.run import compare as run_compare
from lmd_hf.weights.source import EMBEDDED_ID


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return models.write_ids(tmp_path_factory.mktemp("data") / "ids.jsonl", 200, 12)


def check(found, expected, **close):
    """Two rows, field by field."""
    for key, value in vars(expected).items():
        other = getattr(found, key)
        if isinstance(value, (float, np.ndarray)) or (isinstance(value, tuple) and value and key.endswith("values")):
            np.testing.assert_allclose(np.array(other), np.array(value), err_msg=f"{expected.name} {key}", **close)
        elif key not in ("conventions", "intervals", "error_bound", "method", "data"):
            assert other == value, f"{expected.name} {key}"


@pytest.mark.parametrize("metric", ["identity", "norm"])
@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_every_family_gives_the_same_report(save, family, metric):
    on_cpu, on_gpu = (
        lmd_hf.analyze(save(family), device=device, heads=True, metric=metric) for device in ("cpu", "cuda")
    )
    assert "NVIDIA" in on_gpu.environment["device"] or "cuda" in on_gpu.environment["device"].lower()
    assert on_gpu.coverage == on_cpu.coverage
    for found, expected in zip(on_gpu.matrices, on_cpu.matrices, strict=True):
        check(found, expected, **CLOSE)
    for found, expected in zip(on_gpu.heads, on_cpu.heads, strict=True):
        check(found, expected, **CLOSE)


@pytest.mark.parametrize("shape", [(700, 500), (500, 700), (600, 600), (3000, 40), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_within_the_bound(shape, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, reference = exact(w.cuda()), torch.linalg.svdvals(w.double())
    trusted = reference > 1e-6 * reference[0]
    assert ((found.values / reference - 1).abs()[trusted]).max() <= max(found.error_bound, 1e-15)


@pytest.mark.parametrize("lowest", [1e-4, 1e-7, 1e-12])
@pytest.mark.parametrize("shape", [(900, 300), (300, 320)])
def test_small_values_are_refined(shape, lowest):
    k = min(shape)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q for n in shape)
    w = (u * torch.logspace(0, np.log10(lowest), k, dtype=torch.float64)) @ v.T
    found, reference = exact(w.cuda()), torch.linalg.svdvals(w)
    trusted = reference > 1e-6 * reference[0]
    assert ((found.values / reference - 1).abs()[trusted]).max() <= found.error_bound
    assert found.error_bound < 1e-7


def test_a_sketch_keeps_its_certificates_and_tf32_stays_off():
    w = torch.randn(2400, 2000, generator=torch.Generator().manual_seed(0))
    w[:, :30] *= torch.linspace(12, 4, 30)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = KERNELS["sketch"](w.cuda(), seed=1)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    reference = torch.linalg.svdvals(w.double())
    assert found.sketch is not None
    count = len(found.sketch.certified)
    assert count > 10
    errors = (found.values[:count] / reference[:count] - 1).abs()
    assert errors.max() <= found.error_bound
    rank = effective_rank(reference.numpy())
    assert effective_rank(found.values.numpy()) == pytest.approx(rank, rel=0.01)


def test_factors_lose_the_same():
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    there, here = (lmd_hf.decompose(each, rank=8) for each in (w.cuda(), w))
    assert there.error_bound == pytest.approx(here.error_bound, rel=1e-9)
    torch.testing.assert_close(there.reconstruct().cpu(), here.reconstruct(), rtol=1e-8, atol=1e-9)


def test_a_live_model_on_the_gpu_is_read_where_it_is():
    model = models.make("llama").cuda()
    found = [lmd_hf.analyze(model, device=device, heads=True) for device in ("cuda", "cpu")]
    assert next(model.parameters()).is_cuda
    expected = lmd_hf.analyze(model.cpu(), device="cpu", heads=True)
    for report in found:
        for rows in ("matrices", "heads"):
            for row, other in zip(getattr(report, rows), getattr(expected, rows), strict=True):
                check(row, other, **CLOSE)


def test_what_the_card_has_no_room_for_is_done_on_the_cpu():
    module = torch.nn.Sequential(torch.nn.Linear(1500, 2000), torch.nn.Linear(30, 20))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2.5e-4)  # some 20 MB
    try:
        found = lmd_hf.analyze(module, device="cuda").matrices
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1500, 2000, device="cuda").double()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for row, other in zip(found, lmd_hf.analyze(module, device="cpu").matrices, strict=True):
        check(row, other, **CLOSE)


def test_data_mode_sees_the_same_inputs(save, lines):
    data = Data(lines, seq_len=12)
    on_cpu, on_gpu = (
        lmd_hf.analyze(save("llama"), metric="data", data=data, device=device) for device in ("cpu", "cuda")
    )
    for found, expected in zip(on_gpu.matrices, on_cpu.matrices, strict=True):
        assert found.metric == expected.metric
        np.testing.assert_allclose(found.singular_values, expected.singular_values, rtol=1e-4, atol=1e-6)


def test_a_truncated_model_is_on_the_cpu_like_any_that_was_loaded(save, lines):
    small = lmd_hf.truncate(save("llama"), ratio=0.6, metric="data", data=Data(lines, seq_len=12))
    assert {parameter.device.type for parameter in small.parameters()} == {"cpu"}
    assert not hasattr(small.model, "hf_device_map")
    there = lmd_hf.truncate(models.make("llama").cuda(), ratio=0.6)
    assert {parameter.device.type for parameter in there.parameters()} == {"cuda"}


def test_a_tracker_watches_a_model_on_the_gpu():
    model = models.make("llama").cuda()
    tracker = lmd_hf.LMDTracker(model, every=1, budget=None)
    rows = {row.name: row for row in lmd_hf.analyze(model).matrices}
    for point in tracker.points:
        assert point.effective_rank == pytest.approx(rows[point.name].effective_rank, rel=1e-6)


def test_a_comparison_and_factors(save, tmp_path, monkeypatch):
    models.make("llama", seed=1).save_pretrained(tmp_path / "other")
    on_gpu = lmd_hf.compare(save("llama"), tmp_path / "other")
    monkeypatch.setattr(run_compare, "pick_device", lambda name: torch.device("cpu"))
    on_cpu = lmd_hf.compare(save("llama"), tmp_path / "other")
    assert on_gpu.matrices
    for found, expected in zip(on_gpu.matrices, on_cpu.matrices, strict=True):
        check(found, expected, rtol=1e-5, atol=1e-6)
    lmd_hf.analyze(save("llama"), rank=4, factors=tmp_path / "factors", device="cuda")
    assert list((tmp_path / "factors").glob("*.safetensors"))


def test_a_fresh_process_with_many_threads(tmp_path):
    """Torch loads its eigensolvers once, and not in every thread."""
    command = [sys.executable, "-m", "lmd_hf", "analyze", EMBEDDED_ID, "--device", "cuda", "--json", "-q", "--heads"]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["matrices"]
    expected = lmd_hf.analyze(EMBEDDED_ID, device="cpu").matrices
    for row, other in zip(rows, expected, strict=True):
        assert row["effective_rank"] == pytest.approx(other.effective_rank, rel=1e-6)
