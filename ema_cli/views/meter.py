"""How far the work is: one changing line on a terminal, elsewhere a line per tenth.

The cursor is never hidden, so nothing that ends the process can leave it so.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from ema_cli.text import size

if TYPE_CHECKING:
    from ema_cli.engine import Progress

# Seconds of work before anything is shown, on a terminal and elsewhere; and between two drawings.
FIRST_DRAWN, FIRST_LINE = 0.5, 2.0
_BETWEEN = 0.1
_SHORTEST_BAR, _LONGEST_BAR = 10, 40
_GAP = "  "
ERASE = "\r\x1b[K"


class Pace:
    """How fast a work goes, counted from its own beginning.

    What an earlier process had done of it took none of this one's time.
    """

    def __init__(self) -> None:
        self.began = 0.0
        self.event: Progress | None = None
        self._base = 0

    def count(self, event: Progress, now: float) -> bool:
        """Take note of an event; returns whether it begins another work."""
        last, self.event = self.event, event
        anew = last is None or not last.read <= event.read or event.total != last.total
        if anew or event.read == 0:
            self.began, self._base = now, event.read
        self._base = max(self._base, event.earlier)
        return anew

    def rate(self, now: float) -> float:
        """Return bytes per second."""
        read = self.event.read if self.event is not None else 0
        return (read - self._base) / max(now - self.began, 1e-3)

    def facts(self, now: float) -> list[str]:
        """Return how far it is, in bytes too, how fast it goes and how long it takes."""
        event = self.event
        if event is None:
            return []
        rate = self.rate(now)
        left = "finishing" if event.read >= event.total else _left(event.total - event.read, rate)
        done = f"{size(event.read)} of {size(event.total)}"
        return [f"{_hundredths(event)} %", done, _rate(rate) if rate > 0 else "", left]


class Meter:
    """Shows the events of one command.

    Args:
        stream: where it goes.
        live: whether that is a terminal on which a line can be rewritten.
        color: whether styles are allowed.
        write: writes text there.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        live: bool,
        color: bool,
        write: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._live, self._color = stream, live, color
        self._write, self._clock = write, clock
        self._pace = Pace()
        self._drawn = -math.inf
        self._tenth = 0
        self.visible = False

    def show(self, event: Progress) -> None:
        """Show an event, unless the last one was just now."""
        now = self._clock()
        anew = self._pace.count(event, now)
        if self._live:
            self._draw(event, now)
        else:
            self._tell(event, now, anew=anew)

    def clear(self) -> None:
        """Take the line away."""
        if self.visible:
            self._write(ERASE)
            self.visible = False

    def _tell(self, event: Progress, now: float, *, anew: bool) -> None:
        """Write a line when another tenth is done."""
        tenth = _hundredths(event) // 10
        if anew or event.read in (0, event.earlier):
            self._tenth = tenth
        if tenth > self._tenth and now - self._pace.began >= FIRST_LINE:
            self._tenth = tenth
            self._write(_GAP.join(filter(None, self._pace.facts(now))) + "\n")

    def _draw(self, event: Progress, now: float) -> None:
        """Rewrite the line, but not too often; when all is read, what follows may take long."""
        soon = now - self._drawn < _BETWEEN and event.read < event.total
        if soon or now - self._pace.began < FIRST_DRAWN:
            return
        self._drawn, self.visible = now, True
        share = _hundredths(event) / 100
        facts = self._pace.facts(now)
        drawn = _drawn(self._stream, event.what, share, facts, color=self._color)
        self._write(f"\r{drawn}\x1b[K")


def _hundredths(event: Progress) -> int:
    return min(100 * event.read // event.total, 100) if event.total else 100


def _rate(rate: float) -> str:
    for unit, scale in (("GB/s", 1e9), ("MB/s", 1e6)):
        if rate >= scale:
            return f"{rate / scale:.1f} {unit}"
    return f"{rate / 1e3:.1f} kB/s"


def _left(n_bytes: int, rate: float) -> str:
    """Return how long it takes to read the rest, or nothing as long as that is unknown."""
    if rate <= 0:
        return ""
    seconds = math.ceil(n_bytes / rate)
    if seconds < 60:
        return f"{seconds} s left"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s left"
    return f"{seconds // 3600:,} h {seconds // 60 % 60} min left"


# ---------------------------------------------------------------------------- on a terminal


def _drawn(stream: TextIO, what: str, share: float, facts: Sequence[str], *, color: bool) -> str:
    """Return the line as the terminal of `stream` is told it."""
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.segment import Segment, Segments
    from rich.text import Text

    width = _columns(stream) - 1  # or some terminals go on in the next line
    console = Console(
        file=stream, force_terminal=True, no_color=not color, highlight=False, width=max(width, 1)
    )
    title, bar, told = arranged(what, facts, width)
    with console.capture() as captured:
        if title:
            console.print(Text(title + _GAP), end="", soft_wrap=True)
        if bar:
            made = ProgressBar(100, share * 100, width=bar)
            lines = console.render_lines(made, console.options.update_width(bar))
            line = lines[0] if lines else [Segment(" " * bar)]  # nothing done, and no colors
            console.print(Segments(line), Text(_GAP), sep="", end="", soft_wrap=True)
        console.print(Text(told), end="", soft_wrap=True)
    return captured.get()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def arranged(what: str, facts: Sequence[str], width: int) -> tuple[str, int, str]:
    """Return what of a line has room: what is worked on, the width of a bar, and the facts."""
    from rich.cells import cell_len

    share, done, rate, left = facts
    # As wide as they become, so that the bar keeps its place.
    of_total = done[done.index(" of ") :]
    done_wide = f"{done:>{len('999.9 MiB') + len(of_total)}}"
    wide = [f"{share:>5}", done_wide, f"{rate:>10}", f"{left:<14}"]
    told = _GAP.join(wide)
    for title in (what, what.partition(",")[0], ""):
        used = cell_len(title) + len(told) + len(_GAP) * (1 + bool(title))
        if used + _SHORTEST_BAR <= width:
            return title, min(width - used, _LONGEST_BAR), told.rstrip()
    for some in ([share, done, rate, left], [share, rate, left], [share, left], [share]):
        told = _GAP.join(filter(None, some))
        if len(told) <= width:
            return "", 0, told
    return "", 0, ""
