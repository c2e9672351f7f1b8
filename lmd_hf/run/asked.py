"""What a user asked for, checked before anything is done with it: one clear line for what is not what it should be."""

import dataclasses
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lmd_hf.errors import SettingsError, SourceError
from lmd_hf.records import Data, Settings


Kind = tuple[type | tuple[type, ...], str]  # the type of a value, and what it is called
SWITCH, WHOLE, NUMBER, TEXT = (bool, "True or False"), (Integral, "a whole number"), (Real, "a number"), (str, "a text")
KINDS: dict[type, Kind] = {bool: SWITCH, int: WHOLE, float: NUMBER, str: TEXT}


def hub_id(text: str) -> str:
    """The id of a repository as it is; `SourceError` for what can be none."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise SourceError(f"{text}: not the id of a repository on the Hub; write org/name") from None
    return text


def check_model(model: Any, *, revision: str | None = None, subfolder: str = "") -> None:
    """`SettingsError` for what can be no model, a revision of what is on this machine, and a folder that leads out of
    its repository."""
    from torch import nn  # here, for reports are read without torch

    from lmd_hf.weights.source import FileSource

    if not isinstance(model, (str, Path, nn.Module, FileSource)):
        kinds = "a Hub id, a folder, a weight file or a torch module"
        raise SettingsError(f"the model is of the type {type(model).__name__}; give {kinds}")
    is_local = isinstance(model, nn.Module) or (isinstance(model, (str, Path)) and Path(model).expanduser().exists())
    if revision is not None and is_local:
        name = type(model).__name__ if isinstance(model, nn.Module) else model
        raise SettingsError(
            f"{name}: is on this machine, and only repositories on the Hub have revisions; leave it out"
        )
    if (path := PurePosixPath(subfolder)).is_absolute() or ".." in path.parts:
        raise SettingsError(f"subfolder is '{subfolder}'; give a folder inside the repository")


def check_type(name: str, value: Any, kind: Kind, hint: str = "") -> None:
    """`SettingsError` for a value of another kind; True is no number."""
    if not isinstance(value, kind[0]) or (isinstance(value, bool) and kind is not SWITCH):
        raise _wrong(name, value, kind[1], hint)


def check_types(record: Settings | Data) -> None:
    """`SettingsError` for a field whose value is of another kind than its default."""
    for field in dataclasses.fields(record):
        value, hint = getattr(record, field.name), field.metadata.get("help", "")
        if isinstance(field.default, tuple):
            texts(field.name, value, hint)
        elif field.default is not None:
            check_type(field.name, value, KINDS[type(field.default)], hint)
        elif value is not None:
            check_type(field.name, value, (field.metadata["fields"], "the name of a dataset, or a Data"))


def texts(name: str, value: Any, hint: str = "") -> tuple[str, ...]:
    """The texts of a collection; `SettingsError` for what is none, such as a single text."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise _wrong(name, value, "a tuple of names", hint)
    found = tuple(value)
    for each in found:
        check_type(f"one of {name}", each, TEXT, hint)
    return found


def _wrong(name: str, value: Any, wanted: str, hint: str) -> SettingsError:
    shown = " ".join(repr(value).split())[:60]
    return SettingsError(f"{name} is {shown}; give {wanted}" + (f": {hint}" if hint else ""))
