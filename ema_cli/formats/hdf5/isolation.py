"""Starts the process that opens HDF5 files, asks it, and turns its death into a clear error.

One process serves all files of a command. It is started when the first one is met, and thrown away
when it does not answer as expected.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ema_cli
from ema_cli.errors import DamagedFile, EmaError, InputError, UnsupportedInput
from ema_cli.formats.hdf5 import messages
from ema_cli.formats.hdf5.messages import PAYLOAD, Closed
from ema_cli.text import shorten

# Silence for so long means that no answer will come.
PATIENCE_SECONDS = 600.0
# Of computing: what a file of this size may take, ten times what good ones take.
_LEAST_SECONDS, _LISTED_PER_SECOND, _LONGEST_LISTING = 0.5, 256 << 10, 240.0
# And what it may take to hold, at least, at most, and for each byte of a file or for each object.
_LEAST_MEMORY, _MOST_MEMORY, _PER_BYTE = 64 << 20, 1 << 30, 16
_BYTES_PER_SECOND = 4 << 20
_BUILT_PER_SECOND = 500
# A new file holds what the library keeps of each object until all is written.
_BUILT_OBJECT = 24 << 10
_FAREWELL_SECONDS = 5.0
_LITERAL_LIMIT = 1 << 30
# How long its answers may be: to tell a file takes less than it has.
_SHORT, _LISTED_BYTES, _BUILT_BYTES = 1 << 20, 16, 256

_HINT = "save it again as Keras does: without links, other files, plug-ins and exotic types"

# Ended by its limits, or by a system that had no memory left.
_OUT_OF_BOUNDS = (signal.SIGPROF, signal.SIGXCPU, signal.SIGKILL)

# What is kept of the environment: libraries may be found through it.
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "PATH")
_ENVIRONMENT = {
    "HDF5_USE_FILE_LOCKING": "FALSE",
    "HDF5_PLUGIN_PRELOAD": "::",  # no plug-ins at all
    "HDF5_PLUGIN_PATH": "",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from ema_cli.formats.hdf5 import child; child.main(int(sys.argv[2]))"
)


class Window(NamedTuple):
    """Where an HDF5 file lies within an open file; in bytes."""

    offset: int
    nbytes: int


class _Process:
    """A running child and the socket to it."""

    def __init__(self) -> None:
        mine, theirs = socket.socketpair()
        mine.settimeout(PATIENCE_SECONDS)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # ourselves
                [sys.executable, "-I", "-S", "-c", _START, _import_path(), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={**{k: os.environ[k] for k in _KEPT if k in os.environ}, **_ENVIRONMENT},
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        self.owner = os.getpid()
        self.pid = self._process.pid
        self.connection = mine
        self.greeting: dict[str, Any] | None = None

    def greeted(self) -> None:
        """Wait until it is ready. Raises `EmaError` when it cannot be started."""
        if self.greeting is None:
            try:
                raw = messages.receive(self.connection, _SHORT)
                self.greeting = messages.decode(raw)
            except (Closed, OSError):
                raise EmaError(
                    "internal error: the process that reads HDF5 files does not start",
                    f"try: {shorten(sys.executable)} -c 'import h5py'",
                ) from None

    def end(self, *, patient: bool = True) -> int | None:
        """End it, leaving it time to do so itself; return its exit code."""
        self.connection.close()
        if self.owner != os.getpid():
            return None
        try:
            self._process.wait(_FAREWELL_SECONDS if patient else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self._process.returncode


_lock = threading.RLock()
_current: _Process | None = None


def _import_path() -> str:
    """Return where this process imports from, as JSON, with our own package first."""
    own = os.path.dirname(os.path.dirname(os.path.abspath(ema_cli.__file__)))
    return json.dumps([own, *(os.path.abspath(path) for path in sys.path if path)])


@contextlib.contextmanager
def _asked(path: str, request: Mapping[str, Any], fds: list[int]) -> Iterator[socket.socket]:
    """Send a request about the file `path`; what goes wrong until its end is that file's fault."""
    global _current
    with _lock:
        if _current is None or _current.owner != os.getpid():
            _current = _Process()
        process = _current
        whole = False
        try:
            process.greeted()
            messages.send(process.connection, request, fds)
            yield process.connection
            whole = True
        except TimeoutError:
            raise DamagedFile(path, "the HDF5 library does not finish reading it") from None
        except (Closed, OSError):
            raise DamagedFile(path, _death(process)) from None
        except messages.TooLong as error:
            raise DamagedFile(path, str(error)) from None
        except InputError:
            whole = True
            raise
        finally:
            if not whole:
                _current = None
                process.end(patient=False)


def _death(process: _Process) -> str:
    code = process.end()
    if code is not None and -code in _OUT_OF_BOUNDS:
        return "the HDF5 library took too long or too much memory reading it"
    return "the HDF5 library crashed reading it"


def close() -> None:
    """End the process, if there is one."""
    global _current
    with _lock:
        process, _current = _current, None
        if process is not None:
            process.end()


atexit.register(close)


def pid() -> int | None:
    """Return the process id of the child, if there is one."""
    return None if _current is None else _current.pid


def _received(connection: socket.socket, path: str, limit: int = 0) -> tuple[dict[str, Any], bytes]:
    """Return the next document, and its JSON. Raises `InputError` for a refusal."""
    raw = messages.receive(connection, max(limit, _SHORT))
    document = messages.decode(raw)
    if "damaged" in document:
        raise DamagedFile(path, shorten(str(document["damaged"])))
    if "unsupported" in document:
        reason, at = (shorten(str(document.get(key))) for key in ("unsupported", "at"))
        raise UnsupportedInput(f"{shorten(path, 1000)}: '/{at}': {reason}", _HINT)
    return document, raw


def _seconds(window: Window) -> float:
    """Return how long it may take to list a file: a small one that takes long does not end."""
    return min(_LEAST_SECONDS + window.nbytes / _LISTED_PER_SECOND, _LONGEST_LISTING)


def _memory(n_bytes: int) -> int:
    return min(max(n_bytes, _LEAST_MEMORY), _MOST_MEMORY)


def list_file(fd: int, path: str, window: Window) -> tuple[dict[str, Any], bytes]:
    """Return what an HDF5 file holds, unchecked, and the same as JSON. Raises `InputError`."""
    request: dict[str, Any] = {
        "do": "list",
        "window": window,
        "seconds": _seconds(window),
        "memory": _memory(window.nbytes * _PER_BYTE),
        "limit": min(_SHORT + window.nbytes * _LISTED_BYTES, messages.DOCUMENT_LIMIT),
    }
    with _asked(path, request, [fd]) as connection:
        return _received(connection, path, request["limit"])


def read_boxes(
    fd: int,
    path: str,
    window: Window,
    dataset: str,
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    sizes: Sequence[int],
    chunk: int,
) -> Generator[memoryview]:
    """Yield the bytes of boxes of a dataset, which are valid until the next one.

    Args:
        fd: the file.
        path: its name, for errors.
        window: where in it the HDF5 file lies.
        dataset: the path of the dataset.
        boxes: (starts, lengths) pairs.
        sizes: the bytes of each.
        chunk: bytes of one chunk of the dataset.
    """
    request = {
        "do": "read",
        "window": window,
        "path": dataset,
        "boxes": boxes,
        "seconds": _seconds(window) + sum(sizes) // _BYTES_PER_SECOND,
        "memory": _memory(_LEAST_MEMORY + 3 * max(sizes, default=0) + 4 * chunk),
    }
    buffer = memoryview(bytearray(max(sizes, default=0)))
    with _asked(path, request, [fd]) as connection:
        for n_bytes in sizes:
            document, _ = _received(connection, path)
            if document.get(PAYLOAD) != n_bytes:
                raise Closed
            messages.fill(connection, buffer[:n_bytes])
            yield buffer[:n_bytes]


class Building(NamedTuple):
    """A new HDF5 file: its size, the offset of each dataset, all other bytes, and what to tell."""

    nbytes: int
    offsets: tuple[int, ...]
    literals: tuple[tuple[int, bytes], ...]
    notes: tuple[str, ...]


def build(path: str, request: Mapping[str, Any], source: tuple[int, Window] | None) -> Building:
    """Return a new HDF5 file laid out as `building.Built` says; `source` is copied from."""
    fds = [source[0]] if source else []
    window = source[1] if source else None
    objects = len(request["datasets"]) + len(request["groups"])
    seconds = 1 + objects // _BUILT_PER_SECOND + (_seconds(window) if window else 0)
    memory = _memory(objects * _BUILT_OBJECT + (window.nbytes if window else 0) * _PER_BYTE)
    limit = _SHORT + objects * _BUILT_BYTES
    bounds = {"seconds": seconds, "memory": memory, "limit": limit}
    with _asked(path, {**request, **bounds, "do": "build", "window": window}, fds) as connection:
        document, _ = _received(connection, path, limit)
        try:
            pairs = [(int(offset), int(nbytes)) for offset, nbytes in document["literals"]]
            nbytes = int(document["nbytes"])
            offsets = tuple(int(offset) for offset in document["offsets"])
            notes = tuple(shorten(str(note)) for note in document["notes"])
        except (KeyError, TypeError, ValueError):
            raise Closed from None
        if sum(n_bytes for _, n_bytes in pairs) > _LITERAL_LIMIT:
            raise Closed
        literals = []
        for offset, n_bytes in pairs:
            data = bytearray(n_bytes)
            messages.fill(connection, memoryview(data))
            literals.append((offset, bytes(data)))
    return Building(nbytes, offsets, tuple(literals), notes)
