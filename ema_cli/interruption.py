"""Signals that wait while the threading library takes its locks.

An exception that a signal's handler raises inside the library can leave one of them taken, for a
thread to wait for it for ever: `Condition.__enter__`, which futures and events use, is Python code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0
_waiting: list[type[BaseException]] = []


@contextmanager
def held() -> Iterator[None]:
    """Let signals wait until the end of the context; to be left within a moment."""
    global _depth
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler runs here
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth and _waiting:
            raise _waiting.pop()


def interrupt(error: type[BaseException]) -> None:
    """Raise `error`, called by a handler: now, or where nothing is held any more."""
    if not _depth:
        raise error
    _waiting.append(error)
