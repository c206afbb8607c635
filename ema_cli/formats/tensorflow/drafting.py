"""Lays out TensorFlow checkpoints and seals them: the index is written when all bytes are known.

For the same content the bytes are TensorFlow's own: tensors lie in the order of their names, as
Saver sorts them, and the index is built as its table builder does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ema_cli.blueprint import Draft, Entry, File, Layout, Patch
from ema_cli.checksums import crc32c, masked
from ema_cli.formats.tensorflow import bundle, entries, ordered, places, table
from ema_cli.formats.tensorflow.entries import DTYPE_NUMBERS, Header
from ema_cli.formats.tensorflow.opaque import opaque_checksums
from ema_cli.tensors import NO_FILE, Checkpoint, Extent, Slice, Tensor

# TensorFlow cannot restore a sliced tensor of this dtype whole ("Dtype half not supported"), so
# no averaged tensor becomes one. What is sliced in it already stays.
_NEVER_SLICED = "float16"
# Stands for a checksum that is not known yet; zero would be left out.
_UNKNOWN = 1


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
    data = [
        File(name, end) for name, (end, _) in zip(last.index.names, structure.ends, strict=False)
    ]
    index = structure.raw.tobytes()
    if (structure.crc_offsets < 0).any():  # a compressed index, in which nothing can be replaced
        index = _index(last.index.by_name, Header(len(data), last.index.big_endian))
    by_name = last.index.by_name
    return Draft([*data, _index_file(index)], by_name, _fixed(by_name.values()))


def fresh(wanted: Sequence[Entry], last: Checkpoint) -> Draft:
    """Return one new shard with the wanted entries, slices as they were, and its index."""
    placed: dict[str, Tensor] = {}
    end = 0
    for entry in sorted(wanted, key=lambda entry: _key(entry.name)):
        source = last.index.by_name[entry.source]
        changed = entry.dtype != source.dtype and entry.dtype.name == _NEVER_SLICED
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
    header = Header(1, last.index.format == places.NAME and last.index.big_endian)
    index = _index_file(_index(placed, header))
    return Draft([File(places.data_suffix(0, 1), end), index], placed, _fixed(placed.values()))


def renamed(wanted: Sequence[Entry], source: Checkpoint) -> Draft:
    """Return a new index over copies of the data files of `source`, which stay as they are."""
    by_name = source.index.by_name
    placed = {entry.name: by_name[entry.source]._replace(name=entry.name) for entry in wanted}
    data = [
        File(name, stamp.size, copy_of=stamp.path)
        for name, stamp in zip(source.index.names[:-1], source.files, strict=False)
    ]
    index = _index(placed, Header(len(data), source.index.big_endian))
    return Draft([*data, _index_file(index)], placed)


def _fixed(tensors: Iterable[Tensor]) -> tuple[Extent, ...]:
    """Return the extents whose bytes have the checksum that the index holds, each once."""
    return tuple(dict.fromkeys(e for t in tensors if t.dtype.bits for e in t.extents))


def _index_file(index: bytes) -> File:
    """Return the file of an index whose checksums are still to come."""
    return File(places.SUFFIX, len(index), ((0, index),))


# ---------------------------------------------------------------------------- sealing


def seal(layout: Layout, checksums: Mapping[Extent, int]) -> list[Patch]:
    """Return the index file, with the checksums in their places.

    Args:
        layout: of the output.
        checksums: CRC-32C of each extent as it was written; those of copied files may be missing.
    """
    last = layout.last
    sources = {entry.name: entry.source for entry in layout.entries}
    whole_files = any(file.copy_of for file in layout.files)
    ordinal = len(layout.files) - 1
    raw = bytearray(layout.files[ordinal].literals[0][1])
    items = (item for item in table.read(bytes(raw)) if item.key)
    for (key, tensor, place), item in zip(_keys(layout.places), items, strict=True):
        assert item.key == key  # noqa: S101  # both are sorted
        if place is None:
            continue
        if tensor.dtype.bits and not whole_files:
            crc = checksums[tensor.extents[place]]
        else:
            # Copied with the file; or strings, whose checksum is not one of their bytes.
            crc = _recorded(last, last.index.by_name[sources[tensor.name]], place)
        at = item.offset + entries.crc_offset(item.value)
        raw[at : at + entries.CRC_BYTES] = masked(crc).to_bytes(entries.CRC_BYTES, "little")
    for start, length in table.blocks(layout.files[ordinal].literals[0][1]):
        end = start + length
        crc = masked(crc32c(memoryview(raw)[start : end + 1]))
        raw[end + 1 : end + table.TRAILER_BYTES] = crc.to_bytes(entries.CRC_BYTES, "little")
    return [Patch(ordinal, 0, bytes(raw), whole=True)]


def _recorded(last: Checkpoint, tensor: Tensor, place: int) -> int:
    """Return the checksum that `last` holds for the bytes of an extent.

    Where only its structure was kept, strings are still there to be summed again.
    """
    if last.checksums is None:
        return opaque_checksums(last, tensor)[1]
    return int(last.checksums[last.index.ordinals[tensor.extents[place]]])


# ---------------------------------------------------------------------------- the index


def _index(placed: Mapping[str, Tensor], header: Header) -> bytes:
    """Return the bytes of an index, each checksum in it the same number, to be replaced."""
    items = [(b"", entries.encode_header(header))]
    for key, tensor, place in _keys(placed):
        dtype = DTYPE_NUMBERS[tensor.dtype.name]
        if place is None:
            slices = tuple(_slice_extents(piece) for piece in tensor.slices)
            entry = entries.Entry(dtype, tensor.shape, 0, 0, 0, 0, slices)
        else:
            shape = tensor.slices[place].lengths if tensor.slices else tensor.shape
            entry = entries.Entry(dtype, shape, *tensor.extents[place], _UNKNOWN, ())
        items.append((key, entries.encode_entry(entry)))
    return table.build(items)


def _keys(placed: Mapping[str, Tensor]) -> list[tuple[bytes, Tensor, int | None]]:
    """Return the keys of an index in order, with the tensor and which of its extents each tells.

    The whole of a tensor in slices has an entry that tells none.
    """
    keys: list[tuple[bytes, Tensor, int | None]] = []
    for tensor in placed.values():
        key = _key(tensor.name)
        keys.append((key, tensor, None if tensor.slices else 0))
        for place, piece in enumerate(tensor.slices):
            keys.append((ordered.slice_key(key, _slice_extents(piece)), tensor, place))
    keys.sort(key=lambda row: row[0])
    return keys


def _slice_extents(piece: Slice) -> tuple[tuple[int, int], ...]:
    """Return the extents of a slice exactly as its key holds them."""
    return tuple(
        (start, -1 if whole else length)
        for start, length, whole in zip(piece.starts, piece.lengths, piece.whole, strict=True)
    )
