"""What strace is told, and what it tells: system calls as data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Calls that change files or their names.
MUTATING = (
    *(
        "write",
        "writev",
        "pwrite64",
        "pwritev",
        "pwritev2",
        "sendfile",
        "copy_file_range",
        "splice",
    ),
    *("fsync", "fdatasync", "sync_file_range", "msync", "sync", "syncfs"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("unlink", "unlinkat", "rmdir", "mkdir", "mkdirat"),
    *("truncate", "ftruncate", "fallocate", "chmod", "fchmod", "fchmodat", "utimensat"),
)
# An opening changes something when it creates or truncates.
OPENING = ("open", "openat", "openat2", "creat")
READING = ("read", "pread64", "readv", "preadv", "preadv2", "getdents64", "mmap")
LOOKING = ("fstat", "stat", "lstat", "newfstatat", "statx", "statfs", "fstatfs", "flock", "close")
# What is needed to follow descriptors and positions.
FOLLOWING = (*MUTATING, *OPENING, "read", "readv", "lseek", "close", "dup", "dup2", "dup3", "fcntl")

# Their strings are contents, not names.
_CARRYING = {"write", "writev", "pwrite64", "pwritev", "pwritev2", *READING}

_LINE = re.compile(rb"(?:\[pid +)?(\d+)?\]? *(\w+)\((.*)\) += (-?\d+|\?)(.*)$", re.DOTALL)
UNFINISHED = -1000
_CUT = b" <unfinished ...>"
_RESUMED = re.compile(rb"(\d+) +<\.\.\. (\w+) resumed>(.*)$", re.DOTALL)
_HEX = re.compile(rb"\\x([0-9a-f]{2})")
_FD = re.compile(rb"(?:AT_FDCWD|-?\d+)<([^>]*)>(?:\(deleted\))?$")
_NAMED = re.compile(rb"<((?:\\x[0-9a-f]{2})+)>")
_STRING = re.compile(rb'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True)
class Call:
    """One system call.

    Attributes:
        name: of the call.
        args: as strace prints them.
        result: what it returned: -1 on failure, `UNFINISHED` when the process died in it.
        ordinal: 1 for the first call of this name in its thread, as strace counts for ``when``.
        note: what follows the result, such as the error.
    """

    name: str
    args: tuple[bytes, ...]
    result: int
    ordinal: int
    note: bytes = b""

    @property
    def failed(self) -> bool:
        """Whether the call changed nothing because it failed, or was never carried out."""
        return self.result < 0

    @property
    def unfinished(self) -> bool:
        """Whether the process was killed before the call was carried out."""
        return self.result == UNFINISHED

    def fd(self, position: int) -> int:
        """Return the file descriptor at a position; -100 is the current directory."""
        text = self.args[position].split(b"<")[0]
        return -100 if text == b"AT_FDCWD" else int(text)

    def named(self, position: int) -> str:
        """Return the path that strace knows for the descriptor at a position."""
        found = _FD.match(self.args[position])
        return os.fsdecode(unescape(found[1])) if found else ""

    def data(self, position: int) -> bytes:
        """Return the bytes of all strings in one argument."""
        return b"".join(unescape(text) for text in _STRING.findall(self.args[position]))

    def text(self, position: int) -> str:
        """Return the path in one argument."""
        return os.fsdecode(self.data(position))

    def number(self, position: int) -> int:
        """Return the number in one argument, also in brackets."""
        return int(self.args[position].strip(b"[]"), 0)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path the call is about: names given, and those behind its descriptors."""
        behind, given = _NAMED.findall(self.note), []
        for arg in self.args:
            if not arg.startswith(b"AT_FDCWD"):
                behind += _NAMED.findall(arg)
            if self.name not in _CARRYING:
                given += _STRING.findall(arg)
        known = [text for text in map(unescape, behind) if text.startswith(b"/")]  # no pipes
        return tuple(os.fsdecode(text) for text in (*known, *map(unescape, given)))

    @property
    def mutates(self) -> bool:
        """Whether the call could change a file or a name."""
        if self.name in OPENING:
            return any(b"O_CREAT" in arg or b"O_TRUNC" in arg for arg in self.args)
        return self.name in MUTATING


def unescape(text: bytes) -> bytes:
    """Return the bytes of a string that strace printed with ``-xx``."""
    return _HEX.sub(lambda found: bytes([int(found[1], 16)]), text)


def names(calls: Iterable[str]) -> str:
    """Return the value of ``-e trace`` for these calls, as far as the machine has them."""
    return ",".join(f"?{name}" for name in calls)


def recording(log: str, calls: Iterable[str] = FOLLOWING, *, longest: int = 64) -> list[str]:
    """Return the arguments that write these calls to the file `log`, `longest` bytes of each."""
    return ["-y", "-xx", "-s", str(longest), "-o", log, "-e", f"trace={names(calls)}"]


def injecting(name: str, what: str, when: str, log: str = os.devnull) -> list[str]:
    """Return the arguments that inject a fault into some calls of one name.

    `what` is ``signal=SIGKILL``, ``error=EIO`` or ``retval=0``; `when` is ``7``, or ``7+`` for
    all from then on.
    """
    arguments = ["-o", log, "-e", f"trace={names([name])}"]
    return [*arguments, "-e", f"inject={name}:{what}:when={when}"]


def parse(log: str) -> list[Call]:
    """Return the calls in the file `log` in the order in which they ended."""
    counts: dict[tuple[bytes, bytes], int] = {}
    begun: dict[bytes, bytes] = {}
    calls = []
    with open(log, "rb") as file:
        for raw in file:
            line = _joined(raw.rstrip(b"\n"), begun)
            found = _LINE.match(line)
            if found is None:
                continue
            pid, name, args, result, note = found.groups()
            key = (pid or b"", name)
            counts[key] = counts.get(key, 0) + 1
            value = UNFINISHED if result == b"?" else int(result)
            split = tuple(_split(args))
            calls.append(Call(name.decode(), split, value, counts[key], note))
    return calls


def _joined(line: bytes, begun: dict[bytes, bytes]) -> bytes:
    """Return a whole line where another thread's calls came between its two halves."""
    if line.endswith(_CUT):
        begun[line.split()[0]] = line[: -len(_CUT)]
        return b""
    resumed = _RESUMED.match(line)
    return begun.pop(resumed[1], b"") + resumed[3] if resumed else line


def _split(args: bytes) -> list[bytes]:
    """Split arguments at commas outside brackets; strings are hexadecimal and hold none."""
    parts, depth, start = [], 0, 0
    for position, byte in enumerate(args):
        if byte in b"[{(":
            depth += 1
        elif byte in b"]})":
            depth -= 1
        elif byte == ord(",") and depth == 0:
            parts.append(args[start:position].strip())
            start = position + 1
    parts.append(args[start:].strip())
    return parts


def within(call: Call, roots: Sequence[str], cwd: str) -> bool:
    """Whether the call is about something inside one of the directories `roots`."""
    for path in call.paths:
        whole = os.path.normpath(os.path.join(cwd, path))
        if any(whole == root or whole.startswith(root + "/") for root in roots):
            return True
    return False
