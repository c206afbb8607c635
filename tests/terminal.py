"""Commands in processes of their own, on a terminal or in pipes, which can be held up at will."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from helpers import write_run

PATIENCE = 60.0
COLOR = re.compile(r"\x1b\[[0-9;]*m")

# A process whose work has many tasks, each of which is shown and recorded at once.
CHILD = """
import fcntl, os, sys, termios, time
from pathlib import Path
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ema_cli import engine, progress
from ema_cli.views import meter
engine.TASK_ELEMENTS, progress.INTERVAL = 1000, 0.0
meter.FIRST_DRAWN = meter.FIRST_LINE = meter._BETWEEN = 0.0
stuck, go, carried_out, calls = {stuck!r}, {go!r}, engine.run_task, []
def run_task(task):
    calls.append(task)
    if len(calls) == {nth}:
        Path(stuck).touch()
        while not Path(go).exists():
            time.sleep(0.005)
    return carried_out(task)
engine.run_task = run_task
{patch}
from ema_cli.cli import entry
entry()
"""


def run_of_ten_tasks(folder: Path) -> Path:
    """Write three checkpoints that make ten tasks of `CHILD`."""
    values = np.random.default_rng(3).normal(size=(3, 10000)).astype(np.float32)
    return write_run(folder, [{"w": value} for value in values])


def words(run: Path, *more: str | Path) -> list[str | Path]:
    """Return the command that averages them."""
    out = run.parent / "place" / "out.safetensors"
    return ["run", run, "-o", out, "--decay", "0.5", "--workers", "1", *more]


class Held:
    """A command whose task number `nth` waits until `go` is called.

    Args:
        folder: where files can be made by which it is told so.
        words: the command.
        nth: of the task; 0 for none.
        columns: of a terminal, which stdin and stderr are then; pipes without.
        both: whether stdout is that terminal too.
        env: added to the environment.
        patch: code for the process.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str | Path],
        *,
        nth: int = 0,
        columns: int = 0,
        both: bool = False,
        env: dict[str, str] | None = None,
        patch: str = "",
    ) -> None:
        self._stuck, self._go = folder / "stuck", folder / "go"
        for path in (self._stuck, self._go):
            path.unlink(missing_ok=True)
        self.shown, self._decoder = "", codecs.getincrementaldecoder("utf-8")()
        code = CHILD.format(stuck=str(self._stuck), go=str(self._go), nth=nth, patch=patch)
        self._master, terminal = self._terminal(columns) if columns else (-1, subprocess.PIPE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            stdin=terminal if columns else subprocess.DEVNULL,
            stdout=terminal if both else subprocess.PIPE,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
            start_new_session=True,
            text=True,
        )
        if columns:
            os.close(terminal)
            os.set_blocking(self._master, False)

    @staticmethod
    def _terminal(columns: int) -> tuple[int, int]:
        master, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        return master, terminal

    def until_stuck(self) -> None:
        """Wait until the task is being worked on."""
        deadline = time.monotonic() + PATIENCE
        while not self._stuck.exists():
            assert self.process.poll() is None, self.ended()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def go(self) -> None:
        """Let the task go on."""
        self._go.touch()

    def press(self, key: bytes) -> None:
        """Press a key on the terminal."""
        os.write(self._master, key)

    def until(self, text: str) -> None:
        """Wait until the terminal shows a text."""
        deadline = time.monotonic() + PATIENCE
        while text not in COLOR.sub("", self._read()):
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.005)

    def _read(self) -> str:
        with contextlib.suppress(OSError):  # nothing yet, or nobody has it open any more
            self.shown += self._decoder.decode(os.read(self._master, 1 << 16))
        return self.shown

    def ended(self) -> tuple[int, str, str]:
        """Wait for the end; returns the exit code, and what stdout and stderr were told."""
        if self._master < 0:
            out, err = self.process.communicate(timeout=PATIENCE)
            return self.process.returncode, out, err
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            self._read()
            time.sleep(0.005)
        while len(self.shown) < len(self._read()):
            pass
        out = self.process.stdout.read() if self.process.stdout else ""
        return self.process.returncode, out, self.shown

    def close(self) -> None:
        """End the process if it has not ended."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        if self._master >= 0:
            os.close(self._master)


@contextmanager
def held(folder: Path, words: Sequence[str | Path], **more: object) -> Iterator[Held]:
    """A command that is ended in any case."""
    command = Held(folder, words, **more)  # type: ignore[arg-type]
    try:
        yield command
    finally:
        command.close()


def screen(told: str) -> list[str]:
    """Return what a terminal shows when all of `told` was written, line by line."""
    lines, at = [""], 0
    for part in re.findall(r"\x1b\[K|\r|\n|[^\x1b\r\n]+", COLOR.sub("", told)):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            at = 0
            continue
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:at]
            continue
        else:
            lines[-1] = lines[-1][:at] + part + lines[-1][at + len(part) :]
        at = len(lines[-1]) if part != "\n" else at
    return lines
