"""What an experiment found, as a frozen value, and its three renderings: JSON, Markdown and a folder of files."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lmd_hf.report.files import text_writer
from lmd_hf.report.plain import plain


if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, JSON = "report.md", "outcome.json"
SPREAD = " sd"  # what the column of standard deviations is called after its means
DOTS_PER_INCH = 100  # small files: these figures have no fine detail
Cell = str | int | float | bool | None
Row = Mapping[str, Cell]


@dataclasses.dataclass(frozen=True)
class Check:
    """One claim with its rule, what was found, and whether the rule holds for the numbers.

    What is no part of the expectation under test, such as a further control, does not decide the verdict.
    """

    expected: str
    found: str
    agrees: bool
    decides: bool = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`checks` in order of importance; `tables` {title: rows, each {column: value}}; `figures` {name: figure}.

    `method` says what was done in a few plain sentences; the question is the catalogue's.
    """

    name: str
    question: str
    method: str
    checks: tuple[Check, ...]
    seeds: tuple[int, ...]
    tables: Mapping[str, Sequence[Row]]
    figures: "Mapping[str, Figure]" = dataclasses.field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether every check that decides agrees."""
        return all(check.agrees for check in self.checks if check.decides)

    @property
    def expected(self) -> str:
        """What was expected: the checks that decide."""
        return "; ".join(check.expected for check in self.checks if check.decides)

    @property
    def found(self) -> str:
        """What was found, in the same order."""
        return "; ".join(check.found for check in self.checks if check.decides)

    def to_dict(self) -> dict[str, Any]:
        """{name, expected, found, agrees, seeds, tables}; the first table holds the checks one by one."""
        checks = [plain(check) for check in self.checks]
        return {
            "name": self.name,
            "expected": self.expected,
            "found": self.found,
            "agrees": self.agrees,
            "seeds": list(self.seeds),
            "tables": {"checks": checks, **{title: list(rows) for title, rows in self.tables.items()}},
        }

    def to_markdown(self) -> str:
        """The report: question, checks, method, tables and figures."""
        parts = [
            f"# {self.name}",
            self.question,
            f"Agrees: **{verdict(self.agrees)}**",
            _checks_table([check for check in self.checks if check.decides]),
            f"{self.method} Seeds: {_numbers(self.seeds)}; ± and sd are standard deviations over them.",
            *(f"![{name}]({name}.png)" for name in self.figures),
        ]
        if further := [check for check in self.checks if not check.decides]:
            parts += ["## further controls, no part of the verdict", _checks_table(further)]
        for title, rows in self.tables.items():
            parts += [f"## {title}", _markdown_table(rows)]
        parts.append(f"Made by `lmd-hf reproduce {self.name} --seeds {len(self.seeds)}`.")
        return "\n\n".join(parts) + "\n"


def verdict(agrees: bool) -> str:
    """`yes` or `no`."""
    return "yes" if agrees else "no"


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """`mean ± standard deviation` over seeds; of one value, the value."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def counted(holds: Sequence[bool]) -> str:
    """`on 9 of 10`."""
    return f"on {sum(holds)} of {len(holds)}"


def averaged(column: str, values: Sequence[float]) -> dict[str, Cell]:
    """Two columns of a table: the mean over seeds, and beside it the standard deviation (`None` of one value)."""
    deviation = significant(statistics.stdev(values)) if len(values) > 1 else None
    return {column: significant(statistics.fmean(values)), column + SPREAD: deviation}


def significant(value: float, digits: int = 5) -> float:
    """The value to so many significant digits: what a table holds."""
    return float(f"{value:.{digits}g}")


def outcome_writers(outcome: Outcome) -> dict[str, Callable[[Path], None]]:
    """{file name: what writes it}: report.md, outcome.json and a PNG for each figure."""

    def picture(figure: "Figure") -> Callable[[Path], None]:
        return lambda path: figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})

    return {
        REPORT: text_writer(outcome.to_markdown()),
        JSON: text_writer(json.dumps(outcome.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        **{f"{name}.png": picture(figure) for name, figure in outcome.figures.items()},
    }


def index_page(folder: Path, names: Sequence[str]) -> str:
    """The page over the experiments whose outcome.json lies in a subfolder of their name."""
    table = index_table(folder, names)
    return f"# The paper's experiments\n\n{table}\n\nMade by `lmd-hf reproduce --all --out DIR`.\n"


def index_table(folder: Path, names: Sequence[str], *, link: str = "") -> str:
    """One line each: the first rule, what was found of it, how many rules hold and whether all do; `link` leads to
    `folder` from the page."""
    rows = []
    for name in names:
        if (folder / name / JSON).is_file():
            outcome = json.loads((folder / name / JSON).read_text(encoding="utf-8"))
            rules = [check for check in outcome["tables"]["checks"] if check["decides"]]
            hold = f"{sum(rule['agrees'] for rule in rules)} of {len(rules)}"
            first = rules[0]
            page = f"[{name}]({link}{name}/{REPORT})"
            rows.append((page, first["expected"], first["found"], hold, verdict(outcome["agrees"])))
    headers = ("experiment", "first of its rules", "found", "rules that hold", "agrees")
    return tabulate(rows, headers=headers, tablefmt="github")


def _checks_table(checks: Sequence[Check]) -> str:
    rows = [(check.expected, check.found, verdict(check.agrees)) for check in checks]
    return tabulate(rows, headers=("expected", "found", "agrees"), tablefmt="github")


def _markdown_table(rows: Sequence[Row]) -> str:
    shown = [{key: _with_spread(key, row) for key in row if not _is_spread(key, row)} for row in rows]
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)


def _is_spread(key: str, row: Row) -> bool:
    return key.endswith(SPREAD) and key.removesuffix(SPREAD) in row


def _with_spread(key: str, row: Row) -> str:
    """The cell, and in the same one its deviation over seeds where the row has that."""
    deviation = row.get(key + SPREAD)
    return _cell(row[key]) if deviation is None else f"{_cell(row[key])} ± {deviation:.2g}"


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return verdict(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(seeds: Sequence[int]) -> str:
    consecutive = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}…{seeds[-1]}" if consecutive and len(seeds) > 2 else ", ".join(map(str, seeds))
