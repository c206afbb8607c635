"""A state on disk: which generation counts, and what it consists of."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from ema_cli import durable
from ema_cli.blueprint import CHUNK_BYTES
from ema_cli.checksums import crc32c
from ema_cli.errors import DamagedFile, DamagedState, InputError, StorageError, storage_errors
from ema_cli.files import read_at, stamp_of
from ema_cli.states import consistency, locks, sealed, slots
from ema_cli.states import directory as places
from ema_cli.states.binding import Binding
from ema_cli.states.records import Manifest, Root, Row
from ema_cli.states.slots import Slot
from ema_cli.tensors import Stamp
from ema_cli.text import shorten

# How often, and how many seconds apart, a reader tries to open a state that is just committed.
_ATTEMPTS, _PAUSE = 500, 0.01


class Generation(NamedTuple):
    """What counts: everything that ``ROOT`` tells of, read and checked but for the slot's bytes.

    Attributes:
        root: decides the rest.
        binding: what the state is bound to.
        manifest: of the slot.
        rows: the ledger.
        slot: where the tensors lie in the slot.
    """

    root: Root
    binding: Binding
    manifest: Manifest
    rows: tuple[Row, ...]
    slot: Slot

    @property
    def applied(self) -> list[Row]:
        """The checkpoints that are averaged, in order."""
        return [row for row in self.rows if not row.missed]


class State:
    """A directory of shadows, open for reading; see `reading`, and `commit.writing`.

    Attributes:
        path: of the directory.
        current: the generation that counts, or None before the first.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.current: Generation | None = None
        self._root: bytes = b""

    def place(self, name: str) -> str:
        """Return the path of a file of the state."""
        return os.path.join(self.path, name)

    def slot_stamp(self) -> Stamp:
        """Return the slot that counts, its size and head checked. Raises `DamagedState`."""
        assert self.current is not None  # noqa: S101  # asked only where there is one
        path = self.slot_path(self.current.root.slot)
        with storage_errors(path, "cannot open"):
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                raise DamagedState(path, "expected a slot, found none") from None
        if not stat.S_ISREG(mode):
            raise DamagedState(path, "expected a slot, found something else")
        found = stamp_of(path)
        if found.size != self.current.slot.nbytes:
            raise DamagedState(
                path, f"expected {self.current.slot.nbytes:,} bytes, found {found.size:,}"
            )
        head = self.current.slot.head
        if read_at(path, 0, len(head)) != head:
            raise DamagedState(path, "expected the tensors that the manifest lists")
        return found

    def slot_path(self, number: int) -> str:
        """Return the path of a slot."""
        return self.place(places.slot_name(number))

    def skeleton_directory(self) -> str:
        """Return where the structure of the last applied checkpoint is."""
        assert self.current is not None  # noqa: S101
        return self.place(places.last_name(self.current.root.generation))

    # ------------------------------------------------------------------ loading

    def load(self) -> None:
        """Read what ``ROOT`` tells of. Raises `DamagedState`."""
        self.current, self._root = None, b""
        path = self.place(places.ROOT)
        if not durable.exists(path):
            if places.was_committed(self.path):
                raise DamagedState(path, "expected a file, found none")
            return
        self._root = sealed.contents(path, places.ROOT_LIMIT)
        root = Root.from_json(_only(self._root, path), path)
        binding = self._sealed(places.PLAN, root.plan)
        name = places.manifest_name(root.generation)
        manifest = Manifest.from_json(self._sealed(name, root.manifest), self.place(name))
        if manifest.generation != root.generation:
            raise DamagedState(self.place(name), "expected the manifest of another generation")
        bound = Binding.from_json(binding, self.place(places.PLAN))
        consistency.check_held(manifest.held, bound, self.place(name))
        slot = slots.lay_out(manifest.held)
        if len(manifest.checksums) != -(-slot.nbytes // CHUNK_BYTES):
            raise DamagedState(self.place(name), "expected one checksum for each chunk")
        rows = self._ledger(root)
        consistency.check_rows(rows, bound, self.place(places.LEDGER))
        self.current = Generation(root, bound, manifest, rows, slot)

    def _sealed(self, name: str, crc: int) -> Any:
        path = self.place(name)
        document, found = sealed.read(path)
        if found != crc:
            raise DamagedState(path, f"expected checksum {crc:08x}, found {found:08x}")
        return document

    def _ledger(self, root: Root) -> tuple[Row, ...]:
        path, (n_bytes, crc) = self.place(places.LEDGER), root.ledger
        data = sealed.contents(path)[:n_bytes]
        if len(data) < n_bytes or crc32c(data) != crc:
            raise DamagedState(path, f"expected {n_bytes:,} bytes with checksum {crc:08x}")
        return tuple(Row.from_json(row, path) for row in sealed.unseal_all(data, path))


def _only(data: bytes, path: str) -> Any:
    documents = sealed.unseal_all(data, path)
    if len(documents) != 1:
        raise DamagedState(path, f"expected one line, found {len(documents)}")
    return documents[0]


@contextlib.contextmanager
def reading(path: str) -> Iterator[State]:
    """Open a state for reading, while a writer may go on: its generation stays readable.

    Raises `DamagedState`, also for a state that was never finished.
    """
    places.check_format(path, create=False)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        state = State(path)
        fd = -1
        try:
            fd = _held(state)
            if fd >= 0:
                with damage_told(path):
                    yield state
                return
        finally:
            if fd >= 0:
                os.close(fd)
    raise StorageError(
        f"{shorten(path, 1000)}: changes faster than it can be opened", "give the command again"
    )


@contextlib.contextmanager
def damage_told(path: str) -> Iterator[None]:
    """Tell a damaged file of the state as what it is; links to checkpoints are none of its own."""
    try:
        yield
    except DamagedFile as error:
        file, reason, tensor = error.args
        inside = os.path.relpath(file, path).split(os.sep)
        if inside[0] in (os.pardir, places.PINS):
            raise
        about = "" if tensor is None else f"tensor '{shorten(tensor)}': "
        raise DamagedState(file, about + reason) from error


def _held(state: State) -> int:
    """Load a state and lock its slot against being written; -1 when it moved on meanwhile."""
    path = state.place(places.ROOT)
    before = root_bytes(path)
    try:
        state.load()
        if state.current is None:
            raise DamagedState(state.path, "no generation was ever committed: expected a file ROOT")
        slot = state.slot_stamp().path
        with storage_errors(slot, "cannot open"):
            fd = os.open(slot, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (InputError, StorageError):
        if root_bytes(path) != before:
            return -1
        raise
    if locks.lock(fd, exclusive=False) and root_bytes(path) == before:
        return fd
    os.close(fd)
    return -1


def root_bytes(path: str) -> bytes:
    """Return the bytes of the file ``ROOT`` at `path`, none where it is not there."""
    return sealed.contents(path, places.ROOT_LIMIT) if durable.exists(path) else b""
