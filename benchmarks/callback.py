"""What `LMDCallback` costs: the embedded model's training script with it and without it, in turn.

    python benchmarks/callback.py --steps 4000 --runs 1

Both train on the same rows from the same seed, so their losses must be equal bit for bit; the table says whether they
are. `measuring` is what the callback itself took, files and figures at the end included.
"""

import argparse
import contextlib
import io
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil
import torch
import transformers
from tabulate import tabulate

from lmd_hf import LMDCallback
from lmd_hf.demo.train import SEED, WINDOW, read_corpus, to_windows, train_model
from lmd_hf.weights.source import EMBEDDED_FOLDER


class Timed(LMDCallback):
    """The callback, with a clock around each of its events."""

    def __init__(self):
        super().__init__()
        self.took = 0.0


def _timed(name):
    event = getattr(LMDCallback, name)

    def run(self, *arguments, **named):
        begun = time.perf_counter()
        event(self, *arguments, **named)
        self.took += time.perf_counter() - begun

    return run


for _event in ("on_train_begin", "on_step_end", "on_epoch_end", "on_save", "on_log", "on_train_end"):
    setattr(Timed, _event, _timed(_event))


def run(windows, steps, callbacks):
    """(wall seconds, CPU seconds, losses) of one training."""
    transformers.set_seed(SEED)
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        begun, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        trainer = train_model(windows, Path(folder), steps=steps, callbacks=callbacks)
        spent = time.perf_counter() - begun, sum(process.cpu_times()[:2]) - cpu
    return *spent, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main():
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(EMBEDDED_FOLDER)
    windows = to_windows(read_corpus(Path(sysconfig.get_path("stdlib")))[0], tokenizer)
    rows, shares = [], []
    for number in range(options.runs):
        callback = Timed()
        order = [("without", []), ("with", [callback])]
        found = {
            name: run(windows, options.steps, given) for name, given in (order if number % 2 == 0 else order[::-1])
        }
        (plain, plain_cpu, losses), (watched, watched_cpu, same) = found["without"], found["with"]
        shares.append(callback.took / (watched - callback.took))
        points = callback.tracker.points
        rows.append(
            [
                *(f"{plain:.1f}", f"{watched:.1f}", f"{plain_cpu:.1f}", f"{watched_cpu:.1f}"),
                *(f"{callback.took:.2f}", f"{shares[-1]:.2%}", len({p.step for p in points}), len(points)),
                "yes" if losses == same else "NO",
            ]
        )
    print(
        f"{options.steps} steps of 32 × {WINDOW} tokens, {psutil.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    headers = (
        "s without",
        "s with",
        "CPU s without",
        "CPU s with",
        "measuring s",
        "share",
        "steps",
        "points",
        "losses equal",
    )
    print(tabulate(rows, headers=headers, tablefmt="github"))
    print(f"\nmeasuring / training, median: {statistics.median(shares):.2%} (aim: below 2 %)")


if __name__ == "__main__":
    main()
