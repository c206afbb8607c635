"""Ctrl-C and SIGTERM: the first lets what runs come to its end, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ema_cli import interruption

# Whoever starts us may pass on a signal that the terminal sent to both: within so many seconds it
# is the same one.
TOGETHER = 0.3

_FIRST = {
    signal.SIGINT: "interrupted: finishing what is running; Ctrl-C again stops at once",
    signal.SIGTERM: "terminated: finishing what is running; another signal stops at once",
}
SECOND = "stopped at once"


class Terminated(BaseException):
    """SIGTERM arrived: unwind as for Ctrl-C, so that nothing half-written stays."""


class Unread(BaseException):
    """Nobody reads stdout any more, and the work would go on without an end."""


class Signals:
    """Handles the signals of a command while it lasts, if this is the main thread.

    What whoever started us ignores stays ignored. SIGHUP ends the process, as SIGKILL does: the
    next run repairs what it left, or goes on.

    Args:
        say: told a line to be written by other means than the streams, which may be in use.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._first = -1.0
        self._ending = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _FIRST:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ending(self) -> None:
        """From now on nothing is left to finish: a first signal ends the process too."""
        self._ending = True

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self._first >= 0 and now - self._first < TOGETHER:
            return
        if self._ending or self._first >= 0:
            self._say(SECOND)
            os._exit(128 + number)
        self._first = now
        self._say(_FIRST[signal.Signals(number)])
        interruption.interrupt(KeyboardInterrupt if number == signal.SIGINT else Terminated)
