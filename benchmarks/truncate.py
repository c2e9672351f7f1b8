"""Loss against size: the embedded model cut to 0.9 … 0.4 of its matrices' parameters, on text that it has not seen.

The text is Python's standard library, split as the model's training script splits it: metrics of data come from 512
windows of 256 tokens of the training files, losses from 256 windows of the files that were held out. Contenders: plain
SVD with the same share in every matrix; the metrics of `lmd_hf.truncate` with ranks by equal marginal loss; and its
metric `data` with the same share in every matrix, to tell metric and allocation apart. With a copy of the source of
SVD-LLM (Wang et al. 2024, arXiv 2403.07378), its whitening and truncation too, from the same windows.

    git clone https://github.com/AIoT-MLSys-Lab/SVD-LLM
    python benchmarks/truncate.py --out benchmarks/truncate.md --svd-llm SVD-LLM
"""

import argparse
import contextlib
import copy
import importlib
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from tabulate import tabulate
from torch import nn
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
BLOCK = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
Peer = Callable[[float], tuple[nn.Module, int]]  # ratio -> (the model, its parameters)


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


def svd_llm(source: Path, base: Base, seen: Data) -> Peer:
    """SVD-LLM as it is published, on the CPU. Its attention runs in the transformers of its time alone, so each pair of
    factors is multiplied and put back where the matrix was, which changes no number."""
    sys.path.insert(0, str(source))
    theirs = importlib.import_module("SVDLLM")
    batches = load_batches(base.model, base.place, seen)
    with contextlib.redirect_stdout(sys.stderr):
        profiled = copy.deepcopy(base.model)
        profile = theirs.profle_svdllm("llama", profiled, [batches[i] for i in range(len(batches))], "cpu")

    def cut(ratio: float) -> tuple[nn.Module, int]:
        factored, whole = copy.deepcopy(base.model), copy.deepcopy(base.model)
        with contextlib.redirect_stdout(sys.stderr):
            theirs.whitening("llama", factored, profile, ratio, "cpu")
        for ours, pairs in zip(whole.model.layers, factored.model.layers, strict=True):
            for block, names in BLOCK.items():
                for name in names:
                    out, into = (getattr(getattr(pairs, block), f"{name}_{side}_proj").weight.data for side in "uv")
                    getattr(getattr(ours, block), f"{name}_proj").weight.data = out @ into
        return whole, sum(parameter.numel() for parameter in factored.parameters())

    return cut


def measure(
    base: Base, held_out: Data, found: dict[str, Sequence[Axes]], peers: dict[str, Peer]
) -> tuple[float, list[list[str]]]:
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
        for name, peer in peers.items():
            model, theirs = peer(ratio)
            losses.append(mean_loss(model, batches)[0])
            print(f"{name}: {theirs:,} parameters", file=sys.stderr)
        best = min(losses)
        rows.append([f"{ratio}", f"{size:,}", *(f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in losses)])
        print(*rows[-1], file=sys.stderr, flush=True)
    return before, rows


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--svd-llm", type=Path, metavar="DIR", help="a copy of SVD-LLM's source")
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
        peers = {} if options.svd_llm is None else {"SVD-LLM": svd_llm(options.svd_llm, base, seen)}
        before, rows = measure(base, unseen, found, peers)
    size = sum(parameter.numel() for parameter in base.model.parameters())
    table = tabulate(
        rows, headers=("ratio", "parameters", *CONTENDERS, *peers), tablefmt="github", disable_numparse=True
    )
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
