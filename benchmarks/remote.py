"""`lmd-hf analyze` of a model on a distant Hub: time beside transfer alone and compute alone, bytes, and peak memory.

    python benchmarks/remote.py [--runs 3] [--megabytes 125,500,2000] [--roles 'q,k;'] [--latency 0.03]
                                [--bandwidth 50e6]

The Hub is that of the tests, in this process; `bandwidth` is shared by all connections. Every figure is from a process
of its own, ours from the command itself (`python -m lmd_hf analyze … --json`). The checkpoints are LLaMA-like with
random weights in fp32; `by` says whether the plan comes from names alone or from the model's modules (the same
checkpoint whose config.json leaves the activation to transformers, which then has to be imported). `ours` counts from
the first byte of the weight file (its header) to the end of the process, so that it holds the imports that reads
overlap, parsing and the report; `last byte` from the same moment; `whole` from the start of the process. Transfer alone
is our own reader fetching the same bytes and doing nothing with them; compute alone is the same matrices from a local
folder, without imports.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import hub_server  # noqa: E402


ROLES = "q,k;"
POLL = 0.05  # seconds between two looks at the peak
SHAPES = {125: (768, 2048, 4), 500: (1024, 2816, 11), 2000: (2048, 5632, 10)}  # MB: hidden, feed-forward, layers
VOCAB = 8192
TRANSFER = """
import sys, json, time
from lmd_hf.api import plan
from lmd_hf.records import Settings
from lmd_hf.run.read_ahead import reading_ahead, spans
from lmd_hf.weights.source import open_source
works = plan(sys.argv[1], settings=Settings(roles=tuple(filter(None, sys.argv[2].split(","))))).works
source = open_source(sys.argv[1])
begun = time.perf_counter()
with reading_ahead(source, works) as reads:
    for work in reads.works:
        with reads.taking(work):
            for span in spans(work.ref):
                reads.read(span.tensor, span.start, span.stop)
print(json.dumps({"seconds": time.perf_counter() - begun}))
"""
COMPUTE = """
import sys, json
from lmd_hf.records import Settings
from lmd_hf.run.execute import execute
from lmd_hf.run.plan import make_plan
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
source = open_source(sys.argv[1])
plan = make_plan(list_matrices(source), source.identity, Settings(roles=tuple(filter(None, sys.argv[2].split(",")))))
print(json.dumps({"seconds": execute(plan, source).timing["execute"],
                  "bytes": sum(t.stop - t.start for w in plan.works for t in w.ref.tensors),
                  "largest": max(8 * w.ref.shape[0] * w.ref.shape[1] for w in plan.works)}))
"""
SAVE = """
import sys, torch, transformers as t
hidden, feed_forward, layers, vocab = map(int, sys.argv[2:])
torch.manual_seed(0)
config = t.LlamaConfig(hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers, vocab_size=vocab,
                       num_attention_heads=16, num_key_value_heads=16)
t.LlamaForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="1GB")
"""


def run(*command: str) -> dict[str, Any]:
    """What a process prints as JSON, when it began and ended, and its peak memory, which the kernel would report to a
    parent only together with the parent's own pages before the exec; so it is looked up while the process runs."""
    with (
        tempfile.TemporaryDirectory() as home,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        environment = {**os.environ, "HF_ENDPOINT": HUB.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1",
                       "PYTHONPATH": str(ROOT)}  # fmt: skip
        begin = time.time()
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, env=environment, cwd=home)
        peaks = [0.0]
        threading.Thread(target=watch, args=(process.pid, peaks), daemon=True).start()
        process.wait()
        end = time.time()
        err.seek(0)
        if process.returncode:
            sys.exit(err.read())
        out.seek(0)
        return {**json.loads(out.read()), "begin": begin, "exit": end, "memory": max(peaks)}


def watch(process: int, peaks: list[float]) -> None:
    """Note the peak memory of a process, in MB, until it ends."""
    with contextlib.suppress(StopIteration, OSError):
        while True:
            status = Path(f"/proc/{process}/status").read_text()
            peaks.append(next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")))
            time.sleep(POLL)


def measure(folder: Path, name: str, roles: str, runs: int) -> dict[str, float]:
    """One row: medians of `runs` processes each, in turn."""
    rows = []
    for _ in range(runs):
        compute = run("-c", COMPUTE, str(folder), roles)
        transfer = run("-c", TRANSFER, name, roles)
        HUB.first = HUB.sent = 0
        ours = run("-m", "lmd_hf", "analyze", name, "--json", *(["--roles", roles] if roles else []))
        rows.append(
            {
                "transfer": transfer["seconds"],
                "compute": compute["seconds"],
                "last": HUB.last - HUB.first,
                "ours": ours["exit"] - HUB.first,
                "whole": ours["exit"] - ours["begin"],
                "bytes": ours["environment"]["bytes_fetched"] / compute["bytes"],
                "memory": ours["memory"],
                "largest": compute["largest"] / 1e6,
                "megabytes": compute["bytes"] / 1e6,
            }
        )
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def files_of(folder: Path, *, complete: bool) -> dict[str, bytes]:
    """What the Hub serves; an incomplete config.json has to be completed by transformers."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files["config.json"])
    if not complete:
        del config["hidden_act"]
    return {**files, "config.json": json.dumps(config).encode()}


def main() -> None:
    """Serve each checkpoint, analyse it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", default="125,500,2000")
    parser.add_argument("--roles", default=ROLES, help="selections, with ; between them; an empty one is all roles")
    parser.add_argument("--latency", type=float, default=0.03)
    parser.add_argument("--bandwidth", type=float, default=50e6)
    options = parser.parse_args()
    HUB.latency, HUB.bandwidth = options.latency, options.bandwidth
    print(f"{options.latency * 1e3:.0f} ms, {options.bandwidth / 1e6:.0f} MB/s, median of {options.runs}, "
          f"{os.cpu_count()} cores; limits: bytes 1.05, time 1.15, memory 3 × largest + 500 MB")  # fmt: skip
    print(f"{'model':>6} {'roles':>6} {'by':>8} {'MB':>6} {'bytes':>6} {'transfer s':>11} {'compute s':>10} "
          f"{'last byte s':>12} {'ours s':>7} {'time':>5} {'whole s':>8} {'peak MB':>8} {'limit':>6}")  # fmt: skip
    for size in map(int, options.megabytes.split(",")):
        with tempfile.TemporaryDirectory() as place:
            subprocess.run([sys.executable, "-c", SAVE, place, *map(str, SHAPES[size]), str(VOCAB)], check=True,
                           stderr=subprocess.DEVNULL)  # fmt: skip
            for by in ("names", "modules"):
                name = f"org/model-{size}-{by}"
                HUB.add(name, files_of(Path(place), complete=by == "names"))
                for roles in options.roles.split(";"):
                    r = measure(Path(place), name, roles, options.runs)
                    print(f"{size:>6} {roles or 'all':>6} {by:>8} {r['megabytes']:>6.0f} {r['bytes']:>6.3f} "
                          f"{r['transfer']:>11.2f} {r['compute']:>10.2f} {r['last']:>12.2f} {r['ours']:>7.2f} "
                          f"{r['ours'] / max(r['transfer'], r['compute']):>5.2f} {r['whole']:>8.2f} "
                          f"{r['memory']:>8.0f} {3 * r['largest'] + 500:>6.0f}", flush=True)  # fmt: skip
        HUB.clear()
        HUB.latency, HUB.bandwidth = options.latency, options.bandwidth


HUB = hub_server.start()
if __name__ == "__main__":
    main()
