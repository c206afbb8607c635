"""An audit hook that writes down what a process does besides computing, in comparable words."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

# Told of by every interpreter all the time, and of no consequence.
_NOISE = (
    "object.__",
    "sys._getframe",
    "builtins.id",
    "gc.",
    "code.__new__",
    "function.__new__",
    "array.__new__",
)
VARIABLE = "EMA_AVG_TESTS_WATCH"


class Watch:
    """Be an audit hook.

    Args:
        places: (prefix of a path, what to call it), the first that fits.
        log: file descriptor to write lines of JSON to, or -1.

    Attributes:
        seen: what was done, each kind once.
        off: whether to look away.
    """

    def __init__(self, places: Sequence[Sequence[str]], log: int = -1) -> None:
        self.places = [*places, *_python_places()]
        self.seen: set[tuple[str, ...]] = set()
        self.off = False
        self._log = log

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Be told of an event."""
        if self.off or event.startswith(_NOISE):
            return
        self.off = True  # what the hook itself does is nobody's business
        try:
            key = (event, *self._words(event, args))
            if key not in self.seen:
                self.seen.add(key)
                if self._log >= 0:
                    os.write(self._log, json.dumps(key).encode() + b"\n")
        finally:
            self.off = False

    def _words(self, event: str, args: tuple[Any, ...]) -> list[str]:
        if event == "import":
            return [str(args[0])]
        if event == "marshal.loads":
            return []
        if event == "exec":
            return [self.place(getattr(args[0], "co_filename", "?"))]
        if event == "compile":
            return [self.place(args[1])]
        if event == "subprocess.Popen":
            return [self.place(word) for word in args[1]]
        if event == "open":
            return [self.place(args[0]), "w" if _writes(args[1], args[2]) else "r"]
        return [self.place(arg) for arg in args if isinstance(arg, str | bytes | os.PathLike)]

    def place(self, path: Any) -> str:
        """Return what a path is to us."""
        if isinstance(path, int) or path is None:
            return "a descriptor"
        text = os.fsdecode(path)
        if not os.path.isabs(text):
            return re.sub(r"\d+", "#", text[:80])
        text = os.path.normpath(text)
        for prefix, name in self.places:
            if text == prefix or text.startswith(prefix + os.sep):
                return name
        return re.sub(r"\d+", "#", text[:80])


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(int(flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _python_places() -> list[tuple[str, str]]:
    """Return where Python and its packages lie."""
    found = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path}
    return [(os.path.abspath(path), "python") for path in found if path]


def from_environment() -> None:
    """Watch this process, if its environment says so."""
    told = os.environ.get(VARIABLE)
    if told:
        said = json.loads(told)
        log = os.open(said["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        sys.addaudithook(Watch(said["places"], log))
