"""Protocol buffer messages as far as checkpoints use them: fields, checked one by one.

A message is ``tag value`` pairs, ``tag = varint(number << 3 | wire type)``. Wire types: 0 varint,
1 eight bytes, 2 ``varint length, bytes``, 5 four bytes. Source: the encoding page of
protobuf.dev. Nothing here trusts a length, and a field with another wire type than its message
declares is an error of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ema_cli.errors import DamagedFile

VARINT = 0
FIXED64 = 1
BYTES = 2
FIXED32 = 5

_LARGEST_NUMBER = (1 << 29) - 1
_SHORT = [bytes([value]) for value in range(0x80)]

Field = tuple[int, int, int | memoryview]


class Malformed(ValueError):
    """Bytes that are no message, table or entry; the text says what was expected and found."""


@contextmanager
def damaged(path: str, tensor: str | None = None) -> Iterator[None]:
    """Turn `Malformed` raised inside into a `DamagedFile` that names `path`."""
    try:
        yield
    except Malformed as error:
        raise DamagedFile(path, str(error), tensor) from None


# ---------------------------------------------------------------------------- reading


def varint(data: bytes | memoryview, at: int, longest: int = 10) -> tuple[int, int]:
    """Return the number at `at`, of at most `longest` bytes, and the position after it."""
    value = shift = 0
    for position in range(at, min(at + longest, len(data))):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise Malformed("a varint holds more than 64 bits")
            return value, position + 1
        shift += 7
    kind = "runs past the end" if at + longest > len(data) else f"is longer than {longest} bytes"
    raise Malformed(f"a varint at byte {at} {kind}")


def fields(data: bytes | memoryview) -> Iterator[Field]:
    """Yield (number, wire type, value) of each field; bytes are views into `data`."""
    view = memoryview(data)
    at, end = 0, len(view)
    while at < end:
        tag, at = varint(view, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number <= _LARGEST_NUMBER:
            raise Malformed(f"a field has number {number}")
        value: int | memoryview
        if kind == VARINT:
            value, at = varint(view, at)
        elif kind == BYTES:
            length, at = varint(view, at)
            value = view[at : at + length]
            if len(value) < length:
                raise Malformed(f"field {number} needs {length:,} bytes, {len(value):,} follow")
            at += length
        elif kind in (FIXED32, FIXED64):
            width = 4 if kind == FIXED32 else 8
            if at + width > end:
                raise Malformed(f"field {number} needs {width} bytes, {end - at} follow")
            value = int.from_bytes(view[at : at + width], "little")
            at += width
        else:
            raise Malformed(f"field {number} has wire type {kind}")
        yield number, kind, value


def unsigned(field: Field) -> int:
    """Return the value of a varint field as it stands."""
    return _number(field, VARINT)


def signed(field: Field) -> int:
    """Return an int32 or int64 field: two's complement in 64 bits."""
    value = _number(field, VARINT)
    return value - (1 << 64) if value >> 63 else value


def fixed32(field: Field) -> int:
    """Return a fixed32 field."""
    return _number(field, FIXED32)


def message(field: Field) -> memoryview:
    """Return the bytes of a string, bytes or message field."""
    number, kind, value = field
    if kind != BYTES or isinstance(value, int):
        raise Malformed(f"field {number} has wire type {kind}, expected {BYTES}")
    return value


def text(field: Field) -> str:
    """Return a string field; bytes that are not UTF-8 become lone surrogates."""
    return bytes(message(field)).decode("utf-8", "surrogateescape")


def _number(field: Field, expected: int) -> int:
    number, kind, value = field
    if kind != expected or not isinstance(value, int):
        raise Malformed(f"field {number} has wire type {kind}, expected {expected}")
    return value


# ---------------------------------------------------------------------------- writing


def put_varint(value: int) -> bytes:
    """Return `value` as a varint; negative numbers as 64 bit two's complement."""
    if 0 <= value < 0x80:
        return _SHORT[value]
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def put_number(number: int, value: int) -> bytes:
    """Return a varint field, or nothing for zero, which proto3 leaves out."""
    return put_varint(number << 3 | VARINT) + put_varint(value) if value else b""


def put_fixed32(number: int, value: int) -> bytes:
    """Return a fixed32 field, or nothing for zero."""
    if not value:
        return b""
    return put_varint(number << 3 | FIXED32) + value.to_bytes(4, "little")


def put_bytes(number: int, value: bytes) -> bytes:
    """Return a length-delimited field; an empty one is written too."""
    return put_varint(number << 3 | BYTES) + put_varint(len(value)) + value
