"""What others have named, on a terminal."""

import re


CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and half of a pair of UTF-16, which no terminal can be sent


def visible(text: str) -> str:
    r"""A line where control characters are shown (`\x1b`, `\n`), so that no name moves the cursor or makes a line."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible_lines(text: str) -> str:
    """Several lines, each `visible`."""
    return "\n".join(map(visible, text.split("\n")))
