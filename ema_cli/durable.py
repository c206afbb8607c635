"""Outputs on disk: created locked, reserved, written, made durable, replaced in one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import cast

from ema_cli.errors import Locked, storage_errors
from ema_cli.text import shorten, size

# Beside a destination NAME our unfinished file is ".NAME" + this.
TEMPORARY_SUFFIX = ".ema-avg.tmp"
_SYNC_FILE_RANGE_WRITE = 2
_RENAME_NOREPLACE = 1
_LONGEST_NAME = 255
# While a folder is replaced, the old one waits beside it under ".NAME" + this.
ASIDE_SUFFIX = ".ema-avg.old"
# While the files of a prefix are moved there, they wait under ".NAME" + this: all of them are old.
MOVING_SUFFIX = ".ema-avg.moving"

# What has to be unpacked before it can be read lies beside the output under ".NAME" + this.
SPILL_SUFFIX = ".ema-avg.spill"
# Which tasks of a long work are done is told by a log beside the first output, ".NAME" + this.
PROGRESS_SUFFIX = ".ema-avg.progress"


def beside(path: str, suffix: str) -> str:
    """Return the hidden working name for `path` in the same directory."""
    head, tail = os.path.split(path.rstrip("/"))
    if len(os.fsencode(tail)) + len(suffix) >= _LONGEST_NAME:
        tail = hashlib.sha256(os.fsencode(tail)).hexdigest()
    return os.path.join(head, f".{tail}{suffix}")


def create_locked(path: str, *, empty: bool = True) -> int:
    """Return a descriptor of the empty file `path`, opened O_NOFOLLOW and locked for writing.

    What a killed process left there, file or folder, is taken over; what a living process holds
    raises `Locked`. Without `empty` a file keeps what it holds.
    """
    with storage_errors(path, "cannot create"):
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except IsADirectoryError:
                os.close(create_locked_directory(path))
                os.rmdir(path)
                continue
            if not _lock(fd, path):
                continue
            try:
                if empty:
                    os.ftruncate(fd, 0)
            except OSError:
                os.close(fd)
                os.unlink(path)
                raise
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


def create_locked_directory(path: str, *, empty: bool = True) -> int:
    """Return a locked descriptor of the directory `path`, taken over as `create_locked`.

    `empty`: delete what is in it.
    """
    with storage_errors(path, "cannot create"):
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except NotADirectoryError:
                os.close(create_locked(path))  # refuses a link, and what a process still writes
                os.unlink(path)
                continue
            if _lock(fd, path):
                for entry in os.listdir(fd) if empty else ():
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
    """Return what an ordinary user can still write to the file system of `directory`.

    A directory that does not exist yet counts as the nearest one above it that does.
    """
    directory = directory or "."
    while directory not in (".", "/") and not os.path.isdir(directory):
        directory = os.path.dirname(directory) or "."
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def left_bytes(path: str) -> int:
    """Return what the unfinished output for `path` takes that a killed process left."""
    root = beside(path, TEMPORARY_SUFFIX)
    with contextlib.suppress(OSError):
        found = [root]
        if os.path.isdir(root) and not os.path.islink(root):
            found = [entry.path for entry in os.scandir(root)]
        return sum(os.lstat(one).st_blocks * 512 for one in found)
    return 0


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


def rename_new(old: str, new: str) -> None:
    """Rename `old` to `new`, which must not exist: `FileExistsError` otherwise, at any moment.

    renameat2(2) with RENAME_NOREPLACE; where that is missing, a look just before.
    """
    if sys.platform == "linux":
        number, path = ctypes.c_int, ctypes.c_char_p
        call = _system_call("renameat2", number, path, number, path, ctypes.c_uint)
        here = -100  # AT_FDCWD
        if call(here, os.fsencode(old), here, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), new)
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(old, new)


def sync(fd: int, path: str) -> None:
    """Make the bytes of `fd` durable; a failure is never retried, the pages may be lost."""
    with storage_errors(path, "cannot make durable"):
        os.fsync(fd)


def sync_data(fd: int, path: str) -> None:
    """Make the bytes of `fd` durable, but no times of the file; see `sync`."""
    with storage_errors(path, "cannot make durable"):
        getattr(os, "fdatasync", os.fsync)(fd)  # macOS has only the latter


def sync_directory(path: str) -> None:
    """Make the names in directory `path` durable."""
    with storage_errors(path, "cannot make durable"):
        fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def stage(path: str, data: bytes) -> str:
    """Write the small file that will replace `path`, durably; returns its temporary name."""
    temporary = beside(path, TEMPORARY_SUFFIX)
    fd = create_locked(temporary)
    try:
        write_exact(fd, data, 0, temporary)
        sync(fd, temporary)
    except BaseException:
        remove(temporary)
        raise
    finally:
        os.close(fd)
    return temporary


def exists(path: str) -> bool:
    """Whether something is called `path`, a dangling link too.

    What cannot be told for another reason than that nothing is there raises `StorageError`: what
    is decided on it may not be undone.
    """
    with storage_errors(path, "cannot look for it"):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def remove(path: str) -> None:
    """Remove a file or a folder of ours if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.isdir(path) and not os.path.islink(path):
            import shutil  # slow to import, and rarely needed

            shutil.rmtree(path)
        else:
            os.unlink(path)


def make_directories(path: str) -> list[str]:
    """Make a directory and those above it; returns what was missing, outermost last."""
    missing = []
    above = path
    while above not in ("", "/") and not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    os.makedirs(path, exist_ok=True)
    return missing


def remove_empty(directories: Iterable[str]) -> None:
    """Remove the directories that are empty, in this order."""
    for directory in directories:
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def is_temporary(name: str) -> bool:
    """Whether an interrupted run of ours may have left a file of this name."""
    suffixes = (TEMPORARY_SUFFIX, ASIDE_SUFFIX, MOVING_SUFFIX, SPILL_SUFFIX, PROGRESS_SUFFIX)
    return name.startswith(".") and name.endswith(suffixes)
