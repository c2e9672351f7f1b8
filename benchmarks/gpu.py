"""Exact decomposition of random bf16 weights in the shapes of LLaMA-3-8B and Mixtral-8x7B, on one GPU.

    python benchmarks/gpu.py [--models LLaMA-3-8B,Mixtral-8x7B] [--batches]

With `--batches` instead: small matrices one by one, four streams at a time, against all at once, by short side. Where
the second stops to pay is what `BATCH_SIDE` in lmd_hf/run/shares.py should be.

Every weight is made in main memory just before it is needed, and goes through the workers and streams of `analyze`.
Beside the whole time stand the shares of each stage in the summed seconds of all streams (making the weight, upload,
decomposition), and the rate that is reached beside that of a large float64 product on the same card. Needs one CUDA
device.
"""

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from lmd_hf.matrix.batched import exact_each
from lmd_hf.matrix.cost import exact_flops
from lmd_hf.matrix.kernels import exact
from lmd_hf.run.workers import STREAMS, count_workers, upload, worker_pool


AIMS = {"LLaMA-3-8B": 45, "Mixtral-8x7B": 240}  # seconds
LAYER = [(4096, 4096)] * 2 + [(1024, 4096)] * 2  # q and o, k and v
MLP = [(14336, 4096), (14336, 4096), (4096, 14336)]
MODELS = {
    "LLaMA-3-8B": [(4096, 128256)] * 2 + (LAYER + MLP) * 32,
    "Mixtral-8x7B": [(4096, 32000)] * 2 + (LAYER + [(8, 4096)] + MLP * 8) * 32,
}


def rate(device: torch.device) -> float:
    """Float64 operations a second of one large product."""
    x = torch.randn(8192, 8192, dtype=torch.float64, device=device)
    x @ x
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    x @ x
    torch.cuda.synchronize(device)
    return 2 * 8192**3 / (time.perf_counter() - begun)


def run(shapes: list[tuple[int, int]], device: torch.device) -> tuple[float, Counter]:
    """(seconds, seconds by stage summed over the streams)."""
    stages, lock = Counter(), threading.Lock()

    def one(shape: tuple[int, int]) -> None:
        begun = time.perf_counter()
        w = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        made = time.perf_counter()
        there = upload(w, device)
        torch.cuda.current_stream(device).synchronize()
        moved = time.perf_counter()
        exact(there)
        with lock:
            stages.update(made=made - begun, upload=moved - made, decompose=time.perf_counter() - moved)

    ordered = sorted(shapes, key=lambda s: -exact_flops(max(s), min(s)))
    sizes = [2 * max(s) * min(s) + 3 * 8 * min(s) ** 2 for s in ordered]
    workers = count_workers(sizes, device)
    begun = time.perf_counter()
    with worker_pool(workers, len(ordered)) as pool:
        list(pool.map(one, ordered))
    return time.perf_counter() - begun, stages


def batches(device: torch.device) -> None:
    """Print one row a short side."""
    print("| short side | matrices | one by one, s | at once, s | times faster |")
    print("|---|---|---|---|---|")
    for side in (32, 64, 128, 256, 512, 1024):
        matrices = [torch.randn(side, 2 * side, device=device).bfloat16() for _ in range(64)]
        exact_each(matrices[:2])
        took = [seconds(partial(each, matrices, device), device) for each in (one_by_one, at_once)]
        print(f"| {side} | {len(matrices)} | {took[0]:.3f} | {took[1]:.3f} | {took[0] / took[1]:.1f} |")


def one_by_one(matrices: list[torch.Tensor], device: torch.device) -> None:
    """As `analyze` does with large ones."""
    with worker_pool(STREAMS, len(matrices)) as pool:
        list(pool.map(lambda w: exact(upload(w, device)), matrices))


def at_once(matrices: list[torch.Tensor], device: torch.device) -> None:
    """As `analyze` does with small ones."""
    exact_each([upload(w, device) for w in matrices])


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """What a call takes that ends on the CPU."""
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    """Print one row a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device with 24 GB of memory or more; there is none here")
    device = torch.device("cuda", 0)
    exact(torch.randn(512, 512, device=device))  # the first run loads libraries
    speed = rate(device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {speed / 1e12:.1f} float64 TFLOP/s\n")
    if options.batches:
        return batches(device)
    print("| model | matrices | s | aim, s | made | upload | decompose | share of the card's rate |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models.split(","):
        took, stages = run(MODELS[name], device)
        flops = sum(exact_flops(max(s), min(s)) for s in MODELS[name])
        shares = " | ".join(f"{stages[stage] / sum(stages.values()):.0%}" for stage in ("made", "upload", "decompose"))
        print(f"| {name} | {len(MODELS[name])} | {took:.1f} | {AIMS[name]} | {shares} | {flops / took / speed:.0%} |")


if __name__ == "__main__":
    main()
