"""What a checkpoint holds: dtypes, tensors, extents, indexes. Plain frozen data, no file access."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NumpyDType = np.dtype[Any]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: as NumPy or ml_dtypes spell it, e.g. ``"bfloat16"``.
        bits: width of one element; 4 and 6 bit types are packed.
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
        DType("float4_e2m1fn", 4, floating=True),
        DType("float6_e2m3fn", 6, floating=True),
        DType("float6_e3m2fn", 6, floating=True),
        DType("float8_e4m3fn", 8, floating=True),
        DType("float8_e4m3fnuz", 8, floating=True),
        DType("float8_e5m2", 8, floating=True),
        DType("float8_e5m2fnuz", 8, floating=True),
        DType("float8_e8m0fnu", 8, floating=True),
        DType("float16", 16, averaged=True, floating=True),
        DType("bfloat16", 16, averaged=True, floating=True),
        DType("float32", 32, averaged=True, floating=True),
        DType("float64", 64, averaged=True, floating=True),
    )
}

AVERAGED_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.averaged)


@functools.cache
def numpy_dtype(name: str) -> NumpyDType:
    """Return the little-endian NumPy dtype called `name`; imports ml_dtypes only when needed.

    Raises `TypeError` for packed types, which have no NumPy counterpart here.
    """
    if DTYPES[name].bits < 8:
        raise TypeError(f"{name} is packed and has no NumPy dtype")
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        dtype: NumpyDType = np.dtype(getattr(ml_dtypes, name))
        return dtype
    return np.dtype(name).newbyteorder("<")


class Extent(NamedTuple):
    """Where bytes lie: `file` is the ordinal in the checkpoint's files; both others in bytes."""

    file: int
    offset: int
    nbytes: int


class Tensor(NamedTuple):
    """One named tensor of a checkpoint and where its bytes lie."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    extent: Extent

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def describe(dtype: DType, shape: tuple[int, ...]) -> str:
    """Return ``"float32 [64, 10]"``."""
    return f"{dtype.name} [{', '.join(map(str, shape))}]"


@dataclass(frozen=True, eq=False)
class Index:
    """Where each tensor of a checkpoint lies, byte for byte.

    Checkpoints whose headers are the same bytes share one `Index`, so identity means equality.

    Attributes:
        format: a key of `ema_cli.formats.FORMATS`.
        tensors: in the order of their bytes (file, then offset).
        names: the file names inside a folder checkpoint, or one empty string for a single file.
        header_digests: SHA-256 of each file's header.
        metadata: the file level string metadata of the first file.
    """

    format: str
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    header_digests: tuple[str, ...]
    metadata: Mapping[str, str]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.extent.nbytes for tensor in self.tensors)


class Stamp(NamedTuple):
    """A file as it was when its header was read; a different one later means it changed."""

    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved set of named tensors.

    Attributes:
        path: as the user would name it.
        files: the files that hold tensor bytes, in the order of `Extent.file`.
        index: what it holds.
        step: the training step, or None when nothing tells it.
        notes: what was odd about it, but no reason to refuse it.
        index_file: the file that lists its shards, or empty.
        within: its path inside the run's directory, where it was found by searching.
    """

    path: str
    files: tuple[Stamp, ...]
    index: Index
    step: int | None = None
    notes: tuple[str, ...] = ()
    index_file: str = ""
    within: str = ""

    @property
    def name(self) -> str:
        """What tells it from the others: its path within the run, or its last component."""
        return self.within or self.path.rstrip("/").rpartition("/")[2]
