"""Tensors whose elements have lengths: strings, and variants (lists of tensors, say).

Strings: the ``varint64`` length of each, ``u32`` masked CRC-32C of the lengths, then the bytes of
all strings. That CRC runs over each length as u32, or as u64 when it is 2^32 or more, not over
the varints. The CRC of the entry continues it over the four bytes of the checksum and all strings.

Variants: for each element ``varint64 length, bytes, u32`` masked CRC. One CRC runs through all
elements: over the length as u64, the bytes, and the four bytes of the checksum, which is what the
CRC was just before it. The entry's is its last value.

Numbers are in the byte order of the writing machine. Source: WriteStringTensor and
WriteVariantTensor in tensor_bundle.cc of TensorFlow.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from ema_cli.checksums import crc32c, masked
from ema_cli.formats.tensorflow.wire import Malformed

# Of a tensor no more than one piece is in memory, with the lengths it holds.
PIECE_BYTES = 256 << 10

_CHECKSUM_BYTES = 4
_LARGEST_U32 = (1 << 32) - 1

Read = Callable[[int, int], bytes]


def string_checksums(
    read: Read, size: int, elements: int, *, big_endian: bool = False
) -> tuple[int, int]:
    """Return the CRC-32C of a string tensor's bytes as they lie, and the one of its entry.

    Args:
        read: returns `count` bytes of the tensor from `offset` on, at most `PIECE_BYTES`.
        size: of the tensor, in bytes.
        elements: how many strings it holds.
        big_endian: the byte order of the machine that wrote it.
    """
    if size == elements == 0:
        return 0, 0
    _check_size(size, elements, elements + _CHECKSUM_BYTES)
    stream = _Stream(read, size)
    crc = total = 0
    for lengths in _lengths(stream, elements):
        total += sum(lengths)
        if total > size:
            raise _wrong_total(total, stream.left)
        crc = crc32c(_as_numbers(lengths, big_endian), crc)
    crc = _checksum(stream, crc, big_endian)
    if total != stream.left:
        raise _wrong_total(total, stream.left)
    for piece in stream.take(total):
        crc = crc32c(piece, crc)
    return stream.crc, crc


def variant_checksums(
    read: Read, size: int, elements: int, *, big_endian: bool = False
) -> tuple[int, int]:
    """Return the same as `string_checksums` for a tensor of variants."""
    _check_size(size, elements, elements * (1 + _CHECKSUM_BYTES))
    stream = _Stream(read, size)
    crc = 0
    for _ in range(elements):
        length = sum(map(sum, _lengths(stream, 1)))
        if length > stream.left - _CHECKSUM_BYTES:
            raise Malformed(f"a variant claims {length:,} bytes, {stream.left:,} follow")
        crc = crc32c(struct.pack(">Q" if big_endian else "<Q", length), crc)
        for piece in stream.take(length):
            crc = crc32c(piece, crc)
        crc = _checksum(stream, crc, big_endian)
    if stream.left:
        raise Malformed(f"{stream.left:,} bytes follow the last variant")
    return stream.crc, crc


def decode(data: bytes, elements: int) -> list[bytes]:
    """Return the strings of a tensor that is small enough to hold.

    Their lengths fill it, but whether the checksums match is for `string_checksums` to say.
    """
    if not data and not elements:
        return []
    _check_size(len(data), elements, elements + _CHECKSUM_BYTES)
    stream = _Stream(lambda offset, count: data[offset : offset + count], len(data))
    lengths = [length for found in _lengths(stream, elements) for length in found]
    if sum(lengths) != stream.left - _CHECKSUM_BYTES:
        raise _wrong_total(sum(lengths), stream.left - _CHECKSUM_BYTES)
    strings = []
    at = len(data) - sum(lengths)
    for length in lengths:
        strings.append(data[at : at + length])
        at += length
    return strings


class _Stream:
    """The bytes of a tensor in their order, piece by piece.

    Attributes:
        crc: the CRC-32C of what has been read from the file.
        left: how many bytes have not been taken.
    """

    def __init__(self, read: Read, size: int) -> None:
        self.crc = 0
        self.left = size
        self._read = read
        self._at = 0  # in the file
        self._size = size
        self._rest = memoryview(b"")  # read, but not taken

    def peek(self) -> memoryview:
        """Return the next bytes, at least one and at most a piece, without taking them."""
        if not self._rest:
            count = min(PIECE_BYTES, self._size - self._at)
            piece = self._read(self._at, count) if count else b""
            if len(piece) != count or not count:
                raise Malformed(f"the tensor ends after {self._at + len(piece):,} bytes")
            self.crc = crc32c(piece, self.crc)
            self._at += count
            self._rest = memoryview(piece)
        return self._rest

    def skip(self, count: int) -> None:
        """Take this many of the bytes that `peek` returned."""
        self._rest = self._rest[count:]
        self.left -= count

    def take(self, count: int) -> Iterator[memoryview]:
        """Take this many bytes; yield them in pieces."""
        while count:
            piece = self.peek()[:count]
            self.skip(len(piece))
            count -= len(piece)
            yield piece


def _lengths(stream: _Stream, elements: int) -> Iterator[list[int]]:
    """Take this many varints; yield them in lists, one for each piece."""
    value = shift = 0
    while elements:
        found: list[int] = []
        piece = stream.peek()
        taken = len(piece)
        for at, byte in enumerate(piece, 1):
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                found.append(value)
                value = shift = 0
                if len(found) == elements:
                    taken = at
                    break
            elif shift == 70:
                raise Malformed("the length of an element is longer than 10 bytes")
        stream.skip(taken)
        elements -= len(found)
        yield found


def _as_numbers(lengths: list[int], big_endian: bool) -> bytes:
    """Return the lengths as they enter the checksum."""
    order = ">" if big_endian else "<"
    if max(lengths, default=0) <= _LARGEST_U32:
        return struct.pack(f"{order}{len(lengths)}I", *lengths)
    return b"".join(struct.pack(order + ("Q" if n > _LARGEST_U32 else "I"), n) for n in lengths)


def _checksum(stream: _Stream, crc: int, big_endian: bool) -> int:
    """Take a checksum, which must be that of what came before; return the CRC after it."""
    stored = b"".join(stream.take(_CHECKSUM_BYTES))
    expected = masked(crc).to_bytes(_CHECKSUM_BYTES, "big" if big_endian else "little")
    if stored != expected:
        raise Malformed(
            f"expected the checksum {expected.hex()} in the tensor, found {stored.hex()}"
        )
    return crc32c(stored, crc)


def _check_size(size: int, elements: int, needed: int) -> None:
    if needed > size:
        raise Malformed(f"{elements:,} elements need {needed:,} bytes or more, found {size:,}")


def _wrong_total(total: int, left: int) -> Malformed:
    return Malformed(f"the strings claim {total:,} bytes, {left:,} follow their lengths")
