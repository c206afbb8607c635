"""The files of a state: what they are called, how small ones are replaced, what is left over."""

from __future__ import annotations

import errno
import os
import re
import stat

from ema_cli import durable, hints
from ema_cli.errors import (
    DamagedState,
    InputError,
    OutputExists,
    UnsupportedInput,
    storage_errors,
)
from ema_cli.files import read_at, read_small
from ema_cli.text import command, shorten

FORMAT, LOCK, PLAN, ROOT, LEDGER, PROGRESS, PINS = (
    "FORMAT",
    "LOCK",
    "plan",
    "ROOT",
    "ledger",
    "progress",
    "pins",
)
MAGIC = b"ema-avg state "
VERSION_LINE = MAGIC + b"1\n"
ROOT_LIMIT = 4096
_TEMPORARY = ".tmp"
# What says that nothing of that name can be a file.
_NOT_THERE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
)
_SLOT = re.compile(r"slot\.(\d{1,9})")
_GENERATION = re.compile(r"(?:manifest|last)-(\d{1,18})")


def slot_name(number: int) -> str:
    """Return what a slot is called."""
    return f"slot.{number}"


def manifest_name(generation: int) -> str:
    """Return what the manifest of a generation is called."""
    return f"manifest-{generation}"


def last_name(generation: int) -> str:
    """Return what the directory with the structure of the last checkpoint is called."""
    return f"last-{generation}"


def slot_numbers(path: str) -> list[int]:
    """Return the numbers of the slots in a state, ascending."""
    with storage_errors(path, "cannot list"):
        matches = map(_SLOT.fullmatch, os.listdir(path))
    return sorted(int(match[1]) for match in matches if match)


def is_stale(name: str, generation: int) -> bool:
    """Whether a file belongs to another generation than the one that counts."""
    match = _GENERATION.fullmatch(name)
    return match is not None and int(match[1]) != generation


def was_committed(path: str) -> bool:
    """Whether a state without ``ROOT`` had one: a creation that was killed leaves generation 1."""
    with storage_errors(path, "cannot list"):
        matches = [_GENERATION.fullmatch(name) for name in os.listdir(path)]
    return any(match and int(match[1]) > 1 for match in matches)


def is_state(path: str) -> bool:
    """Whether a directory is a state, of whatever version. Raises `StorageError`.

    What has ``ROOT`` and a slot is one, though ``FORMAT`` may be damaged.
    """
    where = os.path.join(path, FORMAT)
    with storage_errors(where, "cannot look for it"):
        try:
            told = stat.S_ISREG(os.stat(where).st_mode)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            told = False
    try:
        if told and bytes(read_at(where, 0, len(MAGIC))) == MAGIC:
            return True
    except InputError:  # shorter, or not to be read
        pass
    return all(os.path.isfile(os.path.join(path, name)) for name in (ROOT, slot_name(0), PLAN))


def prepare(path: str) -> None:
    """Make the directory of a state; raises `OutputExists` for one that holds something else."""
    with storage_errors(path, "cannot create"):
        above = durable.make_directories(os.path.dirname(os.path.abspath(path)))
        for made in above:
            durable.sync_directory(os.path.dirname(made))
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise OutputExists(
                    f"{shorten(path, 1000)}: expected a directory for the state, found a file",
                    hints.STATE,
                ) from None
        found = set(os.listdir(path))
        if ROOT not in found:  # it may have been made by a process that got no further
            durable.sync_directory(os.path.dirname(os.path.abspath(path)))
    if is_state(path):
        if ROOT in found and FORMAT not in found:
            raise DamagedState(os.path.join(path, FORMAT), "expected a file, found none")
        return
    if foreign := sorted(found - {FORMAT, FORMAT + _TEMPORARY, LOCK}):
        raise OutputExists(
            f"{shorten(path, 1000)}: expected a state or an empty directory, found "
            f"'{shorten(foreign[0])}'",
            hints.STATE,
        )


def _begin(path: str) -> str:
    begin = f"{command('ema-avg', 'run', 'RUN', '--state', path)} begins one"
    return begin if os.path.exists(path) else hints.near_path(path, begin)


def check_format(path: str, *, create: bool) -> None:
    """Raise `UnsupportedInput` for a state of another version; `create`: say which one it is."""
    where = os.path.join(path, FORMAT)
    if not durable.exists(where):
        if create:
            replace(path, FORMAT, VERSION_LINE)
            return
        raise InputError(f"{shorten(path, 1000)}: no state: expected a file {FORMAT}", _begin(path))
    found = read_small(where, ROOT_LIMIT)
    if found != VERSION_LINE:
        raise UnsupportedInput(
            f"{shorten(where, 1000)}: expected a state of version 1, found {found[:40]!r}",
            "use the version of ema-avg that made it",
        )


def replace(path: str, name: str, data: bytes, *, lasting: bool = True) -> None:
    """Give the file `name` new contents, all or nothing; `lasting`: its name is durable too."""
    staged = stage(path, name, data)
    with storage_errors(os.path.join(path, name), "cannot write"):
        os.rename(staged, os.path.join(path, name))
    if lasting:
        durable.sync_directory(path)


def stage(path: str, name: str, data: bytes) -> str:
    """Write what will be the file `name`, durably; returns its temporary name."""
    temporary = os.path.join(path, name + _TEMPORARY)
    with storage_errors(temporary, "cannot write"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600)
        try:
            durable.write_exact(fd, data, 0, temporary)
            durable.sync(fd, temporary)
        finally:
            os.close(fd)
    return temporary


def remove_unfinished(path: str) -> None:
    """Remove what a killed process left half-written; the writer's lock is held."""
    with storage_errors(path, "cannot repair"):
        for name in os.listdir(path):
            if name.endswith(_TEMPORARY) or name == PINS or durable.is_temporary(name):
                durable.remove(os.path.join(path, name))
