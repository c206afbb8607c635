"""How the next generation of a state comes to count.

Two slots, one of which is read while the other is written; ``ROOT``, renamed into place, is the
only commit point. `docs/durability.md` tells the protocol and why each barrier is there.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ema_cli import durable
from ema_cli.checksums import crc32c
from ema_cli.errors import EmaError, Locked, StorageError, storage_errors
from ema_cli.states import directory as places
from ema_cli.states import locks, sealed, slots
from ema_cli.states.binding import Binding
from ema_cli.states.records import Manifest, Root, Row
from ema_cli.states.slots import Slot
from ema_cli.states.store import State, damage_told, root_bytes
from ema_cli.text import shorten


class ClaimedSlot(NamedTuple):
    """A slot that is being written: its number, its path, and the descriptor that locks it."""

    number: int
    path: str
    fd: int


class OpenState(State):
    """A state whose lock we hold; see `writing`.

    Attributes:
        renaming: whether ``ROOT`` may have been replaced without our knowing: then no slot may be
            touched before the state is opened again.
    """

    def __init__(self, path: str, lock: int) -> None:
        super().__init__(path)
        self.renaming = False
        self._lock = lock
        self._epoch: int | None = None
        self._begun = 0  # the CRC-32C of the file that `begin` wrote

    def begin(self, binding: Binding) -> None:
        """Write down what is averaged, before the first generation."""
        data = sealed.seal(binding.to_json())
        places.replace(self.path, places.PLAN, data)
        self._begun = crc32c(data)

    def claim(self, slot: Slot, taken: int | None = None) -> ClaimedSlot:
        """Return a slot that nobody reads, of the right size and with its head written.

        It keeps the bytes that a killed process wrote there, if it has this layout; else it is a
        new file: who mapped the old one keeps what he has. `taken` is the slot that counts, where
        no ``ROOT`` tells it.
        """
        if taken is None or self.current is not None:
            taken = self.current.root.slot if self.current else -1
        numbers = places.slot_numbers(self.path)
        for number in [n for n in numbers if n != taken]:
            path = self.place(places.slot_name(number))
            fd = self._claimed(path, slot)
            if fd is not None:
                return ClaimedSlot(number, path, locks.hold(fd))
        number = next(n for n in range(len(numbers) + 1) if n not in numbers)
        path = self.place(places.slot_name(number))
        return ClaimedSlot(number, path, locks.hold(self._made(path, slot)))

    def _claimed(self, path: str, slot: Slot) -> int | None:
        """Return the locked spare slot, or None where somebody reads it or it has another size."""
        with storage_errors(path, "cannot open"):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not locks.lock(fd, exclusive=True):
                if locks.lock(fd, exclusive=False):
                    os.close(fd)
                    return None  # a reader
                raise Locked(
                    f"{shorten(path, 1000)}: another process writes to this state",
                    "wait for it, or stop it",
                )
            self._check_alone()  # or this is the slot that counts by now
            if os.fstat(fd).st_size == slot.nbytes and self._begins(fd, slot):
                return fd
            durable.remove(path)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return self._made(path, slot)

    def _begins(self, fd: int, slot: Slot) -> bool:
        return os.pread(fd, len(slot.head), 0) == slot.head

    def _made(self, path: str, slot: Slot) -> int:
        with storage_errors(path, "cannot create"):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
        try:
            locks.lock(fd, exclusive=True)
            durable.reserve(fd, slot.nbytes, path)
            durable.write_exact(fd, slot.head, 0, path)
        except BaseException:
            os.close(fd)
            durable.remove(path)
            raise
        return fd

    def reserve(self, slot: Slot) -> None:
        """Make both slots, so that a full disk is found before any work."""
        for name in map(places.slot_name, (0, 1)):
            if not durable.exists(self.place(name)):
                os.close(self._made(self.place(name), slot))

    def commit(
        self,
        claim: ClaimedSlot,
        manifest: Manifest,
        rows: Sequence[Row],
    ) -> None:
        """Make the generation count that was written to a slot; it does once this returns.

        The order of the barriers is the promise: everything that ``ROOT`` will tell of is durable,
        names too, before ``ROOT`` is.
        """
        try:
            self._commit(claim, manifest, rows)
        except StorageError:
            if not self.renaming:
                self._check_alone()  # what went wrong may have been another process
            raise
        self.clean()

    def _commit(self, claim: ClaimedSlot, manifest: Manifest, rows: Sequence[Row]) -> None:
        durable.sync(claim.fd, claim.path)
        self._check_alone()
        ledger = self._append(rows)
        name = places.manifest_name(manifest.generation)
        document = sealed.seal(manifest.to_json())
        places.replace(self.path, name, document, lasting=False)
        durable.sync_directory(self.path)
        root = Root(
            self.current.root.uuid if self.current else uuid.uuid4().hex,
            self._next_epoch(),
            manifest.generation,
            claim.number,
            self.current.root.plan if self.current else self._begun,
            crc32c(document),
            ledger,
        )
        # Who reads the new ROOT finds its slot free to be read.
        locks.lock(claim.fd, exclusive=False)
        self._replace_root(root)

    def record(self, rows: Sequence[Row]) -> None:
        """Add lines to the ledger without a new generation of shadows: what was missed."""
        assert self.current is not None  # noqa: S101  # there is something to miss it
        self._check_alone()
        root = self.current.root._replace(epoch=self._next_epoch(), ledger=self._append(rows))
        self._replace_root(root)

    def _replace_root(self, root: Root) -> None:
        """Replace ``ROOT``; from the rename on nobody can tell which a power cut would leave."""
        staged = places.stage(self.path, places.ROOT, sealed.seal(root.to_json()))
        self._check_alone()
        self.renaming = True
        with storage_errors(self.place(places.ROOT), "cannot write"):
            os.rename(staged, self.place(places.ROOT))
        durable.sync_directory(self.path)
        self.load()
        self.renaming = False

    def _next_epoch(self) -> int:
        if self._epoch is None:
            self._epoch = (self.current.root.epoch if self.current else 0) + 1
        return self._epoch

    def _append(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Append lines to what counts of the ledger, durably; returns its new length and CRC."""
        path = self.place(places.LEDGER)
        n_bytes, crc = self.current.root.ledger if self.current else (0, 0)
        data = b"".join(sealed.seal(row.to_json()) for row in rows)
        with storage_errors(path, "cannot write"):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
            try:
                os.ftruncate(fd, n_bytes)
                durable.write_exact(fd, data, n_bytes, path)
                durable.sync(fd, path)
            finally:
                os.close(fd)
        return n_bytes + len(data), crc32c(data, crc)

    def _check_alone(self) -> None:
        """Raise `Locked` when another process may have written since the lock was taken."""
        now = root_bytes(self.place(places.ROOT))
        if now != self._root or not locks.is_named(self._lock, self.place(places.LOCK)):
            raise Locked(
                f"{shorten(self.path, 1000)}: another process has written to this state, or its "
                "lock was removed",
                "give the same command again",
            )

    def clean(self) -> None:
        """Remove what no longer counts, unless somebody may read it. Nothing depends on this."""
        if self.current is None:
            return
        root = self.current.root
        with contextlib.suppress(OSError, EmaError):
            if self._read_by_others(root.slot):
                return
            for name in os.listdir(self.path):
                if places.is_stale(name, root.generation):
                    durable.remove(self.place(name))
            spares = [n for n in places.slot_numbers(self.path) if n != root.slot]
            for number in spares[1:]:
                durable.remove(self.place(places.slot_name(number)))

    def _read_by_others(self, current: int) -> bool:
        for number in places.slot_numbers(self.path):
            if number != current:
                fd = os.open(self.place(places.slot_name(number)), os.O_RDWR | os.O_NOFOLLOW)
                try:
                    if not locks.lock(fd, exclusive=True):
                        return True
                finally:
                    os.close(fd)
        return False


@contextlib.contextmanager
def writing(path: str) -> Iterator[OpenState]:
    """Open a state for writing, or begin one, and hold its lock.

    Raises `Locked`, `DamagedState`, `UnsupportedInput` for one of another version, `OutputExists`
    for a directory that holds something else.
    """
    places.prepare(path)
    lock = locks.acquire(os.path.join(path, places.LOCK))
    try:
        places.check_format(path, create=True)
        state = OpenState(path, lock)
        state.load()
        # Its name may have been given by a process that was killed before this: what ROOT tells
        # of counts only now, and what it does not tell of may go.
        durable.sync_directory(path)
        if state.current is not None:
            state.slot_stamp()
        places.remove_unfinished(path)
        state.clean()
        with damage_told(path):
            yield state
    finally:
        locks.release(lock)


def checksums_of(slot: Slot, made: Mapping[int, int]) -> tuple[int, ...]:
    """Return the CRC-32C of each chunk of a slot from what was written to it and its head."""
    ends = slots.chunk_ends(slot.nbytes)
    found = [made.get(k, 0) for k in range(len(ends))]
    for k, crc in slots.head_sums(slot.head, ends):
        found[k] ^= crc
    return tuple(found)
