"""Lays out new PyTorch archives, byte for byte as torch.save writes them.

With ``.format_version`` in the archive torch.load may compute where each storage lies, rather
than read it: then order, names, padding and keys must be exactly those of torch.save. Keys count
up from 0 in the order in which the pickle mentions the storages.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ema_cli.blueprint import File
from ema_cli.formats import zips
from ema_cli.formats.torch.encoding import encode
from ema_cli.formats.torch.indexing import normal_strides
from ema_cli.formats.torch.nodes import ITEM_SIZES, StorageRef, TensorRef
from ema_cli.formats.torch.rebuild import STORAGES
from ema_cli.formats.zips import NewMember
from ema_cli.tensors import DType, Extent, Tensor

# As torch.save calls an archive that it writes to no file of its own.
STEM = "archive"
# The dtypes torch has a class of storages for; tensors of others lie in storages of bytes.
_CLASSIC = frozenset(STORAGES.values())
WRITABLE = frozenset(name for name in ITEM_SIZES if name and name[0] != "q" and "quint" not in name)
_ID_DIGITS = 40


class Item(NamedTuple):
    """A tensor to be stored.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        shape: its dimensions.
        strides: in elements, where its bytes are those of a tensor with these, else ().
        span: number of elements between the first and the last one, both included.
        same: what tells its bytes: items that have it in common share a storage; None shares none.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    span: int
    same: object


class Made(NamedTuple):
    """A new file, where its tensors lie, and where the CRC-32 of each storage belongs."""

    file: File
    places: Mapping[str, Tensor]
    crc_at: Mapping[Extent, tuple[int, ...]]


def item_of(name: str, dtype: DType, shape: tuple[int, ...], source: Tensor, part: str) -> Item:
    """Return the item for `part` of `source`, which keeps its strides where they leave no gaps."""
    strides = source.strides if shape == source.shape else ()
    if strides and source.extent.nbytes > source.nbytes:
        strides = ()  # gathered: what lies between its elements is none of it
    span = math.prod(shape)
    if strides:
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    tied = bool(span) and not source.slices
    # Bytes that are gathered are only equal where they are gathered in the same way.
    way = (shape, source.strides) if source.strides and not strides else span
    return Item(
        name, dtype, shape, strides, span, (source.extent, part, dtype.name, way) if tied else None
    )


def refs_of(items: Sequence[Item]) -> dict[str, TensorRef]:
    """Return the tensors of a new pickle by name; storages are numbered in this order."""
    found: dict[object, StorageRef] = {}
    refs: dict[str, TensorRef] = {}
    for place, item in enumerate(items):
        same = item.same if item.same is not None else place
        storage = found.get(same)
        if storage is None:
            storage = found[same] = _storage(str(len(found)), item)
        strides = item.strides or c_strides(item.shape)
        refs[item.name] = TensorRef(storage, item.dtype.name, 0, item.shape, strides)
    return refs


def _storage(key: str, item: Item) -> StorageRef:
    classic = item.dtype.name in _CLASSIC
    numel = item.span if classic else item.span * item.dtype.bits // 8
    return StorageRef(key, item.dtype.name if classic else "", numel, "cpu")


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor in C order, as torch has them."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def lay_out(
    name: str,
    root: Any,
    items: Sequence[Item],
    *,
    big_endian: bool = False,
) -> Made:
    """Return the file `name` with the pickle of `root`, which mentions the items in this order."""
    pickled = encode(root)
    refs = refs_of(items)
    storages = {ref.storage.key: ref.storage for ref in refs.values()}
    members = [
        _member("data.pkl", pickled),
        _member(".format_version", b"1"),
        _member(".storage_alignment", b"64"),
        _member("byteorder", b"big" if big_endian else b"little"),
    ]
    first = len(members)
    members += [NewMember(f"{STEM}/data/{s.key}", None, s.nbytes) for s in storages.values()]
    members += [_member("version", b"3\n"), _member(".data/serialization_id", _identity(pickled))]
    laid = zips.lay_out(members, torch=True)
    extents = {key: Extent(0, *laid.extents[place]) for place, key in enumerate(storages, first)}
    crc_at = {
        extents[key]: laid.crc_at[place]
        for place, key in enumerate(storages, first)
        if extents[key].nbytes
    }
    file = File(name, laid.total, tuple(laid.literals))
    places = {item.name: _place(item, extents[refs[item.name].storage.key]) for item in items}
    return Made(file, places, crc_at)


def _member(name: str, data: bytes) -> NewMember:
    return NewMember(f"{STEM}/{name}", data, len(data))


def _identity(pickled: bytes) -> bytes:
    """Return what stands for torch.save's hash of the archive; nobody computes that again."""
    number = int.from_bytes(hashlib.sha256(pickled).digest(), "big")
    return f"{number:0{_ID_DIGITS}}"[-_ID_DIGITS:].encode("ascii")


def _place(item: Item, extent: Extent) -> Tensor:
    strides = normal_strides(item.shape, item.strides) if item.strides else ()
    return Tensor(item.name, item.dtype, item.shape, extent, (), strides)
