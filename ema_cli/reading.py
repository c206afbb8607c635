"""Tensors read block by block, from a checkpoint's file or from an array in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from ema_cli import formats, gathering, regions, spilling
from ema_cli.checksums import Running
from ema_cli.errors import Disagreement, UnsupportedInput
from ema_cli.files import Handles, open_unchanged, read_exact
from ema_cli.formats import safetensors
from ema_cli.kernel import Array
from ema_cli.naming import STEP_NAMES, role_in, role_of
from ema_cli.states.records import Row, row_of
from ema_cli.steps import step_from_name, stored_step
from ema_cli.tensors import DTYPES, Checkpoint, DType, Extent, Role, Tensor, numpy_dtype, swap_width
from ema_cli.text import shorten
from ema_cli.verifying import check, check_read, summed

Source = str | os.PathLike[str] | Mapping[str, Any]
_OPEN_FILES = 16


class TensorReader:
    """One tensor of a checkpoint, verified where that keeps checksums. A context that closes it.

    Packed dtypes and those of variable width are read as bytes.

    Args:
        checkpoint: with this tensor readable, not spilled.
        tensor: of the checkpoint.
        verified: what was verified before of the bytes that several tensors share.

    Attributes:
        dtype: NumPy dtype of the blocks.
        elements: how many there are.
    """

    def __init__(
        self, checkpoint: Checkpoint, tensor: Tensor, verified: set[Extent] | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._tensor = tensor
        fixed = tensor.dtype.bits >= 8
        self.dtype = numpy_dtype(tensor.dtype.name) if fixed else np.dtype(np.uint8)
        self._swap = swap_width(tensor.dtype.name) if checkpoint.index.big_endian else 0
        self.elements = tensor.nbytes // self.dtype.itemsize
        self._running: dict[Extent, Running] = {}
        index = checkpoint.index
        own = not tensor.strides and all(extent in index.ordinals for extent in tensor.extents)
        self._sums = checkpoint.checksums is not None and own
        self._shared = checkpoint.checksums is not None and not own
        self._verified = set() if verified is None else verified
        self._handles = Handles(lambda file: open_unchanged(checkpoint.files[file]), _OPEN_FILES)

    def __enter__(self) -> TensorReader:
        if self._tensor.name in self._checkpoint.index.negated:
            raise UnsupportedInput(
                f"{shorten(self._checkpoint.path, 1000)}: tensor '{shorten(self._tensor.name)}': "
                "what is stored is its negative",
                "save it again as tensor.resolve_neg()",
            )
        for extent in self._tensor.extents if self.elements else ():
            self._handles.fd(extent.file)  # a file that is gone or another is told now
        if self._shared:
            self._verify_shared()
        return self

    def _verify_shared(self) -> None:
        """Verify the bytes that this tensor shares with others, unless one of them did."""
        around = set(summed(self._checkpoint.index, self._tensor))
        if not around <= self._verified:
            error = check(self._checkpoint, self._tensor)
            if error is not None:
                raise error
            self._verified |= around

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.__exit__(kind, error, trace)
        complete = all(running.nbytes == extent.nbytes for extent, running in self._running.items())
        if kind is None and complete and self._running:
            found = {extent: running.crc for extent, running in self._running.items()}
            check_read(self._checkpoint, self._tensor, found)

    def block(self, start: int, count: int) -> Array:
        """Return a new flat array of `count` elements from element `start`."""
        array: Array = np.empty(count, self.dtype)
        if self._tensor.strides:
            self._gather(array, start)
        else:
            self._read(array, start)
        if self._swap:
            array.view(f"u{self._swap}").byteswap(inplace=True)
        return array

    def _gather(self, array: Array, start: int) -> None:
        file = self._tensor.extent.file
        path = self._checkpoint.files[file].path
        region = regions.whole(self._tensor, self.dtype.itemsize)
        grid = region.grid or regions.Grid(self.elements, ())

        def read(part: memoryview, offset: int) -> None:
            read_exact(self._handles.fd(file), part, offset, path)

        gathering.fetch(grid, region.offset, start, array, read)

    def _read(self, array: Array, start: int) -> None:
        view, width = array.view(np.uint8).data, self.dtype.itemsize
        done = 0
        for extent, offset, n in self._stretches(start, len(array)):
            part = view[done : done + n * width]
            path = self._checkpoint.files[extent.file].path
            read_exact(self._handles.fd(extent.file), part, offset, path)
            if self._sums:
                kind = self._checkpoint.index.checksum
                self._running.setdefault(extent, Running(kind)).add(offset, part)
            done += n * width

    def _stretches(self, start: int, count: int) -> Iterable[tuple[Extent, int, int]]:
        extent = self._tensor.extent
        if not self._tensor.slices:
            return [(extent, extent.offset + start * self.dtype.itemsize, count)]
        return regions.pieces(self._tensor, self.dtype.itemsize, start, count)


class ArrayReader:
    """A NumPy array read as `TensorReader` reads a file."""

    def __init__(self, array: Array) -> None:
        self._flat = np.ascontiguousarray(array).reshape(-1)
        self.dtype = self._flat.dtype
        self.elements = self._flat.size

    def __enter__(self) -> ArrayReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def block(self, start: int, count: int) -> Array:
        """Return a new flat array of `count` elements from element `start`."""
        block: Array = self._flat[start : start + count].copy()
        return block


class Values:
    """The tensors of one checkpoint, wherever they are.

    Attributes:
        where: for messages.
        specs: dtype and shape of each tensor, in order.
    """

    def __init__(self, source: Source) -> None:
        self._checkpoint: Checkpoint | None = None
        self._arrays: dict[str, Array] = {}
        self._verified: set[Extent] = set()
        if isinstance(source, Mapping):
            self.where = "the mapping"
            self._arrays = {name: _native(np.asarray(value)) for name, value in source.items()}
            self.specs = {name: _spec(name, array) for name, array in self._arrays.items()}
        else:
            self._checkpoint = self._readable(formats.read(os.fspath(source), {}))
            self.where = shorten(self._checkpoint.path, 1000)
            tensors = self._checkpoint.index.tensors
            self.specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}

    @property
    def storable(self) -> list[str]:
        """The tensors that a store of shadows can hold beside them: not strings, for one."""
        return [
            name
            for name, (dtype, _) in self.specs.items()
            if safetensors.representable(dtype) and safetensors.can_name(name)
        ]

    def trainable(self, name: str) -> tuple[str, ...]:
        """Return what is averaged unless said otherwise; `name` is that of the shadows."""
        index = self._checkpoint.index if self._checkpoint else None
        return tuple(
            tensor
            for tensor, (dtype, _) in self.specs.items()
            if dtype.averaged
            and (role_in(index, tensor, name) if index else role_of(tensor, name)) is Role.VARIABLE
        )

    def open(self, name: str) -> TensorReader | ArrayReader:
        """Return a reader of one tensor."""
        if self._checkpoint is None:
            return ArrayReader(self._arrays[name])
        tensor = self._checkpoint.index.by_name[name]
        return TensorReader(self._checkpoint, tensor, self._verified)

    def row(self, generation: int, coefficient: float) -> Row:
        """Return the line of the ledger that tells of this checkpoint."""
        if self._checkpoint is None:
            return Row(None, "", "", (), (coefficient,), "", generation)
        found = self._checkpoint
        stored = stored_step(found)
        step = stored.value if stored else step_from_name(found.name)
        named = dataclasses.replace(found, step=step)
        return row_of(named, generation, [coefficient])

    def _readable(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with all its tensors readable as long as this object is there."""
        stack = contextlib.ExitStack()
        weakref.finalize(self, stack.close)
        return stack.enter_context(spilling.readable(checkpoint, checkpoint.index.by_name))

    def step(self) -> int:
        """Return the training step: stored, or told by the name. Raises `Disagreement`."""
        if self._checkpoint is not None:
            stored = stored_step(self._checkpoint)
            step = stored.value if stored else step_from_name(self._checkpoint.name)
            if step is not None:
                return step
        for name in STEP_NAMES:
            if name in self._arrays and self._arrays[name].size == 1:
                return int(self._arrays[name].reshape(-1)[0])
        raise Disagreement(
            f"{self.where}: no step: expected a scalar called global_step",
            "give num_updates=N, 'count' or None",
        )


def _native(array: Array) -> Array:
    """Return the array in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _spec(name: str, array: Array) -> tuple[DType, tuple[int, ...]]:
    dtype = array.dtype.name
    if dtype not in DTYPES:
        raise TypeError(f"'{shorten(name)}': no checkpoint can hold dtype {array.dtype}")
    return DTYPES[dtype], array.shape
