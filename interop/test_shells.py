"""Completion in the shells themselves: typed at a terminal, one key after the other."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = os.path.dirname(sys.executable)
# How long a shell is waited for that never answers.
PATIENCE = 60
# Interactive and without anybody's settings; the line so far is told at Ctrl-G, between marks.
SHELLS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        [
            'eval "$(_EMA_AVG_COMPLETE=bash_source ema-avg)"',
            """bind -x '"\\C-g": printf "<<%s>>" "$READLINE_LINE"'""",
        ],
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        [
            "autoload -U compinit; compinit -u -D",
            'eval "$(_EMA_AVG_COMPLETE=zsh_source ema-avg)"',
            'tell() { printf "<<%s>>" "$BUFFER" }; zle -N tell; bindkey "^G" tell',
        ],
    ),
    "fish": (
        ["fish", "--no-config", "-i"],
        [
            "_EMA_AVG_COMPLETE=fish_source ema-avg | source",
            "bind \\cg 'printf \"<<%s>>\" (commandline | string collect)'",
        ],
    ),
}
COMPLETED = [
    ("ema-avg pl", "ema-avg plan "),
    ("ema-avg run --fo", "ema-avg run --format "),
    ("ema-avg run --average half-l", "ema-avg run --average half-life:"),
    ("ema-avg run --average x=ema:0.9999/", "ema-avg run --average x=ema:0.9999/step "),
    ("ema-avg run --average=po", "ema-avg run --average=power:"),
    ("ema-avg run run --include logits/k", "ema-avg run run --include logits/kernel"),
    ("ema-avg plan run --exclude=hidden1/b", "ema-avg plan run --exclude=hidden1/batch_norm/"),
    ("ema-avg inspect digi", "ema-avg inspect 'digits run'"),
    ("ema-avg export --state=nosuch sta", "ema-avg export --state=nosuch state/"),
]


class Terminal:
    """A shell at a terminal of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        words, self._setup = SHELLS[name]
        environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder), "PS1": "$ "}
        environment |= {"TERM": "xterm" if name == "fish" else "dumb", "LC_ALL": "C.UTF-8"}
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execvpe(words[0], words, environment)

    def set_up(self) -> None:
        """Load the completion, and wait until that is done."""
        for line in self._setup:
            self._type(f"{line}\n")
        self._type("printf '%s%s' rea dy; echo\n")
        self._until(r"ready")

    def completed(self, line: str) -> str:
        """The line after the completion of its last word."""
        self._type(line)
        self._type("\t")
        self._type("\x07")
        found = self._until(r"<<(.*?)>>")
        self._type("\x15")  # nothing of it stays for the next one
        return found

    def _type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def _until(self, pattern: str) -> str:
        seen = b""
        deadline = time.monotonic() + PATIENCE
        while (match := re.search(pattern, seen.decode(errors="replace"), re.DOTALL)) is None:
            readable, _, _ = select.select([self._fd], [], [], deadline - time.monotonic())
            assert readable, f"waited for {pattern}, saw {seen!r}"
            seen += os.read(self._fd, 65536)
        return match[1] if match.groups() else match[0]

    def close(self) -> None:
        """End the shell."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._fd)


@pytest.mark.parametrize("name", SHELLS)
def test_words_are_completed_at_the_terminal(name: str, tmp_path: Path) -> None:
    """Commands, options, averages, tensor names and paths, each after one press of Tab."""
    assert shutil.which(name), f"{name} is missing: apt-get install {name}"
    (tmp_path / "run").symlink_to(ROOT / "fixtures" / "digits" / "run")
    (tmp_path / "digits run").mkdir()
    (tmp_path / "state").mkdir()
    terminal = Terminal(name, tmp_path)
    try:
        terminal.set_up()
        for line, expected in COMPLETED:
            found = terminal.completed(line).replace("digits\\ run", "'digits run'")
            assert found.rstrip("/ ") == expected.rstrip("/ "), line
    finally:
        terminal.close()
