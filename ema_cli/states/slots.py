"""What a slot holds and where: a safetensors file whose data begins on a page, without gaps."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ema_cli.blueprint import CHUNK_BYTES
from ema_cli.checksums import CRC32C, crc32c, shift
from ema_cli.formats import safetensors
from ema_cli.states.records import AVERAGE, COPY, Held
from ema_cli.tensors import Checkpoint, DType, Extent, Index, Stamp, Tensor

ALIGNMENT = 4096


class Slot(NamedTuple):
    """A slot before it is written.

    Attributes:
        held: its tensors in the order of their bytes.
        head: the bytes before the data.
        extents: of each tensor.
    """

    held: tuple[Held, ...]
    head: bytes
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.head) + sum(extent.nbytes for extent in self.extents)

    @property
    def names(self) -> dict[str, str]:
        """For each averaged variable, the tensor it is held in; tied ones have one."""
        return {
            variable: held.name
            for held in self.held
            if held.part == AVERAGE and held.average == 0
            for variable in held.variables
        }

    def places(self, parts: Collection[str], average: int) -> dict[str, Tensor]:
        """Return where the tensors of some parts of an average lie, by what they stand for.

        Copies belong to no average.
        """
        return {
            variable: Tensor(variable, held.dtype, held.shape, extent)
            for held, extent in zip(self.held, self.extents, strict=True)
            if held.part in parts and (held.part == COPY or held.average == average)
            for variable in held.variables
        }


def lay_out(held: Iterable[Held]) -> Slot:
    """Return a slot with these tensors; a name that cannot stand there is replaced."""
    held = tuple(_named(held))
    specs = [(one.name, one.dtype, one.shape) for one in held]
    head, extents = safetensors.encode_header(specs, {}, ALIGNMENT)
    return Slot(held, head, tuple(extents))


def _named(held: Iterable[Held]) -> Iterable[Held]:
    taken: set[str] = set()
    for k, one in enumerate(held):
        name = one.name if safetensors.can_name(one.name) else f"tensor-{k}"
        while name in taken:
            name += "_1"
        taken.add(name)
        yield one._replace(name=name)


def can_hold(dtype: DType) -> bool:
    """Whether a slot can hold tensors of a dtype: those of whole bytes that safetensors has."""
    return dtype.bits >= 8 and safetensors.representable(dtype)


def chunk_ends(n_bytes: int) -> list[int]:
    """Return where the chunks of a file end that have a checksum each."""
    return [min(start + CHUNK_BYTES, n_bytes) for start in range(0, n_bytes, CHUNK_BYTES)]


def head_sums(head: bytes, ends: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Yield (chunk, contribution) of the bytes before the data of a slot."""
    start = 0
    for k, end in enumerate(ends):
        part = head[start:end]
        if not part:
            return
        yield k, shift(crc32c(part), end - start - len(part))
        start = end


def view(
    slot: Slot,
    stamp: Stamp,
    checksums: Sequence[int],
    average: int,
    *,
    parts: Collection[str] = (AVERAGE,),
) -> Checkpoint:
    """Return an average of a slot as a checkpoint that has its tensors under their own names.

    The chunks from its first to its last tensor are verified as one.
    """
    tensors = sorted(slot.places(parts, average).values(), key=lambda tensor: tensor.extent)
    ends = chunk_ends(slot.nbytes)
    start = min((t.extent.offset for t in tensors if t.nbytes), default=0)
    stop = max((t.extent.offset + t.nbytes for t in tensors), default=0)
    first = bisect.bisect_right(ends, start)
    last = max(bisect.bisect_left(ends, stop), first)
    crc = 0
    for end, chunk in zip(ends[first : last + 1], checksums[first : last + 1], strict=True):
        crc ^= shift(chunk, ends[last] - end)
    begin = ends[first - 1] if first else 0
    record = Extent(0, begin, ends[last] - begin)
    index = Index(safetensors.NAME, tuple(tensors), ("",), records=(record,), checksum=CRC32C)
    sums = np.array([crc], np.uint32)
    return Checkpoint(stamp.path, (stamp,), index, ("",), checksums=sums)


def whole(slot: Slot, stamp: Stamp, checksums: Sequence[int]) -> Checkpoint:
    """Return a slot as a checkpoint of all its tensors under the slot's own names.

    Each chunk is verified for itself, when the first tensor in it is read.
    """
    rows = zip(slot.held, slot.extents, strict=True)
    tensors = tuple(Tensor(held.name, held.dtype, held.shape, extent) for held, extent in rows)
    ends = chunk_ends(slot.nbytes)
    records = tuple(Extent(0, a, b - a) for a, b in zip([0, *ends[:-1]], ends, strict=True))
    index = Index(safetensors.NAME, tensors, ("",), records=records, checksum=CRC32C)
    return Checkpoint(stamp.path, (stamp,), index, ("",), checksums=np.array(checksums, np.uint32))
