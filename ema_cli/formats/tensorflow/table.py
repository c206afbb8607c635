"""The table that TensorFlow's ``.index`` files are: sorted keys with values, after LevelDB.

Layout: data blocks, a metaindex block, an index block, then a footer of 48 bytes. A block is
followed by ``u8 type`` (0 stored, 1 snappy) and ``u32le`` masked CRC-32C of block and type; its
handle is ``varint64 offset, varint64 size`` without these five bytes. The index block maps a
separator (at least the last key of a block, less than the first of the next) to the block's
handle. The footer holds the handles of metaindex and index, zeros, and the magic number. Source:
table_format.md of LevelDB; format.h and table_builder.cc of TensorFlow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ema_cli.checksums import crc32c, masked
from ema_cli.formats.tensorflow.block import INTERVAL, Block, Item, shared_bytes, walk
from ema_cli.formats.tensorflow.snappy import decompress
from ema_cli.formats.tensorflow.wire import Malformed, put_varint, varint

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER_BYTES = 48

TRAILER_BYTES = 5
_STORED, _SNAPPY = 0, 1

# TensorFlow's writer closes a block of this size, and before an entry of twice that.
_BLOCK_BYTES = 256 << 10

Data = bytes | bytearray | memoryview
Extent = tuple[int, int]


# ---------------------------------------------------------------------------- reading


def read(data: Data) -> Iterator[Item]:
    """Yield the items of a table, in order of their keys, which differ.

    All checksums are verified before the first item; everything else as the items come.
    """
    view = memoryview(data)
    separators, found = _layout(view)
    floor: bytes | None = None
    for separator, (offset, size) in zip(separators, found, strict=False):
        block, stored = _content(view, offset, size)
        if stored:
            yield from walk(block, offset, floor, separator)
        else:
            for item in walk(block, offset, floor, separator):
                yield item._replace(offset=-1)
        floor = separator


def blocks(data: Data) -> list[Extent]:
    """Return (offset, size) of each block with its checksum verified, in the order they lie.

    The type byte and the checksum follow each block and are not counted.
    """
    return _layout(memoryview(data))[1]


def _verify(view: memoryview, offset: int, size: int) -> None:
    """Check the checksum of the block at `offset`, whose trailer is known to be in the file."""
    end = offset + size + 1
    found = masked(crc32c(view[offset:end]))
    stored = int.from_bytes(view[end : end + 4], "little")
    if found != stored:
        raise Malformed(
            f"the block at byte {offset:,} has checksum {found:08x}, stored is {stored:08x}"
        )


def _layout(view: memoryview) -> tuple[list[bytes], list[Extent]]:
    """Return the separator of each data block, and the extents of data, metaindex and index."""
    if len(view) < FOOTER_BYTES:
        raise Malformed(f"expected at least {FOOTER_BYTES} bytes, found {len(view)}")
    footer = bytes(view[-FOOTER_BYTES:])
    if not footer.endswith(MAGIC):
        raise Malformed(f"expected the magic number {MAGIC.hex()} at the end, found another")
    metaindex, at = _handle(footer, 0)
    index, at = _handle(footer, at)
    if footer[at : -len(MAGIC)].strip(b"\0"):
        raise Malformed("the footer holds more than two handles")
    _check_order([metaindex, index], len(view))
    _verify(view, *index)
    separators, found = [], []
    content, _ = _content(view, *index)
    for separator, value, _ in walk(content, index[0], None, None):
        handle, end = _handle(value, 0)
        if end != len(value):
            raise Malformed(f"a handle of {len(value)} bytes ends after {end}")
        separators.append(separator)
        found.append(handle)
    _check_order([*found, metaindex, index], len(view))
    for extent in (*found, metaindex):
        _verify(view, *extent)
    return separators, [*found, metaindex, index]


def _handle(data: bytes, at: int) -> tuple[Extent, int]:
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def _check_order(found: list[Extent], file_size: int) -> None:
    """Check that blocks follow one another and end before the footer: none is read twice."""
    free = 0
    for offset, size in found:
        if offset < free:
            raise Malformed(f"the block at byte {offset:,} begins before byte {free:,}")
        free = offset + size + TRAILER_BYTES
    if free > file_size - FOOTER_BYTES:
        raise Malformed(
            f"a block ends at byte {free:,}, the footer begins at {file_size - FOOTER_BYTES:,}"
        )


def _content(view: memoryview, offset: int, size: int) -> tuple[bytes, bool]:
    """Return the content of a block, and whether it was stored as it is."""
    kind = view[offset + size]
    content = view[offset : offset + size]
    if kind == _STORED:
        return bytes(content), True
    if kind == _SNAPPY:
        return decompress(content), False
    raise Malformed(f"the block at byte {offset:,} has the unknown compression {kind}")


# ---------------------------------------------------------------------------- writing


def build(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the table of these (key, value) pairs as TensorFlow writes it, byte for byte.

    Keys must increase; a `ValueError` says that they do not.
    """
    out = bytearray()
    index = Block(1)
    block = Block(INTERVAL)
    last: bytes | None = None
    pending: bytes | None = None  # the handle of a block whose separator is not yet known
    for key, value in items:
        if last is not None and key <= last:
            raise ValueError("the keys of a table must increase")
        if block and len(key) + len(value) >= 2 * _BLOCK_BYTES:
            pending = _append(out, block)
            block = Block(INTERVAL)
        if pending is not None and last is not None:
            index.add(_separator(last, key), pending)
            pending = None
        block.add(key, value)
        last = key
        if block.size >= _BLOCK_BYTES:
            pending = _append(out, block)
            block = Block(INTERVAL)
    if block:
        pending = _append(out, block)
    if pending is not None and last is not None:
        index.add(_successor(last), pending)
    handles = _append(out, Block(INTERVAL)) + _append(out, index)
    return bytes(out) + handles.ljust(FOOTER_BYTES - len(MAGIC), b"\0") + MAGIC


def _append(out: bytearray, block: Block) -> bytes:
    """Append the finished block to `out` and return its handle."""
    handle = put_varint(len(out)) + put_varint(block.size)
    content = block.finish() + bytes([_STORED])
    out += content + masked(crc32c(content)).to_bytes(4, "little")
    return handle


def _separator(last: bytes, following: bytes) -> bytes:
    """Return a short key from `last` on and below `following`."""
    at = shared_bytes(last, following)
    if at < len(last) and last[at] + 1 < following[at]:
        return last[:at] + bytes([last[at] + 1])
    return last


def _successor(last: bytes) -> bytes:
    """Return a short key from `last` on."""
    for at, byte in enumerate(last):
        if byte != 0xFF:
            return last[:at] + bytes([byte + 1])
    return last
