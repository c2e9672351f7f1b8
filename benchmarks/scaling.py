"""One process and two, one thread each: the time from the first matrix to the last, and whether the numbers agree.

    python benchmarks/scaling.py [--runs 3] [--layers 6]

The model is LLaMA-like with random bf16 weights (hidden 2048, feed-forward 5632), over a minute of work for one core.
One process is kept to one core by `taskset`; two are started by torchrun, and each takes half of the machine. Every run
is a fresh one: nothing is taken from the cache of an earlier one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file


HIDDEN, FEED_FORWARD = 2048, 5632
ONE = ["taskset", "--cpu-list", "0", sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


def save_model(folder: Path, layers: int) -> None:
    """Random weights of a LLaMA-like decoder, without embeddings."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
    shapes |= {"mlp.gate_proj": (FEED_FORWARD, HIDDEN), "mlp.up_proj": (FEED_FORWARD, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, FEED_FORWARD)}
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.randn(*shape, generator=generator).to(torch.bfloat16)
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")


def run(launcher: list[str], folder: Path) -> dict:
    """The report of one run, without what an earlier one has kept."""
    with tempfile.TemporaryDirectory() as assets:
        answer = subprocess.run(
            [*launcher, "-m", "lmd_hf", "analyze", str(folder), "--json", "--device", "cpu"],
            stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, "HF_ASSETS_CACHE": assets},
        )  # fmt: skip
    return json.loads(answer.stdout)


def largest_difference(one: list[dict], two: list[dict]) -> float:
    """Relative, over every number of every row; the rows must be the same ones in the same order."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        for key, value in a.items():
            pairs = zip(value, b[key], strict=True) if key == "singular_values" else [(value, b[key])]
            for x, y in pairs:
                if isinstance(x, float):
                    worst = max(worst, abs(x - y) / max(abs(x), 1e-300))
                else:
                    assert x == y, (a["name"], key)
    return worst


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        save_model(Path(place), options.layers)
        for _ in range(options.runs):
            one, two = run(ONE, Path(place)), run(TWO, Path(place))
            difference = largest_difference(one["matrices"], two["matrices"])
            rows.append((one["timing"]["execute"], two["timing"]["execute"], difference))
    print("| one process, s | two processes, s | ratio | largest relative difference |\n|---|---|---|---|")
    for alone, shared, difference in rows:
        print(f"| {alone:.1f} | {shared:.1f} | {alone / shared:.2f} | {difference:.1e} |")
    print(f"median ratio {statistics.median(a / b for a, b, _ in rows):.2f} (aim: at least 1.8)")


if __name__ == "__main__":
    main()
