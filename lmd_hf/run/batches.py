"""A dataset as batches for a model: text through its own tokenizer, images through its own processor."""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from torch import nn

from lmd_hf.errors import SettingsError, first_line
from lmd_hf.records import Data
from lmd_hf.run.loading import Batch, Origin
from lmd_hf.run.world import World


LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".md": "text"}
TEXT_COLUMNS = ("text", "sentence", "content", "document", "article", "question", "prompt")  # in order of preference
TOKENS = "input_ids"  # a column of them needs no tokenizer
Build = Callable[[Sequence[int]], Batch]


@dataclass(frozen=True)
class Batches:
    """Examples in their order, `batch_size` at a time. `lengths` are the unpadded tokens of each text, `None` for
    images; `about` says in words what was read."""

    examples: int
    batch_size: int
    about: str
    lengths: tuple[int, ...] | None
    build: Build

    @property
    def tokens(self) -> int | None:
        """Unpadded tokens in all; `None` for images."""
        return None if self.lengths is None else sum(self.lengths)

    def digest(self) -> str:
        """What tells these examples from others: every token, and of images, which take long to decode, the first and
        the last batch."""
        digest = hashlib.sha256(repr((self.examples, self.lengths)).encode())
        for index in sorted({0, len(self) - 1}) if "pixel_values" in self[0] else range(len(self)):
            for value in self[index].values():
                digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return -(-self.examples // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        start = index * self.batch_size
        return self.build(range(start, min(start + self.batch_size, self.examples)))

    def share(self, world: World) -> Iterator[tuple[int, Batch]]:
        """This rank's batches, each with its place: every `size`-th, so that a batch is the same for any number of
        ranks."""
        for index in range(world.rank, len(self), world.size):
            yield index, self[index]


def load_batches(model: nn.Module, place: Origin, data: Data) -> Batches:
    """`data.samples` examples of the dataset, drawn uniformly with a seed from its name, as the model takes them.

    A dataset with a column `input_ids` is taken as it is; else text goes through the model's tokenizer (cut to
    `seq_len`, padded on the right to the longest of a batch, with its attention mask), images go through its
    processor, and an encoder-decoder model gets the same text on both sides. Raises `SettingsError` in one line for a
    dataset that cannot be read, is empty or has no column of the kind that the model takes, and for a `seq_len` beyond
    the model's positions.
    """
    rows, columns = _read(data.dataset)
    takes = set(inspect.signature(model.forward).parameters)
    images_alone = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    pictures = [name for name, kind in columns.items() if type(kind).__name__ == "Image"]
    if images_alone and not pictures:
        told = f"{type(model).__name__} takes images, and the dataset has none"
        raise SettingsError(f"{data.dataset}: {told} (its columns: {_listed(columns)})")
    if not images_alone and "input_ids" not in takes:
        wanted = getattr(model, "main_input_name", "other inputs")
        raise SettingsError(f"{type(model).__name__} takes {wanted}; the metric 'data' runs on texts and images alone")
    column = pictures[0] if images_alone else _text_column(columns, data.dataset)
    with_images = pictures if "pixel_values" in takes else []
    chosen = _drawn(rows.select_columns([column]), column, data)
    if images_alone:
        build = _images(rows, chosen, column, place)
        return Batches(len(chosen), data.batch_size, f"images of column '{column}'", None, build)
    _check_length(model, data.seq_len)
    sequences, pad = _encoded([rows[i][column] for i in chosen], column, place, data)
    # those of one length together: padding is time lost
    order = sorted((i for i, ids in enumerate(sequences) if ids), key=lambda i: (len(sequences[i]), i))
    if not order:
        raise SettingsError(f"{data.dataset}: the dataset is empty; its column '{column}' gives no token")
    known = _vocabulary(model)
    _check_ids(sequences, known, data.dataset)
    pad = pad if 0 <= pad < known else 0  # the mask hides it, but it is looked up
    build = _text_builder(model, [sequences[i] for i in order], pad)
    if with_images:
        build = _both(build, _images(rows, [chosen[i] for i in order], with_images[0], place))
    about = f"texts of column '{column}'" + (f", images of column '{with_images[0]}'" if with_images else "")
    return Batches(len(order), data.batch_size, about, tuple(len(sequences[i]) for i in order), build)


def _read(dataset: str) -> tuple[Any, dict[str, Any]]:
    """The rows (of the split `train`, else the first) and {column: its type}."""
    import datasets

    path = Path(dataset).expanduser()
    name, _, configuration = dataset.partition(":")  # org/name:configuration
    if path.suffix.lower() in LOADERS and not path.is_file():
        raise SettingsError(f"{dataset}: no such file; check the path of the dataset")
    if path.is_file() and path.stat().st_size == 0:
        raise SettingsError(f"{dataset}: the dataset is empty; its file holds nothing")
    try:
        with _quiet(path.exists()):
            if path.is_file() and path.suffix.lower() in LOADERS:
                found = datasets.load_dataset(LOADERS[path.suffix.lower()], data_files=str(path))
            elif path.exists():
                found = datasets.load_dataset(str(path))
            else:
                found = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise SettingsError(f"{dataset}: the dataset cannot be read ({first_line(error)})") from None
    rows = found["train"] if "train" in found else found[next(iter(found))]
    return rows, dict(rows.features)


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """No bars of the datasets library where reading takes a moment, or where bars were switched off."""
    from datasets.utils import logging

    shown = logging.is_progress_bar_enabled()
    if shown and (local or are_progress_bars_disabled()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _drawn(rows: Any, column: str, data: Data) -> list[int]:
    """The places of `samples` rows that hold something, drawn uniformly; all, where there are fewer."""
    seed = int.from_bytes(hashlib.sha256(Path(data.dataset).name.encode()).digest()[:8], "big")
    chosen: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
        if len(chosen) == data.samples:
            break
        value = rows[index][column]
        if value.strip() if isinstance(value, str) else value:
            chosen.append(index)
    if not chosen:
        raise SettingsError(f"{data.dataset}: the dataset is empty; no example of column '{column}' holds anything")
    return sorted(chosen)


def _encoded(values: list[Any], column: str, place: Origin, data: Data) -> tuple[list[list[int]], int]:
    """(token ids of each example, at most `seq_len` of them; the id that pads)."""
    if column == TOKENS:
        return [list(ids)[: data.seq_len] for ids in values], 0
    from transformers import AutoTokenizer

    tokenizer = place.load(AutoTokenizer.from_pretrained, trust_remote_code=False)
    if tokenizer.model_max_length < data.seq_len:
        raise _too_long(data.seq_len, tokenizer.model_max_length)
    return tokenizer(values, truncation=True, max_length=data.seq_len)["input_ids"], tokenizer.pad_token_id or 0


def _text_builder(model: nn.Module, sequences: list[list[int]], pad: int) -> Build:
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    masked = "attention_mask" in inspect.signature(model.forward).parameters
    return lambda indices: _padded([sequences[i] for i in indices], pad, masked=masked, decodes=decodes)


def _padded(sequences: list[list[int]], pad: int, *, masked: bool, decodes: bool) -> Batch:
    longest = max(len(ids) for ids in sequences)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    batch = {"input_ids": ids, **({"attention_mask": mask} if masked else {})}
    if decodes:
        batch |= {f"decoder_{name}": value for name, value in batch.items()}
    return batch


def _text_column(columns: dict[str, Any], dataset: str) -> str:
    texts = [name for name, kind in columns.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    if named := [name for name in (TOKENS, *TEXT_COLUMNS) if (name == TOKENS and name in columns) or name in texts]:
        return named[0]
    if len(texts) == 1:
        return texts[0]
    found = f"several columns of text ({', '.join(texts)})" if texts else "no column of text"
    raise SettingsError(f"{dataset}: {found}; its columns are {_listed(columns)}; name the right one 'text'")


def _listed(columns: dict[str, Any]) -> str:
    return ", ".join(columns) or "none"


def _check_length(model: nn.Module, seq_len: int) -> None:
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < seq_len:
        raise _too_long(seq_len, positions)


def _check_ids(sequences: list[list[int]], known: float, dataset: str) -> None:
    """On a GPU an id that the model does not know would end the process."""
    lowest, highest = (pick(pick(ids) for ids in sequences if ids) for pick in (min, max))
    if not 0 <= lowest <= highest < known:
        told = f"{dataset}: token {lowest if lowest < 0 else highest} is none of the model's {known:,}"
        raise SettingsError(f"{told}; take a dataset that its own tokenizer has made, or one of text")


def _vocabulary(model: Any) -> float:
    """Rows of the table of tokens, which may be more than the configuration says; infinite where nothing tells."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    known = getattr(table, "num_embeddings", getattr(_text_config(model), "vocab_size", None))
    return known if isinstance(known, int) else math.inf


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _too_long(seq_len: int, positions: int) -> SettingsError:
    return SettingsError(f"seq_len {seq_len} is longer than the model's {positions} positions; give at most that")


def _images(rows: Any, chosen: list[int], column: str, place: Origin) -> Build:
    from transformers import AutoImageProcessor

    # the name itself may be a stand-in that asks for torchvision
    processor = place.load(
        lambda *args, **more: AutoImageProcessor.from_pretrained(*args, **more), trust_remote_code=False
    )

    def build(indices: Sequence[int]) -> Batch:
        pictures = [rows[chosen[i]][column].convert("RGB") for i in indices]
        return {"pixel_values": processor(images=pictures, return_tensors="pt")["pixel_values"]}

    return build


def _both(texts: Build, images: Build) -> Build:
    return lambda indices: texts(indices) | images(indices)
