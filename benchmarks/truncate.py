"""Loss against size: the embedded model cut to 0.9 … 0.4 of its matrices' parameters, on text that it has not seen.

The text is Python's standard library, split as the model's training script splits it: metrics of data come from 512
windows of 256 tokens of the training files, losses from 256 windows of the files that were held out. Contenders: plain
SVD with the same share in every matrix; the metrics of `lmd_hf.truncate` with ranks by equal marginal loss; and its
metric `data` with the same share in every matrix, to tell metric and allocation apart.

    python benchmarks/truncate.py --out benchmarks/truncate.md
"""

import argparse
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from tabulate import tabulate
from transformers import AutoTokenizer

from lmd_hf.demo.train import WINDOW, read_corpus, to_windows
from lmd_hf.records import Data, Settings
from lmd_hf.run.batches import load_batches
from lmd_hf.truncated.base import Base, open_base, sharing
from lmd_hf.truncated.cut import SIGHTS, Axes, axes_of, find_parts
from lmd_hf.truncated.loss import mean_loss
from lmd_hf.truncated.truncate import apply, ranks_of
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SEEN, HELD_OUT = 512, 256  # windows


def write_windows(texts: list[str], path: Path, count: int) -> Data:
    """So many windows of the texts, drawn with a seed, as a data set of token ids."""
    windows = to_windows(texts, AutoTokenizer.from_pretrained(EMBEDDED_FOLDER))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:count]
    path.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in windows[order]))
    return Data(str(path), samples=count, seq_len=WINDOW, batch_size=16, tokens=count * WINDOW)


def single_ratio(found: Sequence[Axes], ratio: float) -> tuple[int | None, ...]:
    """The same share of the parameters of every matrix."""
    ranks = [int(ratio * axes.curve.whole / axes.curve.axis) for axes in found]
    return tuple(rank if rank <= len(axes.curve.energies) else None for axes, rank in zip(found, ranks, strict=True))


def equal_loss(found: Sequence[Axes], ratio: float) -> tuple[int | None, ...]:
    """What `lmd_hf.truncate` does."""
    return ranks_of([axes.curve for axes in found], {"ratio": ratio})


CONTENDERS = {
    "plain SVD, one ratio": ("identity", single_ratio),
    "identity": ("identity", equal_loss),
    "norm": ("norm", equal_loss),
    "data, one ratio": ("data", single_ratio),
    "data": ("data", equal_loss),
    "fisher": ("fisher", equal_loss),
}


def measure(base: Base, held_out: Data, found: dict[str, Sequence[Axes]]) -> tuple[float, list[list[str]]]:
    """The loss of the base, and a row for each ratio."""
    batches = load_batches(base.model, base.place, held_out)
    before, _ = mean_loss(base.model, batches)
    rows = []
    for ratio in RATIOS:
        losses = []
        for metric, ranks in CONTENDERS.values():
            cut = replace(base, model=sharing(base.model))
            apply(cut, found[metric], ranks(found[metric], ratio))
            losses.append(mean_loss(cut.model, batches)[0])
        size = sum(parameter.numel() for parameter in cut.model.parameters())
        best = min(losses)
        rows.append([f"{ratio}", f"{size:,}", *(f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in losses)])
        print(*rows[-1], file=sys.stderr, flush=True)
    return before, rows


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    disable_progress_bars()
    train, held_out = read_corpus(Path(sysconfig.get_path("stdlib")))
    base = open_base(EMBEDDED_ID)
    inventory = list_matrices(base.source)
    seconds, found = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        seen = write_windows(train, Path(scratch) / "seen.jsonl", SEEN)
        unseen = write_windows(held_out, Path(scratch) / "held_out.jsonl", HELD_OUT)
        for metric in SIGHTS:
            data = seen if metric in ("data", "fisher") else None
            parts, _ = find_parts(base, inventory, Settings())
            started = time.perf_counter()
            found[metric], _ = axes_of(base, parts, metric, data)
            seconds[metric] = time.perf_counter() - started
        before, rows = measure(base, unseen, found)
    size = sum(parameter.numel() for parameter in base.model.parameters())
    table = tabulate(rows, headers=("ratio", "parameters", *CONTENDERS), tablefmt="github", disable_numparse=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = (
        f"Held-out loss, nats a token, over {HELD_OUT * (WINDOW - 1):,} tokens; whole: {size:,} parameters, "
        f"{before:.3f}.\n\n"
        f"{table}\n\n"
        f"Seconds for the factors: {', '.join(f'{name} {value:.1f}' for name, value in seconds.items())} "
        f"({SEEN * WINDOW:,} tokens of data). {cores} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}.\n"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(
            f"# Loss against size\n\nMade by `python benchmarks/truncate.py`.\n\n{text}", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
