"""Whether to write to a repository at all: a pure decision from what it looks like."""

import re
from dataclasses import dataclass
from typing import Literal

import yaml

from lmd_hf.hub.metadata import BAD_YAML, find_block


TITLE = "Add a Layer Matrix Decomposition section to the model card"
_NO = "false|no|off|n|0"  # as YAML or people write it
_NO_LINE = re.compile(
    rf"""^[ \t]*["']?lmd["']?[ \t]*:[ \t]*["']?(?:{_NO})["']?[ \t]*(?:#.*)?\r?$""", re.MULTILINE | re.IGNORECASE
)
Marks = dict[str, str]  # what the begin marker of a section says: weights, numbers, lmd_hf, commit


@dataclass(frozen=True)
class Pull:
    """A pull request with our title, or with our section in its card (`marks`, else `None`). `card` is the card on its
    branch while that is open, which others may have changed."""

    number: int
    author: str
    status: str
    marks: Marks | None
    card: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether its maintainers have still to decide."""
        return self.status in ("open", "draft")


@dataclass(frozen=True)
class Look:
    """A repository before anything is written: the commit of main, a digest of its weight files, its card (`None` if
    there is none), what that card's section says, the pull requests that concern us, and who we are (`None` without a
    token)."""

    repo_id: str
    commit: str
    weights: str
    card: str | None
    marks: Marks | None
    pulls: tuple[Pull, ...]
    me: str | None
    disabled: bool = False

    @property
    def ours(self) -> tuple[Pull, ...]:
        """The pull requests that we opened ourselves."""
        return tuple(pull for pull in self.pulls if self.me is not None and pull.author == self.me)


@dataclass(frozen=True)
class Decision:
    """`create` a pull request, `update` number `pull`, or do `nothing`; and why."""

    action: Literal["create", "update", "nothing"]
    reason: str
    pull: int | None = None


def decide(look: Look, marks: Marks, *, force: bool = False) -> Decision:
    """What may be done with a section that says `marks`; before the analysis, without `numbers`, what could be.

    Who opted out, or removed or refused the section, is left alone (`refusal`); what says the same already is not said
    again; an own open pull request is renewed in place; one that somebody else opened with the same numbers is theirs.
    """
    if no := refusal(look, force=force):
        return no
    if look.marks is not None and is_same(look.marks, marks):
        return Decision("nothing", "its card has these numbers")
    for pull in look.pulls:
        whose = "" if pull.author == look.me else f" of {pull.author}"
        if pull.is_open and pull.marks is not None and is_same(pull.marks, marks):
            return Decision("nothing", f"pull request #{pull.number}{whose} proposes these numbers", pull.number)
    if mine := [pull.number for pull in look.ours if pull.is_open]:
        return Decision("update", f"pull request #{min(mine)} is open with other numbers", min(mine))
    return Decision("create", "its card has no such section" if look.marks is None else "its card has other numbers")


def refusal(look: Look, *, force: bool = False) -> Decision | None:
    """What no numbers can change: an opt-out, a disabled repository and, unless `force`, an own pull request that was
    closed unmerged, or merged and its section removed later.

    An archive is not among them: the Hub has no such state of a repository (`ModelInfo` knows disabled, gated and
    private), and what its owner writes into the card's text nobody can rely on; `lmd: false` is the way to say it."""
    if look.disabled:
        return Decision("nothing", "the Hub has disabled this repository")
    if opted_out(look.card or ""):
        return Decision("nothing", "its card opts out (lmd: false)")
    last = max(look.ours, key=lambda pull: pull.number, default=None)
    if force or last is None:
        return None
    if last.status == "closed":
        return Decision("nothing", f"pull request #{last.number} was closed unmerged (--force asks again)", last.number)
    if last.status == "merged" and look.marks is None:
        return Decision("nothing", f"the section of #{last.number} was removed later (--force asks again)", last.number)
    return None


def is_same(there: Marks, here: Marks) -> bool:
    """Whether a section says what ours would: the same numbers or, before they are known, the same weights by the same
    version."""
    keys = ("numbers",) if "numbers" in here else ("weights", "lmd_hf")
    return all(there.get(key) == here[key] for key in keys)


def opted_out(card: str) -> bool:
    """Whether the card's metadata says `lmd: false`, or the like; in metadata that is not valid YAML, whether a line
    does."""
    found = find_block(card)
    if found is None:
        return False
    block = card[found.start : found.stop]
    try:
        metadata = yaml.safe_load(block)
    except BAD_YAML:
        return _NO_LINE.search(block) is not None
    return isinstance(metadata, dict) and any(
        str(key).lower() == "lmd" and isinstance(value, (str, int)) and re.fullmatch(_NO, str(value).strip().lower())
        for key, value in metadata.items()
    )
