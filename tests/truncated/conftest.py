"""The embedded model, some of its own kind of text, and a smaller model made of it."""

import json
import textwrap
from pathlib import Path

import pytest

from lmd_hf import truncate
from lmd_hf.weights.source import EMBEDDED_FOLDER, EMBEDDED_ID


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A data set of token ids that every model with a vocabulary of 60 or more takes, and the same of real text."""
    folder = tmp_path_factory.mktemp("texts")
    import torch

    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 60, (32, 16), generator=draw)
    (folder / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in rows))
    lines = Path(textwrap.__file__).read_text().split("\n\n")
    (folder / "code.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines if line.strip()))
    return folder


@pytest.fixture(scope="session")
def small():
    """The embedded model with seven tenths of its matrices' parameters."""
    return truncate(EMBEDDED_ID, ratio=0.7)


@pytest.fixture(scope="session")
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "stdlib-small"
    small.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype="float32").eval()  # the default changed
