"""One command's way to the user: data on stdout, talk on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from ema_cli.errors import EmaError
from ema_cli.views.meter import ERASE, Meter
from ema_cli.views.screens import Screen, screen_of
from ema_cli.views.tables import Cell, write_table

if TYPE_CHECKING:
    from ema_cli.engine import Progress

SCHEMA = 1


class Out:
    """One command's way to the user.

    Args:
        as_json: documents on stdout instead of text; the last one is ``result`` or ``error``.
        quiet: errors only on stderr.
        verbose: also what is usually not worth a line.
        color: styles are allowed (never needed to understand).

    Who stops reading stdout does not end what was asked for: `unread` says that they did. What
    cannot be said on stderr is not said.
    """

    # Of the command that runs: whom a signal is told.
    current: ClassVar[Out | None] = None

    def __init__(
        self,
        *,
        as_json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        color: bool = True,
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self._stdout: TextIO = sys.stdout
        self._stderr: TextIO = sys.stderr
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._color = color and not plain
        self.unread = False
        self._working = False
        self._live = os.environ.get("TERM") != "dumb" and self._stderr.isatty()
        live = self._live and not as_json
        self._progress = Meter(self._stderr, live=live, color=self._color, write=self._talk)
        Out.current = self

    # ------------------------------------------------------------------ stdout

    def line(self, text: str = "") -> None:
        """Write one line of data, unless JSON was asked for."""
        self.end_progress()
        if not self.as_json:
            with self._read():
                self._stdout.write(text + "\n")

    def document(self, kind: str, /, **fields: Any) -> None:
        """Write one JSON line, if JSON was asked for."""
        self.end_progress()
        if self.as_json:
            document = _finite({"type": kind, "schema": SCHEMA, **fields})
            text = json.dumps(document, allow_nan=False)
            with self._read():
                self._stdout.write(text + "\n")
                self._stdout.flush()  # who follows a long work reads it now, and never half of it

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Write a table, unless JSON was asked for."""
        self.end_progress()
        if not self.as_json:
            with self._read():
                write_table(self._stdout, columns, rows, color=self._color)

    def flush(self) -> None:
        """Write out what is buffered."""
        self.end_progress()
        with self._read():
            self._stdout.flush()

    @contextlib.contextmanager
    def _read(self) -> Iterator[None]:
        """Write data, unless those who read it have gone; from then on it goes nowhere."""
        try:
            yield
        except BrokenPipeError:
            self.unread = True
            silence(self._stdout)

    def screen(self, *, talk: bool = False) -> Screen | None:
        """Return the terminal that may be drawn on, or None: pictures are for people.

        `talk`: on stderr, beside data that goes to stdout.
        """
        if self.as_json or (talk and self.quiet):
            return None
        self.end_progress()
        if talk:
            return screen_of(self._stderr, self._talk, color=self._color)
        return screen_of(self._stdout, self._stdout.write, color=self._color)

    # ------------------------------------------------------------------ stderr

    def say(self, text: str) -> None:
        """Write a line of talk."""
        self.end_progress()
        if not self.quiet:
            self._talk(text + "\n")

    def detail(self, text: str) -> None:
        """Write a line of talk that only ``-v`` asks for."""
        if self.verbose:
            self.say(text)

    def warning(self, code: str, message: str, hint: str) -> None:
        """Write a warning with its stable code, and its hint apart."""
        self.document("warning", warning=code, message=message, hint=hint)
        if not self.quiet:
            self._talk(f"warning: {message} [{code}]\n")
            self._hint(hint)

    def error(self, error: EmaError) -> None:
        """Write an error: what and where, then a blank line and the hint."""
        self.end_progress()
        self._talk(f"ema-avg: error: {error.message}\n")
        if error.hint:
            self._talk("\n")
            self._hint(error.hint)
        self.document(  # last: it may be stdout that cannot be written
            "error",
            code=error.exit_code,
            error=type(error).__name__,
            message=error.message,
            hint=error.hint,
        )

    def _hint(self, hint: str) -> None:
        for number, text in enumerate(hint.splitlines()):
            self._talk(f"{'hint: ' if number == 0 else '      '}{text}\n")

    def _talk(self, text: str) -> None:
        """Write to stderr; that it cannot be written is no reason to end."""
        with contextlib.suppress(OSError, ValueError):
            self._stderr.write(text)
            self._stderr.flush()

    def progress(self, event: Progress) -> None:
        """Show how far the work is: one changing line on a terminal, a line per tenth elsewhere."""
        if event.note:
            self.say(event.note)
        self._working = event.read < event.total
        if not self.quiet:
            self._progress.show(event)

    def interrupted(self, text: str) -> None:
        """Say at once what a signal does to the work, if there is any; for handlers of signals.

        On a terminal the line goes first, with the key that was pressed on it.
        """
        line = ERASE if self._live else ""
        line += f"{text}\n" if self._working and not self.quiet else ""
        with contextlib.suppress(OSError, ValueError):  # past the stream, which may be in use
            os.write(self._stderr.fileno(), line.encode("ascii", "backslashreplace"))

    def end_progress(self) -> None:
        """Take the progress line away; whatever is written next stands on a line of its own."""
        self._progress.clear()


def silence(stream: TextIO) -> None:
    """Let what is written to a stream go nowhere, at the interpreter's end too."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _finite(value: Any) -> Any:
    """Return JSON data with NaN and infinities, which JSON cannot say, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
