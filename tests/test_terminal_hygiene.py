"""Whatever names hold and terminals can show: nothing fails, nothing is interpreted."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import write_run

from ema_cli.cli import main

RED = "\x1b[31m"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = (
    ("plan RUN", 0),
    ("inspect RUN", 0),
    ("inspect A", 0),
    ("map A", 13),
    ("diff A B", 13),
    ("run RUN -o OUT --decay 0.5 -v", 0),
    ("verify OUT", 0),
    ("run RUN --state STATE --decay 0.5", 0),
    ("inspect STATE", 0),
    ("verify STATE", 0),
    ("export STATE -o OTHER", 0),
    ("rename A -o RENAMED --names shadow -v", 0),
    ("plan RUN --include grösse", 13),
    ("plan RUN/nö", 12),
    ("--help", 0),
)


class Terminal(io.TextIOWrapper):
    """A terminal that shows what an encoding has."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """A run whose names are of all kinds, and where else things are."""
    values = [
        {"größe/w": np.full(9, k, np.float32), f"[bold]{RED}x": np.ones(3, np.float32) * k, "日": k}
        for k in (1.0, 2.0, 3.0)
    ]
    run = write_run(tmp_path / f"läufe{RED}", values)
    named = {"RUN": run, "A": run / "model-step-100.safetensors"}
    named |= {"B": run / "model-step-200.safetensors", "OUT": tmp_path / "gemäß.safetensors"}
    named |= {"OTHER": tmp_path / "o.safetensors", "RENAMED": tmp_path / "r.safetensors"}
    named |= {"STATE": tmp_path / "zustände"}
    return {word: str(path) for word, path in named.items()}


@pytest.mark.parametrize("columns", ["20", "100"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "xterm"}])
def test_every_command_on_any_terminal(
    monkeypatch: pytest.MonkeyPatch,
    paths: dict[str, str],
    env: dict[str, str],
    encoding: str,
    columns: str,
) -> None:
    """Every exit code is what it is elsewhere, and only we say what escape sequences there are."""
    monkeypatch.setenv("COLUMNS", columns)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for line, code in COMMANDS:
        terminal = Terminal(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        words = [re.sub(r"^[A-Z]+", lambda m: paths[m[0]], word) for word in line.split()]
        assert main(words) == code, line
        terminal.flush()
        told = terminal.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert told, line
        assert RED not in told
        assert "\x1b" not in STYLE.sub("", told), line
        assert "\x1b" not in told or env.get("TERM") != "dumb", line
