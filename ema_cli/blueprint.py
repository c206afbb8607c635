"""What an output will hold and where, decided before it exists. Plain frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ema_cli.tensors import Checkpoint, DType, Extent, Slice, Tensor

# What a tensor of the output is made of.
AVERAGE = "average"
COPY = "copy"
BIASED = "biased"
LOCAL_STEP = "local_step"

# What is written is summed in chunks of this size, counted from the beginning of its file.
CHUNK_BYTES = 4 << 20


class Entry(NamedTuple):
    """One tensor of an output: `part` of the input tensor `source`, sliced as that is."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    part: str
    source: str
    slices: tuple[Slice, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor of fixed width."""
        return math.prod(self.shape) * self.dtype.bits // 8


def entry_of(name: str, tensor: Tensor, part: str, dtype: DType | None = None) -> Entry:
    """Return the entry `name`: `part` of `tensor`, sliced as it is, in its dtype or another."""
    return Entry(name, dtype or tensor.dtype, tensor.shape, part, tensor.name, tensor.slices)


class File(NamedTuple):
    """One file of an output.

    Attributes:
        name: inside the output folder, or what follows the prefix; empty for a single file.
        nbytes: its final size.
        literals: (offset, bytes) known in advance: headers, indexes, scalars.
        copy_of: the file it is a copy of, but for its literals and what is averaged; or empty.
    """

    name: str
    nbytes: int
    literals: tuple[tuple[int, bytes], ...] = ()
    copy_of: str = ""


class Draft(NamedTuple):
    """What a format makes of the entries.

    Attributes:
        files: those of the output.
        places: where in them each tensor lies.
        sums: the extents whose checksums its seal needs.
        own: what else its seal needs.
        notes: what is worth knowing about it.
        big_endian: the byte order of its numbers, or None for that of its last checkpoint.
    """

    files: Sequence[File]
    places: Mapping[str, Tensor]
    sums: tuple[Extent, ...] = ()
    own: object = None
    notes: tuple[str, ...] = ()
    big_endian: bool | None = None


class Patch(NamedTuple):
    """Bytes of an output that only its data decides; those of a whole file end where it ends."""

    file: int
    offset: int
    data: bytes
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Layout:
    """An output before it exists.

    Attributes:
        path: where it will be published.
        format: a key of `ema_cli.formats.FORMATS`.
        kind: ``file``, ``folder`` or ``prefix``: what its path is the name of.
        names: ``shadow`` or ``variable``.
        entries: its tensors.
        files: its files, in the order of `Extent.file`.
        places: where each entry's bytes go, by name.
        left_out: input tensors that are not in the output, with the reason.
        last: the checkpoint whose copies it takes.
        template: whether it has the structure of `last`, byte for byte.
        big_endian: the byte order of its numbers.
        sums: the extents whose checksums its seal needs.
        own: what else its seal needs.
        notes: what is worth knowing about it.
    """

    path: str
    format: str
    kind: str
    names: str
    entries: tuple[Entry, ...]
    files: tuple[File, ...]
    places: Mapping[str, Tensor]
    left_out: tuple[tuple[str, str], ...]
    last: Checkpoint
    template: bool = False
    big_endian: bool = False
    sums: tuple[Extent, ...] = ()
    own: object = None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)
