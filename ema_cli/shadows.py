"""Shadows on disk: two slots, one read while the other is written.

A slot is a valid safetensors file whose data starts at 4 KiB, so that it can be mapped. Slots are
written with ``pwrite`` and read through read-only mappings: mapped writes are slower, and a full
disk under a mapping is a SIGBUS. An array mapped from a slot stays what it is until the second
next generation is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from ema_cli import durable
from ema_cli.errors import OutputExists, storage_errors
from ema_cli.formats import safetensors
from ema_cli.kernel import Array
from ema_cli.tensors import Checkpoint, DType, Extent, numpy_dtype
from ema_cli.text import shorten

SLOTS = ("slot.0", "slot.1")
ALIGNMENT = 4096

Spec = tuple[str, DType, tuple[int, ...]]


class ShadowStore:
    """A directory with two slots; generation g lies in slot g mod 2.

    It is not durable yet: a store that already holds slots is refused rather than guessed at.

    Attributes:
        directory: where the slots are.
        generation: of the slot that counts; -1 before the first.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.generation = -1
        self._current: Checkpoint | None = None
        with storage_errors(directory, "cannot create"):
            os.makedirs(directory, exist_ok=True)
        for name in SLOTS:
            if os.path.lexists(os.path.join(directory, name)):
                raise OutputExists(
                    f"{shorten(directory, 1000)}: holds shadows already, found {name}",
                    "give an empty directory: shadows are not continued across processes yet",
                )

    @property
    def current(self) -> Checkpoint | None:
        """The slot that counts, or None before the first generation."""
        if self._current is None and self.generation >= 0:
            self._current = safetensors.read(self._path(self.generation), {})
        return self._current

    def advance(self) -> None:
        """Make the generation count that was just written."""
        self.generation += 1
        self._current = None

    def _path(self, generation: int) -> str:
        return os.path.join(self.directory, SLOTS[generation % 2])

    def write(self, specs: Sequence[Spec]) -> SlotWriter:
        """Return a writer for the next generation, which counts once the writer is left."""
        return SlotWriter(self, self._path(self.generation + 1), specs)

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
    """Writes one generation; leaving it without an error makes the generation count."""

    def __init__(self, store: ShadowStore, path: str, specs: Sequence[Spec]) -> None:
        self._store = store
        self._path = path
        self._head, extents = safetensors.encode_header(specs, {}, ALIGNMENT)
        self._places: dict[str, Extent] = {
            name: extent for (name, _, _), extent in zip(specs, extents, strict=True)
        }
        self._size = len(self._head) + sum(extent.nbytes for extent in extents)
        self._fd = -1

    def __enter__(self) -> SlotWriter:
        if not self._same_layout():
            # A mapping of the old file must keep its bytes: another layout is another file.
            durable.remove(self._path)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with storage_errors(self._path, "cannot create"):
            self._fd = os.open(self._path, flags, 0o600)
        try:
            durable.reserve(self._fd, self._size, self._path)
            durable.write_exact(self._fd, self._head, 0, self._path)
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def _same_layout(self) -> bool:
        try:
            with open(self._path, "rb") as file:
                return file.read(len(self._head)) == self._head
        except FileNotFoundError:
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
        if kind is None:
            self._store.advance()

    def put(self, name: str, start: int, block: Array) -> None:
        """Write the elements of `block` from element `start` of tensor `name` on."""
        offset = self._places[name].offset + start * block.itemsize
        durable.write_exact(self._fd, block.view(np.uint8).data, offset, self._path)
