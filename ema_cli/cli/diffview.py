"""How the difference of two checkpoints is shown: all of it in a pipe, its shape on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ema_cli.text import plural
from ema_cli.views import Cell, Out, Screen, bars

if TYPE_CHECKING:
    from ema_cli.comparison import Bin, Comparison, Difference

COLUMNS = ("tensor", "difference", "A", "B", "elements", "max abs", "max rel", "rel norm")
# So many of the tensors whose values differ are told on a terminal, those that changed most.
SHOWN = 10
_WIDEST = 40
# Where that many characters do not fit, only the numbers that the bars show are told.
_NARROW = 64


def show(out: Out, found: Comparison) -> None:
    """Print the differences: a table of all in a pipe or with -v, else what matters of them."""
    screen = out.screen()
    differences = found.differences
    if screen is None or out.verbose:
        if differences:
            out.table(COLUMNS, [_row(difference) for difference in differences])
    else:
        _summary(screen, differences)
    if screen is not None and any(one.count for one in found.histogram[1:]):
        screen.lines(["", *histogram(found.histogram, screen.width, blocks=screen.blocks)])


def _row(difference: Difference) -> list[Cell]:
    d, values = difference, difference.kind == "values"
    numbers = [f"{d.max_abs:.6g}", f"{d.max_rel:.6g}", f"{d.rel_norm:.6g}"]
    shown = [f"{d.count} of {d.total}", *numbers] if values else ["", "", "", ""]
    return [d.tensor, d.kind, d.a, d.b, *shown]


def _summary(screen: Screen, differences: Sequence[Difference]) -> None:
    """Tell what has no counterpart, then which values changed most."""
    values = [difference for difference in differences if difference.kind == "values"]
    others = [difference for difference in differences if difference.kind != "values"]
    if others:
        screen.table(COLUMNS[:4], [_row(difference)[:4] for difference in others])
    if not values:
        return
    values.sort(key=lambda d: math.inf if math.isnan(d.rel_norm) else d.rel_norm, reverse=True)
    largest = bars.largest_of([difference.rel_norm for difference in values])
    narrow = screen.width < _NARROW
    rows = [
        [
            d.tensor,
            *(
                []
                if narrow
                else [f"{d.count} of {d.total}", f"{d.max_abs:.3g}", f"{d.max_rel:.3g}"]
            ),
            f"{d.rel_norm:.3g}",
            bars.bar(
                math.inf if math.isnan(d.rel_norm) else d.rel_norm,
                largest or 1.0,
                max(min(screen.width // 8, _WIDEST // 2), 4),
                blocks=screen.blocks,
            ),
        ]
        for d in values[:SHOWN]
    ]
    screen.lines([""] if others else [])
    columns = ["tensor", *([] if narrow else COLUMNS[4:7]), COLUMNS[7], ""]
    screen.table(columns, rows)
    if len(values) > SHOWN:
        screen.lines([f"the {SHOWN} of {plural(len(values), 'tensor')} that changed most; -v: all"])


def histogram(bins: Sequence[Bin], width: int, *, blocks: bool) -> list[str]:
    """Return a line for each bin: its bounds, a bar, the number of elements and their share."""
    names = ["0", *(f"< {one.below:g}" for one in bins[1:] if one.below)]
    names.append(f">= {bins[-2].below:g}")
    total = sum(one.count for one in bins)
    numbers = [f"{one.count:,}" for one in bins]
    left, right = max(map(len, names)), max(map(len, numbers))
    wide = min(max(width - left - right - 2, 1), _WIDEST)
    largest = max(one.count for one in bins)
    lines = [f"relative change of {plural(total, 'element')}"]
    for name, one, number in zip(names, bins, numbers, strict=True):
        drawn = bars.bar(one.count, largest, wide, blocks=blocks)
        lines.append(f"{name:>{left}} {number:>{right}} {drawn}".rstrip())
    return lines
