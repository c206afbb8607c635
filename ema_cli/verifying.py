"""Holds what was read against the checksums the checkpoints keep.

Adjacent tensors are read as one and verified as one: the checksum their bytes must have together
follows from those of each.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ema_cli.checksums import Running, shift_all
from ema_cli.errors import DamagedFile, EmaError, InputChanged
from ema_cli.files import open_input, page_buffer, read_exact
from ema_cli.formats import FORMATS
from ema_cli.tasks import Part, Unit
from ema_cli.tensors import Checkpoint, Extent, Index, Tensor
from ema_cli.text import shorten
from ema_cli.work import Work

Checksums = np.ndarray[Any, np.dtype[np.uint32]]

_BLOCK = 1 << 20


class Verifier:
    """Verifies each unit of the work as soon as all its bytes were read."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._partial: dict[Unit, Part] = {}
        self._orders: dict[int, _Order] = {}
        self._sums: dict[int, Checksums] = {}

    def add(self, unit: Unit, part: Part) -> None:
        """Count some bytes of a unit. Raises `DamagedFile` when they are complete and wrong."""
        before = self._partial.pop(unit, Part(0, 0))
        crc, n_bytes = before.crc ^ part.crc, before.nbytes + part.nbytes
        if n_bytes < unit.end - unit.start:
            self._partial[unit] = Part(crc, n_bytes)
            return
        k, file = self._work.of_file(unit.file)
        if self._expected(k, file, unit.start, unit.end) != crc:
            raise _damage(self._work.checkpoints[k], file, unit)

    def finish(self) -> None:
        """Raise when a unit was not read to its end: nothing may go unverified."""
        for unit in self._partial:
            path = shorten(self._work.inputs[unit.file].path, 1000)
            raise EmaError(f"internal error: {path}: bytes {unit.start} to {unit.end} unverified")

    def _expected(self, k: int, file: int, start: int, end: int) -> int:
        """Return the checksum of bytes that hold whole extents, one after the other."""
        checkpoint = self._work.checkpoints[k]
        index = checkpoint.index
        if id(index) not in self._orders:
            self._orders[id(index)] = _Order(index)
        order = self._orders[id(index)]
        if k not in self._sums:
            assert checkpoint.checksums is not None  # noqa: S101  # or nothing would be verified
            self._sums[k] = checkpoint.checksums[order.ordinals]
        sums = self._sums[k]
        first = bisect.bisect_left(order.places, (file, start))
        last = bisect.bisect_left(order.places, (file, end))
        for place in range(first, last) if order.opaque else ():
            tensor = order.opaque.get(place)
            if tensor is not None:
                sums[place] = _raw_checksum(checkpoint, tensor)
        after = end - order.ends[first:last]
        shifted = shift_all(sums[first:last], after, index.checksum)
        return int(np.bitwise_xor.reduce(shifted, initial=0))


class _Order:
    """The extents of an index in the order of their bytes, each once and none empty.

    Attributes:
        places: (file, offset) of each.
        ends: the offset after each.
        ordinals: which of ``Index.extents`` each is.
        opaque: the tensors among them whose recorded checksum is not that of their bytes.
    """

    def __init__(self, index: Index) -> None:
        filled = [extent for extent in index.ordinals if extent.nbytes]
        filled.sort()
        self.places = [extent[:2] for extent in filled]
        self.ends = np.array([offset + n for _, offset, n in filled], np.int64)
        self.ordinals = np.array([index.ordinals[extent] for extent in filled], np.intp)
        place_of = {extent: place for place, extent in enumerate(filled)}
        self.opaque = {
            place_of[t.extent]: t for t in index.tensors if not t.dtype.bits and t.extent.nbytes
        }


def _raw_checksum(checkpoint: Checkpoint, tensor: Tensor) -> int:
    """Return the CRC-32C of the bytes of a tensor whose recorded checksum is not that.

    The bytes are held against the recorded one: `DamagedFile`.
    """
    read = FORMATS[checkpoint.index.format].opaque_checksums
    assert read is not None  # noqa: S101  # of formats that have such tensors
    raw, found = read(checkpoint, tensor)
    error = check_sums(checkpoint, tensor, {tensor.extent: found})
    if error is not None:
        raise error
    return raw


def _mismatch(path: str, name: str, expected: int, found: int) -> DamagedFile:
    return DamagedFile(
        path, f"expected bytes with checksum {expected:08x}, found {found:08x}", name
    )


def _damage(checkpoint: Checkpoint, file: int, unit: Unit) -> DamagedFile | InputChanged:
    """Return the error that names the tensor of a unit whose bytes are not those saved."""
    for tensor in checkpoint.index.tensors:
        inside = [
            extent
            for extent in tensor.extents
            if extent.file == file and unit.start <= extent.offset < unit.end
        ]
        error = check(checkpoint, tensor) if inside and tensor.dtype.bits else None
        if error is not None:
            return error
    return _changed(checkpoint.files[file].path)


def _changed(path: str) -> InputChanged:
    return InputChanged(
        f"{shorten(path, 1000)}: changed while it was read: only now do its checksums match",
        "run again when nothing writes to it any more; nothing was published",
    )


def check(checkpoint: Checkpoint, tensor: Tensor) -> DamagedFile | None:
    """Return the error for a tensor of fixed width that is damaged, or None: reads all of it."""
    if checkpoint.checksums is None:
        return None
    kind = checkpoint.index.checksum
    found = {
        extent: _read_checksum(checkpoint.files[extent.file].path, extent, kind)
        for extent in summed(checkpoint.index, tensor)
    }
    return check_sums(checkpoint, tensor, found)


def summed(index: Index, tensor: Tensor) -> list[Extent]:
    """Return the extents with checksums of their own that hold the bytes of a tensor."""
    if not index.records:
        return list(tensor.extents)
    return [record for record in index.records if _overlap(record, tensor.extent)]


def _overlap(a: Extent, b: Extent) -> bool:
    return a.file == b.file and a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def check_read(checkpoint: Checkpoint, tensor: Tensor, found: Mapping[Extent, int]) -> None:
    """Raise `DamagedFile` unless the bytes read of a tensor, by their checksum, are those saved."""
    if tensor.dtype.bits:
        error = check_sums(checkpoint, tensor, found)
    elif found == {tensor.extent: _raw_checksum(checkpoint, tensor)}:
        return
    else:
        raise _changed(checkpoint.files[tensor.extent.file].path)
    if error is not None:
        raise error


def check_sums(
    checkpoint: Checkpoint, tensor: Tensor, found: Mapping[Extent, int]
) -> DamagedFile | None:
    """Return the error for a tensor whose extents have other checksums than recorded, or None."""
    assert checkpoint.checksums is not None  # noqa: S101  # or there is nothing to compare with
    for extent, crc in found.items():
        recorded = int(checkpoint.checksums[checkpoint.index.ordinals[extent]])
        if crc != recorded:
            path, index = checkpoint.files[extent.file].path, checkpoint.index
            inside = [t.name for t in index.tensors if any(_overlap(extent, e) for e in t.extents)]
            if len(inside) > 1:  # the record does not tell which of them is damaged
                shown = ", ".join(f"'{shorten(name)}'" for name in inside[:3])
                more = "" if len(inside) <= 3 else f" and {len(inside) - 3} more"
                reason = f"expected bytes with checksum {recorded:08x}, found {crc:08x}"
                return DamagedFile(path, f"{reason}, in the bytes of {shown}{more}")
            return _mismatch(path, tensor.name, recorded, crc)
    return None


def _read_checksum(path: str, extent: Extent, kind: str) -> int:
    running = Running(kind)
    _, offset, n_bytes = extent
    buffer = page_buffer(min(_BLOCK, n_bytes))
    fd = open_input(path)
    try:
        for start in range(0, n_bytes, _BLOCK):
            view = buffer[: min(_BLOCK, n_bytes - start)]
            read_exact(fd, view, offset + start, path)
            running.add(offset + start, view)
    finally:
        os.close(fd)
    return running.crc
