"""How far the work is: one changing line, on a terminal that can change it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

from ema_cli.text import size

if TYPE_CHECKING:
    from ema_cli.engine import Progress


class Meter:
    """A line that is rewritten at most five times a second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._shown = 0.0
        self._visible = False

    def show(self, event: Progress) -> None:
        """Show an event, unless the last one was just now."""
        now = time.monotonic()
        if now - self._shown < 0.2 or now - self._started < 0.5:
            return
        self._shown, self._visible = now, True
        rate = event.read / max(now - self._started, 1e-9)
        left = (event.total - event.read) / rate if rate else 0.0
        share = event.read / event.total if event.total else 1.0
        self._stream.write(
            f"\r\x1b[K{share:4.0%}  {size(event.read)} of {size(event.total)}  "
            f"{size(int(rate))}/s  {left:.0f} s left"
        )
        self._stream.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self._visible:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._visible = False
