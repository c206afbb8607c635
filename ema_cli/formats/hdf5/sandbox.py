"""What a process that parses hostile files gives up: files, network, memory and time without end.

Limits of the kernel for all systems; on Linux also Landlock, after which nothing can be opened any
more. All of it is a second line: what is dangerous in a file is looked for and refused first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import time

_STATISTICS = "/proc/self/statm"
_FILES = 16

# linux/landlock.h and linux/prctl.h; the numbers of the calls are those of all architectures.
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_VERSION = 1
_NO_NEW_PRIVILEGES = 38
# Rights over files, by version: the last bit of each. And network and signals, and where they came.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_LATEST_FILE_RIGHTS = 16
_NETWORK_SINCE, _NETWORK = 4, 0b11
_SCOPES_SINCE, _SCOPES = 6, 0b11


def confine() -> bool:
    """Give up everything but the descriptors that are open; whether Landlock took part.

    Whatever is still to be imported must be imported before.
    """
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_NOFILE, _FILES)
    with contextlib.suppress(OSError):
        _statistics.append(os.open(_STATISTICS, os.O_RDONLY))
    return _landlock()


def allow(seconds: float, memory: int) -> None:
    """Let this process compute for so long from now on, and take so many bytes more than it has.

    A signal ends it in time. The limit counts whole seconds, so it comes second to a timer.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _allow(resource.RLIMIT_CPU, int(time.process_time() + seconds) + 2)
    for fd in _statistics:
        mapped = int(os.pread(fd, 64, 0).split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _allow(resource.RLIMIT_AS, mapped + memory)


# The open file that tells how much is mapped, once no file can be opened any more.
_statistics: list[int] = []


def _allow(kind: int, value: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (value, value))


def _landlock() -> bool:
    """Forbid to open, make or change any file, to connect and to send signals; best effort."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        call = library.syscall
    except (OSError, AttributeError):
        return False
    if os.uname().sysname != "Linux":
        return False
    version = call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_ulong(_VERSION))
    if version < 1:
        return False
    files = (1 << _FILE_RIGHTS.get(version, _LATEST_FILE_RIGHTS)) - 1
    rules = struct.pack("<Q", files)
    if version >= _NETWORK_SINCE:
        rules += struct.pack("<Q", _NETWORK)
    if version >= _SCOPES_SINCE:
        rules += struct.pack("<Q", _SCOPES)
    ruleset = call(_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), ctypes.c_ulong(0))
    if ruleset < 0:
        return False
    zero = ctypes.c_ulong(0)
    library.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero)
    done = bool(call(_RESTRICT_SELF, ruleset, zero) == 0)
    os.close(ruleset)
    return done
