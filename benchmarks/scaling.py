"""One process and two, one thread each: the time from the first matrix to the last, and whether the numbers agree.

    python benchmarks/scaling.py [--runs 3] [--layers 6 | --cut]

The model is LLaMA-like with random bf16 weights (hidden 2048, feed-forward 5632), over a minute of work for one core.
One process is kept to one core by `taskset`; two are started by torchrun, and each takes half of the machine. Every run
is a fresh one: nothing is taken from the cache of an earlier one. With `--cut` instead: two processes on one matrix of
24,576 × 3,072, its Gram product shared between them, against one that does all of it while the other waits.
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
LARGE = (24576, 3072)
WHOLE = """
from lmd_hf.cli import main
from lmd_hf.run import shares
shares.EVEN = float("inf")
main()
"""


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


def run(launcher: list[str], folder: Path, program: tuple[str, ...] = ("-m", "lmd_hf")) -> dict:
    """The report of one run, without what an earlier one has kept."""
    with tempfile.TemporaryDirectory() as assets:
        answer = subprocess.run(
            [*launcher, *program, "analyze", str(folder), "--json", "--device", "cpu"],
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


def cut(runs: int) -> None:
    """One matrix by two processes, in pieces and whole, in turn."""
    print("| in pieces, s | whole, s | ratio | largest relative difference |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        w = torch.randn(*LARGE, generator=torch.Generator().manual_seed(0))
        save_file({"layers.0.mlp.up_proj.weight": w}, Path(place) / "model.safetensors")
        (Path(place) / "whole.py").write_text(WHOLE)
        for _ in range(runs):
            pieces, whole = run(TWO, Path(place)), run(TWO, Path(place), (str(Path(place) / "whole.py"),))
            difference = largest_difference(whole["matrices"], pieces["matrices"])
            took = pieces["timing"]["execute"], whole["timing"]["execute"]
            print(f"| {took[0]:.1f} | {took[1]:.1f} | {took[1] / took[0]:.2f} | {difference:.1e} |")


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--cut", action="store_true")
    options = parser.parse_args()
    if options.cut:
        return cut(options.runs)
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
