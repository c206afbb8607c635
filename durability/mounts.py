"""File systems of our own: on loop devices and in memory, cut off from power, filled to the brim.

They are mounted in a namespace that ends with the process, so that nothing stays mounted however
it ends.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass

MIB = 1 << 20
BLOCK = 4096
_CLONE_NEWNS = 0x00020000
_MS_PRIVATE_ALL = 0x4000 | 0x40000  # MS_REC, MS_PRIVATE
_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
# What the ioctl does before it stops all writing: flush the journal but not the data, or nothing.
FLUSH_JOURNAL, FLUSH_NOTHING = 1, 2


@dataclass(frozen=True)
class Kind:
    """A file system to test on: how it is made and mounted."""

    name: str
    mkfs: tuple[str, ...]
    options: str
    mib: int


EXT4 = Kind("ext4", ("mkfs.ext4", "-q", "-F"), "loop", 48)
# Nothing is written on its own before a rename, and data not before its names.
BOLD = Kind("ext4-bold", ("mkfs.ext4", "-q", "-F"), "loop,data=writeback,noauto_da_alloc", 48)
XFS = Kind("xfs", ("mkfs.xfs", "-q", "-f"), "loop", 304)
SMALL = Kind("ext4-small", ("mkfs.ext4", "-q", "-F", "-m", "0"), "loop", 12)
TMPFS = Kind("tmpfs", (), "", 8)
KINDS = {kind.name: kind for kind in (EXT4, BOLD, XFS, SMALL, TMPFS)}


def isolate() -> None:
    """Let this process have mounts of its own."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "a namespace for mounts was refused")
    if library.mount(b"none", b"/", None, _MS_PRIVATE_ALL, None) != 0:
        raise OSError(ctypes.get_errno(), "private mounts were refused")


def _command(*argv: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")


class Volume:
    """A file system in `base`; `isolate` was called before.

    Attributes:
        path: where it is mounted.
    """

    def __init__(self, kind: Kind, base: str) -> None:
        self._kind = kind
        self._image = os.path.join(base, f"{kind.name}-{os.getpid()}.img")
        self.path = os.path.join(base, f"{kind.name}-{os.getpid()}")
        os.makedirs(self.path, exist_ok=True)
        if kind.mkfs:
            with open(self._image, "wb") as file:
                file.truncate(kind.mib * MIB)
            _command(*kind.mkfs, self._image)
        self.mount()

    def mount(self) -> None:
        """Mount it; the journal is played back."""
        if self._kind.mkfs:
            _command("mount", "-o", self._kind.options, self._image, self.path)
        else:
            size = f"size={self._kind.mib}m"
            _command("mount", "-t", "tmpfs", "-o", size, "none", self.path)

    def unmount(self) -> None:
        """Take it away."""
        _command("umount", self.path)

    def settle(self) -> None:
        """Make everything on it durable."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
                raise OSError(ctypes.get_errno(), "syncfs")
        finally:
            os.close(fd)

    def cut_power(self, flag: int) -> None:
        """Lose what is not durable, and come back."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(fd)
        self.unmount()
        self.mount()

    def free(self) -> int:
        """Return the bytes that can still be written."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def fill(self, leave: int) -> None:
        """Fill it with a file until about `leave` bytes are free."""
        fd = os.open(os.path.join(self.path, "filler"), os.O_WRONLY | os.O_CREAT)
        step = max(self.free() - leave, 0) // BLOCK * BLOCK
        at = 0
        try:
            while step and self.free() > leave:
                try:
                    os.posix_fallocate(fd, at, step)
                    at += step
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    step = step // 2 // BLOCK * BLOCK  # some blocks are the file system's own
                step = min(step, (self.free() - leave) // BLOCK * BLOCK)
        finally:
            os.close(fd)

    def empty(self) -> None:
        """Remove everything that was put there."""
        for entry in os.listdir(self.path):
            path = os.path.join(self.path, entry)
            if entry == "lost+found":
                continue
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
