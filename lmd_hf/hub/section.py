"""The section between its two markers, put into a card's text and taken out again: pure text, bytes kept elsewhere."""

import re
from dataclasses import dataclass

from lmd_hf.errors import FormatError
from lmd_hf.hub.metadata import BOM, find_block


VERSION = "1"
END = "<!-- lmd:end -->"
_BEGIN = re.compile(r"<!-- lmd:begin ([\w.=+ -]*) -->")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r|\Z)")
_FENCE = re.compile(r"( {0,3}(?:(?:[-*+]|\d{1,9}[.)]) {1,4})*)(`{3,}|~{3,})(.*)", re.DOTALL)
_RAW = re.compile(r" {0,3}<(pre|script|style|textarea)(?=[\s>])", re.IGNORECASE)
_COMMENT = re.compile(r" {0,3}<!--")


@dataclass(frozen=True)
class Place:
    """Where a card's section lies, from its begin marker to the line break after its end marker, and what the marker
    says of it (`commit`, `lmd_hf`; `gap`: how many characters of line breaks before it came with it)."""

    start: int
    stop: int
    fields: dict[str, str]


def find(card: str) -> Place | None:
    """The section of a card; markers inside code blocks are none.

    Raises `FormatError` where there are two, or one that does not end, as after a merge by hand: a person has to decide
    then what is ours.
    """
    places: list[Place] = []
    begun: tuple[int, dict[str, str]] | None = None
    for start, stop in _open_lines(card)[0]:
        line = card[start:stop].rstrip(" \t\r\n")  # editors leave blanks
        if begin := _BEGIN.fullmatch(line):
            if begun is not None:
                break
            begun = start, dict(pair.split("=", 1) for pair in begin.group(1).split() if "=" in pair)
        elif line == END and begun is not None:
            places.append(Place(begun[0], stop, begun[1]))
            begun = None
    if begun is not None or len(places) > 1:
        raise FormatError("README.md has several LMD sections, or one without its end; remove its lmd markers by hand")
    return places[0] if places else None


def place(card: str, body: str, **fields: str) -> str:
    """The card with this section: where the old one was, else at its end. Line breaks are the card's own.

    `fields` go into the begin marker (letters, digits, `.+-_`). Raises `FormatError` as `find` does, and where the card
    ends inside a code block or a comment that it never closes, which would swallow the section.
    """
    newline = next((style for style in ("\r\n", "\n", "\r") if style in card), "\n")
    old = find(card)
    if old is None and (unclosed := _open_lines(card)[1]):
        raise FormatError(f"README.md ends inside {unclosed} that is never closed; close it first")
    before, after = (card, "") if old is None else (card[: old.start], card[old.stop :])
    gap = newline * (2 - _breaks_at_end(card)) if old is None and card else ""
    room = str(len(gap)) if old is None else old.fields.get("gap", "0")
    marks = " ".join(f"{name}={value}" for name, value in ({"v": VERSION} | fields | {"gap": room}).items())
    begin = f"<!-- lmd:begin {marks} -->"
    if not _BEGIN.fullmatch(begin):
        raise ValueError(f"a marker takes letters, digits and .+-_ alone, got {begin!r}")
    end = "" if old is not None and not card[: old.stop].endswith(("\n", "\r")) else newline
    return before + gap + newline.join([begin, *body.strip("\n").split("\n"), END]) + end + after


def remove(card: str) -> str:
    """The card without its section, and without the line breaks that came with it: what it was before."""
    old = find(card)
    if old is None:
        return card
    before = card[: old.start]
    gap = old.fields.get("gap", "")
    came = int(gap) if gap.isdigit() else 0
    kept = len(before.rstrip("\r\n"))  # a person may have moved the section: nothing but line breaks is taken
    return before[: max(kept, len(before) - came)] + card[old.stop :]


def _breaks_at_end(card: str) -> int:
    """How many line breaks end the card, two at most: two make an empty line."""
    tail = re.search(r"(?:\r\n|\n|\r)*\Z", card)
    return min(2, len(re.findall(r"\r\n|\n|\r", tail.group() if tail else "")))


def _open_lines(card: str) -> tuple[list[tuple[int, int]], str]:
    """(start, stop) of every line outside code blocks and comments that span lines, and what is still open at the end:
    "" or its name. CommonMark's rules for fences, also those that begin a list item and end with it, and for HTML
    blocks of kinds 1 and 2."""
    lines: list[tuple[int, int]] = []
    name, closing, inside = "", re.compile(""), 0  # `inside`: where the text of the list item begins
    metadata = find_block(card)
    for match in _LINE.finditer(card, metadata.end if metadata else int(card.startswith(BOM))):
        text = match.group()
        if not text:
            continue
        if name and inside and text.strip() and len(text) - len(text.lstrip(" ")) < inside:
            name = ""
        if name:
            if closing.search(text):
                name = ""
            continue
        inside = 0
        if (fence := _FENCE.match(text)) and not (fence[2][0] == "`" and "`" in fence[3]):
            inside = len(fence[1]) if fence[1].strip() else 0
            end = rf"^ {{0,{inside + 3}}}{fence[2][0]}{{{len(fence[2])},}}[ \t]*[\r\n]*\Z"
            name, closing = "a code block", re.compile(end)
        elif (raw := _RAW.match(text)) and f"</{raw[1].lower()}>" not in text.lower():
            name, closing = f"a <{raw[1].lower()}>", re.compile(rf"</{raw[1]}>", re.IGNORECASE)
        elif _COMMENT.match(text) and "-->" not in text:
            name, closing = "a comment", re.compile("-->")
        else:
            lines.append(match.span())
    return lines, "" if inside else name
