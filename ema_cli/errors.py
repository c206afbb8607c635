"""The exception tree: every error owns its exit code, its text and its hint.

``args`` are plain data, so errors survive pickling on their way back from a worker process;
the text is made in ``__str__``. Exit codes are the contract of ``docs/architecture.md``::

    EmaError                  1  internal error
    ├── UsageError            2  the command line makes no sense
    ├── NothingToAverage     10  no usable checkpoint
    ├── Locked               11  another process is writing there
    ├── InputError           12  damaged, hostile, unsupported, changed while read
    │   ├── DamagedFile          one invariant of a format is broken
    │   ├── UnsupportedInput     known, but not read by this version
    │   ├── InputChanged         changed between plan and publication
    │   └── DamagedState         a file of a state is not what was written
    ├── Disagreement         13  names, shapes, dtypes or steps disagree
    │   └── Outlier              a checkpoint does not seem to belong to its run
    ├── OutputExists         14  output exists or is an input
    ├── StorageError         15  disk full or I/O error
    ├── OtherSettings        16  the state belongs to other settings
    └── NonFinite            17  a result is NaN or infinite

130, 141 and 143 (interrupted, unread, terminated) are signals, not errors.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ema_cli.text import shorten


class EmaError(Exception):
    """Root of all errors a user can meet.

    Args:
        message: one line, *where: what: expected and found*, made of safe text.
        hint: the command or change that helps; `remedy`, that of the class, where it is empty.
    """

    exit_code = 1
    remedy = "run again with EMA_AVG_DEBUG=1 and report what it shows"

    @property
    def message(self) -> str:
        """What went wrong, one line."""
        return str(self.args[0]) if self.args else type(self).__name__

    @property
    def hint(self) -> str:
        """What would help."""
        return str(self.args[1]) if len(self.args) > 1 and self.args[1] else self.remedy

    def __str__(self) -> str:
        return self.message


class UsageError(EmaError):
    """The command line or the arguments make no sense."""

    exit_code = 2
    remedy = "ema-avg --help lists the commands, ema-avg COMMAND --help the options of one"


class NothingToAverage(EmaError):
    """No usable checkpoint was found, or a selection left none."""

    exit_code = 10
    remedy = "see what lies there with ema-avg inspect RUN"


class Locked(EmaError):
    """Another process is writing to the same output or state."""

    exit_code = 11
    remedy = "wait for it, or stop it"


class InputError(EmaError):
    """An input is damaged, hostile, unsupported or changed while it was read."""

    exit_code = 12
    remedy = "name a checkpoint, or a directory of checkpoints: ema-avg inspect DIR lists them"


class DamagedFile(InputError):
    """A file breaks an invariant of its format.

    Args:
        path: the file.
        reason: the invariant with what was expected and found.
        tensor: the tensor the reason is about, if any.
    """

    remedy = "copy the file again from where it was written, or leave it out with --glob"

    def __init__(self, path: str, reason: str, tensor: str | None = None) -> None:
        super().__init__(path, reason, tensor)

    @property
    def message(self) -> str:
        """``FILE: [tensor 'NAME':] reason``."""
        path, reason, tensor = self.args
        about = "" if tensor is None else f"tensor '{shorten(tensor)}': "
        return f"{shorten(path, 1000)}: {about}{reason}"

    @property
    def hint(self) -> str:
        """What can be done about a damaged file."""
        return self.remedy


class UnsupportedInput(InputError):
    """The input is something we know of but do not read."""

    remedy = "save it again with what wrote it, in a format that ema-avg reads, such as safetensors"


class InputChanged(InputError):
    """An input changed between the plan and the publication of the result."""

    remedy = "run again when nothing writes to it any more; nothing was published"


class DamagedState(InputError):
    """A file of a state is not what was written there.

    Args:
        path: the file.
        reason: what was expected and found.
    """

    remedy = "bring the state back from a copy, or begin a new one in another directory"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)

    @property
    def message(self) -> str:
        """``FILE: reason``."""
        path, reason = self.args
        return f"{shorten(path, 1000)}: {reason}"

    @property
    def hint(self) -> str:
        """What can be done about a damaged state."""
        return self.remedy


class Disagreement(EmaError):
    """Names, shapes, dtypes or steps disagree."""

    exit_code = 13
    remedy = "leave out what differs: checkpoints with --glob or --steps, tensors with --exclude"


class Outlier(Disagreement):
    """A checkpoint does not seem to belong to its run."""

    remedy = "leave the checkpoint out with --steps or by naming the others"


class OutputExists(EmaError):
    """The output exists already, or is one of the inputs."""

    exit_code = 14
    remedy = "write to another name with -o"


class StorageError(EmaError):
    """The disk is full or an I/O call failed."""

    exit_code = 15
    remedy = "see to the path, its permissions and the disk, then give the same command again"


class OtherSettings(EmaError):
    """A state belongs to other settings than those asked for."""

    exit_code = 16
    remedy = "give the settings the state has, or another directory with --state DIR"


class NonFinite(EmaError):
    """A value of the result is NaN or infinite."""

    exit_code = 17
    remedy = (
        "leave the checkpoint out with --steps or --glob, or let it pass with --non-finite allow"
    )


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "internal error",
    2: "usage",
    3: "done, but something that looks like a checkpoint could not be used, or not be recomputed",
    10: "nothing to average",
    11: "locked by another process",
    12: "an input is damaged, hostile, unsupported or changed while read",
    13: "names, shapes, dtypes or steps disagree, checkpoints differ or do not belong to the run, "
    "or a restore would fail",
    14: "the output exists or is an input",
    15: "disk full or I/O error",
    16: "the state belongs to other settings",
    17: "non-finite values",
    130: "interrupted",
    141: "nobody reads the output any more",
    143: "terminated",
}


@contextmanager
def storage_errors(path: str, doing: str) -> Iterator[None]:
    """Turn an `OSError` raised inside into a `StorageError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = (
                "free some space, or write elsewhere with -o; `ema-avg plan` shows what is needed"
            )
        raise StorageError(f"{shorten(path, 1000)}: {doing}: {reason}", hint) from error
