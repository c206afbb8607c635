"""One command's way to the user: data on stdout, talk on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ema_cli.errors import EmaError
from ema_cli.views.meter import Meter
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
    """

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
        self._progress = Meter(self._stderr)

    # ------------------------------------------------------------------ stdout

    def line(self, text: str = "") -> None:
        """Write one line of data, unless JSON was asked for."""
        self.end_progress()
        if not self.as_json:
            self._stdout.write(text + "\n")

    def document(self, kind: str, **fields: Any) -> None:
        """Write one JSON line, if JSON was asked for."""
        self.end_progress()
        if self.as_json:
            document = _finite({"type": kind, "schema": SCHEMA, **fields})
            text = json.dumps(document, allow_nan=False, default=str)
            self._stdout.write(text + "\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Write a table, unless JSON was asked for."""
        self.end_progress()
        if not self.as_json:
            write_table(self._stdout, columns, rows, color=self._color)

    # ------------------------------------------------------------------ stderr

    def say(self, text: str) -> None:
        """Write a line of talk."""
        self.end_progress()
        if not self.quiet:
            self._stderr.write(text + "\n")

    def detail(self, text: str) -> None:
        """Write a line of talk that only ``-v`` asks for."""
        if self.verbose:
            self.say(text)

    def warning(self, code: str, message: str, hint: str) -> None:
        """Write a warning with its stable code, and its hint apart."""
        self.document("warning", code=code, message=message, hint=hint)
        if not self.quiet:
            self._stderr.write(f"warning: {message} [{code}]\n")
            self._hint(hint)

    def error(self, error: EmaError) -> None:
        """Write an error: what and where, then a blank line and the hint."""
        self.document(
            "error",
            code=error.exit_code,
            error=type(error).__name__,
            message=error.message,
            hint=error.hint,
        )
        self._stderr.write(f"ema-avg: error: {error.message}\n")
        if error.hint:
            self._stderr.write("\n")
            self._hint(error.hint)

    def _hint(self, hint: str) -> None:
        for number, text in enumerate(hint.splitlines()):
            self._stderr.write(f"{'hint: ' if number == 0 else '      '}{text}\n")

    def progress(self, event: Progress) -> None:
        """Show how far a run is: one changing line, on a terminal that can change it."""
        if event.note:
            self.say(event.note)
        dumb = os.environ.get("TERM") == "dumb"
        if not self.quiet and not self.as_json and not dumb and self._stderr.isatty():
            self._progress.show(event)

    def end_progress(self) -> None:
        """Take the progress line away; whatever is written next stands on a line of its own."""
        self._progress.clear()

    def flush(self) -> None:
        """Write out what is buffered; raises `BrokenPipeError` when nobody reads."""
        self.end_progress()
        self._stdout.flush()


def _finite(value: Any) -> Any:
    """Return JSON data with NaN and infinities, which JSON cannot say, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
