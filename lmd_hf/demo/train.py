"""Train the embedded model: a one-million-parameter LLaMA on the text of Python's standard library.

    python -m lmd_hf.demo.train OUT

Writes the model folder that `lmd_hf/demo/model` holds: bf16 weights, tokenizer, config, the Trainer's own
`trainer_state.json` (seed, settings and loss curve) and `evaluation.json` (held-out bits per byte beside gzip and
a byte-trigram model). The corpus is the standard library of the running interpreter without its tests; one file
in twenty, chosen by the hash of its path, is held out.
"""

import gzip
import hashlib
import json
import math
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


SEED = 20230905
WINDOW = 256  # tokens the model sees at once
STEPS = 4000
BATCH = 32
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts): every readable module below `root`, one in twenty held out."""
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules are written in another encoding on purpose
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        (held_out if digest[0] % 20 == 0 else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,048 tokens: lossless, so bits per byte are exact."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=["<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def to_windows(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token ids of all texts, one after the other with `<s>` between, cut into rows of WINDOW; the rest is dropped."""
    ids = [i for text in texts for i in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]
    rows = len(ids) // WINDOW
    return torch.tensor(ids[: rows * WINDOW]).view(rows, WINDOW)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> float:
    """−Σ log₂ p(token) / Σ bytes, every text cut into windows that start from `<s>` alone."""
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        size += len(text.encode())
        for start in range(0, len(ids), WINDOW - 1):
            row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + WINDOW - 1]]])
            logits = model(input_ids=row).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return nats / math.log(2) / size


def trigram_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """A byte-trigram model, Witten–Bell interpolated down to the uniform distribution over 256 bytes."""
    counts: list[Counter[bytes]] = [Counter(), Counter(), Counter()]
    for order, table in enumerate(counts):
        table.update(train[i : i + order + 1] for i in range(len(train) - order))
    totals: list[Counter[bytes]] = [Counter(), Counter(), Counter()]
    kinds: list[Counter[bytes]] = [Counter(), Counter(), Counter()]
    for order, table in enumerate(counts):
        for gram, count in table.items():
            totals[order][gram[:-1]] += count
            kinds[order][gram[:-1]] += 1
    bits = 0.0
    for i in range(len(held_out)):
        p = 1 / 256
        for order in range(min(i, 2) + 1):
            gram = held_out[i - order : i + 1]
            total, kind = totals[order][gram[:-1]], kinds[order][gram[:-1]]
            if total:
                p = (counts[order][gram] + kind * p) / (total + kind)
        bits -= math.log2(p)
    return bits / len(held_out)


def train_model(
    windows: torch.Tensor, out: Path, *, steps: int = STEPS, callbacks: Sequence[TrainerCallback] = ()
) -> Trainer:
    """A new model, trained on rows of WINDOW tokens by transformers' own Trainer."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.98,
        logging_steps=max(1, steps // 100),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=True,
        seed=SEED,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=settings,
        train_dataset=[{"input_ids": row, "labels": row} for row in windows],
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, train: list[str], held_out: list[str]
) -> dict[str, Any]:
    """Held-out bits per byte of the stored model, of gzip and of a byte-trigram model, with the size of the corpus."""
    data = "".join(held_out).encode()
    return {
        "corpus": f"standard library of Python {sys.version.split()[0]}, without tests",
        "train_bytes": sum(len(t.encode()) for t in train),
        "train_tokens_seen": STEPS * BATCH * WINDOW,
        "held_out_files": len(held_out),
        "held_out_bytes": len(data),
        "bits_per_byte": {
            "model": bits_per_byte(model, held_out, tokenizer),
            "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
            "byte_trigram": trigram_bits_per_byte("".join(train).encode(), data),
        },
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tiny, code]
---

# stdlib-llama-1m

A LLaMA of {parameters:,} parameters (4 layers, 4 heads, 2 key/value heads, tied embeddings, bf16) trained on the
{corpus} (PSF licence). It exists so that `lmd-hf demo` has a
real trained model to show, offline. It has seen {train_tokens_seen:,} tokens of {train_bytes:,} bytes of text;
`trainer_state.json` is the Trainer's own record and holds the loss curve (seed {seed}). Made by
`python -m lmd_hf.demo.train`.

| on {held_out_files} held-out files ({held_out_bytes:,} bytes) | bits per byte |
|---|---|
| this model | {model:.3f} |
| gzip -9 | {gzip:.3f} |
| byte trigrams (Witten–Bell) | {byte_trigram:.3f} |

It completes Python-like text for a line or two and is good for nothing else.
"""


def card(evaluation: dict[str, Any], parameters: int) -> str:
    """The model's README: what it is, and its figures beside the two baselines."""
    return CARD.format(parameters=parameters, seed=SEED, **evaluation, **evaluation["bits_per_byte"])


def main(out: Path) -> None:
    """Train, evaluate and write the model folder."""
    set_seed(SEED)
    train, held_out = read_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(train)
    trainer = train_model(to_windows(train, tokenizer), out)
    model = trainer.model.to(torch.bfloat16).eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    evaluation = evaluate(model, tokenizer, train, held_out)
    (out / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    (out / "README.md").write_text(card(evaluation, model.num_parameters()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
