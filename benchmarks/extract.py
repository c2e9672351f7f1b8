"""The adapter between two models: `lmd-hf recipe extract` beside `mergekit-extract-lora`.

    python benchmarks/extract.py --mergekit BIN_FOLDER_WITH_MERGEKIT

The base is the embedded model in fp32; the tuned one has an update of its own rank, 2 to 12, in every attention and MLP
matrix. Both tools get their own process. `error` is the largest ‖ΔW − B·A‖/‖ΔW‖ of a matrix, measured on the files they
wrote; `logits` the largest difference between the tuned model's and those that peft makes of base and adapter.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import psutil
import torch
import transformers
from tabulate import tabulate

from lmd_hf.weights.source import EMBEDDED_FOLDER


def write_models(folder):
    """Base and tuned, in fp32."""
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(EMBEDDED_FOLDER)
    for name in ("base", "tuned"):
        if name == "tuned":
            for place, (key, weight) in enumerate(model.named_parameters()):
                if key.endswith("_proj.weight"):
                    rank = 2 + place % 11
                    left = torch.randn(weight.shape[0], rank, generator=generator)
                    weight.data += 0.02 * left @ torch.randn(rank, weight.shape[1], generator=generator)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run(command):
    """(wall seconds, what went wrong) of one process."""
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return time.perf_counter() - begun, "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@torch.no_grad()
def judge(folder, adapter):
    """(entries of the adapter, largest relative error of a matrix, largest difference of a logit)."""
    tuned = transformers.AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    ids = torch.arange(1, 200)[None]
    wanted = tuned.eval()(input_ids=ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
    entries = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    distance = float((model(input_ids=ids).logits - wanted).abs().max())
    merged = dict(model.merge_and_unload().named_parameters())
    errors = [
        float((merged[name] - weight).norm() / (weight - before[name]).norm())
        for name, weight in tuned.named_parameters()
        if not torch.equal(weight, before[name])
    ]
    return entries, max(errors), distance


def main():
    """Run the tools, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", type=Path, help="the folder that holds mergekit-extract-lora")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        base, tuned = str(folder / "base"), str(folder / "tuned")
        own = [sys.executable, "-m", "lmd_hf", "recipe", "extract", base, tuned, "-q", "--out"]
        tools = {
            "lmd-hf, ranks of its own": lambda out: [*own, out],
            "lmd-hf --rank 8": lambda out: [*own, out, "--rank", "8"],
        }
        if options.mergekit is not None:
            theirs = [str(options.mergekit / "mergekit-extract-lora"), "--model", tuned, "--base-model", base]
            tools |= {
                f"mergekit --max-rank {rank}": lambda out, r=rank: [*theirs, "--max-rank", str(r), "--out-path", out]
                for rank in (8, 12)
            }
        for number, (tool, command) in enumerate(tools.items()):
            out = folder / f"adapter-{number}"
            seconds, failed = run(command(str(out)))
            if failed:
                rows.append([tool, f"{seconds:.1f}", failed[:80], "", ""])
                continue
            entries, error, distance = judge(folder, out)
            rows.append([tool, f"{seconds:.1f}", f"{entries:,}", f"{error:.1e}", f"{distance:.1e}"])
    headers = ("tool", "wall s", "entries", "error", "logits")
    print(f"{psutil.cpu_count()} cores, torch {torch.__version__}, peft {peft.__version__}\n")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
