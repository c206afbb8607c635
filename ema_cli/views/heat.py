"""A map of colours: how far checkpoints were from the average, for each group of tensors."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import NamedTuple

from ema_cli.text import printable
from ema_cli.views.shapes import INK, LINE_HEIGHT, MUTED, paragraph, rectangle, tag, text, wrapped

_NAMES, _LARGEST = 200, 130  # room for the names at the left, for numbers at the right
_CHARACTERS = 34
_ROW = 18
# More checkpoints than columns share one: the largest of their values counts.
_COLUMNS = 240
# From small to large; the lightness falls all the way, so it can be told without the colours.
_STOPS = ((255, 247, 214), (254, 196, 79), (217, 95, 14), (102, 37, 6))
_SHADES = 24
_NONE = "#e3e6ea"
# What is smaller than the largest by more than this factor has the lightest shade.
_RANGE = 1e4


class Map(NamedTuple):
    """What is drawn.

    Attributes:
        title: above it.
        note: what the values are.
        steps: of the columns; None where unknown.
        groups: names of the rows.
        values: of each group, one per column; None where there is none.
    """

    title: str
    note: str
    steps: Sequence[int | None]
    groups: Sequence[str]
    values: Sequence[Sequence[float | None]]


def heat_map(root: ET.Element, drawn: Map, x: float, y: float, width: float) -> float:
    """Draw a map with its legend; returns where it ends."""
    y = paragraph(root, wrapped(drawn.title, int(width / 8)), x, y + 12, size=13, weight="bold")
    y = paragraph(root, wrapped(drawn.note, int(width / 6)), x, y, fill=MUTED)
    low, high = _bounds(drawn.values)
    y = _legend(root, low, high, x + _NAMES, y)
    room = width - _NAMES - _LARGEST
    count = min(len(drawn.steps), _COLUMNS)
    edges = [len(drawn.steps) * k // max(count, 1) for k in range(count + 1)]
    for name, values in zip(drawn.groups, drawn.values, strict=True):
        cells = [_largest(values[a:b]) for a, b in itertools.pairwise(edges)]
        lines = wrapped(name, _CHARACTERS)
        height = max(_ROW, 12 * len(lines) + 4)
        _row(root, cells, (low, high), (x + _NAMES, y, room / max(count, 1), height - 1))
        for k, line in enumerate(lines):
            middle = y + height / 2 + 4 + 12 * (k - (len(lines) - 1) / 2)
            text(root, line, x + _NAMES - 8, middle, size=10, anchor="end", fill=INK)
        text(
            root, _told(drawn.steps, values), x + width - _LARGEST + 8, y + height / 2 + 4, size=10
        )
        y += height
    return _steps(root, drawn.steps, x + _NAMES, y + LINE_HEIGHT, room)


def _largest(values: Sequence[float | None]) -> float | None:
    """Return the largest of what is known; what is not finite counts as largest."""
    known = [math.inf if math.isnan(value) else value for value in values if value is not None]
    return max(known, default=None)


def _bounds(rows: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Return the smallest and largest value that have a shade of their own, a decade at least."""
    known = [v for row in rows for v in row if v is not None and math.isfinite(v) and v > 0]
    if not known:
        return 0.1, 1.0
    high = max(known)
    return max(min(*known, high / 10), high / _RANGE), high


def _shade(value: float, low: float, high: float) -> int:
    """Return which of the shades a value has; they are logarithmic."""
    if value <= low:
        return 0
    if value >= high or high <= low:
        return _SHADES - 1
    return round(math.log(value / low) / math.log(high / low) * (_SHADES - 1))


def _color(shade: int) -> str:
    at = shade / (_SHADES - 1) * (len(_STOPS) - 1)
    k = min(int(at), len(_STOPS) - 2)
    pairs = zip(_STOPS[k], _STOPS[k + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - k)):02x}" for a, b in pairs)


def _row(
    root: ET.Element,
    cells: Sequence[float | None],
    bounds: tuple[float, float],
    place: tuple[float, float, float, float],
) -> None:
    """Draw the cells of one group, those of one colour in one path."""
    x, y, wide, height = place
    paths: dict[str, list[str]] = {}
    for k, value in enumerate(cells):
        color = _NONE if value is None else _color(_shade(value, *bounds))
        paths.setdefault(color, []).append(
            f"M{x + k * wide:.2f} {y:g}h{wide:.2f}v{height:g}h-{wide:.2f}z"
        )
    for color, parts in paths.items():
        tag(root, "path", d="".join(parts), fill=color, **{"shape-rendering": "crispEdges"})


def _legend(root: ET.Element, low: float, high: float, x: float, y: float) -> float:
    """Draw what the shades mean; returns where it ends."""
    shades = 24
    left = f"{low:.2g}"
    text(root, left, x, y + 2, size=10)
    x += 7 * len(left) + 4
    for k in range(shades):
        rectangle(root, x + 6 * k, y - 7, 6, 10, _color(k * (_SHADES - 1) // (shades - 1)))
    text(root, f"{high:.2g}", x + 6 * shades + 6, y + 2, size=10)
    rectangle(root, x + 6 * shades + 70, y - 7, 14, 10, _NONE)
    text(root, "no update", x + 6 * shades + 90, y + 2, size=10)
    return y + 12


def _told(steps: Sequence[int | None], values: Sequence[float | None]) -> str:
    """Return the largest value of a group and its step."""
    largest = _largest(values)
    if largest is None:
        return "no update"
    at = [math.inf if v is not None and math.isnan(v) else v for v in values].index(largest)
    step = "" if steps[at] is None else f" at {steps[at]:,}"
    return printable(f"most {largest:.3g}{step}")


def _steps(root: ET.Element, steps: Sequence[int | None], x: float, y: float, room: float) -> float:
    """Write the first, the middle and the last step below; returns where that ends."""
    shown = ["" if step is None else f"{step:,}" for step in steps]
    if shown:
        text(root, f"step {shown[0]}" if shown[0] else "", x, y, size=10)
    if len(shown) > 2:
        text(root, shown[len(shown) // 2], x + room / 2, y, size=10, anchor="middle")
    if len(shown) > 1:
        text(root, shown[-1], x + room, y, size=10, anchor="end")
    return y + LINE_HEIGHT
