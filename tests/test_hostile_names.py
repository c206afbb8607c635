"""Names in tables: whole and never interpreted, on terminals of any width and in a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, raw_safetensors, write_checkpoint
from rich.cells import cell_len

from ema_cli.text import printable
from ema_cli.views.tables import table_text

# Markup, an emoji's code, cursor movements, a window's title, a tab, a newline, a bell.
NAMES = [
    "layer[red]/w",
    "scope[/w]/k",
    "a:key:b:smile:",
    "[bold][/]",
    "\x1b[2J\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "tab\tnew\nline\r\b",
    "\N{RIGHT-TO-LEFT OVERRIDE}" + "\N{CJK UNIFIED IDEOGRAPH-65E5}" * 3,
    "x" * 90,
    "\\x1b[31m",
]
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = {
    "inspect": (("inspect", "a.safetensors"), NAMES),
    "map": (("map", "a.safetensors"), NAMES),
    "diff": (("diff", "a.safetensors", "b.safetensors"), NAMES),
    "plan": (
        (
            "plan",
            "--decay",
            "0.5",
            "--order",
            "given",
            *(f"f/{k}{n}.st" for k, n in enumerate(NAMES[:8])),
        ),
        [f"f/{k}{name}.st" for k, name in enumerate(NAMES[:8])],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of hostile names, and files that are called so."""
    folder = tmp_path_factory.mktemp("names")
    for k, name in enumerate(("a", "b")):
        values = {name: np.full(3, k, np.float32) for name in NAMES}
        write_checkpoint(folder / f"{name}.safetensors", values)
    for k, name in enumerate(NAMES[:8]):
        path = folder / f"f/{k}{name}.st"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, {"w": np.float32([k]), "global_step": np.int64(k + 1)})
    return folder


def terminal(folder: Path, columns: int, *words: str) -> str:
    """What a command writes to a terminal of so many columns, without its styles."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "LINES")}
    child = subprocess.Popen(
        [sys.executable, "-m", "ema_cli", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**environment, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    os.close(ours)
    assert child.wait(60) in (0, 13)
    return _STYLE.sub("", found.decode("utf-8")).replace("\r\n", "\n")


def columns_of(text: str, width: int) -> list[str]:
    """What stands between any two columns of a screen, read from top to bottom without blanks."""
    cells = [_cells(line, width) for line in text.splitlines()]
    return [
        "".join("".join(row[start:end]) for row in cells).replace(" ", "")
        for start in range(width)
        for end in range(start + 1, width + 1)
    ]


def _cells(line: str, width: int) -> list[str]:
    """The cells of a line; the second one of a wide character is empty."""
    cells = [cell for c in line for cell in ([c] if cell_len(c) == 1 else [c, ""])]
    return cells + [" "] * (width - len(cells))


@pytest.mark.parametrize("columns", [20, 40, 80])
@pytest.mark.parametrize("command", COMMANDS)
def test_names_are_folded_on_a_terminal(command: str, columns: int, place: Path) -> None:
    """Every character of every name stands in its column; nothing of it moves the cursor."""
    words, names = COMMANDS[command]
    screen = terminal(place, columns, *words)
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", screen)
    table = screen.split("\n\n")[1 if command == "plan" else 0]
    assert max(map(cell_len, table.splitlines())) <= columns  # prose is the terminal's to wrap
    stacked = columns_of(screen, columns)
    for name in names:
        shown = printable(name).replace(" ", "")
        assert any(shown in column for column in stacked), f"{shown} in\n{screen}"


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_are_whole_lines_of_tab_separated_values_in_a_pipe(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header, one line per row, as many fields in each; names are escaped but never cut."""
    monkeypatch.chdir(place)
    words, names = COMMANDS[command]
    code = 13 if command in ("map", "diff") else 0  # the maps and differences of these two
    rows = [line.split("\t") for line in cmd(*words, code=code).out.splitlines()]
    table = [row for row in rows if len(row) > 1]
    assert len(table) == len(names) + 1
    assert len({len(row) for row in table}) == 1
    column = 1 if command == "map" else 0
    assert [row[column] for row in table[1:]] == [printable(name) for name in names]


def test_what_escapes_make_ambiguous_json_tells_apart(tmp_path: Path) -> None:
    """A tab and a backslash with a t look alike in a table, and are two names in JSON."""
    names = ["a\tb", "a\\tb"]
    header = {
        n: {"dtype": "U8", "shape": [1], "data_offsets": [k, k + 1]} for k, n in enumerate(names)
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_safetensors(header, b"\0\0"))
    first, second = (line.split("\t")[0] for line in cmd("inspect", path).out.splitlines()[1:])
    assert first == second == "a\\tb"
    document = json.loads(cmd("inspect", path, "--json").out)
    assert [row["tensor"] for row in document["tensors"]] == names


def test_numbers_stand_in_one_line_where_there_is_room(place: Path) -> None:
    """Names are folded first: a number over two lines reads as another one."""
    cells = [("a/very/long/name/of/a/tensor", "0.0871290708", 1234567)]
    with open(os.devnull, "w") as stream:
        shown = table_text(stream, ("tensor", "weight", "bytes"), cells, color=False, width=40)
    assert "0.0871290708" in shown
    assert "1234567" in shown
    assert max(map(len, shown.splitlines())) <= 40
