"""Which tasks of a long work are done: a log, by which another process continues a killed one.

Every two seconds, in the background: the files that were written are made durable, then the tasks
that were finished before are recorded, then the log is made durable. So a task that is recorded
lies on disk. A process that continues reads all of it back nevertheless and believes only what has
the recorded checksums; the log is a hint, and may be lost, torn or of other work at any time.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from ema_cli import durable
from ema_cli.errors import DamagedState, StorageError, storage_errors
from ema_cli.readback import is_intact
from ema_cli.states import sealed
from ema_cli.tasks import Cloned, Done, Part, Sum, Task, Unit

VERSION = 1
# Seconds of work that may be lost, besides the tasks that are being worked on.
INTERVAL = 2.0
_LONGEST_LINE = 64 << 20

OTHER_WORK = "the inputs or the plan changed"
OTHER_FILES = "its files were replaced"
OTHER_BYTES = "its files hold something else"
DAMAGED = "its log is damaged"


class Log:
    """The log of the work that fills some files, which exist and are locked by the caller.

    Args:
        path: of the log.
        key: the digest of everything that decides the bytes of the files.
        outputs: paths of the files.

    Attributes:
        done: what an earlier process did, as far as it can be trusted; see `resume`.
        stale: why an earlier process' log was not continued; empty when it was, or there is none.
        recorded: whether the log holds at least one task.
    """

    def __init__(self, path: str, key: str, outputs: Sequence[str]) -> None:
        self.path = path
        self.done: dict[int, Done] = {}
        self.stale = ""
        self.recorded = False
        self._key = key
        self._outputs = tuple(outputs)
        self._fd = -1
        self._end = 0
        self._pending: list[tuple[int, Done]] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._given_up = False
        self._added, self._stopping = threading.Event(), threading.Event()
        # Held while the list of what is pending is changed; and while the log is written.
        self._listing, self._writing = threading.Lock(), threading.Lock()

    # ------------------------------------------------------------------ what was done before

    def resume(self) -> dict[int, Done]:
        """Return, and keep as `done`, what an earlier process' log of this very work holds.

        Empty when there is none; one that cannot be continued is removed, and `stale` tells why.
        """
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with storage_errors(self.path, "cannot open"):
            try:
                self._fd = os.open(self.path, flags)
            except FileNotFoundError:
                return self.done
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                self._close()
                raise StorageError(f"{self.path}: expected a regular file", f"remove {self.path}")
            self.stale = self._read()
            if self.stale:
                self._forget()
            else:
                os.ftruncate(self._fd, self._end)  # a torn tail
                self.recorded = True
        return self.done

    def _read(self) -> str:
        """Read the log up to the first line that is not sealed; returns why it is of no use."""
        with open(self._fd, "rb", closefd=False) as file:
            line = file.readline(_LONGEST_LINE)
            try:
                header = _unsealed(line)
                if header != self._header():
                    same = isinstance(header, dict) and header.get("key") == self._key
                    return OTHER_FILES if same else OTHER_WORK
                while line:
                    self._end += len(line)
                    line = file.readline(_LONGEST_LINE)
                    ordinal, done = _from_json(_unsealed(line))
                    self.done[ordinal] = done
            except (DamagedState, LookupError, TypeError, ValueError):
                pass
        return "" if self.done else DAMAGED

    def _header(self) -> dict[str, Any]:
        inodes = []
        for path in self._outputs:
            try:
                inodes.append(os.stat(path, follow_symlinks=False).st_ino)
            except FileNotFoundError:
                inodes.append(-1)
        return {"version": VERSION, "key": self._key, "inodes": inodes}

    def check(self, tasks: Iterable[Task]) -> int:
        """Read back what is recorded of the work's tasks; forgets those that differ.

        Returns how many tasks there are.
        """
        intact, count = {}, 0
        for ordinal, task in enumerate(tasks):
            count += 1
            done = self.done.get(ordinal)
            if done is not None and is_intact(task, done):
                intact[ordinal] = done
        self.done = intact
        if not intact:
            self.stale = OTHER_BYTES
            self._forget()
        return count

    def _forget(self) -> None:
        """Remove a log that is of no use, before anything changes what it tells of."""
        self._close()
        self.done, self.recorded = {}, False
        durable.remove(self.path)
        durable.sync_directory(os.path.dirname(self.path))

    # ------------------------------------------------------------------ what is done now

    def add(self, ordinal: int, done: Done) -> None:
        """Record a finished task within the next seconds. Raises what went wrong meanwhile."""
        self._raise()
        with self._listing:
            self._pending.append((ordinal, done))
        self._added.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="ema-avg progress", daemon=True)
            self._thread.start()

    def close(self, patience: float | None = None) -> None:
        """Record what is left, unless nothing was recorded so far: then it is not worth it.

        Gives up after `patience` seconds. Raises what went wrong, never to be tried again.
        """
        self._stopping.set()
        self._added.set()
        if self._thread is not None:
            self._thread.join(patience)
        with self._writing:
            self._given_up = True
            self._close()
        self._raise()

    def remove(self) -> None:
        """Remove the log; what is not recorded yet will not be."""
        self._given_up = True
        with contextlib.suppress(Exception):  # what went wrong does not matter any more
            self.close()
        self.recorded = False
        durable.remove(self.path)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ------------------------------------------------------------------ in the background

    def _keep(self) -> None:
        try:
            while not self._stopping.wait(INTERVAL):
                self._added.wait()
                self._added.clear()
                self._record()
            if self.recorded:
                self._record()
        except Exception as error:
            self._error = error
            with contextlib.suppress(OSError):
                durable.remove(self.path)
            self.recorded = False

    def _record(self) -> None:
        """Make what was finished until now durable, then record it, then make that durable."""
        with self._listing:
            group, self._pending = self._pending, []
        if not group or self._given_up:
            return
        for path in self._written(group):
            _sync_data(path)
        data = b"".join(sealed.seal(_to_json(ordinal, done)) for ordinal, done in group)
        with self._writing:
            if self._given_up:
                return
            created = self._fd < 0
            if created:
                data = self._created() + data
            durable.write_exact(self._fd, data, self._end, self.path)
            self._end += len(data)
            durable.sync_data(self._fd, self.path)
        if created:
            for directory in {os.path.dirname(path) for path in (self.path, *self._outputs)}:
                durable.sync_directory(directory)
        self.recorded = True

    def _written(self, group: Iterable[tuple[int, Done]]) -> list[str]:
        files = {file for _, done in group for file, _ in done.made}
        files |= {one.file for _, done in group for one in done.cloned}
        return [self._outputs[file] for file in sorted(files)]

    def _created(self) -> bytes:
        """Create the log; returns its header."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with storage_errors(self.path, "cannot create"):
            self._fd = os.open(self.path, flags, 0o666)
        self._end = 0
        return sealed.seal(self._header())


def _sync_data(path: str) -> None:
    with storage_errors(path, "cannot open"):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        durable.sync_data(fd, path)
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------- lines


def _to_json(ordinal: int, done: Done) -> dict[str, Any]:
    measured = [[*key, value.hex()] for key, value in done.measured.items()]
    return {
        "task": ordinal,
        "read": done.read,
        "written": done.written,
        "parts": [[*unit, *part] for unit, part in done.parts.items()],
        "made": [[*place, crc] for place, crc in done.made.items()],
        "cloned": done.cloned,
        **({"measured": measured} if measured else {}),
    }


def _from_json(record: Any) -> tuple[int, Done]:
    """Return what `_to_json` made; raises LookupError, TypeError or ValueError for else."""
    parts = (_numbers(row) for row in record["parts"])
    made = (_numbers(row) for row in record["made"])
    ordinal, read, written = _numbers([record[key] for key in ("task", "read", "written")])
    done = Done(
        read,
        written,
        {Unit(*row[:4]): Part(*row[4:]) for row in parts},
        {(file, chunk): crc for file, chunk, crc in made},
        None,
        tuple(Cloned(*_numbers(row)) for row in record["cloned"]),
        {Sum(*_numbers(row)): _real(value) for *row, value in record.get("measured", [])},
    )
    return ordinal, done


def _numbers(row: Any) -> list[int]:
    if type(row) is not list or not all(type(number) is int for number in row):
        raise ValueError("expected numbers")
    return row


def _real(text: Any) -> float:
    try:
        return float.fromhex(text)
    except OverflowError as error:
        raise ValueError("expected a float64") from error


def _unsealed(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        raise ValueError("torn")
    return sealed.unseal(line[:-1], "")
