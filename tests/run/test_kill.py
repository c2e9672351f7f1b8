"""`kill -9` at any moment: the next run gives the undisturbed report and computes only what had not been finished."""

import json
import os
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import save_file

from lmd_hf.run.journal import SUFFIX, _index


MOMENTS = 20
MATRICES, THREADS = 60, 2  # at most so many matrices are in flight
ALONE = [sys.executable, "-m", "lmd_hf"]
SHARED = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lmd_hf"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Seconds of work in matrices of several sizes."""
    folder = tmp_path_factory.mktemp("killed")
    generator = torch.Generator().manual_seed(0)
    sizes = [(512 + 128 * (i % 6), 1024 + 64 * (i % 5)) for i in range(MATRICES)]
    save_file(
        {f"layers.{i}.mlp.up_proj.weight": torch.randn(*size, generator=generator) for i, size in enumerate(sizes)},
        folder / "model.safetensors",
    )
    return folder


def start(command, model, assets):
    return subprocess.Popen(
        [*command, "analyze", str(model), "--json", "-q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_ASSETS_CACHE": str(assets)},
        start_new_session=True,
    )


def finish(command, model, assets):
    out, _ = start(command, model, assets).communicate(timeout=300)
    report = json.loads(out)
    reused = report["environment"]["reused"]
    del report["timing"], report["environment"]
    return report, reused


def journalled(assets):
    """Matrices that are whole on disk."""
    return len({key for path in assets.rglob(f"*{SUFFIX}") for key in _index(path) if not key.startswith("@")})


def kill_all(process, _random):
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:  # torchrun's ranks are sessions of their own
        each.kill()


def kill_one_rank(process, random_):
    ranks = [child for child in psutil.Process(process.pid).children() if "lmd_hf" in child.cmdline()]
    for rank in random_.sample(ranks, min(1, len(ranks))):
        rank.kill()


def begun(process, assets):
    """Wait until the first matrix is journalled, so that moments fall into the work and not into the imports."""
    while process.poll() is None and not journalled(assets):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kill", "moments"),
    [(ALONE, kill_all, MOMENTS), (SHARED, kill_one_rank, MOMENTS // 4), (SHARED, kill_all, MOMENTS // 4)],
    ids=["one process", "one of two ranks", "both ranks"],
)
def test_a_kill_at_any_moment_loses_nothing(model, tmp_path, command, kill, moments):
    seeded = random.Random(0)
    expected, reused = finish(command, model, tmp_path / "undisturbed")
    assert reused == 0
    midway = 0
    for moment in range(moments):
        assets = tmp_path / f"killed {moment}"
        process = start(command, model, assets)
        begun(process, assets)
        time.sleep(seeded.uniform(0, 0.4))
        kill(process, seeded)
        process.communicate(timeout=120)
        kept = journalled(assets)
        report, reused = finish(command, model, assets)
        assert report == expected
        assert reused == kept  # whatever was on disk: at most the matrices in flight were computed again
        assert journalled(assets) == MATRICES
        midway += kept < MATRICES
    assert midway > 0  # moments fell into the work


@pytest.mark.slow
def test_two_runs_at_once_give_the_same_report_and_count_nothing_twice(model, tmp_path):
    expected, _ = finish(ALONE, model, tmp_path / "undisturbed")
    assets = tmp_path / "both"
    runs = [start(ALONE, model, assets) for _ in range(2)]
    for run in runs:
        report = json.loads(run.communicate(timeout=300)[0])
        del report["timing"], report["environment"]
        assert report == expected
    assert journalled(assets) == MATRICES
    assert finish(ALONE, model, assets)[1] == MATRICES
