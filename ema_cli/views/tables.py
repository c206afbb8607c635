"""Tables: aligned on a terminal, full-width tab-separated values in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from ema_cli.text import printable

Cell = str | int | float


def write_table(
    stream: TextIO, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, color: bool
) -> None:
    """Write a table to `stream`.

    Names are printed whole, with control characters escaped, never interpreted as markup.
    """
    cells = [[_shown(cell) for cell in row] for row in rows]
    if not stream.isatty():
        stream.writelines("\t".join(row) + "\n" for row in [list(columns), *cells])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    numeric = [_numeric(row[k] for row in cells) for k in range(len(columns))]
    for title, is_number in zip(columns, numeric, strict=True):
        justify: Any = "right" if is_number else "left"
        table.add_column(Text(title), justify=justify, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=stream, no_color=not color, highlight=False, soft_wrap=False).print(table)


def _shown(cell: Cell) -> str:
    return printable(cell) if isinstance(cell, str) else str(cell)


def _numeric(cells: Iterable[str]) -> bool:
    return all(cell.strip("-.,% e0123456789") == "" for cell in cells)
