"""A picture of averages as one SVG file: nothing in it runs, and nothing is loaded from elsewhere.

Every average is a panel: the weights as bars over the steps, the coefficients as a line below.
What was measured of the distances between average and checkpoints is a map of colours, one row per
group of tensors.
"""

from __future__ import annotations

import itertools
import math
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import NamedTuple

from ema_cli.text import percent, printable
from ema_cli.views.bars import largest_of
from ema_cli.views.heat import Map, heat_map
from ema_cli.views.shapes import (
    INK,
    LINE_HEIGHT,
    MARGIN,
    MUTED,
    paragraph,
    rectangle,
    tag,
    text,
    wrapped,
)

_PANEL, _GAP = 380, 28
_LEFT, _RIGHT = 58, 10  # of the plots in a panel: room for what stands at the axes
_WEIGHTS, _COEFFICIENTS = 130, 60
_CHARACTERS = 52
_BAR, _LINE, _AXIS = "#2f6690", "#b3470b", "#8a8a8a"
# A bar for each of more checkpoints says nothing on being pointed at.
_POINTED = 1000


# The attribute by which a picture is known to be one of ours.
MARK = "data-drawn-by"


class Panel(NamedTuple):
    """One average.

    Attributes:
        title: its name.
        notes: lines below it.
        steps: of the checkpoints.
        weights: of the checkpoints.
        coefficients: of the checkpoints.
        names: of the checkpoints.
    """

    title: str
    notes: Sequence[str]
    steps: Sequence[int]
    weights: Sequence[float]
    coefficients: Sequence[float]
    names: Sequence[str]


def picture(title: str, panels: Sequence[Panel], maps: Sequence[Map] = ()) -> bytes:
    """Return an SVG document of some panels side by side, and maps below."""
    together = 2 if len(panels) == 4 else min(len(panels), 3)
    width = max(2 * MARGIN + together * _PANEL + (together - 1) * _GAP, 760 if maps else 0)
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", MARK: "ema-avg"})
    tag(root, "title").text = printable(title)
    background = rectangle(root, 0, 0, width, 0, "#ffffff")
    shown = textwrap.wrap(printable(title), int((width - 2 * MARGIN) / 8))
    y = paragraph(root, shown, MARGIN, MARGIN + 12, size=15, weight="bold")
    for start in range(0, len(panels), together):
        row = panels[start : start + together]
        places = [MARGIN + k * (_PANEL + _GAP) for k in range(len(row))]
        heads = [_head(root, panel, x, y + 12) for panel, x in zip(row, places, strict=True)]
        top = max(heads) + 12
        for panel, x in zip(row, places, strict=True):
            _weights(root, panel, x, top)
            _coefficients(root, panel, x, top + _WEIGHTS + 26)
        y = top + _WEIGHTS + 26 + _COEFFICIENTS + 34
    for one in maps:
        y = heat_map(root, one, MARGIN, y + 16, width - 2 * MARGIN)
    height = y + MARGIN
    background.set("height", f"{height:g}")
    root.attrib |= {"width": f"{width:g}", "height": f"{height:g}"}
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _head(root: ET.Element, panel: Panel, x: float, y: float) -> float:
    """Write the name of a panel and its notes; returns where they end."""
    y = paragraph(root, wrapped(panel.title, _CHARACTERS - 4), x, y, size=13, weight="bold")
    lines = [line for note in panel.notes for line in wrapped(note, _CHARACTERS + 6)]
    return paragraph(root, lines, x, y, fill=MUTED)


def _places(panel: Panel, x: float) -> tuple[list[float], float]:
    """Return the middle of each bar over the steps, and how wide bars are."""
    room, count = _PANEL - _LEFT - _RIGHT, len(panel.steps)
    first, last = min(panel.steps), max(panel.steps)
    if first == last:
        return [x + _LEFT + room / 2] * count, 24.0
    # Steps may be named in another order than theirs.
    ordered = sorted(set(panel.steps))
    nearest = min(b - a for a, b in itertools.pairwise(ordered))
    inside = room / (1 + nearest / (last - first))
    wide = min(max(inside * nearest / (last - first) * 0.8, 0.7), 40.0)
    start = x + _LEFT + (room - inside) / 2
    return [start + (step - first) / (last - first) * inside for step in panel.steps], wide


def _weights(root: ET.Element, panel: Panel, x: float, y: float) -> None:
    largest = largest_of(panel.weights)
    _frame(root, panel, x, y, _WEIGHTS, "weight", percent(largest), "0 %")
    places, wide = _places(panel, x)
    rows = zip(panel.names, panel.steps, panel.weights, panel.coefficients, strict=True)
    for at, (name, step, weight, coefficient) in zip(places, rows, strict=True):
        share = weight / largest if largest and math.isfinite(weight) else 0.0
        height = max(share * _WEIGHTS, 0.0)
        if not height:
            continue
        bar = rectangle(root, at - wide / 2, y + _WEIGHTS - height, wide, height, _BAR)
        if len(panel.steps) <= _POINTED:
            told = f"{name}, step {step:,}: weight {percent(weight)}, coefficient {coefficient:.6g}"
            tag(bar, "title").text = printable(told)


def _coefficients(root: ET.Element, panel: Panel, x: float, y: float) -> None:
    largest = max(largest_of(panel.coefficients), 0.0)
    _frame(root, panel, x, y, _COEFFICIENTS, "coefficient", f"{largest:.3g}", "0", steps=True)
    points = [
        (at, y + _COEFFICIENTS * (1 - (value / largest if largest else 0.0)))
        for at, value in zip(_places(panel, x)[0], panel.coefficients, strict=True)
    ]
    drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in sorted(points))
    look = {"fill": "none", "stroke": _LINE, "stroke-width": "1.6", "stroke-linejoin": "round"}
    tag(root, "polyline", points=drawn, **look)
    for a, b in points if len(points) <= 60 else ():
        tag(root, "circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r="2", fill=_LINE)


def _frame(
    root: ET.Element,
    panel: Panel,
    x: float,
    y: float,
    height: float,
    name: str,
    largest: str,
    zero: str,
    *,
    steps: bool = False,
) -> None:
    """Draw the axes of a plot, with what it shows above and the steps below."""
    left, right, bottom = x + _LEFT, x + _PANEL - _RIGHT, y + height
    text(root, name, left, y - 5, fill=INK)
    text(root, largest, left - 6, y + 9, anchor="end")
    text(root, zero, left - 6, bottom, anchor="end")
    for points in ((left, y, left, bottom), (left, bottom, right, bottom)):
        a, b, c, d = (f"{point:g}" for point in points)
        tag(root, "line", x1=a, y1=b, x2=c, y2=d, stroke=_AXIS)
    if not steps:
        return
    places, below = _places(panel, x)[0], bottom + LINE_HEIGHT
    first, last = min(panel.steps), max(panel.steps)
    ends = f"{first:,}", f"{last:,}"
    halves = [3.2 * len(end) for end in ends]  # about half of what they take
    start, stop = max(min(places), left + halves[0]), min(max(places), right - halves[1])
    text(root, ends[0], start, below, anchor="middle")
    if last > first:
        text(root, ends[1], stop, below, anchor="middle")
    if len(panel.steps) > 2 and max(map(len, ends)) < 12:
        text(root, f"{(first + last) / 2:,.0f}", (left + right) / 2, below, anchor="middle")
    text(root, "step", left - 6, below, anchor="end")
