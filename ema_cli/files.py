"""Files: checked opening and exact reading of inputs, durable creation and publication of outputs.

Inputs are read with ``preadv`` into buffers the caller reuses, never mapped: a mapping of a file
that somebody truncates kills the process with SIGBUS, a short read is an error that can be told.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import resource
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import cast

from ema_cli.errors import (
    DamagedFile,
    EmaError,
    InputChanged,
    InputError,
    Locked,
    StorageError,
    storage_errors,
)
from ema_cli.tensors import Stamp
from ema_cli.text import shorten, size

# Beside a destination NAME our unfinished file is ".NAME" + this.
TEMPORARY_SUFFIX = ".ema-avg.tmp"
_SYNC_FILE_RANGE_WRITE = 2
# While a folder is replaced, the old one waits beside it under ".NAME" + this.
ASIDE_SUFFIX = ".ema-avg.old"

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


# ---------------------------------------------------------------------------- inputs


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
        raise InputError(f"{shorten(path, 1000)}: expected a regular file, found {kind}")
    return fd


def _cannot_open(path: str, error: OSError) -> EmaError:
    if error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE):
        return StorageError(f"{shorten(path, 1000)}: cannot open: {os.strerror(error.errno)}")
    return InputError(f"{shorten(path, 1000)}: cannot open: {os.strerror(error.errno or 0)}")


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
    while done < len(buffer):
        try:
            got = _preadv(fd, buffer[done:], offset + done)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise StorageError(f"{shorten(path, 1000)}: cannot read: {reason}") from error
        if got == 0:
            raise InputChanged(
                f"{shorten(path, 1000)}: truncated while it was read: expected "
                f"{len(buffer):,} bytes at offset {offset:,}, found {done:,}"
            )
        done += got


def _preadv(fd: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(fd, [buffer], offset)


def _pread_copy(fd: int, buffer: memoryview, offset: int) -> int:
    """Do what preadv does where the platform lacks it (macOS before 11)."""
    data = os.pread(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


if not hasattr(os, "preadv"):  # pragma: no cover
    _preadv = _pread_copy


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


class Handles:
    """Open descriptors of a task's input files: the first `limit` stay open, others come and go.

    A task walks its checkpoints in a cycle, the worst case of an LRU cache; keeping a fixed part
    open is the best a bounded cache can do there.
    """

    def __init__(self, files: Sequence[Stamp], limit: int) -> None:
        self._files = files
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
        expected = self._files[ordinal]
        fd = open_input(expected.path)
        try:
            check_unchanged(fd, expected)
        except BaseException:
            os.close(fd)
            raise
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
    """Return how many input files each of `workers` may keep open under RLIMIT_NOFILE."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 64
    return max(1, min(64, (soft - 64) // max(workers, 1) - 4))


# ---------------------------------------------------------------------------- outputs


def beside(path: str, suffix: str) -> str:
    """Return the hidden working name for `path` in the same directory."""
    head, tail = os.path.split(path.rstrip("/"))
    return os.path.join(head, f".{tail}{suffix}")


def create_locked(path: str) -> int:
    """Return a descriptor of the empty file `path`, opened O_NOFOLLOW and locked for writing.

    A file left by a killed process is taken over; one that a living process holds raises
    `Locked`.
    """
    with storage_errors(path, "cannot create"):
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            if _lock(fd, path):
                os.ftruncate(fd, 0)
                return fd


def _lock(fd: int, path: str) -> bool:
    """Lock `fd`; False (and closed) when `path` was meanwhile renamed away or replaced."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Locked(
            f"{shorten(path, 1000)}: another process is writing this output",
            "wait for it, or write to another name with -o",
        ) from None
    except OSError as error:  # no locks on this file system: go on without
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            os.close(fd)
            raise
    with contextlib.suppress(FileNotFoundError):
        named = os.stat(path, follow_symlinks=False)
        if named.st_ino == os.fstat(fd).st_ino:
            return True
    os.close(fd)
    return False


def create_locked_directory(path: str) -> int:
    """Return a locked descriptor of the empty directory `path`, taken over as `create_locked`."""
    with storage_errors(path, "cannot create"):
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if _lock(fd, path):
                for entry in os.listdir(fd):
                    os.unlink(entry, dir_fd=fd)
                return fd


def reserve(fd: int, n_bytes: int, path: str) -> bool:
    """Give the file its size and its blocks now, so that a full disk is found before any work.

    fallocate(2) is called directly: posix_fallocate writes zeros where it is unsupported. There
    the free space is checked instead and False returned: nothing is promised.
    """
    if n_bytes == 0:
        return True
    with storage_errors(path, f"cannot reserve {size(n_bytes)}"):
        if sys.platform == "linux" and _fallocate(fd, n_bytes):
            return True
        free = free_bytes(os.path.dirname(path) or ".")
        if free < n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, n_bytes)
        return False


@functools.cache
def _system_call(name: str, *arguments: type) -> Callable[..., int]:
    """Return a function of the C library that Python has no name for."""
    call = getattr(ctypes.CDLL(None, use_errno=True), name)
    call.argtypes = arguments
    return cast(Callable[..., int], call)


def _fallocate(fd: int, n_bytes: int) -> bool:
    number, offset = ctypes.c_int, ctypes.c_int64
    call = _system_call("fallocate", number, number, offset, offset)
    while call(fd, 0, 0, n_bytes) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def free_bytes(directory: str) -> int:
    """Return what an ordinary user can still write to the file system of `directory`."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def write_exact(fd: int, data: memoryview | bytes, offset: int, path: str) -> None:
    """Write all of `data` at `offset`; raises `StorageError`."""
    view = memoryview(data)
    done = 0
    with storage_errors(path, "cannot write"):
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)


def start_writing(fd: int, offset: int, n_bytes: int) -> None:
    """Let the kernel begin to write these bytes to disk, so that `sync` has less to wait for.

    Only a matter of speed: where sync_file_range(2) is missing or refuses, nothing happens.
    """
    if sys.platform == "linux":
        number, where = ctypes.c_int, ctypes.c_int64
        call = _system_call("sync_file_range", number, where, where, ctypes.c_uint)
        call(fd, offset, n_bytes, _SYNC_FILE_RANGE_WRITE)


def sync(fd: int, path: str) -> None:
    """Make the bytes of `fd` durable; a failure is never retried, the pages may be lost."""
    with storage_errors(path, "cannot make durable"):
        os.fsync(fd)


def sync_directory(path: str) -> None:
    """Make the names in directory `path` durable."""
    with storage_errors(path, "cannot make durable"):
        fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_durably(path: str, data: bytes) -> None:
    """Replace the small file `path` by `data` atomically and durably."""
    temporary = beside(path, TEMPORARY_SUFFIX)
    fd = create_locked(temporary)
    try:
        write_exact(fd, data, 0, temporary)
        sync(fd, temporary)
        with storage_errors(path, "cannot publish"):
            os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    finally:
        os.close(fd)
    sync_directory(os.path.dirname(path))


def remove(path: str) -> None:
    """Remove a file or a folder of ours if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def temporaries_of(names: Sequence[str]) -> Iterator[str]:
    """Yield those of `names` that an interrupted run of ours may have left."""
    for name in names:
        if name.startswith(".") and name.endswith((TEMPORARY_SUFFIX, ASIDE_SUFFIX)):
            yield name
