"""What a checkpoint holds: dtypes, tensors, extents, indexes. Plain frozen data, no file access."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

NumpyDType = np.dtype[Any]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: as NumPy or ml_dtypes spell it, e.g. ``"bfloat16"``.
        bits: width of one element; 4 and 6 bit types are packed, and 0 stands for the variable
            width of strings and variants, which are only ever carried verbatim.
        averaged: whether TensorFlow's moving average takes it (half, bfloat16, float, double).
        floating: whether it holds real numbers; float8 and smaller are, but are never averaged.
    """

    name: str
    bits: int
    averaged: bool = False
    floating: bool = False

    def __str__(self) -> str:
        return self.name


DTYPES: Mapping[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("bool", 8),
        DType("uint8", 8),
        DType("int8", 8),
        DType("uint16", 16),
        DType("int16", 16),
        DType("uint32", 32),
        DType("int32", 32),
        DType("uint64", 64),
        DType("int64", 64),
        DType("complex64", 64),
        DType("complex128", 128),
        DType("qint8", 8),
        DType("quint8", 8),
        DType("qint16", 16),
        DType("quint16", 16),
        DType("qint32", 32),
        DType("int4", 8),
        DType("uint4", 8),
        DType("int2", 8),
        DType("uint2", 8),
        DType("string", 0),
        DType("variant", 0),
        DType("float4_e2m1fn", 4, floating=True),
        DType("float6_e2m3fn", 6, floating=True),
        DType("float6_e3m2fn", 6, floating=True),
        DType("float8_e4m3fn", 8, floating=True),
        DType("float8_e4m3fnuz", 8, floating=True),
        DType("float8_e5m2", 8, floating=True),
        DType("float8_e5m2fnuz", 8, floating=True),
        DType("float8_e8m0fnu", 8, floating=True),
        DType("float8_e4m3b11fnuz", 8, floating=True),
        DType("float4_e2m1fn_byte", 8, floating=True),
        DType("float16", 16, averaged=True, floating=True),
        DType("bfloat16", 16, averaged=True, floating=True),
        DType("float32", 32, averaged=True, floating=True),
        DType("float64", 64, averaged=True, floating=True),
    )
}

AVERAGED_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.averaged)


# Kept by TensorFlow one value per byte; ml_dtypes knows the rest by their own names.
_STORED_AS = {"float4_e2m1fn_byte": "float4_e2m1fn"}


@functools.cache
def numpy_dtype(name: str) -> NumpyDType:
    """Return the little-endian NumPy dtype called `name`; imports ml_dtypes only when needed.

    Raises `TypeError` for packed types and those of variable width, which have no NumPy
    counterpart here.
    """
    if DTYPES[name].bits < 8:
        raise TypeError(f"{name} has no NumPy dtype")
    if name.startswith(("bfloat16", "float8", "float4", "int4", "uint4", "int2", "uint2")):
        import ml_dtypes

        dtype: NumpyDType = np.dtype(getattr(ml_dtypes, _STORED_AS.get(name, name)))
        return dtype
    return np.dtype(name.removeprefix("q")).newbyteorder("<")


@functools.cache
def swap_width(name: str) -> int:
    """Return how many bytes change places together when the byte order does; 0 for none."""
    width = DTYPES[name].bits // 8
    width = width // 2 if name.startswith("complex") else width
    return width if width > 1 else 0


class Role(enum.Enum):
    """What a tensor is for: told by the checkpoint's own records, else by its name."""

    VARIABLE = "variable"
    STATISTICS = "statistics"
    OPTIMIZER = "optimizer state"
    SHADOW = "shadow"
    OTHER_SHADOW = "shadow of another name"
    COUNTER = "counter"
    FIXED = "not trainable"
    BESIDE = "beside the model"


class Extent(NamedTuple):
    """Where bytes lie: `file` is the ordinal in the checkpoint's files; both others in bytes."""

    file: int
    offset: int
    nbytes: int


class Slice(NamedTuple):
    """A box of a partitioned variable, stored as one piece in C order.

    Attributes:
        starts: first index along each dimension.
        lengths: number of indices along each dimension.
        whole: for each dimension, whether it was saved as "all of it" rather than by its length.
        extent: where its bytes lie.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    whole: tuple[bool, ...]
    extent: Extent


class Tensor(NamedTuple):
    """One named tensor of a checkpoint and where its bytes lie.

    Attributes:
        name: as the checkpoint calls it.
        dtype: of its elements.
        shape: empty for a scalar.
        extent: its bytes. That of a partitioned variable lies in no file: it only tells how many
            bytes its slices have together.
        slices: the parts of a partitioned variable.
        strides: in elements, only where these do not follow each other in C order; the extent
            then spans from the first of them to the last.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    extent: Extent
    slices: tuple[Slice, ...] = ()
    strides: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; those of variable width have what their extent holds."""
        bits = self.dtype.bits
        return self.elements * bits // 8 if bits else self.extent.nbytes

    @property
    def dense(self) -> bool:
        """Whether each element between its first and its last is one of its own, once."""
        return not self.strides or self.extent.nbytes == self.nbytes

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The extents of its slices, or its only one."""
        return tuple(s.extent for s in self.slices) if self.slices else (self.extent,)


NO_FILE = -1


class Caution(NamedTuple):
    """Something about a checkpoint that a plan warns of; `code` is stable."""

    code: str
    message: str
    hint: str = ""


def describe(dtype: DType, shape: tuple[int, ...]) -> str:
    """Return ``"float32 [64, 10]"``."""
    return f"{dtype.name} [{', '.join(map(str, shape))}]"


@dataclass(frozen=True, eq=False)
class Index:
    """Where each tensor of a checkpoint lies, byte for byte.

    Checkpoints whose headers say the same share one `Index`, so identity means equality.

    Attributes:
        format: a key of `ema_cli.formats.FORMATS`.
        tensors: in the order of their bytes (file, then offset).
        names: what tells the checkpoint's files apart: their names inside a folder, what follows
            the prefix, or one empty string for a single file.
        metadata: the file level string metadata of the first file.
        big_endian: whether numbers lie in big-endian byte order.
        roles: what the checkpoint itself records of its tensors; empty when it records nothing.
        roles_from: what recorded them, for people.
        full_names: how the training program calls tensors that are saved under other names.
        own: what the format keeps to write a checkpoint of the same structure.
        records: the bytes the format keeps one checksum each for, where these are not just those
            of its tensors: the members of a zip file.
        checksum: a key of `ema_cli.checksums.KINDS`: what those checksums are.
        cautions: what a plan has to warn of.
        lies_as: how the container itself calls tensors, where that differs.
        listed: the names in the container's own order, where that is not the order of the bytes.
        negated: tensors of which the negative is stored.
    """

    format: str
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    big_endian: bool = False
    roles: Mapping[str, Role] = field(default_factory=dict)
    roles_from: str = ""
    full_names: Mapping[str, str] = field(default_factory=dict)
    own: object = None
    records: tuple[Extent, ...] = ()
    checksum: str = "crc32c"
    cautions: tuple[Caution, ...] = ()
    lies_as: Mapping[str, str] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    negated: frozenset[str] = frozenset()

    @functools.cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @functools.cached_property
    def extents(self) -> tuple[Extent, ...]:
        """The records, or else the extents of all tensors and slices, as in `checksums`."""
        return self.records or tuple(e for tensor in self.tensors for e in tensor.extents)

    @functools.cached_property
    def ordinals(self) -> Mapping[Extent, int]:
        """The place of each extent in `extents`."""
        return {extent: ordinal for ordinal, extent in enumerate(self.extents)}


class Stamp(NamedTuple):
    """A file as it was when its header was read; a different one later means it changed.

    One without a path is yet to be made: the format spills there what cannot be read in place.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved set of named tensors.

    Attributes:
        path: as the user would name it.
        files: its files in the order of `Extent.file`, those without tensor bytes last.
        index: what it holds.
        digests: SHA-256 of the header of each file, empty for a file without one.
        step: the training step, or None when nothing tells it.
        notes: what was odd about it, but no reason to refuse it.
        index_file: the file that lists its shards, or empty.
        within: its path inside the run's directory, where it was found by searching.
        checksums: of each of ``index.extents`` as uint32, or None where the format has none.
        told_step: the step and what says so, where it is no tensor.
        key: where the user said that the model is inside it.
    """

    path: str
    files: tuple[Stamp, ...]
    index: Index
    digests: tuple[str, ...]
    step: int | None = None
    notes: tuple[str, ...] = ()
    index_file: str = ""
    within: str = ""
    checksums: np.ndarray[Any, np.dtype[np.uint32]] | None = field(default=None, compare=False)
    told_step: tuple[int, str] | None = None
    key: str = ""

    @property
    def name(self) -> str:
        """What tells it from the others: its path within the run, or its last component."""
        return self.within or self.path.rstrip("/").rpartition("/")[2]
