"""How evenly a plan shares the exact decomposition of real models between 1 and 1,024 ranks, from their shapes alone.

    python benchmarks/balance.py

Imbalance is the load of the busiest rank over the mean load, minus one, in floating-point operations; in brackets, of
how many matrices the Gram products are shared. The shapes are those that the models' published configurations give,
built on the meta device: nothing is downloaded, no weight exists.
"""

import torch
import transformers

from lmd_hf.records import Settings
from lmd_hf.run.plan import make_plan
from lmd_hf.run.shares import imbalance, loads
from lmd_hf.weights.inventory import list_matrices
from lmd_hf.weights.source import open_source


LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
MODELS = {
    "LLaMA-3-8B": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA
    ),
    "LLaMA-3-70B": transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
    ),
    "Mixtral-8x7B": transformers.MixtralConfig(),
    "DeepSeek-V3": transformers.DeepseekV3Config(),
}  # the last two are those models' own values by default
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    """One row a number of ranks, one column a model."""
    plans = {}
    for name, config in MODELS.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        source = open_source(model)
        plans[name] = (list_matrices(source), source.identity)
    print(f"| ranks | {' | '.join(f'{n} ({len(i.selected):,} matrices)' for n, (i, _) in plans.items())} |")
    print(f"|---|{'---|' * len(plans)}")
    for ranks in RANKS:
        cells = []
        for inventory, identity in plans.values():
            plan = make_plan(inventory, identity, Settings(kernel="exact"), ranks)
            cut = {piece.work for mine in plan.pieces for piece in mine}
            cells.append(f"{imbalance(loads(plan.works, plan.shards, plan.pieces)):.1%} ({len(cut)})")
        print(f"| {ranks:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
