"""Input files: checked opening, exact reading, and whether they are still what they were.

Inputs are read with ``preadv`` into buffers the caller reuses, never mapped: a mapping of a file
that somebody truncates kills the process with SIGBUS, a short read is an error that can be told.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
from collections.abc import Callable, Sequence
from types import TracebackType

from ema_cli.errors import (
    DamagedFile,
    EmaError,
    InputChanged,
    InputError,
    StorageError,
)
from ema_cli.hints import PERMISSION, near_path
from ema_cli.tensors import Stamp
from ema_cli.text import shorten, size

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


def page_buffer(n_bytes: int) -> memoryview:
    """Return a new buffer that begins on a page.

    Copying out of the page cache took two to six times as long into one that begins 16 bytes after
    a page, as most allocations of this size do, where the data in the file begins on one. It is
    private: by default a process that is forked would go on in the same memory.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, max(n_bytes, 1), flags=private))[:n_bytes]


def open_input(path: str) -> int:
    """Return a file descriptor of the regular file `path`, symlinks followed.

    O_NONBLOCK keeps a named pipe from blocking us for ever. Raises `InputError`.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_open(path, error) from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = next((text for test, text in _KINDS if test(mode)), "not a regular file")
        raise InputError(
            f"{shorten(path, 1000)}: expected a regular file, found {kind}",
            "name the file itself; what comes through a pipe is saved to a file first",
        )
    return fd


def _cannot_open(path: str, error: OSError) -> EmaError:
    if error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE):
        return StorageError(f"{shorten(path, 1000)}: cannot open: {os.strerror(error.errno)}")
    reason = os.strerror(error.errno or 0)
    hint = PERMISSION if error.errno in (errno.EACCES, errno.EPERM) else ""
    hint = near_path(path) if error.errno == errno.ENOENT else hint
    return InputError(f"{shorten(path, 1000)}: cannot open: {reason}", hint)


def stamp(fd: int, path: str) -> Stamp:
    """Return what identifies the open file, to be compared later.

    ctime is left out on purpose: a hard link made or removed by the trainer changes it.
    """
    status = os.fstat(fd)
    return Stamp(path, status.st_size, status.st_mtime_ns, status.st_ino)


def stamp_of(path: str) -> Stamp:
    """Return the stamp of the regular file `path`."""
    fd = open_input(path)
    try:
        return stamp(fd, path)
    finally:
        os.close(fd)


def check_unchanged(fd: int, expected: Stamp) -> None:
    """Raise `InputChanged` when the open file is not the one that was planned with."""
    if stamp(fd, expected.path) != expected:
        raise _changed(expected.path)


def check_all_unchanged(stamps: Sequence[Stamp]) -> None:
    """Raise `InputChanged` when a file was rewritten, truncated, grown or replaced since."""
    for expected in stamps:
        try:
            status = os.stat(expected.path)
        except FileNotFoundError:
            continue  # rotated away: what we read through our descriptors was the old, whole file
        except OSError as error:
            raise _cannot_open(expected.path, error) from error
        found = (status.st_size, status.st_mtime_ns, status.st_ino)
        if found != expected[1:]:
            raise _changed(expected.path)


def _changed(path: str) -> InputChanged:
    return InputChanged(
        f"{shorten(path, 1000)}: changed while it was read",
        "run again when nothing writes to it any more; nothing was published",
    )


def read_exact(fd: int, buffer: memoryview, offset: int, path: str) -> None:
    """Fill `buffer` with the bytes of `fd` at `offset`; a short read raises `InputChanged`."""
    done = 0
    while True:
        try:
            got = _preadv(fd, buffer[done:], offset + done)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise StorageError(f"{shorten(path, 1000)}: cannot read: {reason}") from error
        if got == 0 and done < len(buffer):
            raise InputChanged(
                f"{shorten(path, 1000)}: truncated while it was read: expected "
                f"{len(buffer):,} bytes at offset {offset:,}, found {done:,}"
            )
        done += got
        if done == len(buffer):
            return


def _preadv(fd: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(fd, [buffer], offset)


def _pread_copy(fd: int, buffer: memoryview, offset: int) -> int:
    """Do what preadv does where the platform lacks it (macOS before 11)."""
    data = os.pread(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


if not hasattr(os, "preadv"):  # pragma: no cover
    _preadv = _pread_copy


def read_at(path: str, offset: int, n_bytes: int) -> bytearray:
    """Return a few bytes of the regular file `path`."""
    data = bytearray(n_bytes)
    fd = open_input(path)
    try:
        read_exact(fd, memoryview(data), offset, path)
    finally:
        os.close(fd)
    return data


def read_small(path: str, limit: int) -> bytes:
    """Return the whole contents of a small regular file of at most `limit` bytes."""
    fd = open_input(path)
    try:
        n_bytes = os.fstat(fd).st_size
        if n_bytes > limit:
            raise DamagedFile(path, f"expected at most {size(limit)}, found {size(n_bytes)}")
        data = bytearray(n_bytes)
        read_exact(fd, memoryview(data), 0, path)
        return bytes(data)
    finally:
        os.close(fd)


def open_unchanged(expected: Stamp) -> int:
    """Return a descriptor of an input file, checked to be the one that was planned with."""
    fd = open_input(expected.path)
    try:
        check_unchanged(fd, expected)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Handles:
    """Open descriptors of a task's files: the first `limit` stay open, others come and go.

    A task walks its checkpoints in a cycle, the worst case of an LRU cache; keeping a fixed part
    open is the best a bounded cache can do there.

    Args:
        open_file: returns a new descriptor of the file with an ordinal.
        limit: how many stay open.
    """

    def __init__(self, open_file: Callable[[int], int], limit: int) -> None:
        self._open_file = open_file
        self._limit = max(limit, 1)
        self._open: dict[int, int] = {}
        self._transient: int | None = None

    def __enter__(self) -> Handles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop_transient()
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def fd(self, ordinal: int) -> int:
        """Return a descriptor of file `ordinal`, valid until the next call."""
        fd = self._open.get(ordinal)
        if fd is not None:
            return fd
        self._drop_transient()
        fd = self._open_file(ordinal)
        if len(self._open) < self._limit:
            self._open[ordinal] = fd
        else:
            self._transient = fd
        return fd

    def _drop_transient(self) -> None:
        if self._transient is not None:
            os.close(self._transient)
            self._transient = None


def handle_limit(workers: int) -> int:
    """Return how many files each of `workers` may keep open under RLIMIT_NOFILE.

    Half of it for inputs and half for outputs, with some left for the rest of the process.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 64
    return max(1, min(64, (soft - 64) // (2 * max(workers, 1)) - 2))
