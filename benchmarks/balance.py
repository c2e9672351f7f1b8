"""How evenly a plan shares the exact decomposition of real models between 1 and 1,024 ranks, from their shapes alone.

    python benchmarks/balance.py

Imbalance is the load of the busiest rank over the mean load, minus one, in floating-point operations. A matrix is never
cut, so no plan can be better than the largest matrix over the mean; that bound stands beside it. The shapes are those
that the models' published configurations give, built on the meta device: nothing is downloaded, no weight exists.
"""

import torch
import transformers

from lmd_hf.records import Settings
from lmd_hf.run.plan import make_plan
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


def imbalance(loads: list[float]) -> float:
    """Busiest over mean, minus one."""
    return max(loads) / (sum(loads) / len(loads)) - 1


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
            loads = [sum(plan.works[index].flops for index in shard) for shard in plan.shards]
            bound = max(0.0, max(work.flops for work in plan.works) / (sum(loads) / ranks) - 1)
            cells.append(f"{imbalance(loads):.1%} (≥ {bound:.1%})")
        print(f"| {ranks:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
