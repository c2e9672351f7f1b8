"""LoRA ranks at an equal budget of trainable parameters: uniform, EVA from peft, and `lmd_hf.lora_config`.

    python benchmarks/lora.py --seeds 5

The embedded model, which was trained on Python, is fine-tuned to C++: the headers below c10/ of the installed torch;
one in five, by the hash of its path, is held out. Every method trains the same modules (q, k, v, o, gate, up, down)
with α/r = 2 (EVA rescales by its own rule), the same optimiser, steps and batches; a seed changes the order of the data
and the initialisation. Reported: held-out bits per byte, mean ± the half-width of the 95 % interval (Student), and the
paired difference to uniform ranks.
"""

import argparse
import hashlib
import math
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import peft
import psutil
import torch
import transformers
from scipy.special import stdtrit
from tabulate import tabulate

import lmd_hf
from lmd_hf.demo.train import to_windows
from lmd_hf.weights.source import EMBEDDED_FOLDER


UNIFORM_RANK = 4
BATCH, LENGTH, RATE = 8, 128, 3e-3
HEADERS = Path(torch.__file__).parent / "include" / "c10"
HELD_OUT_WINDOWS = 60


def corpus(tokenizer):
    """(training rows, held-out rows, bytes for each held-out token), and the training texts."""
    split = ([], [])
    for path in sorted(HEADERS.rglob("*.h")):
        name = path.relative_to(HEADERS).as_posix()
        split[hashlib.sha256(name.encode()).digest()[0] % 5 == 0].append(path.read_text(encoding="utf-8"))
    rows = [to_windows(texts, tokenizer).reshape(-1, LENGTH) for texts in split]
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in split[1])
    size = sum(len(text.encode()) for text in split[1])
    spaced = torch.linspace(0, len(rows[1]) - 1, min(HELD_OUT_WINDOWS, len(rows[1]))).long()
    return rows[0], rows[1][spaced], size / tokens, split[0]


def load():
    """The embedded model in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32)


@torch.no_grad()
def bits_per_byte(model, rows, bytes_a_token):
    """The mean loss of the rows in bits, over the bytes that a token stands for."""
    model.eval()
    nats = statistics.fmean(model(input_ids=part, labels=part).loss.item() for part in rows.split(20))
    return nats / math.log(2) / bytes_a_token


def train(model, rows, steps, seed, rate=RATE):
    """AdamW, linear decay, the batches of this seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in range(steps):
        batch = rows[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(rows)]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def adapted(config, model, rows):
    """The model with its adapter, initialised as the configuration says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, config)
        if config.init_lora_weights == "eva":
            batches = [{"input_ids": part} for part in rows[:160].split(BATCH)]
            peft.initialize_lora_eva_weights(made, batches, show_progress_bar=False)
    return made


def eva_start(config):
    """The same ranks, begun from the directions of the inputs as EVA finds them; ρ = 1 moves no rank."""
    config.init_lora_weights, config.eva_config = "eva", peft.EvaConfig(rho=1.0)
    return config


def configurations(rows, texts, steps):
    """{method: (configuration, how its ranks were found)}."""
    report = lmd_hf.analyze(EMBEDDED_FOLDER)
    uniform = lmd_hf.lora_recipe(report, energy=1.0)
    budget = UNIFORM_RANK * sum(module.unit for module in uniform.modules)
    same = {"r": UNIFORM_RANK, "lora_alpha": 2 * UNIFORM_RANK, "target_modules": sorted(uniform.ranks)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "texts.txt").write_text("\n".join(line for text in texts for line in text.splitlines() if line))
        data = lmd_hf.analyze(
            EMBEDDED_FOLDER, metric="data", data=lmd_hf.records.Data(str(Path(folder) / "texts.txt"), samples=400)
        )
    tuned = train(load(), rows, steps, seed=1000, rate=RATE / 3)
    change = lmd_hf.compare(EMBEDDED_FOLDER, tuned)
    eva = partial(peft.LoraConfig, **same, init_lora_weights="eva")
    return budget, {
        f"uniform, r = {UNIFORM_RANK}": lambda: peft.LoraConfig(**same),
        "EVA, ρ = 2": lambda: eva(eva_config=peft.EvaConfig(rho=2.0)),
        "EVA, ρ = 1 (initialisation alone)": lambda: eva(eva_config=peft.EvaConfig(rho=1.0)),
        "lora_config, weights": lambda: lmd_hf.lora_config(report, budget=budget),
        "lora_config, data metric": lambda: lmd_hf.lora_config(data, budget=budget),
        "lora_config, base against tuned": lambda: lmd_hf.lora_config(change, budget=budget),
        "lora_config, data metric, with EVA's initialisation": lambda: eva_start(
            lmd_hf.lora_config(data, budget=budget)
        ),
    }


def interval(values):
    """(mean, half-width of the 95 % interval)."""
    if len(values) < 2:
        return values[0], math.nan
    width = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), width


def main():
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    begun = time.perf_counter()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(EMBEDDED_FOLDER)
    rows, held_out, bytes_a_token, texts = corpus(tokenizer)
    start = bits_per_byte(load(), held_out, bytes_a_token)
    budget, methods = configurations(rows, texts, options.steps)
    found, sizes = {name: [] for name in methods}, {}
    for seed in range(options.seeds):
        for name, configure in methods.items():
            transformers.set_seed(seed)
            model = adapted(configure(), load(), rows)
            sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            found[name].append(bits_per_byte(train(model, rows, options.steps, seed), held_out, bytes_a_token))
    uniform = next(iter(found.values()))
    table = []
    for name, scores in found.items():
        mean, width = interval(scores)
        shift, shift_width = interval([score - other for score, other in zip(scores, uniform, strict=True)])
        against = "" if scores is uniform else f"{shift:+.4f} ± {shift_width:.4f}"
        table.append((name, f"{sizes[name]:,}", f"{mean:.4f} ± {width:.4f}", against))
    print(
        f"Python → C++ ({len(rows):,} training rows of {LENGTH} tokens), {options.seeds} seeds, {options.steps} steps "
        f"of {BATCH} rows, rate {RATE}, budget {budget:,} parameters; held out {start:.4f} bits per byte before.\n"
        f"{psutil.cpu_count()} cores, torch {torch.__version__}, peft {peft.__version__}, "
        f"{time.perf_counter() - begun:.0f} s in all.\n"
    )
    headers = ("ranks", "parameters", "bits per byte, held out", "less uniform, paired")
    print(tabulate(table, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
