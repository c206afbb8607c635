"""Snappy's raw block format, reading only: some tables are written with compressed blocks.

A block is ``varint32 length`` and elements. The low two bits of an element's first byte say what
it is: 0 a literal (length - 1 in the high six bits, 60 to 63 meaning 1 to 4 bytes that hold it),
1 to 3 a copy of earlier output, with an offset of 11, 16 or 32 bits. Source: format_description
of github.com/google/snappy.
"""

from __future__ import annotations

from ema_cli.formats.tensorflow.wire import Malformed, varint

# TensorFlow closes a block of its tables after 256 KiB.
LIMIT = 64 << 20


def decompress(data: bytes | memoryview, limit: int = LIMIT) -> bytes:
    """Return the content of a block that holds at most `limit` bytes.

    Memory grows with what was decompressed, never with what the block claims.
    """
    data = bytes(data)
    length, at = varint(data, 0, 5)
    if length > limit:
        raise Malformed(f"a compressed block claims {length:,} bytes, expected at most {limit:,}")
    out = bytearray()
    while at < len(data):
        element = _copy if data[at] & 3 else _literal
        at = element(data, at, length, out)
    if len(out) != length:
        raise Malformed(f"a compressed block claims {length:,} bytes, but holds {len(out):,}")
    return bytes(out)


def _literal(data: bytes, at: int, length: int, out: bytearray) -> int:
    """Append a literal to `out`; return the position after it."""
    count = data[at] >> 2
    at += 1
    if count >= 60:
        width = count - 59
        count = _number(data, at, width)
        at += width
    end = at + count + 1
    if end > len(data):
        raise Malformed(f"a literal needs {count + 1:,} bytes, {len(data) - at:,} follow")
    _check_room(length, len(out) + count + 1)
    out += data[at:end]
    return end


def _copy(data: bytes, at: int, length: int, out: bytearray) -> int:
    """Append a copy of earlier output to `out`; return the position after the element."""
    tag = data[at]
    if tag & 3 == 1:
        width, count = 1, (tag >> 2 & 7) + 4
        offset = tag >> 5 << 8 | _number(data, at + 1, 1)
    else:
        width, count = 2 if tag & 3 == 2 else 4, (tag >> 2) + 1
        offset = _number(data, at + 1, width)
    if not 0 < offset <= len(out):
        raise Malformed(f"a copy begins {offset:,} bytes back, only {len(out):,} stand before it")
    _check_room(length, len(out) + count)
    # A copy may reach into what it writes: its pattern then repeats.
    pattern = bytes(out[-offset:][:count])
    out += (pattern * (count // len(pattern) + 1))[:count]
    return at + 1 + width


def _number(data: bytes, at: int, width: int) -> int:
    if at + width > len(data):
        raise Malformed("a compressed block ends inside an element")
    return int.from_bytes(data[at : at + width], "little")


def _check_room(length: int, needed: int) -> None:
    if needed > length:
        raise Malformed(f"a compressed block claims {length:,} bytes, but holds more")
