"""Model cards as people write them, made from a seed: metadata, encodings, bodies and line ends of many kinds."""

import random


METADATA = [
    "license: mit\ntags:\n- a\n- b",
    "license: mit\ntags:\n  - a   # why\n  - 'b: c'\nlanguage: en",
    'tags: [a, "b", c]  # flow\nlicense: mit',
    "tags: []\nlicense: mit",
    "tags: [\n  a,\n  b,\n]\nlicense: apache-2.0",
    "tags: text-generation\nlicense: mit",
    "tags: 'quoted one'",
    "tags:\nlicense: mit",
    "tags: # none yet\nlicense: mit",
    "tags: null\nlicense: mit",
    "tags: ~",
    "license: mit\nmodel-index:\n- name: x\n  results:\n  - metrics:\n    - {type: acc, value: 0.10}",
    "# only a comment",
    "language:\n- en\n- no\nversion: 1.10\nreleased: 2024-01-02\ndescription: |\n  two\n  lines",
    "description: >-\n  folded\n  text\ntags:\n- x\n\n# the end",
    "tags:\n- lmd\nlicense: mit",
    "tags: [a, lmd]",
    '"tags":\n- a',
    "? tags\n: - a",
    "tags: &t\n- a\nother: *t",
    "tags: a, b",
    "tags:\n- a\ntags:\n- b",
    "tags: {a: 1}",
    "tags: |\n  block",
    "license: mit\n  bad: indent: here\n- x",
    "- a\n- list",
    "tags: [a",
    "emoji: \U0001f600\ntags:\n- ünïcode",
    "{license: mit, tags: [a]}",
    "\ttabs: 1",
    "x: !!int _",
    "x: !!bool maybe",
    "x: !!timestamp soon",
    f"x: {'[' * 1000}{']' * 1000}",
]
BODIES = [
    "",
    "# Model\n\nText.\n",
    "# Model\n\nNo line break at the end",
    "\n\n\n",
    "   ",
    "<div align='center'>\n<img src=x>\n</div>\n\n<details><summary>s</summary>\n\nx\n\n</details>\n",
    "```python\nprint('<!-- lmd:begin v=1 -->')\n<!-- lmd:begin v=1 -->\n<!-- lmd:end -->\n```\n",
    "~~~~\n```\n~~~\n~~~~\n\nAfter.\n",
    "<!-- a comment\nover lines -->\n\nText `<!--` here.\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "---\nnot: metadata\n---\n",
    "<pre>\nraw\n</pre>\ntail",
    "Inline ``` not a fence ``` text\n",
    "- ```bash\n  pip install x\n  ```\n- done\n\n10. ~~~\n\n    y\n    ~~~\n",
    "1. - ```\n     not closed, but its item ends\n\nText.\n* ``` inline ```\n+ ~~~\n  the last one\n",
    "text\x0bwith\x0codd\u2028separators\x85\n",
    "bad bytes \udcff\udcfe kept\n",
    "x" * 1_000_000,
]
OPEN = ["```\ncode", "<!-- begun\n", "<pre>\nx\n", "~~~ sh\n```\n"]  # bodies that never close what they open


def cards(count: int, seed: int = 0) -> list[str]:
    """So many cards; every kind of metadata and body at least once."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        block = METADATA[index % len(METADATA)] if index % 6 else None
        body = BODIES[index % len(BODIES)] if index < len(BODIES) * len(METADATA) else draw.choice(BODIES)
        if len(body) > 1000 and index > 2 * len(BODIES):
            body = draw.choice(BODIES[:-1])
        text = body if block is None else f"---\n{block}\n---\n{draw.choice(['', chr(10)])}{body}"
        text = draw.choice(["", "", "", "\ufeff"]) + text.replace("\n", draw.choice(["\n", "\n", "\r\n", "\r"]))
        made.append(text)
    return made
