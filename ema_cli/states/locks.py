"""Who may write a state: locks that the kernel frees when their process dies, however it dies.

flock(2), not fcntl(2) locks, which any close of the file in the same process drops.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from ema_cli.errors import Locked, StorageError, storage_errors
from ema_cli.files import read_small
from ema_cli.text import printable, shorten

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[int] = set()
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def acquire(path: str) -> int:
    """Return a descriptor of the file `path`, made if need be, locked as long as it is open.

    Raises `Locked` when another process holds it. It is never deleted; where somebody else did
    that between our opening and locking it, the new one is locked.
    """
    with _storage_errors(path):
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
            try:
                if not lock(fd, exclusive=True):
                    raise Locked(
                        f"{shorten(path, 1000)}: another process writes to this state"
                        f"{_holder(path)}",
                        "wait for it, or stop it",
                    )
                if is_named(fd, path):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"pid {os.getpid()}\n".encode("ascii"), 0)
                    return hold(fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    try:
        with storage_errors(path, "cannot lock"):
            yield
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_LOCKS:
            raise StorageError(
                f"{shorten(path, 1000)}: this file system has no locks, and two writers would "
                "destroy a state",
                "put the state on a local disk",
            ) from cause
        raise


def _holder(path: str) -> str:
    with contextlib.suppress(Exception):
        text = read_small(path, 100).decode("ascii").strip()
        return f", {printable(text)}" if text else ""
    return ""


def lock(fd: int, *, exclusive: bool) -> bool:
    """Lock an open file; False when somebody else holds a lock that forbids it.

    Nothing is written where the file system has no locks; reading does without.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if exclusive or error.errno not in _NO_LOCKS:
            raise
    return True


def hold(fd: int) -> int:
    """Keep a locked descriptor from living on in forked processes; returns it."""
    _held.add(fd)
    return fd


def release(fd: int) -> None:
    """Close a descriptor, which gives its lock back; in a forked process it is closed already."""
    if fd in _held:
        _held.discard(fd)
        os.close(fd)


def _forget() -> None:
    """Close the copies that a forked process has: they would hold our locks after our death."""
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)


def is_named(fd: int, path: str) -> bool:
    """Whether `path` still is the open file."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))
