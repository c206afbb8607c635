"""The parts that pictures are made of: elements of an SVG document."""

from __future__ import annotations

import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterable

from ema_cli.text import printable

INK, MUTED = "#1c1c1c", "#555555"
MARGIN = 24
LINE_HEIGHT = 15
_FONT = "system-ui, sans-serif"


def tag(parent: ET.Element, name: str, **attributes: str) -> ET.Element:
    """Add an element."""
    return ET.SubElement(parent, name, attributes)


def rectangle(
    parent: ET.Element, x: float, y: float, width: float, height: float, fill: str
) -> ET.Element:
    """Add a rectangle."""
    sides = {"x": x, "y": y, "width": width, "height": height}
    return tag(parent, "rect", **{k: f"{v:.2f}" for k, v in sides.items()}, fill=fill)


def text(
    parent: ET.Element,
    shown: str,
    x: float,
    y: float,
    *,
    size: int = 11,
    weight: str = "normal",
    anchor: str = "start",
    fill: str = MUTED,
) -> None:
    """Add one line of text; names in it are shown, not interpreted."""
    look = {"font-family": _FONT, "font-size": str(size), "font-weight": weight}
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": fill}
    tag(parent, "text", **look, **place).text = printable(shown)


def paragraph(
    parent: ET.Element,
    lines: Iterable[str],
    x: float,
    y: float,
    *,
    size: int = 11,
    weight: str = "normal",
    anchor: str = "start",
    fill: str = INK,
) -> float:
    """Add lines below each other; returns where the next one would stand."""
    for line in lines:
        text(parent, line, x, y, size=size, weight=weight, anchor=anchor, fill=fill)
        y += size * 4 // 3 + 1
    return y


def wrapped(name: str, characters: int) -> list[str]:
    """Return a name in lines of at most so many characters; nothing of it is left out."""
    lines = textwrap.wrap(
        printable(name), characters, break_on_hyphens=False, drop_whitespace=False
    )
    return lines or [""]
