"""Lays out TensorFlow checkpoints and seals them: the index is written when all bytes are known.

For the same content the bytes are TensorFlow's own: tensors lie in the order of their names, as
Saver sorts them, and the index is built as its table builder does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from ema_cli.blueprint import Draft, Entry, File, Layout
from ema_cli.checksums import crc32c, masked
from ema_cli.formats.tensorflow import bundle, entries, ordered, places, table
from ema_cli.formats.tensorflow.entries import DTYPE_NUMBERS, Header
from ema_cli.tensors import NO_FILE, Checkpoint, DType, Extent, Slice, Tensor

# TensorFlow cannot restore a sliced tensor of these dtypes whole ("Dtype half not supported").
_NEVER_SLICED = ("float16", "uint16", "uint32", "uint64", "float8_e5m2", "float8_e4m3fn")
# The masked checksum of an extent of a tensor.
Stored = Callable[[Tensor, Extent], int]
_CRC_BYTES = 4
_TRAILER_BYTES = 5


def representable(dtype: DType) -> bool:
    """Whether a TensorFlow checkpoint can hold this dtype."""
    return dtype.name in DTYPE_NUMBERS


def can_name(name: str) -> bool:
    """Whether a tensor can have this name: any bytes but none, and no slice's key."""
    try:
        key = _key(name)
    except UnicodeEncodeError:
        return False
    return bool(key) and (key[0] != 0 or ordered.parse_slice_key(key) is None)


def _key(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------- laying out


def template(last: Checkpoint) -> Draft:
    """Return the files of `last`: the same entries, order, slices and strings."""
    structure = bundle.structure_of(last.index)
    files = [
        File(name, end) for name, (end, _) in zip(last.index.names, structure.ends, strict=False)
    ]
    return Draft([*files, File(places.SUFFIX, len(structure.raw))], last.index.by_name)


def fresh(wanted: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
    """Return one new shard with the wanted entries, slices as they were, and its index."""
    del limit
    placed: dict[str, Tensor] = {}
    end = 0
    for entry in sorted(wanted, key=lambda entry: _key(entry.name)):
        source = last.index.by_name[entry.source]
        changed = entry.dtype != source.dtype and entry.dtype.name in _NEVER_SLICED
        if entry.slices and not changed:
            slices = []
            for piece in entry.slices:
                n_bytes = math.prod(piece.lengths) * entry.dtype.bits // 8
                slices.append(piece._replace(extent=Extent(0, end, n_bytes)))
                end += n_bytes
            total = Extent(NO_FILE, 0, entry.nbytes)
            placed[entry.name] = Tensor(*entry[:3], total, tuple(slices))
        else:
            # What has no fixed width is copied and keeps its size.
            n_bytes = entry.nbytes if entry.dtype.bits else source.extent.nbytes
            placed[entry.name] = Tensor(*entry[:3], Extent(0, end, n_bytes))
            end += n_bytes
    return Draft([File(places.data_suffix(0, 1), end), _index_file(placed, 1)], placed)


def renamed(wanted: Sequence[Entry], source: Checkpoint) -> Draft:
    """Return a new index over copies of the data files of `source`, which stay as they are."""
    by_name = source.index.by_name
    placed = {entry.name: by_name[entry.source]._replace(name=entry.name) for entry in wanted}
    data = [
        File(name, stamp.size, copy_of=stamp.path)
        for name, stamp in zip(source.index.names[:-1], source.files, strict=False)
    ]
    return Draft([*data, _index_file(placed, len(data))], placed)


def _index_file(placed: Mapping[str, Tensor], shards: int) -> File:
    """Return the index file, whose size does not depend on the checksums."""
    size = len(_index(placed, Header(shards, False), lambda tensor, extent: 1))
    return File(places.SUFFIX, size)


# ---------------------------------------------------------------------------- sealing


def seal(layout: Layout, checksums: Mapping[Extent, int]) -> tuple[int, bytes]:
    """Return the ordinal and the bytes of the index file.

    Args:
        layout: of the output.
        checksums: CRC-32C of each extent as it was written; those of copied files may be missing.
    """
    last = layout.last
    sources = {entry.name: entry.source for entry in layout.entries}
    whole_files = any(file.copy_of for file in layout.files)
    recorded = _recorded(last) if last.index.format == bundle.NAME else {}

    def checksum(tensor: Tensor, extent: Extent) -> int:
        if whole_files:
            return recorded[extent]
        if tensor.dtype.bits:
            return checksums[extent]
        # That of strings is not one of their bytes; they were copied verbatim.
        return recorded[last.index.by_name[sources[tensor.name]].extent]

    ordinal = len(layout.files) - 1
    if layout.template:
        pairs = ((t, extent) for t in last.index.tensors for extent in t.extents)
        patched = _patched(last, [checksum(tensor, extent) for tensor, extent in pairs])
        if patched is not None:
            return ordinal, patched
    header = Header(ordinal, layout.big_endian)
    return ordinal, _index(layout.places, header, lambda t, e: masked(checksum(t, e)))


def _recorded(last: Checkpoint) -> dict[Extent, int]:
    assert last.checksums is not None  # noqa: S101  # every TensorFlow checkpoint has them
    return dict(zip(last.index.extents, last.checksums.tolist(), strict=True))


def _patched(last: Checkpoint, checksums: Sequence[int]) -> bytes | None:
    """Return the index of `last` with other checksums; None when it was compressed."""
    structure = bundle.structure_of(last.index)
    raw = bytearray(structure.raw)
    for offset, crc in zip(structure.crc_offsets.tolist(), checksums, strict=True):
        if offset < 0:
            return None
        raw[offset : offset + _CRC_BYTES] = masked(crc).to_bytes(_CRC_BYTES, "little")
    for start, length in table.blocks(structure.raw.tobytes()):
        end = start + length
        crc = masked(crc32c(memoryview(raw)[start : end + 1]))
        raw[end + 1 : end + _TRAILER_BYTES] = crc.to_bytes(_CRC_BYTES, "little")
    return bytes(raw)


def _index(placed: Mapping[str, Tensor], header: Header, stored: Stored) -> bytes:
    """Return the bytes of an index; `stored` gives the masked checksum of an extent."""
    items = [(b"", entries.encode_header(header))]
    items += [item for tensor in placed.values() for item in _items(tensor, stored)]
    items.sort()
    return table.build(items)


def _items(tensor: Tensor, stored: Stored) -> Iterator[tuple[bytes, bytes]]:
    """Yield the index entries of a tensor: one, or one for the whole and one for each slice."""
    key, dtype = _key(tensor.name), DTYPE_NUMBERS[tensor.dtype.name]
    keys = [_slice_extents(piece) for piece in tensor.slices]
    if tensor.slices:
        whole = entries.Entry(dtype, tensor.shape, 0, 0, 0, 0, tuple(keys))
        yield key, entries.encode_entry(whole)
        for extents, piece in zip(keys, tensor.slices, strict=True):
            one = entries.Entry(
                dtype, piece.lengths, *piece.extent, stored(tensor, piece.extent), ()
            )
            yield ordered.slice_key(key, extents), entries.encode_entry(one)
    else:
        one = entries.Entry(dtype, tensor.shape, *tensor.extent, stored(tensor, tensor.extent), ())
        yield key, entries.encode_entry(one)


def _slice_extents(piece: Slice) -> tuple[tuple[int, int], ...]:
    """Return the extents of a slice exactly as its key holds them."""
    return tuple(
        (start, -1 if whole else length)
        for start, length, whole in zip(piece.starts, piece.lengths, piece.whole, strict=True)
    )
