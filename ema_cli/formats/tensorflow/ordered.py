r"""Keys of slices: numbers and names coded so that the order of the bytes is their own order.

The part of a tensor that a slice holds is stored under the key ``unsigned(0) string(name)
unsigned(rank)`` and for each dimension ``signed(start) signed(length)``; a whole dimension is
start 0, length -1.

* unsigned: ``u8 n`` and n big-endian bytes without leading zeros.
* string: the bytes, with ``00`` as ``00 ff`` and ``ff`` as ``ff 00``, ended by ``00 01``.
* signed: n bytes in two's complement, of which the top n bits are inverted. They hold -2^(7n-1)
  to 2^(7n-1) - 1, so the first bits tell n: n ones and a zero, or for negative numbers the reverse.

Source: ordered_code.cc and saved_tensor_slice_util.cc of TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Range = tuple[int, int]

# A whole dimension.
EVERYTHING: Range = (0, -1)

_END = b"\0\1"
_STRING = re.compile(rb"((?:[^\x00\xff]++|\x00\xff|\xff\x00)*+)\x00\x01")
_PAIR = re.compile(rb"\x00\xff|\xff\x00")
_LONGEST = 10  # bytes of a signed number of 64 bits


def slice_key(name: bytes, extents: Sequence[Range]) -> bytes:
    """Return the key of the slice of tensor `name` with (start, length) in each dimension."""
    numbers = b"".join(_signed(start) + _signed(length) for start, length in extents)
    return b"\0" + _string(name) + _unsigned(len(extents)) + numbers


def parse_slice_key(key: bytes) -> tuple[bytes, tuple[Range, ...]] | None:
    """Return the name and extents of which `key` is the slice key, or None if there are none."""
    if not key.startswith(b"\0"):
        return None
    found = _STRING.match(key, 1)
    if found is None:
        return None
    name = _PAIR.sub(lambda pair: pair[0][:1], found[1])
    at = found.end() + 1
    width = int.from_bytes(key[at - 1 : at], "big")
    rank = int.from_bytes(key[at : at + width], "big")
    numbers = _all_signed(key, at + width)
    if numbers is None or len(numbers) != 2 * rank:
        return None
    extents = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    for extent in extents:
        if extent != EVERYTHING and not 0 <= min(extent) <= max(extent) < 1 << 63:
            return None
    # Numbers and names can be coded in other ways, which no writer uses.
    return (name, extents) if slice_key(name, extents) == key else None


def _string(name: bytes) -> bytes:
    parts = (part.replace(b"\xff", b"\xff\0") for part in name.split(b"\0"))
    return b"\0\xff".join(parts) + _END


def _unsigned(value: int) -> bytes:
    length = (value.bit_length() + 7) // 8
    return bytes([length]) + value.to_bytes(length, "big")


def _signed(value: int) -> bytes:
    length = (~value if value < 0 else value).bit_length() // 7 + 1
    return (value % (1 << 8 * length) ^ _top(length)).to_bytes(length, "big")


def _top(length: int) -> int:
    """Return the bits that are inverted in a signed number of this many bytes."""
    return (1 << length) - 1 << 7 * length


def _all_signed(key: bytes, at: int) -> list[int] | None:
    """Return the signed numbers that fill the rest of the key, or None if they do not."""
    numbers = []
    while at < len(key):
        head = int.from_bytes(key[at : at + 2].ljust(2, b"\0"), "big")
        negative = head < 0x8000
        # The leading ones of a number that is not negative, the leading zeros of one that is.
        length = 16 - (head if negative else head ^ 0xFFFF).bit_length()
        code = key[at : at + length]
        if length > _LONGEST or len(code) < length:
            return None
        value = int.from_bytes(code, "big") ^ _top(length)
        numbers.append(value - (1 << 8 * length) if negative else value)
        at += length
    return numbers
