"""A terminal that can be drawn on: how wide it is, and which characters it shows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from ema_cli.views.bars import has_blocks
from ema_cli.views.tables import Cell, table_text

_WIDTH = 80


@dataclass(frozen=True, slots=True)
class Screen:
    """A terminal.

    Attributes:
        stream: what leads to it.
        write: writes to it.
        width: in characters.
        blocks: it shows block characters; else ASCII has to do.
        color: styles are allowed.
    """

    stream: TextIO
    write: Callable[[str], object]
    width: int
    blocks: bool
    color: bool

    def lines(self, lines: Iterable[str]) -> None:
        """Write lines as they are."""
        self.write("".join(f"{line}\n" for line in lines))

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[Cell]], first: int | None = None
    ) -> None:
        """Write a table; its first column is at most `first` characters wide."""
        text = table_text(
            self.stream,
            columns,
            rows,
            color=self.color,
            width=self.width,
            first=first,
            blocks=self.blocks,
        )
        self.write(text)


def screen_of(stream: TextIO, write: Callable[[str], object], *, color: bool) -> Screen | None:
    """Return the terminal `stream` leads to, or None where it leads to none."""
    if not stream.isatty():
        return None
    return Screen(stream, write, _width(stream), has_blocks(stream, os.environ), color)


def _width(stream: TextIO) -> int:
    with contextlib.suppress(ValueError):
        if (told := int(os.environ.get("COLUMNS", ""))) > 0:
            return told
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or _WIDTH
    return _WIDTH
