"""The loss of a causal language model over a dataset."""

from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from torch.nn.functional import cross_entropy

from lmd_hf.errors import SettingsError
from lmd_hf.run.batches import Batches
from lmd_hf.run.loading import evaluating, forward
from lmd_hf.run.world import World


_ALONE = World()
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how transformers calls them


def mean_loss(model: nn.Module, batches: Batches) -> tuple[float, int]:
    """(mean −ln p of each token from those before it, in nats, over how many): padding is no token, and the first of a
    text is given. Raises `SettingsError` for any other kind of model, of which no loss is known."""
    name = type(model).__name__
    if not name.endswith(CAUSAL):
        raise SettingsError(f"{name} has no loss that is known here; only causal language models are evaluated")
    total, count = 0.0, 0
    bar = tqdm(
        batches.share(_ALONE), total=len(batches), desc="evaluating", leave=False, delay=2, name="lmd_hf.truncate"
    )
    with evaluating(model):
        for _, batch in bar:
            logits: Any = forward(model, batch).logits
            ids = batch["input_ids"].to(logits.device)
            there = batch.get("attention_mask", torch.ones_like(ids)).to(logits.device)[:, 1:] > 0
            total += cross_entropy(logits[:, :-1][there].float(), ids[:, 1:][there], reduction="sum").item()
            count += int(there.sum())
    if not count:
        raise SettingsError("no text of the dataset has two tokens; give longer ones")
    return total / count, count
