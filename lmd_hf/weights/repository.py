"""Which files of a repository hold its weights, and what its index and its configuration say of them."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lmd_hf.errors import FormatError, SourceError
from lmd_hf.records import TensorRef


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".gguf", *PICKLES)
TRAINING_STATE = (
    r"(?:training_args|optim(?:izer)?|scheduler|scaler|rng_state|random_states|trainer_state|sampler|dl_state_dict|"
    r"custom_checkpoint)(?:_\d+)?\b.*"
)
STATE = "trainer_state.json"
STATE_BYTES = 100e6  # more than a loss curve of a million points
PARAMS = "params.json"  # which says how wide LLaMA's own files, `consolidated.00.pth` …, are when joined
INDEX = "model.safetensors.index.json"
NAMED = 5  # files that a note names before it counts

# what trainings over several processes leave instead of whole weights, and the way to those
IN_PARTS = {
    r"pytorch_model_fsdp_\d+|.*\.distcp": "each process has saved its part; train with fsdp_state_dict_type "
    "FULL_STATE_DICT, or join the parts: accelerate merge-weights PARTS OUT",
    r"zero_to_fp32\.py": "DeepSpeed has saved each process's part; set stage3_gather_16bit_weights_on_model_save in "
    "its configuration, or join the parts with the zero_to_fp32.py there",
}


def weight_files(names: list[str], where: str) -> list[str]:
    """Which of a repository's files hold the weights: the index of its shards, or the files. `SourceError` if none.

    Safetensors before pickles before GGUF; `model…` before others; plain files before a variant such as
    `model.fp16.safetensors`; the layout of transformers before the authors' own `consolidated` one.
    """
    names = [name for name in names if "/" not in name and not re.fullmatch(TRAINING_STATE, name)]
    for endings in ((".safetensors",), PICKLES):
        found = _of_kind(names, endings)
        if is_sliced(found) and (PARAMS not in names or endings != PICKLES):
            remedy = "read the repository's safetensors files, or join the slices with their authors' script"
            raise SourceError(f"{where}: {len(found)} files each hold a slice of every matrix; {remedy}")
        if found:
            return found
    quantised = [name for name in names if name.endswith(".gguf")]
    if len(quantised) > 1:
        raise SourceError(f"{where}: holds {len(quantised)} GGUF files; give one of them: {', '.join(quantised[:9])}")
    if quantised:
        return quantised
    adapter = [name for name in names if name in ("adapter_model.safetensors", "adapter_model.bin")]
    if adapter:
        return [max(adapter)]
    for parts, said in IN_PARTS.items():
        if any(re.fullmatch(parts, name) for name in names):
            raise SourceError(f"{where}: no whole weights in it; {said}")
    raise SourceError(f"{where}: no weights in it; save the model with save_pretrained first")


def is_sliced(names: list[str]) -> bool:
    """Whether each of these files holds a slice of every matrix."""
    return len(names) > 1 and re.match(r"consolidated\.\d+\.", names[0]) is not None


def _of_kind(names: list[str], endings: tuple[str, ...]) -> list[str]:
    """The best index or files of one kind; none if there is none."""

    def rank(name: str) -> tuple[bool, bool, str]:
        return _plain_name(name) != name, not name.startswith(("model", "pytorch_model")), name

    kinds = "|".join(map(re.escape, endings))
    indexes = [n for n in names if re.search(rf"({kinds})\.index(\.[\w-]+)?\.json$", n) and not n.startswith("cons")]
    files = [name for name in names if name.endswith(endings) and not name.startswith("adapter_model")]
    plain = [name for name in files if not name.startswith("consolidated")]
    whole = [name for name in plain if name in ("model.safetensors", "pytorch_model.bin")]
    if whole or indexes:
        return [whole[0] if whole else min(indexes, key=rank)]
    kept = {_plain_name(name): name for name in sorted(plain, key=rank, reverse=True)}  # of variants the first
    return sorted(kept.values()) or sorted(files)


def _plain_name(name: str) -> str:
    """The name without its variant: `model.fp16.safetensors`, `model.safetensors.index.fp16.json`."""
    return re.sub(r"^([\w-]+)\.[\w-]+(?=\.\w+$)|(?<=\.index)\.[\w-]+(?=\.json$)", r"\1", name)


def unread_files(present: list[str], read: list[str]) -> tuple[str, ...]:
    """A note that names the weight files which are there, here or in folders below, but not read.

    Not named are a pickle beside safetensors of the same weights, what a trainer keeps of its own state, and pickles
    of other names in folders below, which may hold anything.
    """
    paths = [path for path in map(PurePosixPath, present) if not re.fullmatch(TRAINING_STATE, path.name)]
    safetensors = {path for path in paths if path.suffix == ".safetensors"}
    folders = {path.parent for path in safetensors}

    def told(path: PurePosixPath) -> bool:
        if path.suffix not in PICKLES:
            return path.suffix in WEIGHTS
        if path.match("*pytorch_model*"):
            return path.parent not in folders
        return path.parent == PurePosixPath() and path.with_suffix(".safetensors") not in safetensors

    unread = sorted({str(path) for path in paths if told(path)} - set(read))
    if not unread:
        return ()
    named = ", ".join(unread[:NAMED]) + (f" and {len(unread) - NAMED} more" if len(unread) > NAMED else "")
    return (f"weight files not read: {named}" + ("; --subfolder reads a folder" if "/" in "".join(unread) else ""),)


@dataclass(frozen=True)
class Index:
    """model.safetensors.index.json: which shards there are, and which tensors they promise."""

    shards: list[str]
    promised: set[str]
    where: str

    def check(self, tensors: tuple[TensorRef, ...]) -> None:
        """`FormatError` if the shards do not hold every tensor that the index promises."""
        if missing := sorted(self.promised - {tensor.name for tensor in tensors}):
            raise FormatError(
                f"{self.where}: promises {len(missing)} tensors that no shard holds, first '{missing[0]}'; "
                "the shards belong to another version: download them again"
            )


def read_index(data: bytes, where: str) -> Index:
    """The index of a sharded checkpoint; `FormatError` if it is none, or names a file elsewhere."""
    try:
        weight_map = json.loads(data)["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{where}: not an index of shards (JSON with a weight_map); download it again") from None
    if not shards or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.(?:safetensors|bin)", name) for name in shards
    ):
        raise FormatError(f"{where}: the weight_map must name weight files beside it; download it again")
    return Index(shards, set(weight_map), where)


def read_config(path: Path) -> dict[str, Any] | None:
    """config.json as a dictionary, `None` if there is none; `FormatError` if it is not a JSON object."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_untagged)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: not a JSON object; download it again")
    return config


def _untagged(values: dict[str, Any]) -> Any:
    """A JSON object as it is, but for those that transformers writes in place of infinity and NaN:
    {"__float__": "Infinity"}, as in the `time_step_limit` of Mamba-2."""
    tag = values.get("__float__")
    return float(tag) if len(values) == 1 and tag in ("Infinity", "-Infinity", "NaN") else values


def architectures(config: dict[str, Any] | None) -> tuple[str, ...]:
    """The model classes that a configuration names."""
    named = (config or {}).get("architectures")
    return tuple(map(str, named)) if isinstance(named, list) else ()


def config_file(names: list[str]) -> str:
    """The name of the configuration that goes with these weight files."""
    if is_sliced(names):
        return PARAMS
    return "adapter_config.json" if names[0].startswith("adapter_model") else "config.json"


def newest_state(names: Iterable[str]) -> str | None:
    """The trainer's state that belongs to the weights: the one beside them, else the last `checkpoint-N` folder's."""
    numbered = {int(found[1]): name for name in names if (found := re.fullmatch(rf"checkpoint-(\d+)/{STATE}", name))}
    return STATE if STATE in names else numbered[max(numbered)] if numbered else None


def check_state(name: str, size: int | None) -> None:
    """`FormatError` for a trainer's state that is too large to be one, before it is fetched or read."""
    if size is not None and size > STATE_BYTES:
        raise FormatError(f"{name}: {size / 1e6:.0f} MB, which no loss curve needs")


def find_state(folder: Path) -> tuple[str, Path] | None:
    """(its name, where it is) of the trainer's state in a folder or in the last of its checkpoints."""
    paths = [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]
    name = newest_state([path.relative_to(folder).as_posix() for path in paths if path.is_file()])
    return None if name is None else (name, folder / name)
