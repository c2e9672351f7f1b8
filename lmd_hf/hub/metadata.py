"""One tag more in the YAML block of a model card, by an edit of its text: all else stays byte for byte.

A round trip through an object would rewrite comments, quotes, flow lists and the spelling of numbers.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from lmd_hf.errors import first_line


BOM = "\ufeff"
# of a date that is none, of `!!int _`, `!!bool x` and `!!timestamp x`, and of a thousand brackets
BAD_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
_ITEM = re.compile(r"[ \t]*-[ \t]+")  # what stands before an item of a block list, and nothing else on its line


@dataclass(frozen=True)
class Block:
    """The YAML of a card: `card[start:stop]`; `end` is where the card goes on behind its closing line."""

    start: int
    stop: int
    end: int
    newline: str


def find_block(card: str) -> Block | None:
    """The metadata at the head of a card, as huggingface_hub finds it, after a byte order mark if there is one."""
    bom = len(BOM) if card.startswith(BOM) else 0
    found = REGEX_YAML_BLOCK.search(card[bom:])
    if found is None:
        return None
    newline = "\r\n" if "\r\n" in found.group(1) else "\n"
    return Block(bom + found.start(2), bom + found.end(2), bom + found.end(), newline)


def add_tag(card: str, tag: str) -> tuple[str, str | None]:
    """The card with `tag` last among its tags, and `None`; or the card as it is, and the reason.

    Block lists, flow lists, single tags, empty and missing keys and missing blocks are edited in place. An edit counts
    only if the block, parsed again, holds what it held before and the tag: anchors, duplicate keys and whatever else is
    odd end in a reason, never in other metadata. A card that has the tag comes back as it is, without a reason.
    """
    found = find_block(card)
    if found is None:
        bom, text = (BOM, card[1:]) if card.startswith(BOM) else ("", card)
        newline = "\r\n" if "\r\n" in text else "\n"
        return bom + newline.join(("---", "tags:", f"- {tag}", "---", text)), None
    block = card[found.start : found.stop]
    try:
        before = yaml.safe_load(block) or {}
        root = yaml.compose(block, Loader=yaml.SafeLoader)
    except BAD_YAML as error:
        return card, f"the metadata is not valid YAML ({_problem(error)})"
    if not isinstance(before, dict):
        return card, "the metadata is not a mapping"
    tags = before.get("tags")
    listed = [] if tags is None else [tags] if isinstance(tags, str) else tags
    if not isinstance(listed, list):
        return card, "'tags' is neither a list nor a text"
    if tag in listed:
        return card, None
    wanted = {**before, "tags": [*listed, tag]}
    for edited in _edits(block, root, tag, found.newline):
        if _loads_as(edited, wanted):
            return card[: found.start] + edited + card[found.stop :], None
    return card, "the metadata is written in a way that cannot be edited in place"


def _edits(block: str, root: Any, tag: str, newline: str) -> list[str]:
    """Ways to write the tag, the most natural first; the caller keeps the first that means what it should."""
    keys = [] if root is None or not isinstance(root, yaml.MappingNode) else root.value
    values = [(key, value) for key, value in keys if key.value == "tags"]
    if not values:
        indent = " " * (0 if root is None else root.start_mark.column)
        lines = f"{indent}tags:{newline}{indent}- {tag}"
        first = lines + newline + block  # where the last value is a text that takes in the line break after it
        return [block + newline + lines, first] if block.strip() else [lines]
    key, value = values[-1]  # of duplicates, the one that counts
    start, stop = value.start_mark.index, value.end_mark.index
    raw = block[start:stop]
    if isinstance(value, yaml.SequenceNode):
        return _appended(block, value, tag, newline, flow=raw.rstrip().endswith("]"))
    if value.tag.endswith(":null"):
        under = f"{newline}{' ' * key.start_mark.column}- {tag}"
        return (
            [_after_line(block, key.end_mark.index, under)] if not raw else [block[:start] + f"[{tag}]" + block[stop:]]
        )
    return [block[:start] + f"[{text}, {tag}]" + block[stop:] for text in (raw, json.dumps(value.value))]


def _appended(block: str, value: yaml.SequenceNode, tag: str, newline: str, *, flow: bool) -> list[str]:
    if flow:
        close = value.end_mark.index - 1
        last = value.value[-1].end_mark.index if value.value else close
        comma = ", " if value.value and "," not in block[last:close] else " " if value.value else ""
        place = last if comma == ", " else close
        return [block[:place] + comma + tag + block[place:]]
    last_item = value.value[-1]
    begin = last_item.start_mark.index - last_item.start_mark.column
    before = _ITEM.match(block, begin)
    return [] if before is None else [_after_line(block, last_item.end_mark.index, newline + before.group() + tag)]


def _after_line(block: str, index: int, addition: str) -> str:
    """With `addition` at the end of the line that `index` is on, after its comment."""
    line = re.compile(r"[^\r\n]*").match(block, index)
    end = line.end() if line else index
    return block[:end] + addition + block[end:]


def _loads_as(block: str, wanted: dict[str, Any]) -> bool:
    try:
        return _spelled(yaml.safe_load(block)) == _spelled(wanted)
    except BAD_YAML:
        return False


def _spelled(metadata: dict[str, Any]) -> dict[str, str]:
    """Comparable: True is not 1, and NaN is NaN; what aliases share is written once, however often they multiply it."""
    return {str(key): yaml.safe_dump(value) for key, value in metadata.items()}


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or first_line(error)
    return f"{problem}, line {mark.line + 1}" if mark is not None else problem
