"""What an HDF5 file holds, as plain data: told by the child process, and checked here once more.

Whatever is wrong with a row is an error of the file: the child may have been taken over by it.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ema_cli.errors import DamagedFile, UnsupportedInput
from ema_cli.formats.hdf5.names import SHADOWS_ATTRIBUTE, UNMARKED, Shadows, can_name, is_path
from ema_cli.tensors import DTYPES
from ema_cli.text import shorten, size

DIMENSION_LIMIT = 32
CHUNK_LIMIT = 128 << 20
# Keras's own limits of what few stored bytes may stand for.
_BOMB_BYTES = 4 << 30
_BOMB_RATIO = 1000

# The dtypes of HDF5 datasets.
READABLE = frozenset(
    f"{kind}{bits}"
    for kind, widths in {
        "float": (16, 32, 64),
        "int": (8, 16, 32, 64),
        "uint": (8, 16, 32, 64),
        "complex": (64, 128),
        "bfloat": (16,),
    }.items()
    for bits in widths
) | {"bool"}


class Dataset(NamedTuple):
    """A dataset of numbers.

    Attributes:
        path: without a leading "/".
        dtype: our name, or `UNMARKED`.
        big: whether its numbers are big-endian.
        shape: its dimensions.
        layout: ``contiguous``, ``chunked`` or ``compact``.
        offset: of its bytes in the HDF5 file when they lie there as one, or -1.
        stored: bytes that are stored of it.
        chunk: dimensions of its chunks.
        address: of the object; two names of one dataset have the same.
        more: whether it has attributes that tell other things.
    """

    path: str
    dtype: str
    big: bool
    shape: tuple[int, ...]
    layout: str
    offset: int
    stored: int
    chunk: tuple[int, ...]
    address: int
    more: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @property
    def direct(self) -> bool:
        """Whether its bytes lie in the file as one."""
        return self.offset >= 0 and self.nbytes == self.stored > 0


class Structure(NamedTuple):
    """What one HDF5 file holds.

    Attributes:
        datasets: those of numbers.
        groups: for each group, the root being "", its lists of strings by attribute.
        more: the groups that have other attributes.
        others: (path, what it holds) of what is no tensor.
        root: strings of the root group: versions, and the model's configuration.
        digest: SHA-256 of all of this, in hex.
    """

    datasets: tuple[Dataset, ...]
    groups: Mapping[str, Mapping[str, tuple[str, ...]]]
    more: frozenset[str]
    others: tuple[tuple[str, str], ...]
    root: Mapping[str, str]
    digest: str

    @property
    def shadows(self) -> Shadows:
        """Where the shadows lie that an output of this tool holds."""
        trees = []
        for path, attributes in self.groups.items():
            ends = attributes.get(SHADOWS_ATTRIBUTE, ())
            if path and "/" not in path and len(ends) == 1 and can_name(ends[0]):
                trees.append((ends[0], path))
        ends = self.groups.get("", {}).get(SHADOWS_ATTRIBUTE, ())
        return Shadows(tuple(trees), tuple(end for end in ends if can_name(end)))


def _bits(dtype: str) -> int:
    return 16 if dtype == UNMARKED else DTYPES[dtype].bits


class _Nonsense(Exception):
    """A row is not what the child sends."""


def structure_of(path: str, document: Mapping[str, Any], raw: bytes, nbytes: int) -> Structure:
    """Return the checked structure of an HDF5 file of `nbytes`. Raises `InputError`."""
    try:
        structure = _parsed(document, hashlib.sha256(raw).hexdigest())
        addresses = [_integer(document["base"]) + d.address for d in structure.datasets]
    except (_Nonsense, KeyError, TypeError, ValueError):
        raise DamagedFile(path, "the HDF5 library tells nonsense of it") from None
    paths = [d.path for d in structure.datasets] + [p for p, _ in structure.others]
    if len(set(paths)) != len(paths):
        raise DamagedFile(path, "expected different names, found one twice")
    for dataset in structure.datasets:
        _check(path, dataset, nbytes)
    _check_extents(path, structure.datasets, addresses)
    _check_bombs(path, structure.datasets)
    return structure


# ---------------------------------------------------------------------------- rows


def _parsed(document: Mapping[str, Any], digest: str) -> Structure:
    return Structure(
        tuple(_dataset(*row) for row in document["datasets"]),
        {
            _group(path): {_text(name): _texts(value) for name, value in attributes.items()}
            for path, attributes, _ in document["groups"]
        },
        frozenset(path for path, _, more in document["groups"] if more),
        tuple((_name(path), _text(what)) for path, what in document["others"]),
        {_text(name): _text(value) for name, value in document["root"].items()},
        digest,
    )


def _dataset(
    path: Any,
    dtype: Any,
    big: Any,
    shape: Any,
    layout: Any,
    offset: Any,
    stored: Any,
    chunk: Any,
    address: Any,
    more: Any,
) -> Dataset:
    if (dtype != UNMARKED and dtype not in READABLE) or type(big) is not bool:
        raise _Nonsense
    if not all(map(_integer, chunk)):
        raise _Nonsense
    return Dataset(
        _name(path),
        dtype,
        big,
        tuple(map(_integer, shape)),
        _text(layout),
        offset if offset == -1 else _integer(offset),
        _integer(stored),
        tuple(map(_integer, chunk)),
        _integer(address),
        bool(more),
    )


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _Nonsense
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _Nonsense
    return value


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)


def _group(value: Any) -> str:
    return _name(value) if value else _text(value)


def _name(value: Any) -> str:
    if not is_path(_text(value)):
        raise _Nonsense
    return str(value)


# ---------------------------------------------------------------------------- checks


def _check(path: str, dataset: Dataset, nbytes: int) -> None:
    shape = dataset.shape
    if len(shape) > DIMENSION_LIMIT:
        raise DamagedFile(
            path,
            f"expected at most {DIMENSION_LIMIT} dimensions, found {len(shape)}",
            dataset.path,
        )
    if math.prod(n for n in shape if n) * 16 >= 1 << 63:
        raise DamagedFile(path, f"the size of shape {list(shape)} overflows 64 bits", dataset.path)
    if dataset.offset >= 0:
        if dataset.stored not in (0, dataset.nbytes):
            raise DamagedFile(
                path,
                f"shape {list(shape)} needs {dataset.nbytes:,} bytes, found {dataset.stored:,}",
                dataset.path,
            )
        if dataset.offset + dataset.stored > nbytes:
            raise DamagedFile(
                path,
                f"expected its {dataset.stored:,} bytes before the file's end at {nbytes:,}, "
                f"found them at {dataset.offset:,}",
                dataset.path,
            )
    chunk = math.prod(dataset.chunk) * _bits(dataset.dtype) // 8
    if len(dataset.chunk) not in (0, len(shape)) or chunk > CHUNK_LIMIT:
        raise UnsupportedInput(
            f"{shorten(path, 1000)}: dataset '{shorten(dataset.path)}': expected chunks of at most "
            f"{size(CHUNK_LIMIT)}, found {size(chunk)}",
            "save it again with smaller chunks, or without any",
        )


def _check_extents(path: str, datasets: Iterable[Dataset], addresses: Iterable[int]) -> None:
    """Check that no two datasets share bytes, and that none holds the records that tell of one."""
    objects = sorted({0, *addresses})
    end, last = 0, ""
    spans = sorted({(d.offset, d.stored, d.address): d for d in datasets if d.direct}.items())
    for (offset, nbytes, _), dataset in spans:
        if offset < end:
            raise DamagedFile(path, f"its data overlaps that of '{shorten(last)}'", dataset.path)
        end, last = offset + nbytes, dataset.path
        k = bisect.bisect_left(objects, offset)
        if k < len(objects) and objects[k] < end:
            raise DamagedFile(path, "its data overlaps the file's own records", dataset.path)


def _check_bombs(path: str, datasets: Iterable[Dataset]) -> None:
    """Check that few stored bytes do not stand for very many."""
    declared = stored = 0
    for dataset in datasets:
        if not dataset.direct:
            declared += dataset.nbytes
            stored += dataset.stored
            if declared > _BOMB_BYTES and declared > _BOMB_RATIO * stored:
                raise DamagedFile(
                    path,
                    f"expected no more than {_BOMB_RATIO} times what is stored, "
                    f"found {size(stored)} that stand for {size(declared)}",
                    dataset.path,
                )
