"""Tables: aligned on a terminal, full-width tab-separated values in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from ema_cli.text import printable

Cell = str | int | float
# Characters that a column needs to be shown at all, its distance to the next one included.
_NARROWEST = 4
# Characters between two columns, and those that a column of text is left with at least.
_BETWEEN, _TEXT = 3, 6


def write_table(
    stream: TextIO, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, color: bool
) -> None:
    """Write a table to `stream`.

    Names are printed whole, with control characters escaped, never interpreted as markup.
    """
    cells = [[_shown(cell) for cell in row] for row in rows]
    if stream.isatty():
        stream.write(table_text(stream, columns, cells, color=color))
    else:
        stream.writelines("\t".join(row) + "\n" for row in [list(columns), *cells])


def table_text(
    stream: TextIO,
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    color: bool,
    width: int | None = None,
    first: int | None = None,
    blocks: bool = True,
) -> str:
    """Return a table as the terminal `stream` leads to shows it.

    Args:
        stream: the terminal.
        columns: titles, which may hold line breaks.
        rows: the cells; what does not fit is folded.
        color: styles are allowed.
        width: of the terminal, where it is known.
        first: how wide the first column may be.
        blocks: what is not ASCII may be used for lines.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[_shown(cell) for cell in row] for row in rows]
    lines = box.SIMPLE_HEAD if blocks else box.Box(str(box.SIMPLE_HEAD).replace("─", "-"))
    table = Table(box=lines, pad_edge=False, show_edge=False)
    console = Console(
        file=stream,
        color_system="auto" if color else None,
        highlight=False,
        soft_wrap=False,
        width=width,
    )
    numeric = [_numeric(row[k] for row in cells) for k in range(len(columns))]
    whole = _whole(columns, cells, numeric, console.width)
    for k, title in enumerate(columns):
        justify: Any = "right" if numeric[k] else "left"
        limit = first if k == 0 else None
        table.add_column(
            Text(title), justify=justify, overflow="fold", max_width=limit, no_wrap=whole[k]
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    # Too narrow for all columns, rich would leave some of them out; the terminal wraps lines.
    console.width = max(console.width, _NARROWEST * len(columns))
    with console.capture() as shown:
        console.print(table)
    return shown.get()


def _whole(
    columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool], width: int
) -> list[bool]:
    """Return which columns stand in one line each: those of numbers, if there is room."""
    widths = [
        max(len(text) for text in (*title.split("\n"), *(row[k] for row in cells)))
        for k, title in enumerate(columns)
    ]
    numbers = sum(one for one, is_number in zip(widths, numeric, strict=True) if is_number)
    needed = numbers + _TEXT * numeric.count(False) + _BETWEEN * (len(columns) - 1)
    return [is_number and needed <= width for is_number in numeric]


def _shown(cell: Cell) -> str:
    return printable(cell) if isinstance(cell, str) else str(cell)


def _numeric(cells: Iterable[str]) -> bool:
    return all(cell.strip("-.,% e0123456789") == "" for cell in cells)
