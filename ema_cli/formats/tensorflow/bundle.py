"""Reads a TensorFlow checkpoint's index: which tensor lies where, every entry checked.

The checkpoints of a run differ only in the checksums their indexes hold. One whose other bytes are
those of an index parsed before is not parsed again.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ema_cli.checksums import unmasked_all
from ema_cli.errors import DamagedFile, InputError
from ema_cli.files import open_input, read_exact, stamp, stamp_of
from ema_cli.formats.known import Known
from ema_cli.formats.tensorflow import entries, ordered, places, roles, table
from ema_cli.formats.tensorflow.entries import DTYPE_NAMES, Entry, Header
from ema_cli.formats.tensorflow.places import NAME
from ema_cli.formats.tensorflow.wire import Malformed, damaged
from ema_cli.hints import near_path
from ema_cli.tensors import DTYPES, NO_FILE, Checkpoint, DType, Extent, Index, Slice, Stamp, Tensor
from ema_cli.text import shorten, size

INDEX_LIMIT = 1 << 30
TENSOR_LIMIT = 1_000_000
# Slices of one tensor; checking that they are disjoint takes time with their square.
SLICE_LIMIT = 4096

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Checksums = np.ndarray[Any, np.dtype[np.uint32]]
SliceKey = tuple[bytes, tuple[tuple[int, int], ...]]


class Structure(NamedTuple):
    """What the checkpoints of a run have in common.

    Attributes:
        raw: the bytes of the index it was parsed from.
        free: for each byte of `raw`, whether it belongs to a checksum.
        crcs: the checksum of each extent in that index, as stored.
        crc_offsets: where in `raw` each of them lies; -1 where that cannot be said.
        empty: which extents hold no bytes.
        ends: for each shard the end of its last tensor, and which that is.
    """

    raw: Bytes
    free: np.ndarray[Any, np.dtype[np.bool_]]
    crcs: Checksums
    crc_offsets: np.ndarray[Any, np.dtype[np.int64]]
    empty: np.ndarray[Any, np.dtype[np.intp]]
    ends: tuple[tuple[int, str], ...]


class Found(NamedTuple):
    """An entry of the index, and where in it the four bytes of its checksum lie (or -1)."""

    entry: Entry
    crc_offset: int


def read(path: str, known: Known) -> Checkpoint:
    """Return the checkpoint that `path` means: a prefix, one of its files, or a folder.

    Raises `DamagedFile` for each broken invariant, `InputError` for what is missing.
    """
    inside = places.prefix_in(path) if os.path.isdir(path) else None
    prefix = inside or places.prefix_of(path)
    if prefix is None:
        raise InputError(
            f"{shorten(path, 1000)}: no TensorFlow checkpoint is called so", near_path(path)
        )
    index_path = prefix + places.SUFFIX
    index_stamp, raw = _read_index(index_path)
    index = _index(index_path, raw, known)
    files = tuple(_shard_stamp(prefix + name) for name in index.names[:-1])
    _check_ends(files, structure_of(index))
    checkpoint = Checkpoint(
        prefix,
        (*files, index_stamp),
        index,
        (*[""] * len(files), hashlib.sha256(raw).hexdigest()),
        index_file=index_path,
        checksums=_checksums(index_path, raw, index),
    )
    _check_shared(checkpoint)
    return roles.recorded(checkpoint, known)


def _read_index(path: str) -> tuple[Stamp, bytearray]:
    fd = open_input(path)
    try:
        file = stamp(fd, path)
        if file.size > INDEX_LIMIT:
            raise DamagedFile(
                path, f"expected an index of at most {size(INDEX_LIMIT)}, found {size(file.size)}"
            )
        if file.size >= table.FOOTER_BYTES and not places.ends_as_table(path):
            raise DamagedFile(path, "expected the magic number of a table at its end")
        raw = bytearray(file.size)
        read_exact(fd, memoryview(raw), 0, path)
        return file, raw
    finally:
        os.close(fd)


def _shard_stamp(path: str) -> Stamp:
    if not os.path.exists(path):
        raise InputError(
            f"{shorten(path, 1000)}: this data file is missing: the checkpoint is incomplete",
            "copy it from where the checkpoint was written, or leave the checkpoint out",
        )
    return stamp_of(path)


# ---------------------------------------------------------------------------- structure


def structure_of(index: Index) -> Structure:
    """Return the structure an index was parsed from."""
    assert isinstance(index.own, Structure)  # noqa: S101  # as `_parse` made it
    return index.own


def known_as(n_bytes: int) -> tuple[object, ...]:
    """Return the key in `Known` of the last index of this size."""
    return NAME, "index", n_bytes


def _index(path: str, raw: bytearray, known: Known) -> Index:
    """Return the parsed index, or that of one with the same bytes parsed before."""
    mine = np.frombuffer(raw, np.uint8)
    before: Index | None = known.get(known_as(len(raw)))
    if before is not None:
        structure = structure_of(before)
        same_size = len(structure.raw) == len(mine)
        if same_size and not ((structure.raw != mine) & ~structure.free).any():
            with damaged(path):
                table.blocks(raw)  # whose checksums are among the bytes that may differ
            return before
    with damaged(path):
        index = _parse(path, raw, mine)
    known[known_as(len(raw))] = index
    return index


def _parse(path: str, raw: bytearray, mine: Bytes) -> Index:
    items = iter(table.read(raw))
    first = next(items, None)
    if first is None or first.key:
        raise Malformed("expected the header as the first entry of the index")
    header = entries.parse_header(first.value)
    plain: dict[bytes, Found] = {}
    pieces: dict[SliceKey, Found] = {}
    for key, value, offset in items:
        try:
            entry, at = entries.parse_entry(value), entries.crc_offset(value)
        except Malformed as error:
            raise DamagedFile(path, str(error), _text(key)) from None
        found = Found(entry, offset + at if at >= 0 and offset >= 0 else -1)
        if len(plain) + len(pieces) >= TENSOR_LIMIT:
            raise Malformed(f"expected at most {TENSOR_LIMIT:,} entries, found more")
        slice_key = ordered.parse_slice_key(key) if key[:1] == b"\0" else None
        if slice_key is not None:
            pieces[slice_key] = found
        else:
            plain[key] = found
    tensors, stored = _tensors(path, header, plain, pieces)
    crcs = np.array([found.entry.crc for found in stored], np.uint32)
    offsets = np.array([found.crc_offset for found in stored], np.int64)
    free = np.zeros(len(raw), np.bool_)
    if (offsets >= 0).all():
        for start, length in table.blocks(raw):
            free[start + length + 1 : start + length + table.TRAILER_BYTES] = True
        free[offsets[:, None] + np.arange(entries.CRC_BYTES)] = True
    names = [places.data_suffix(shard, header.shards) for shard in range(header.shards)]
    extents = [extent for tensor in tensors for extent in tensor.extents]
    empty = np.array([k for k, extent in enumerate(extents) if not extent.nbytes], np.intp)
    structure = Structure(mine, free, crcs, offsets, empty, _ends(path, header, tensors))
    return Index(
        NAME,
        tensors,
        (*names, places.SUFFIX),
        big_endian=header.big_endian,
        own=structure,
    )


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _tensors(
    path: str, header: Header, plain: Mapping[bytes, Found], pieces: Mapping[SliceKey, Found]
) -> tuple[tuple[Tensor, ...], list[Found]]:
    """Return the tensors in the order of their bytes, and the entry of each of their extents."""
    used: set[SliceKey] = set()
    placed: list[tuple[Tensor, list[Found]]] = []
    for key, found in plain.items():
        name = _text(key)
        try:
            if found.entry.slices:
                placed.append(_partitioned(name, key, found.entry, header, pieces, used))
            else:
                placed.append((_tensor(name, found.entry, header), [found]))
        except Malformed as error:
            raise DamagedFile(path, str(error), name) from None
    for slice_key, found in pieces.items():
        if slice_key not in used:  # a name that only looks like a slice of something
            name = _text(ordered.slice_key(*slice_key))
            with damaged(path, name):
                placed.append((_tensor(name, found.entry, header), [found]))
    placed.sort(key=_position)
    stored = [found for _, several in placed for found in several]
    return tuple([tensor for tensor, _ in placed]), stored


def _position(placed: tuple[Tensor, list[Found]]) -> tuple[int, int]:
    return placed[0].extents[0][:2]


def _tensor(name: str, entry: Entry, header: Header) -> Tensor:
    dtype = _dtype(entry.dtype)
    return Tensor(name, dtype, entry.shape, _extent(entry, dtype, header))


def _dtype(number: int) -> DType:
    name = DTYPE_NAMES.get(number)
    if name is None:
        raise Malformed(f"expected the number of a dtype, found {number}")
    return DTYPES[name]


def _extent(entry: Entry, dtype: DType, header: Header) -> Extent:
    """Return where the bytes of an entry lie; whether the file holds them is checked later."""
    _, shape, shard, offset, n_bytes, _, _ = entry
    if not 0 <= shard < header.shards:
        raise Malformed(f"expected a shard from 0 to {header.shards - 1}, found {shard}")
    if offset < 0 or n_bytes < 0:
        raise Malformed(f"expected offset and size >= 0, found {offset} and {n_bytes}")
    elements = math.prod(shape)
    if dtype.bits:
        expected = elements * dtype.bits // 8
        if n_bytes != expected:
            raise Malformed(
                f"shape {list(shape)} of {dtype} needs {expected:,} bytes, its size is {n_bytes:,}"
            )
    elif elements > n_bytes:
        raise Malformed(f"{elements:,} {dtype} elements need more than its {n_bytes:,} bytes")
    return Extent(shard, offset, n_bytes)


def _ends(path: str, header: Header, tensors: Sequence[Tensor]) -> tuple[tuple[int, str], ...]:
    """Return the end of each shard's last tensor; refuses tensors that partly overlap."""
    ends = [(0, "")] * header.shards
    pairs = [(extent, tensor.name) for tensor in tensors for extent in tensor.extents]
    pairs.sort(key=lambda pair: pair[0])
    before = Extent(NO_FILE, 0, 0)
    for extent, name in pairs:
        file, offset, n_bytes = extent
        if n_bytes and extent != before:
            if offset < ends[file][0]:
                raise DamagedFile(
                    path, f"its bytes overlap those of '{shorten(ends[file][1])}'", name
                )
            ends[file] = (offset + n_bytes, name)
            before = extent
    return tuple(ends)


def _check_ends(files: Sequence[Stamp], structure: Structure) -> None:
    for file, (end, name) in zip(files, structure.ends, strict=True):
        if end > file.size:
            raise DamagedFile(
                file.path, f"needs {end:,} bytes up to its end, the file has {file.size:,}", name
            )


# ---------------------------------------------------------------------------- partitions


def _partitioned(
    name: str,
    key: bytes,
    entry: Entry,
    header: Header,
    pieces: Mapping[SliceKey, Found],
    used: set[SliceKey],
) -> tuple[Tensor, list[Found]]:
    """Return a tensor stored in slices, which must cover it exactly, and their entries."""
    dtype = _dtype(entry.dtype)
    if not dtype.bits:
        raise Malformed(f"a {dtype} tensor cannot be stored in slices")
    if len(entry.slices) > SLICE_LIMIT:
        raise Malformed(f"expected at most {SLICE_LIMIT:,} slices, found {len(entry.slices):,}")
    slices, stored = [], []
    for extents in entry.slices:
        piece = pieces.get((key, extents))
        if piece is None:
            raise Malformed(f"its slice {list(extents)} has no entry")
        used.add((key, extents))
        slices.append(_slice(entry, extents, piece.entry, header))
        stored.append(piece)
    if len(set(entry.slices)) < len(slices):
        raise Malformed("one of its slices overlaps itself: it stands twice")
    filled = [piece.extent for piece in slices if piece.extent.nbytes]
    if len(set(filled)) < len(filled):
        raise Malformed("two of its slices overlap: they share their bytes")
    elements = math.prod(entry.shape)
    covered = sum(math.prod(s.lengths) for s in slices)
    if covered != elements:
        raise Malformed(
            f"expected slices of {elements:,} elements together, found {covered:,}: "
            "they overlap or leave a part out"
        )
    _check_disjoint(slices)
    total = Extent(NO_FILE, 0, elements * dtype.bits // 8)
    return Tensor(name, dtype, entry.shape, total, tuple(slices)), stored


def _slice(whole: Entry, extents: Sequence[tuple[int, int]], piece: Entry, header: Header) -> Slice:
    if len(extents) != len(whole.shape):
        raise Malformed(f"a slice has {len(extents)} dimensions, expected {len(whole.shape)}")
    starts = tuple(start for start, _ in extents)
    lengths = tuple(
        full if length < 0 else length
        for (_, length), full in zip(extents, whole.shape, strict=True)
    )
    for start, length, full in zip(starts, lengths, whole.shape, strict=True):
        if start < 0 or start + length > full:
            raise Malformed(f"a slice {list(extents)} leads out of shape {list(whole.shape)}")
    if piece.dtype != whole.dtype or piece.shape != lengths:
        raise Malformed(f"a slice {list(extents)} has another dtype or shape {list(piece.shape)}")
    extent = _extent(piece, _dtype(piece.dtype), header)
    return Slice(starts, lengths, tuple(length < 0 for _, length in extents), extent)


def _check_disjoint(slices: Sequence[Slice]) -> None:
    """Refuse slices that share an element: swept along the dimension that is cut most often."""
    boxes = [piece for piece in slices if math.prod(piece.lengths)]
    rank = len(boxes[0].starts) if boxes else 0
    axis = max(range(rank), key=lambda k: len({box.starts[k] for box in boxes}), default=None)
    if axis is None:
        return  # a scalar, or nothing: the sum of the elements tells
    active: list[Slice] = []
    for box in sorted(boxes, key=lambda box: box.starts[axis]):
        active = [a for a in active if a.starts[axis] + a.lengths[axis] > box.starts[axis]]
        for other in active:
            if _share(box, other):
                raise Malformed(
                    f"the slices at {list(other.starts)} and {list(box.starts)} overlap"
                )
        active.append(box)


def _share(a: Slice, b: Slice) -> bool:
    return all(
        s < t + n and t < s + m
        for s, m, t, n in zip(a.starts, a.lengths, b.starts, b.lengths, strict=True)
    )


# ---------------------------------------------------------------------------- checksums


def _checksums(path: str, raw: bytearray, index: Index) -> Checksums:
    """Return the CRC-32C of each extent as this checkpoint's index holds it."""
    structure = structure_of(index)
    offsets = structure.crc_offsets
    stored = structure.crcs
    if (offsets >= 0).all():
        picked = np.frombuffer(raw, np.uint8)[offsets[:, None] + np.arange(entries.CRC_BYTES)]
        stored = np.ascontiguousarray(picked).view("<u4").reshape(-1)
    checksums = unmasked_all(stored)
    wrong = structure.empty[checksums[structure.empty] != 0]
    if len(wrong):
        reason = "expected the checksum of no bytes, found another"
        names = [tensor.name for tensor in index.tensors for _ in tensor.extents]
        raise DamagedFile(path, reason, names[wrong[0]])
    return checksums


def _check_shared(checkpoint: Checkpoint) -> None:
    """Check that tensors which share their bytes tell the same checksum of them."""
    index, checksums = checkpoint.index, checkpoint.checksums
    if checksums is None or len(index.ordinals) == len(index.extents):
        return
    seen: dict[tuple[Extent, bool], int] = {}
    pairs = ((tensor, extent) for tensor in index.tensors for extent in tensor.extents)
    for (tensor, extent), crc in zip(pairs, checksums.tolist(), strict=True):
        if seen.setdefault((extent, tensor.dtype.bits > 0), crc) != crc and extent.nbytes:
            reason = "shares its bytes with another tensor, but not their checksum"
            raise DamagedFile(checkpoint.index_file, reason, tensor.name)
