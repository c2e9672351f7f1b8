"""Attention heads as text, as Markdown and as a figure."""

from collections.abc import Callable, Sequence

import numpy as np
from tabulate import tabulate

from lmd_hf.circuits import HeadReport, MlpReport
from lmd_hf.report.text import counted, rounded, spread


AUTO_ASSOCIATIVE = 0.9  # of symmetric energy and of the eigenvalue score, both: the head looks up its own kind
COPYING = 0.5  # of the copying score: most of what the head writes points the way of what it read
COLUMNS = ("layer", "head", "keys", "QK participation", "symmetric", "attraction", "σ₁(QK)", "copying", "capacity")
DATA_COLUMNS = ("k90", "class")
MEASURES: dict[str, Callable[[HeadReport], float | None]] = {
    "participation ratio of QK": lambda head: head.qk_participation_ratio,
    "symmetric energy of QK": lambda head: head.qk_symmetric_energy,
    "eigenvalue score of QK": lambda head: head.qk_eigenvalue_score,
    "copying score of OV": lambda head: head.copying_score,
}


def groups(heads: Sequence[HeadReport]) -> dict[str, list[HeadReport]]:
    """{stack and block: its heads}, in order of appearance."""
    found: dict[str, list[HeadReport]] = {}
    for head in heads:
        found.setdefault(" ".join(filter(None, (head.stack, head.block))), []).append(head)
    return found


def table(heads: Sequence[HeadReport], *, limit: int | None = None) -> str:
    """One line a head."""
    shown = heads[:limit] if limit is not None else heads
    columns = COLUMNS + (DATA_COLUMNS if any(head.hopfield_class for head in heads) else ())
    text = tabulate([_cells(head)[: len(columns)] for head in shown], headers=columns, disable_numparse=True)
    return f"{text}\n… and {len(heads) - len(shown)} more" if len(shown) < len(heads) else text


def _cells(head: HeadReport) -> tuple[str, ...]:
    two = rounded(2)
    return (
        "" if head.layer is None else str(head.layer),
        " ".join(filter(None, (head.stack, head.block, str(head.head)))),
        str(head.kv_head),
        rounded(1)(head.qk_participation_ratio),
        two(head.qk_symmetric_energy),
        two(head.qk_eigenvalue_score),
        _three_digits(head.inverse_temperature),
        two(head.copying_score),
        "–" if head.capacity_log10 is None else f"10^{head.capacity_log10:.2f}",
        rounded(1)(head.k90),
        head.hopfield_class or "–",
    )


def _three_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def summary(heads: Sequence[HeadReport]) -> list[str]:
    """The lines of a summary: what the heads of each stack and block are like, and by which conventions."""
    if not heads:
        return []
    return [*(_line(name, group) for name, group in groups(heads).items()), f"heads: {conventions(heads)}"]


def _line(name: str, heads: Sequence[HeadReport]) -> str:
    two = rounded(2)
    parts = [
        counted(len(heads), "head", "heads"),
        f"participation ratio of QK {spread([h.qk_participation_ratio for h in heads], rounded(1))}",
        f"symmetric energy {spread([h.qk_symmetric_energy for h in heads], two)} (0.5: none)",
        f"eigenvalue score {spread([h.qk_eigenvalue_score for h in heads], two)}",
        f"inverse temperature σ₁ {spread([h.inverse_temperature for h in heads], _three_digits)}",
        f"copying score of OV {spread([h.copying_score for h in heads], two)}",
    ]
    auto, copying = len(auto_associative(heads)), len(copiers(heads))
    counts = f"{auto} auto-associative (both scores ≥ {AUTO_ASSOCIATIVE}), {copying} copying (≥ {COPYING})"
    classes = "".join(f", {sum(h.hopfield_class == c for h in heads)} of class {c}" for c in _classes(heads))
    return f"{name}: {', '.join(parts)}; {counts}{classes}"


def mlp_lines(mlps: Sequence[MlpReport]) -> list[str]:
    """A line of a summary for the MLPs of each stack and block; nothing without any."""
    places = dict.fromkeys((mlp.stack, mlp.block) for mlp in mlps)
    lines = []
    for stack, block in places:
        group = [mlp for mlp in mlps if (mlp.stack, mlp.block) == (stack, block)]
        norms = f"values of length {spread([m.value_norm for m in group], rounded(2))}"
        cosines = [("keys", [m.key_value_cosine for m in group]), ("gates", [m.gate_value_cosine for m in group])]
        told = [f"{name} and values {spread(found, rounded(3))}" for name, found in cosines if any(found)]
        chance = max(mlp.chance for mlp in group)
        cosine = f"; mean cosine of {', of '.join(told)} (unrelated: 0 ± {chance:.1g})" if told else ""
        name = " ".join(filter(None, (stack, block)))
        keys = f"keys of length {spread([m.key_norm for m in group], rounded(2))}"
        capacity = f"capacity (log10) {spread([m.capacity_log10 for m in group], rounded(2))}"
        memories = counted(len(group), "key–value memory", "key–value memories")
        lines.append(f"{name}: {memories}, {keys}, {norms}{cosine}; {capacity}")
    return lines


def _classes(heads: Sequence[HeadReport]) -> list[str]:
    present = {head.hopfield_class for head in heads}
    return [name for name in ("I", "II", "III", "IV") if name in present]


def auto_associative(heads: Sequence[HeadReport]) -> list[HeadReport]:
    """The heads whose QK is nearly a symmetric form that attracts."""
    return [head for head in heads if _least(head.qk_symmetric_energy, head.qk_eigenvalue_score) >= AUTO_ASSOCIATIVE]


def copiers(heads: Sequence[HeadReport]) -> list[HeadReport]:
    """The heads whose OV mostly writes what it reads."""
    return [head for head in heads if _least(head.copying_score) >= COPYING]


def _least(*values: float | None) -> float:
    return min(-1.0 if value is None else value for value in values)


def conventions(heads: Sequence[HeadReport]) -> str:
    """What the numbers of these heads fold in and leave out, in one line."""
    told = [head.conventions for head in heads]
    left_out = [
        *(["biases"] if any(each["biases"] for each in told) else []),
        *(["norms of queries and keys"] if any(each["qk_norm"] for each in told) else []),
        *(["soft caps"] if any(each["soft_cap"] is not None for each in told) else []),
    ]
    folded = sum(bool(each["norm_folded"]) for each in told)
    norms = (
        "gains of norms folded in" if folded == len(told) else f"gains of norms folded in for {folded} of {len(told)}"
    )
    return "; ".join(
        [
            norms if folded else "gains of norms not folded in",
            f"left out: {', '.join(left_out)}" if left_out else "nothing else left out",
            *(["rotary positions at zero offset"] if any(each["rotary"] for each in told) else []),
        ]
    )


def section(heads: Sequence[HeadReport]) -> str:
    """The paragraph of a model card; empty without heads."""
    if not heads:
        return ""
    symmetric = spread([head.qk_symmetric_energy for head in heads], rounded(2))
    copying = spread([head.copying_score for head in heads], rounded(2))
    title = counted(len(heads), "attention head as a Hopfield memory", "attention heads as Hopfield memories")
    auto = counted(len(auto_associative(heads)), "head is", "heads are")
    return (
        f"**{title}** (QK: similarity, softmax: separation, OV: projection). "
        f"Symmetric energy of QK {symmetric}, where 0.5 is what unrelated queries and keys have; copying score of OV "
        f"{copying}: median, least and largest. {auto} auto-associative (symmetric "
        f"energy and eigenvalue score of QK ≥ {AUTO_ASSOCIATIVE}), {len(copiers(heads))} mostly copy (≥ {COPYING}). "
        f"From the weights: {conventions(heads)}."
    )


def grids(heads: Sequence[HeadReport]) -> dict[str, dict[str, np.ndarray]]:
    """{stack and block: {measure: layer × head}}, NaN where there is no number."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, group in groups([head for head in heads if head.layer is not None]).items():
        shape = 1 + max(head.layer or 0 for head in group), 1 + max(head.head for head in group)
        found[name] = {}
        for measure, value in MEASURES.items():
            grid = np.full(shape, np.nan)
            for head in group:
                grid[head.layer or 0, head.head] = np.nan if (number := value(head)) is None else number
            found[name][measure] = grid
    return found
