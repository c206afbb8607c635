"""Bars and plots as text: numbers in, strings out, no terminal needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII_LEVELS = " .:-=+*#"
_PLAIN_LOCALES = ("C", "POSIX")
# What Python itself puts into LC_CTYPE where the locale is C: the user did not ask for it.
_COERCED = ("C.UTF-8", "C.utf8", "UTF-8")


def has_blocks(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether block characters can be written to `stream` and will be shown as such."""
    if environ.get("TERM") == "dumb" or _plain_locale(environ):
        return False
    try:
        (_EIGHTHS + _LEVELS).encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _plain_locale(environ: Mapping[str, str]) -> bool:
    given = [environ.get("LC_ALL"), environ.get("LC_CTYPE"), environ.get("LANG")]
    if given[1] in _COERCED:
        given[1] = None
    return next((value for value in given if value), "") in _PLAIN_LOCALES


def _share(value: float, largest: float) -> float:
    """Return `value` as a share of `largest`, always from 0 to 1."""
    if math.isnan(value) or value <= 0 or not largest > 0:
        return 0.0
    return 1.0 if math.isinf(value) else min(value / largest, 1.0)


def bar(value: float, largest: float, width: int, *, blocks: bool = True) -> str:
    """Return a horizontal bar in eighths of a character, `width` characters for `largest`.

    What is not zero shows: its bar has at least one mark.
    """
    share = _share(value, largest)
    if not blocks:
        return "#" * max(round(share * width), int(share > 0))
    eighths = max(round(share * width * 8), int(share > 0))
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def sparkline(values: Sequence[float], *, blocks: bool = True) -> str:
    """Return one character per value, its height relative to the largest."""
    levels = _LEVELS if blocks else _ASCII_LEVELS
    largest = largest_of(values)
    return "".join(_level(_share(value, largest) * (len(levels) - 1), levels) for value in values)


def _level(height: float, levels: str) -> str:
    """Return the character for a height in levels; what is not zero shows."""
    if height <= 0:
        return levels[0]
    return levels[min(max(round(height), 1), len(levels) - 1)]


def largest_of(values: Sequence[float]) -> float:
    """Return the largest finite value, or 0."""
    return max((value for value in values if math.isfinite(value)), default=0.0)


def binned(values: Sequence[float], width: int) -> list[float]:
    """Return at most `width` values: the largest of each bin of neighbours."""
    count = len(values)
    if count <= width:
        return list(values)
    edges = [count * k // width for k in range(width + 1)]
    return [max(values[a:b]) for a, b in itertools.pairwise(edges)]


def plot(
    values: Sequence[float],
    steps: Sequence[int],
    width: int,
    height: int,
    *,
    shown: Callable[[float], str] = "{:.3g}".format,
    margin: int = 0,
    blocks: bool = True,
) -> list[str]:
    """Return the lines of a plot: one column per value, or per bin of neighbours.

    The largest value and zero stand at the left, the first, a middle and the last step below.

    Args:
        values: what is drawn, never negative.
        steps: of the values.
        width: of every line, at most.
        height: lines of the plot itself.
        shown: how a value is written.
        margin: what these take at the left at least.
        blocks: block characters may be used.
    """
    largest = largest_of(values)
    labels = [shown(largest), *[""] * (height - 2), shown(0.0)] if height > 1 else [shown(largest)]
    margin = max(margin, *map(len, labels))
    room = max(width - margin - 2, 1)
    wide = max(room // max(len(values), 1), 1)
    columns = [_share(value, largest) for value in binned(values, room)]
    lines = []
    for row, label in enumerate(labels):
        below = height - 1 - row
        cells = [_cell(share * height, below, blocks=blocks) * wide for share in columns]
        line = f"{label:>{margin}} {'┤' if blocks else '|'}{''.join(cells)}"
        lines.append(line.rstrip())
    axis = _axis(steps, len(columns) * wide, room)
    return [*lines, (" " * (margin + 2) + axis).rstrip()]


def _cell(height: float, below: int, *, blocks: bool) -> str:
    """Return what of a column `height` rows high is seen in the row with `below` rows below it."""
    inside = min(max(height - below, 0.0), 1.0)
    if not blocks:
        return "#" if inside >= 0.5 or (below == 0 and height > 0) else " "
    if below == 0:
        return _level(inside * 8, _LEVELS)
    return _LEVELS[round(inside * 8)]


def _axis(steps: Sequence[int], drawn: int, room: int) -> str:
    """Return the first, the middle and the last step under the columns they belong to."""
    if not steps:
        return ""
    first, last = f"{steps[0]:,}", f"{steps[-1]:,}"
    if len(steps) == 1:
        return first
    end = min(max(drawn, len(first) + 1 + len(last)), max(room, len(first) + 1 + len(last)))
    line = first + " " * (end - len(first) - len(last)) + last
    middle = f"{steps[len(steps) // 2]:,}"
    at = (end - len(middle)) // 2
    free = at > len(first) + 1 and at + len(middle) + 1 < end - len(last)
    if len(steps) > 2 and free:
        line = line[:at] + middle + line[at + len(middle) :]
    return line


def beside(panels: Sequence[Sequence[str]], gap: int = 3) -> list[str]:
    """Return panels of lines side by side, each as wide as its widest line."""
    height = max(map(len, panels), default=0)
    widths = [max(map(len, panel), default=0) for panel in panels]
    rows = []
    for k in range(height):
        cells = [panel[k] if k < len(panel) else "" for panel in panels]
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        rows.append((" " * gap).join(padded).rstrip())
    return rows
