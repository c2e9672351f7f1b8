"""Decomposition of random bf16 weights in the shapes of LLaMA-3-8B and Mixtral-8x7B, on one GPU.

    python benchmarks/gpu.py [--models LLaMA-3-8B,Mixtral-8x7B] [--kernel exact|sketch] [--batches | --heads]

The weights lie in main memory, and each goes through the workers and streams of `analyze`. Beside the whole time stand
the time that moving the weights to the card takes alone, the shares of upload and decomposition in the summed seconds
of all streams, and, of the exact kernel, the rate that is reached beside that of a large float64 product on the card.

With `--batches` instead: small matrices one by one, four streams at a time, against all at once, by short side. Where
the second stops to pay is what `BATCH_SIDE` in lmd_hf/run/shares.py should be. With `--heads`: the heads of two layers
of LLaMA-3-8B's size on the card, and on the CPU beside it. Needs one CUDA device.
"""

import argparse
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from lmd_hf.matrix.batched import exact_each
from lmd_hf.matrix.cost import exact_flops
from lmd_hf.matrix.kernels import KERNELS, exact
from lmd_hf.records import Settings
from lmd_hf.run.heads import measure_heads
from lmd_hf.run.plan import plan_heads
from lmd_hf.run.workers import STREAMS, count_workers, pick_device, upload, worker_pool
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


AIMS = {"LLaMA-3-8B": 45, "Mixtral-8x7B": 240}  # seconds, exact
LAYER = [(4096, 4096)] * 2 + [(1024, 4096)] * 2  # q and o, k and v
MLP = [(14336, 4096), (14336, 4096), (4096, 14336)]
MODELS = {
    "LLaMA-3-8B": [(4096, 128256)] * 2 + (LAYER + MLP) * 32,
    "Mixtral-8x7B": [(4096, 32000)] * 2 + (LAYER + [(8, 4096)] + MLP * 8) * 32,
}
Shapes = list[tuple[int, int]]


def rate(device: torch.device) -> float:
    """Float64 operations a second of one large product."""
    x = torch.randn(8192, 8192, dtype=torch.float64, device=device)
    x @ x
    return 2 * 8192**3 / seconds(lambda: x @ x, device)


def run(shapes: Shapes, device: torch.device, step: Callable[[torch.Tensor], object]) -> tuple[float, Counter]:
    """(seconds, seconds by stage summed over the streams) of a step on the card for each of the weights."""
    pool_of_numbers = torch.randn(2 * max(map(math.prod, shapes)), device=device).mul_(0.02).bfloat16().cpu()
    stages, lock = Counter(), threading.Lock()

    def one(index: int) -> None:
        shape, start = ordered[index], 64 * (index % 1000)
        begun = time.perf_counter()
        there = upload(pool_of_numbers[start : start + math.prod(shape)].view(shape), device)
        torch.cuda.current_stream(device).synchronize()
        moved = time.perf_counter()
        step(there)
        torch.cuda.current_stream(device).synchronize()
        with lock:
            stages.update(upload=moved - begun, decompose=time.perf_counter() - moved)

    ordered = sorted(shapes, key=lambda s: -exact_flops(max(s), min(s)))
    sizes = [2 * math.prod(s) + 3 * 8 * min(s) ** 2 for s in ordered]
    with worker_pool(count_workers(sizes, device), len(ordered)) as pool:
        list(pool.map(one, range(STREAMS)))  # pinned memory is made once
        begun = time.perf_counter()
        stages.clear()
        list(pool.map(one, range(len(ordered))))
        return time.perf_counter() - begun, stages


def models(names: list[str], kernel: str, device: torch.device) -> None:
    """Print one row a model."""
    speed = rate(device)
    print(f"{speed / 1e12:.1f} float64 TFLOP/s in products\n")
    print(
        "| model | kernel | matrices | s | aim, s | to move the weights, s | upload | decompose | of the card's rate |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        shapes = MODELS[name]
        moving, _ = run(shapes, device, lambda w: None)
        took, stages = run(shapes, device, KERNELS[kernel])
        shares = " | ".join(f"{stages[stage] / sum(stages.values()):.0%}" for stage in ("upload", "decompose"))
        flops = sum(exact_flops(max(s), min(s)) for s in shapes)
        aim = AIMS[name] if kernel == "exact" else f"{1.5 * moving:.1f}"
        reached = f"{flops / took / speed:.0%}" if kernel == "exact" else "–"
        print(f"| {name} | {kernel} | {len(shapes)} | {took:.1f} | {aim} | {moving:.1f} | {shares} | {reached} |")


def batches(device: torch.device) -> None:
    """Print one row a short side."""
    print("| short side | matrices | one by one, s | at once, s | times faster |")
    print("|---|---|---|---|---|")
    for side in (16, 32, 64, 128, 256, 512, 1024):
        matrices = [torch.randn(side, 2 * side, device=device).bfloat16() for _ in range(256)]
        exact_each(matrices[:2])
        took = [seconds(partial(each, matrices, device), device) for each in (one_by_one, at_once)]
        print(f"| {side} | {len(matrices)} | {took[0]:.3f} | {took[1]:.3f} | {took[0] / took[1]:.1f} |")


def one_by_one(matrices: list[torch.Tensor], device: torch.device) -> None:
    """As `analyze` does with large ones."""
    with worker_pool(STREAMS, len(matrices)) as pool:
        list(pool.map(lambda w: exact(upload(w, device)), matrices))


def at_once(matrices: list[torch.Tensor], device: torch.device) -> None:
    """As `analyze` does with small ones: a batch a stream."""
    share = -(-len(matrices) // STREAMS)
    parts = [matrices[start : start + share] for start in range(0, len(matrices), share)]
    with worker_pool(STREAMS, len(matrices)) as pool:
        list(pool.map(lambda part: exact_each([upload(w, device) for w in part]), parts))


def heads(device: torch.device) -> None:
    """Print one row a device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 64}
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=64, **sizes)).bfloat16()
    source = open_source(model.cpu())
    planned = plan_heads(list_matrices(source), Settings(heads=True))
    measure_heads(planned[:32], source, folded=False, device=str(device))
    print("| device | heads | s | largest difference of a σ, relative to the first |")
    print("|---|---|---|---|")
    found = {}
    for name in (str(device), "cpu"):
        begun = time.perf_counter()
        found[name] = measure_heads(planned, source, folded=False, device=name).rows
        took = time.perf_counter() - begun
        pairs = zip(found[name], found[str(device)], strict=True)
        off = max(abs(a - b) / x.qk_singular_values[0] for x, y in pairs for a, b in zip(
            x.qk_singular_values, y.qk_singular_values, strict=True))  # fmt: skip
        print(f"| {name} | {len(planned)} | {took:.2f} | {off:.1e} |")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """What a call takes, with all that it has begun on the card."""
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--kernel", default="exact", choices=KERNELS)
    parser.add_argument("--batches", action="store_true")
    parser.add_argument("--heads", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device with 24 GB of memory or more; there is none here")
    device = pick_device("cuda")
    exact(torch.randn(512, 512, device=device))
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    if options.batches:
        batches(device)
    elif options.heads:
        heads(device)
    else:
        models(options.models.split(","), options.kernel, device)


if __name__ == "__main__":
    main()
