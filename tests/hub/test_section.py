"""The section and the tag are put in and taken out; not one byte elsewhere changes."""

import difflib
import re

import cards
import pytest
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from lmd_hf.errors import FormatError
from lmd_hf.hub.etiquette import opted_out
from lmd_hf.hub.metadata import add_tag
from lmd_hf.hub.section import END, find, place, remove


BODY = "## LMD\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
CARDS = cards.cards(300)
NOT_EDITED = {  # metadata → why its tags stay as they are
    "? tags\n: - a": "cannot be edited in place",
    "tags: &t\n- a\nother: *t": "cannot be edited in place",
    "tags: {a: 1}": "neither a list nor a text",
    "license: mit\n  bad: indent: here\n- x": "not valid YAML",
    "- a\n- list": "not a mapping",
    "tags: [a": "not valid YAML",
    "\ttabs: 1": "not valid YAML",
    "x: !!int _": "not valid YAML",
    "x: !!bool maybe": "not valid YAML",
    "x: !!timestamp soon": "not valid YAML",
    f"x: {'[' * 1000}{']' * 1000}": "not valid YAML",
}


def outside(before: str, after: str) -> list[str]:
    """The pieces of `before` that `after` lost."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return [before[i:j] for kind, i, j, _, _ in matcher.get_opcodes() if kind in ("delete", "replace")]


@pytest.mark.parametrize("index", range(len(CARDS)))
def test_every_byte_outside_the_section_stays_and_removing_it_restores_the_card(index):
    card = CARDS[index]
    once = place(card, BODY, commit="abc", lmd_hf="0.1.0")
    found = find(once)
    assert found is not None
    assert once.startswith(card)
    assert once[found.start : found.stop].replace("\r\n", "\n").replace("\r", "\n").strip("\n").endswith(END)
    assert found.fields["commit"] == "abc"
    assert place(once, BODY, commit="abc", lmd_hf="0.1.0") == once
    other = place(once, BODY + "\nmore", commit="def", lmd_hf="0.2.0")
    assert find(other).fields["commit"] == "def"
    assert remove(once) == card
    assert remove(other) == card


@pytest.mark.parametrize("index", range(len(CARDS)))
def test_the_tag_is_added_by_an_edit_or_there_is_a_reason(index):
    card = CARDS[index]
    edited, reason = add_tag(card, "lmd")
    if reason is not None:
        assert edited == card
        return
    assert add_tag(edited, "lmd") == (edited, None)
    old, new = (REGEX_YAML_BLOCK.search(text.removeprefix("\ufeff")) for text in (card, edited))
    was = (yaml.safe_load(old.group(2)) or {}) if old else {}
    now = yaml.safe_load(new.group(2))
    tags = was.get("tags") or []
    assert now.pop("tags") == [
        *([tags] if isinstance(tags, str) else tags),
        *(["lmd"] if "lmd" not in tags else []),
    ]
    was.pop("tags", None)
    assert now == was
    assert edited.startswith("\ufeff") == card.startswith("\ufeff")
    if len(card) < 5000 and not any(odd in card for odd in ("null", "~", "tags: |")):
        assert not [piece for piece in outside(card, edited) if piece.strip("'")]


@pytest.mark.parametrize("metadata", cards.METADATA)
def test_what_cannot_be_edited_says_why(metadata):
    card = f"---\n{metadata}\n---\n# Model\n"
    edited, reason = add_tag(card, "lmd")
    if metadata in NOT_EDITED:
        assert edited == card
        assert NOT_EDITED[metadata] in reason
    else:
        assert reason is None
        assert "lmd" in yaml.safe_load(REGEX_YAML_BLOCK.search(edited).group(2))["tags"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tags:\n  - a   # why\nx: 1", "tags:\n  - a   # why\n  - lmd\nx: 1"),
        ("tags: [a, 'b']  # c", "tags: [a, 'b', lmd]  # c"),
        ("tags: [\n  a,\n  b,\n]", "tags: [\n  a,\n  b,\n lmd]"),
        ("tags: one # c", "tags: [one, lmd] # c"),
        ("tags: # none", "tags: # none\n- lmd"),
        ("tags: null", "tags: [lmd]"),
        ("license: mit", "license: mit\ntags:\n- lmd"),
        ("tags: a, b", 'tags: ["a, b", lmd]'),
    ],
)
def test_the_edit_looks_as_a_person_would_have_made_it(before, after):
    assert add_tag(f"---\n{before}\n---\n", "lmd") == (f"---\n{after}\n---\n", None)


def test_blanks_behind_a_marker_are_no_reason_for_a_second_section():
    once = place("# x\n", BODY)
    assert place(once.replace("-->\n", "--> \t\n"), BODY) == once


def test_aliases_that_multiply_take_no_time():
    lists = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12))
    metadata = f"{lists}\nlmd: *a11\ntags:\n- b"
    assert not opted_out(f"---\n{metadata}\n---\n")
    assert add_tag(f"---\n{metadata}\n---\n", "lmd") == (f"---\n{metadata}\n- lmd\n---\n", None)


@pytest.mark.parametrize("body", cards.OPEN)
def test_a_card_that_would_swallow_the_section_is_refused(body):
    with pytest.raises(FormatError, match="never closed"):
        place("# x\n\n" + body, BODY)


@pytest.mark.parametrize(
    "text", ["<!-- lmd:begin v=1 -->\nx\n", "<!-- lmd:begin v=1 -->\n<!-- lmd:begin v=1 -->\n" + END]
)
def test_broken_or_doubled_sections_are_for_a_person(text):
    for act in (find, remove, lambda card: place(card, BODY)):
        with pytest.raises(FormatError, match="by hand"):
            act(text)


def test_two_sections_are_for_a_person():
    with pytest.raises(FormatError, match="several"):
        find(place("", BODY) + place("", BODY))


def test_a_section_that_a_person_moved_is_renewed_where_it_is():
    text = place("# Model\n", BODY)
    section = text[find(text).start :]
    moved = "# Model\n\nIntro." + "\n" + section + "\n## Usage\n"
    renewed = place(moved, "new")
    assert renewed.startswith("# Model\n\nIntro.\n<!-- lmd:begin")
    assert renewed.endswith("-->\n\n## Usage\n")
    assert re.search(r"gap=\d+ -->\nnew\n<!-- lmd:end -->", renewed)


def test_a_marker_takes_no_text_that_could_end_it():
    with pytest.raises(ValueError, match="letters, digits"):
        place("", BODY, commit="--> <script>")
