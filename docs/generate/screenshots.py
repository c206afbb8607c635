"""Take the pictures in docs/images: commands at work in a terminal, as SVG.

    python docs/generate/screenshots.py

Each command runs in a pseudoterminal of a fixed width, in a directory in which ``fixtures`` leads
to the fixtures of the repository; what it writes, colours included, is drawn by rich. What
`--plot` draws is kept as it is. The pictures load no fonts or style sheets. `make docs` runs this,
and tests/test_screenshots.py holds the text of the pictures to what the commands write.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES = ROOT / "docs" / "images"
COLUMNS = 100

# One command per picture, by the name of its file.
COMMANDS = {
    "plan": "ema-avg plan fixtures/digits/run --decay 0.999/step --workers 2",
    "sweep": (
        "ema-avg plan fixtures/digits/bf16 --last 10 --average mean@last=5"
        " --average sqrt=lr:1-sqrt --workers 2"
    ),
    "stats": (
        "ema-avg run fixtures/digits/run -o average.safetensors --last 10"
        " --decay 0.999/step --stats"
    ),
    "map": (
        "ema-avg map fixtures/tensorflow/graph/digits.ckpt-300"
        " --for fixtures/tensorflow/graph/evaluation.meta"
    ),
}
# What --plot draws, by the name of its file.
PLOTS = {
    "plot": "ema-avg run fixtures/digits/run -o average.safetensors --decay 0.999/step -q",
}
# What is another number on every machine and every day.
_CHANGING = re.compile(r"(?<=of )[\d.,]+ [KMGTP]?i?B(?= free)|(?<=in )[\d.]+(?= s$)", re.MULTILINE)

_THEME = TerminalTheme(
    (22, 27, 34),
    (208, 215, 222),
    [
        (72, 79, 88),
        (255, 123, 114),
        (63, 185, 80),
        (210, 153, 34),
        (88, 166, 255),
        (188, 140, 255),
        (57, 197, 207),
        (177, 186, 196),
    ],
    [
        (110, 118, 129),
        (255, 161, 152),
        (86, 211, 100),
        (227, 179, 65),
        (121, 192, 255),
        (210, 168, 255),
        (86, 212, 221),
        (240, 246, 252),
    ],
)
# rich's own frame loads a font from elsewhere; this one takes what the reader has.
_FRAME = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
  <style>
    .{unique_id}-matrix {{
      font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
      font-size: {char_height}px;
      line-height: {line_height}px;
      white-space: pre;
    }}
    {styles}
  </style>
  <defs>
    <clipPath id="{unique_id}-clip-terminal">
      <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
    </clipPath>
    {lines}
  </defs>
  {chrome}
  <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">
    {matrix}
    </g>
  </g>
</svg>
"""


def written(command: str) -> str:
    """Return what a shell command writes to a terminal, escape sequences included."""
    with tempfile.TemporaryDirectory() as folder:
        return _in_terminal(command, folder)


def drawn(command: str) -> str:
    """Return what `--plot` of a command draws."""
    with tempfile.TemporaryDirectory() as folder:
        _in_terminal(f"{command} --plot plot.svg", folder)
        return (Path(folder) / "plot.svg").read_text(encoding="utf-8")


def _in_terminal(command: str, folder: str) -> str:
    """Return what a command writes that is run in this directory."""
    (Path(folder) / "fixtures").symlink_to(ROOT / "fixtures")
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
        process = subprocess.Popen(  # noqa: S603  # a command of ours
            ["sh", "-c", command],  # noqa: S607
            cwd=folder,
            env=_environment(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            close_fds=True,
        )
    finally:
        os.close(theirs)
    raw = _drained(ours)
    if process.wait():
        raise RuntimeError(f"{command}: exit code {process.returncode}\n{raw}")
    return _CHANGING.sub("…", raw.replace("\r\n", "\n"))


def _environment() -> dict[str, str]:
    """Return the environment of a usual terminal, with this environment's commands in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("EMA_AVG_", "LC_", "PYTHON"))
        and name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "LANG", "LINES")
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    usual = {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LC_ALL": "C.UTF-8"}
    return {**kept, **usual, "PATH": path}


def _drained(terminal: int) -> str:
    """Return everything that is written to the other end until it is closed."""
    parts = []
    try:
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    except OSError:  # on Linux, the end
        pass
    finally:
        os.close(terminal)
    return b"".join(parts).decode()


def picture(name: str) -> str:
    """Return the picture of a command and what it writes, as SVG."""
    command = COMMANDS[name]
    console = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        highlight=False,
        color_system="truecolor",
    )
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")), soft_wrap=False)
    console.print(Text.from_ansi(written(command).rstrip("\n")))
    console.print()
    return console.export_svg(
        title="ema-avg", theme=_THEME, code_format=_FRAME, unique_id=f"ema-avg-{name}"
    )


def main() -> None:
    """Take all pictures."""
    IMAGES.mkdir(exist_ok=True)
    for name in COMMANDS:
        (IMAGES / f"{name}.svg").write_text(picture(name), encoding="utf-8")
    for name, command in PLOTS.items():
        (IMAGES / f"{name}.svg").write_text(drawn(command), encoding="utf-8")


if __name__ == "__main__":
    main()
