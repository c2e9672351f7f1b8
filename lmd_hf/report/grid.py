"""Maps as HTML tables whose cells are buttons: layer × role, layer × head. They can be read, tabbed to and clicked."""

import html
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np

from lmd_hf.circuits import HeadReport
from lmd_hf.report.findings import label
from lmd_hf.report.heads import MEASURES as HEAD_MEASURES
from lmd_hf.report.heads import groups
from lmd_hf.report.measures import COLORMAP, layer_grid
from lmd_hf.report.plain import Row
from lmd_hf.report.text import by_role, matrix_label


STYLE = (files("lmd_hf.report") / "interactive.css").read_text(encoding="utf-8")
DARK = 0.1791  # relative luminance where white and black have the same contrast, 4.6 : 1 (WCAG 2)


def layer_table(
    rows: Sequence[Row], name: str, measure: Callable[[Row], float | None], *, selected: str | None = None
) -> str:
    """Layer × role as a table; a cell is the median of the matrices that share it, and its button's `data-key` the
    `findings.label` of the first of them. What lies outside numbered layers stands below, a button each."""
    placed = [row for row in rows if row.layer is not None]
    roles = by_role(placed)
    layers = 1 + max((row.layer or 0 for row in placed), default=-1)
    grid = layer_grid(roles, layers, measure)
    firsts = {(row.layer, role): label(row) for role, group in reversed(roles) for row in reversed(group)}
    columns = [role for role, _ in roles]
    shades = _Shades(np.append(grid.ravel(), [_number(measure(row)) for row in rows if row.layer is None]))
    lines = []
    for layer in range(layers):
        cells = [
            _cell(value, firsts.get((layer, role)), f"layer {layer}, {role}", shade=shades(value), selected=selected)
            for role, value in zip(columns, grid[layer], strict=True)
        ]
        lines.append(f'<tr><th scope="row">{layer}</th>{"".join(cells)}</tr>')
    table = _table(f"{name}, layer by role", "layer", columns, lines) if lines else ""
    outside = [
        _button(_number(measure(row)), label(row), matrix_label(row), shade=shades(_number(measure(row))),
                selected=selected, named=True)
        for row in rows if row.layer is None
    ]  # fmt: skip
    below = f'<p class="lmd-outside">Outside the layers: {" ".join(outside)}</p>' if outside else ""
    return f'<div class="lmd-map">{table}{below}{_legend(shades.low, shades.high)}</div>'


def head_grid(heads: Sequence[HeadReport], name: str, *, selected: str | None = None) -> str:
    """Layer × head, a table for each stack and block; a button's `data-key` is `layer stack block head`, as in
    `head_key`."""
    measure = HEAD_MEASURES[name]
    shades = _Shades(np.array([_number(measure(head)) for head in heads]))
    tables = []
    for place, group in groups(heads).items():
        known = {(head.layer, head.head): head for head in group}
        columns = range(1 + max(head.head for head in group))
        lines = []
        for layer in dict.fromkeys(head.layer for head in group):
            cells = []
            for column in columns:
                head = known.get((layer, column))
                value = np.nan if head is None else _number(measure(head))
                key = None if head is None else head_key(head)
                where = f"{place} layer {layer}, head {column}"
                cells.append(_cell(value, key, where, shade=shades(value), selected=selected))
            lines.append(f'<tr><th scope="row">{"–" if layer is None else layer}</th>{"".join(cells)}</tr>')
        tables.append(_table(f"{place}: {name}, layer by head", "layer", [str(c) for c in columns], lines))
    return f'<div class="lmd-map">{"".join(tables)}{_legend(shades.low, shades.high)}</div>'


def head_key(head: HeadReport) -> str:
    """What tells one head from every other: `3 decoder attention 2`."""
    return " ".join(str(word) for word in (head.layer, head.stack, head.block, head.head) if word not in ("", None))


def short(value: float) -> str:
    """A number in four characters or so."""
    if np.isnan(value):
        return "–"
    if value == round(value) and abs(value) < 1e5:
        return f"{value:.0f}"
    value = round(value, 2) + 0.0  # no −0.00
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.0e}"


class _Shades:
    """The colour of a value between the least and the largest."""

    def __init__(self, values: np.ndarray) -> None:
        known = values[np.isfinite(values)]
        self.low, self.high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)

    def __call__(self, value: float) -> str:
        if np.isnan(value):
            return ""
        place = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        red, green, blue, _ = matplotlib.colormaps[COLORMAP](place)
        ink = "#fff" if _luminance(red, green, blue) < DARK else "#000"
        return f"background:{matplotlib.colors.to_hex((red, green, blue))};color:{ink}"


def _luminance(*channels: float) -> float:
    """WCAG 2's relative luminance of an sRGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _cell(value: float, key: str | None, where: str, **look: Any) -> str:
    return "<td></td>" if key is None else f"<td>{_button(value, key, where, **look)}</td>"


def _button(value: float, key: str, where: str, *, shade: str, selected: str | None, named: bool = False) -> str:
    told = html.escape(f"{where}: {short(value)}")
    text = html.escape(f"{where} {short(value)}") if named else short(value)
    current = ' aria-current="true"' if key == selected else ""
    return (
        f'<button type="button" data-key="{html.escape(key)}" style="{shade}" aria-label="{told}" title="{told}"'
        f"{current}>{text}</button>"
    )


def _table(caption: str, corner: str, columns: Sequence[str], lines: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col"><span>{html.escape(column)}</span></th>' for column in columns)
    return (
        f'<div class="lmd-scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>"
        f'<th scope="col">{corner}</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _legend(low: float, high: float) -> str:
    stops = ",".join(matplotlib.colors.to_hex(matplotlib.colormaps[COLORMAP](i / 6)) for i in range(7))
    return (
        f'<p class="lmd-legend"><span>{short(low)}</span><span class="lmd-bar" role="img" aria-label="colours from '
        f'{short(low)} to {short(high)}" style="background:linear-gradient(90deg,{stops})"></span>'
        f"<span>{short(high)}</span></p>"
    )
