"""Pickled checkpoints (`pytorch_model.bin`, `consolidated.00.pth`): tensors only, mapped, never a Python object."""

import pickle
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lmd_hf.errors import FormatError, SourceError


INSIDE = ("state_dict", "model_state_dict", "module", "model")  # where trainers put the weights among other things


@lru_cache(maxsize=256)
def read_pickled(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a file that `torch.save` wrote, mapped into memory where its format allows.

    Only tensors and plain containers are unpickled (`weights_only`), so no code in the file can run. Raises
    `SourceError` if the file asks for more, `FormatError` if it is damaged or holds no tensors.
    """
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # written before torch 1.6, in a format that cannot be mapped
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        remedy = "load it with the library that wrote it, and save safetensors"
        raise SourceError(
            f"{path}: holds more than tensors, and what else is in a pickle can run code; {remedy}"
        ) from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path}: not a readable checkpoint ({reason}); download it again") from None
    tensors = _tensors(loaded)
    if not tensors:
        raise FormatError(f"{path}: no named tensors in it; is this file a checkpoint?")
    return tensors


def _tensors(loaded: object) -> dict[str, Tensor]:
    """The state dict in what was loaded, or in one of its usual places."""
    if not isinstance(loaded, dict):
        return {}
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor) and not value.is_sparse}
    inner = next((loaded[key] for key in INSIDE if isinstance(loaded.get(key), dict)), None)
    return tensors or _tensors(inner)


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
