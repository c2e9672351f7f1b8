"""The exact kernel against the floor and beside other ways to singular values, in one run.

    python benchmarks/exact.py [--runs 3]

The floor of a set of matrices is Σ (2·L·k² + 4/3·k³) over this machine's own float64 product rate, all cores (L the
long side, k the short one); the tighter floor counts half of the first term, since a Gram matrix is symmetric. Ours is
the time of the whole set through the worker pool that `analyze` uses, with weights in float32 in memory. Peers run one
matrix with all cores; errors are relative to float64 LAPACK, over the values that a method gives.
"""

import argparse
import os
import platform
import statistics
import time

import numpy as np
import scipy
import scipy.linalg
import torch

from lmd_hf.matrix.kernels import exact
from lmd_hf.run.workers import worker_pool


GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12 + [(768, 1024), (768, 50257)]
LARGE = [(4096, 14336), (4096, 4096)]
SETS = {"GPT-2 small, 50 matrices": GPT2, "4096 × 14336 and 4096 × 4096": LARGE}
SAMPLE = (768, 3072)
LOWRANK = 64


def matrices(shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Gaussian noise, as at initialisation."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) * 0.02 for shape in shapes]


def timed(work: object) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - begun


def rate() -> float:
    """Float64 operations a second of a matrix product on all cores: the best of several."""
    x = np.random.default_rng(0).standard_normal((3072, 3072))
    return 2 * 3072**3 / min(timed(lambda: x @ x[::-1]) for _ in range(4))


def ours(weights: list[torch.Tensor]) -> float:
    """The whole set, the most expensive first, one worker a core."""

    def run() -> None:
        with worker_pool(min(len(weights), os.cpu_count() or 1), len(weights)) as pool:
            list(pool.map(exact, sorted(weights, key=lambda w: -w.numel() * min(w.shape))))

    return timed(run)


def against_the_floor(runs: int) -> None:
    """One row a set of shapes."""
    print("| matrices | ours, s | floor, s | ratio | half the Gram product, s | ratio |\n|---|---|---|---|---|---|")
    for name, shapes in SETS.items():
        weights = matrices(shapes)
        rows = []
        for _ in range(runs):
            speed = rate()
            sides = [(max(s), min(s)) for s in shapes]
            gram, eigen = sum(2 * long * k**2 for long, k in sides), sum(4 / 3 * k**3 for _, k in sides)
            took, floor, half = ours(weights), (gram + eigen) / speed, (gram / 2 + eigen) / speed
            rows.append((took, floor, took / floor, half, took / half))
        took, floor, ratio, half, other = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {took:.2f} | {floor:.2f} | **{ratio:.2f}** | {half:.2f} | {other:.2f} |", flush=True)


def beside_others() -> None:
    """One 768 × 3072 matrix: time and largest relative error."""
    (w,) = matrices([SAMPLE])
    truth = scipy.linalg.svd(w.double().numpy(), compute_uv=False)
    ways = {
        "ours": lambda: exact(w).values.numpy(),
        "scipy.linalg.svdvals, float64": lambda: scipy.linalg.svdvals(w.double().numpy()),
        "torch.linalg.svdvals, float64": lambda: torch.linalg.svdvals(w.double()).numpy(),
        "torch.linalg.svdvals, float32": lambda: torch.linalg.svdvals(w).numpy(),
        f"torch.svd_lowrank(q={LOWRANK}, niter=2)": lambda: torch.svd_lowrank(w, q=LOWRANK, niter=2)[1].numpy(),
    }
    print("\n| one 768 × 3072 matrix | s | values | largest relative error |\n|---|---|---|---|")
    for name, way in ways.items():
        torch.manual_seed(0)
        found = way()
        error = np.abs(found - truth[: len(found)]) / truth[: len(found)]
        took = statistics.median(timed(way) for _ in range(3))
        print(f"| {name} | {took:.3f} | {len(found)} | {error.max():.1e} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
          f"numpy {np.__version__}, scipy {scipy.__version__}; medians of {options.runs}\n")  # fmt: skip
    against_the_floor(options.runs)
    beside_others()


if __name__ == "__main__":
    main()
