"""Settings as options of the command line, and back: the records are the only list of them."""

import argparse
import dataclasses
from typing import Any

from lmd_hf.errors import SettingsError


Parser = argparse.ArgumentParser | argparse._ArgumentGroup
Field = dataclasses.Field[Any]


def add_settings(parser: Parser, record: Any, names: tuple[str, ...] = ()) -> None:
    """An option for every field of a record, those of the records that it holds too; with `names` for these alone."""
    for field in dataclasses.fields(record):
        if field.name in names or not names:
            for setting in _settings_in(field):
                _add_setting(parser, setting)


def chosen_settings(record: Any, options: argparse.Namespace, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """{field: what was chosen}, of these fields or of all; a record that one holds is `None` where all is as by
    default."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        if names and field.name not in names:
            continue
        values = {setting.name: getattr(options, setting.name) for setting in _settings_in(field)}
        held = field.metadata.get("fields")
        chosen[field.name] = values[field.name] if held is None else _recorded(held, values)
    return chosen


def changed_settings(record: Any, options: argparse.Namespace, names: tuple[str, ...] = ()) -> list[str]:
    """The settings, of these fields or of all, that are not as by default."""
    fields = [field for field in dataclasses.fields(record) if field.name in names or not names]
    settings = [setting for field in fields for setting in _settings_in(field)]
    return [setting.name for setting in settings if getattr(options, setting.name) != setting.default]


def refuse_for_saved(model: str, changed: list[str]) -> None:
    """`SettingsError` for options that cannot change what was saved."""
    if changed:
        option = changed[0].replace("_", "-")
        raise SettingsError(f"{model}: saved, so --{option} changes nothing; leave it out, or name the model itself")


def _settings_in(field: Field) -> tuple[Field, ...]:
    """A setting itself, or those of the record that it holds."""
    record = field.metadata.get("fields")
    return (field,) if record is None else dataclasses.fields(record)


def _add_setting(parser: Parser, field: Field) -> None:
    if isinstance(field.default, bool):
        parser.add_argument(f"--{field.name}", action="store_true", help=field.metadata["help"])
        return
    is_list = isinstance(field.default, tuple)
    shown = field.metadata.get("unset", "all") if field.default in ("", ()) else field.default
    parser.add_argument(
        f"--{field.name.replace('_', '-')}",
        default=field.default,
        choices=field.metadata.get("choices"),
        type=_comma_list if is_list else type(field.default),
        metavar=None if "choices" in field.metadata else field.name.upper(),
        help=f"{field.metadata['help']} (default: {shown})",
    )


def _comma_list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _recorded(record: Any, values: dict[str, Any]) -> Any:
    """The record of these options; `None` if all are as they are by default."""
    made = record(**values)
    return None if made == record() else made
