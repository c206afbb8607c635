"""The shadows of `ExponentialMovingAverage`: a state that is written tensor by tensor.

One slot is read while the other is written. Slots are written with ``pwrite`` and mapped
read-only: mapped writes are slower, and a full disk under a mapping is a SIGBUS. An array mapped
from a slot stays what it is until the second next generation is written.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from ema_cli import durable
from ema_cli.chunks import Chunks
from ema_cli.errors import Locked, OtherSettings, StorageError
from ema_cli.files import stamp_of
from ema_cli.kernel import Array
from ema_cli.states import commit, locks, slots
from ema_cli.states.binding import CLASS, Binding
from ema_cli.states.commit import ClaimedSlot, OpenState
from ema_cli.states.records import Held, Manifest, Row
from ema_cli.states.slots import Slot
from ema_cli.tensors import Checkpoint, numpy_dtype
from ema_cli.text import shorten


class ShadowStore:
    """A state whose tensors are written one after the other; its lock is held until it is closed.

    Args:
        directory: of the state, which is continued or begun.
        binding: what it is bound to.
        lasting: whether a generation survives a power cut; not where the directory is temporary.

    Attributes:
        state: the directory.
        manifest: of the generation that counts, or None before the first.

    Raises:
        OtherSettings: the state is bound to something else.
        Locked, DamagedState: it cannot be opened.
    """

    def __init__(self, directory: str, binding: Binding, *, lasting: bool = True) -> None:
        stack = contextlib.ExitStack()
        self._process = os.getpid()
        weakref.finalize(self, in_process(self._process, stack.close))
        # Wherever the program goes, it is this directory.
        self.state: OpenState = stack.enter_context(commit.writing(os.path.abspath(directory)))
        self._binding = binding
        self._lasting = lasting
        self._current: Checkpoint | None = None
        self._manifest: Manifest | None = None
        self._number = -1
        self._slot: Slot | None = None
        try:
            self._open()
        except BaseException:
            stack.close()
            raise

    def _open(self) -> None:
        """Take up what the state holds, or begin it."""
        if self.state.current is not None:
            self._check_same(self.state.current.binding)
            self._take(self.state.current.manifest, self.state.current.root.slot)
        elif self._lasting:
            self.state.begin(self._binding)

    def _check_same(self, found: Binding) -> None:
        where = shorten(self.state.path, 1000)
        if found.by != CLASS:
            raise OtherSettings(
                f"{where}: made by ema-avg run, not by ExponentialMovingAverage",
                "give the class a directory of its own",
            )
        mine, asked = found.settings, self._binding.settings
        if mine != asked:
            raise OtherSettings(
                f"{where}: the state belongs to other settings: {mine}, asked for {asked}",
                "give the same arguments, or another directory",
            )

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the generation that counts."""
        return self._manifest

    def _take(self, manifest: Manifest, number: int) -> None:
        if manifest is self._manifest:
            return
        self._manifest, self._number, self._current = manifest, number, None
        self._slot = slots.lay_out(manifest.held)

    @property
    def current(self) -> Checkpoint | None:
        """The slot that counts, under the slot's own names, or None before the first."""
        if self._current is None and self._manifest is not None and self._slot is not None:
            stamp = stamp_of(self.state.slot_path(self._number))
            self._current = slots.whole(self._slot, stamp, self._manifest.checksums)
        return self._current

    def write(self, held: Sequence[Held]) -> SlotWriter:
        """Return a writer for the next generation, which counts once it is committed.

        A forked process has a copy of this object and of its locks, but not the right to write.
        """
        if os.getpid() != self._process:
            raise Locked(
                f"{shorten(self.state.path, 1000)}: opened by another process, which was forked",
                "make an ExponentialMovingAverage in the process that uses it",
            )
        return SlotWriter(self.state, slots.lay_out(held), self._number)

    def commit(self, writer: SlotWriter, own: Mapping[str, Any], row: Row) -> None:
        """Make the generation count that was just written, with what the class keeps of it."""
        sums = commit.checksums_of(writer.slot, writer.made())
        held = writer.slot.held
        manifest = Manifest(row.generation, held, sums, None, True, own)
        if not self._lasting:
            self._take(manifest, writer.claim.number)
            return
        try:
            self.state.commit(writer.claim, manifest, [row])
        finally:  # it may be there although something went wrong after it
            if self.state.current is not None:
                self._take(self.state.current.manifest, self.state.current.root.slot)

    def read(self, name: str) -> Array:
        """Return the tensor `name` of the current slot as a read-only mapped array."""
        current = self.current
        if current is None:
            raise KeyError(name)
        tensor = current.index.by_name[name]
        dtype = numpy_dtype(tensor.dtype.name)
        if tensor.extent.nbytes == 0:
            empty = np.empty(tensor.shape, dtype)
            empty.setflags(write=False)
            return empty
        return np.memmap(
            current.files[0].path, dtype, "r", offset=tensor.extent.offset, shape=tensor.shape
        )


class SlotWriter:
    """Writes one generation, tensor by tensor. A context that releases the slot."""

    def __init__(self, state: OpenState, slot: Slot, current: int) -> None:
        self.slot = slot
        self._state = state
        self._number = current
        self._places = dict(zip((h.name for h in slot.held), slot.extents, strict=True))
        self._chunks = Chunks(lambda file: slot.nbytes)
        self.claim = ClaimedSlot(-1, "", -1)

    def __enter__(self) -> SlotWriter:
        self.claim = self._state.claim(self.slot, self._number)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        locks.release(self.claim.fd)
        if isinstance(error, StorageError) and not self._state.renaming:
            # What the kernel holds of the slot may be lost without a word: a new one is made.
            durable.remove(self.claim.path)

    def put(self, name: str, start: int, block: Array) -> None:
        """Write the elements of `block` from element `start` of tensor `name` on."""
        offset = self._places[name].offset + start * block.itemsize
        data = block.view(np.uint8).data
        durable.write_exact(self.claim.fd, data, offset, self.claim.path)
        self._chunks.add(0, offset, data)

    def made(self) -> dict[int, int]:
        """Return what was written to each chunk, by its checksum."""
        return {chunk: crc for (_, chunk), crc in self._chunks.made().items()}


def in_process(process: int, function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that does nothing in another process than `process`."""

    def call() -> None:
        if os.getpid() == process:
            function()

    return call


def held(name: str, part: str, spec: tuple[Any, tuple[int, ...]], variable: str = "") -> Held:
    """Return a tensor of a slot with a dtype and shape: `part` of a variable, or of itself."""
    dtype, shape = spec
    return Held(name, dtype, shape, part, 0, (variable or name,))
