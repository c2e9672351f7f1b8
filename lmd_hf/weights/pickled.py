"""Pickled checkpoints (`pytorch_model.bin`, `consolidated.00.pth`): tensors only, mapped, never a Python object."""

import pickle
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmd_hf.errors import FormatError, SourceError, first_line


INSIDE = ("state_dict", "model_state_dict", "module", "model")  # where trainers put the weights among other things

Keys = tuple[Hashable, ...]  # the way to a tensor through dicts and lists


@dataclass(frozen=True)
class Pickled:
    """What one file holds, mapped for as long as this lives.

    `tensors` are the model's, by name, `unread` says of some of them why their entries cannot be read. `beside` counts
    the tensors of what is in the file and is not the model.
    """

    path: Path
    tensors: dict[str, Tensor]
    unread: dict[str, str]
    beside: dict[str, int]

    def notes(self) -> tuple[str, ...]:
        """A line that names what is in the file beside the model, if anything is."""
        if not self.beside:
            return ()
        named = ", ".join(f"{part} ({count} tensors)" if count > 1 else part for part, count in self.beside.items())
        return (f"{self.path.name}: not read beside its state dict: {named}",)


def read_pickled(path: Path) -> Pickled:
    """What `torch.save` wrote, mapped into memory where its format allows.

    The model is the dict under `state_dict`, `model_state_dict`, `module` or `model`, the first that is there, or one
    of these inside of it; else the whole. Its own entries are the tensors that a module would load; what lies deeper,
    is sparse or has no data is unread. Only tensors and plain containers are unpickled (`weights_only`), so no code in
    the file can run. Raises `SourceError` if the file asks for more, `FormatError` if it is damaged or no such dict
    holds a tensor.
    """
    found = dict(_walk(_load(path)))
    models = [keys[:-1] for keys in found if all(key in INSIDE for key in keys[:-1])]
    if not models:
        parts = ", ".join(sorted({str(keys[0]) for keys in found})[:9])
        inner = f" at its top or in {', '.join(INSIDE)}, but in {parts}; save one of them" if parts else " in it"
        raise FormatError(f"{path}: no named tensors{inner}; is this file a checkpoint?")
    model = min(models, key=lambda keys: [*(INSIDE.index(str(key)) for key in keys), len(INSIDE)])
    tensors: dict[str, Tensor] = {}
    unread: dict[str, str] = {}
    beside: Counter[str] = Counter()
    for keys, value in found.items():
        if keys[: len(model)] != model:
            apart = next(depth for depth, key in enumerate(keys) if key != model[depth])
            beside[".".join(map(str, keys[: apart + 1]))] += 1
            continue
        name = ".".join(map(str, keys[len(model) :]))
        while name in tensors:  # 1 and '1' are two keys
            name += " (again)"
        tensors[name] = value
        if reason := _why_unread(value, len(keys) - len(model)):
            unread[name] = reason
    return Pickled(path, tensors, unread, dict(beside))


def _load(path: Path) -> object:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # written before torch 1.6, in a format that cannot be mapped
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        remedy = "load it with the library that wrote it, and save safetensors"
        raise SourceError(
            f"{path}: holds more than tensors, and what else is in a pickle can run code; {remedy}"
        ) from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise FormatError(f"{path}: not a readable checkpoint ({first_line(error)}); download it again") from None


def _walk(loaded: object) -> Iterator[tuple[Keys, Tensor]]:
    """Every tensor in a dict, in its order, with the way to it; a container that comes twice, or holds itself, once."""
    seen: set[int] = set()
    rest: list[tuple[Keys, object]] = [((), loaded)] if isinstance(loaded, dict) else []
    while rest:
        keys, value = rest.pop()
        if isinstance(value, Tensor):
            yield keys, value.detach()
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            rest += reversed([((*keys, key), each) for key, each in items])


def _why_unread(value: Tensor, depth: int) -> str:
    """Why the entries of a tensor, `depth` keys below the model, cannot be read; "" if they can."""
    if value.is_meta:
        return "no data: it was saved from the meta device; load the model before it is saved"
    if value.layout != torch.strided or value.is_nested:
        return "stored sparse or nested; save it as a dense tensor"
    return "in a dict or list inside of the state dict; save it there under a name of its own" if depth > 1 else ""


def repeated(tensors: dict[str, Tensor]) -> dict[str, str]:
    """{name: the earlier name of the very same entries}: what `torch.save` stores once for several names."""
    first: dict[tuple[object, ...], str] = {}
    result = {}
    for name, value in tensors.items():
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
        if value.numel() and place in first:
            result[name] = first[place]
        else:
            first[place] = name
    return result
