"""The messages in a TensorFlow index: the header under the empty key, then one for each tensor.

::

    BundleHeaderProto  1 num_shards  2 endianness (0 little, 1 big)  3 version
    VersionDef         1 producer  2 min_consumer  3 bad_consumers (repeated)
    BundleEntryProto   1 dtype  2 shape  3 shard_id  4 offset  5 size  6 crc32c (fixed32)
                       7 slices (repeated)

Fields that are zero are left out, except the shape. An entry with slices describes a tensor whose
parts have entries of their own: only its dtype and shape mean something. Source:
tensor_bundle.proto and versions.proto of TensorFlow.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from ema_cli.formats.tensorflow import wire
from ema_cli.formats.tensorflow.ordered import Range
from ema_cli.formats.tensorflow.shapes import (
    encode_shape,
    encode_slice,
    natural,
    parse_shape,
    parse_slice,
)
from ema_cli.formats.tensorflow.wire import (
    Field,
    Malformed,
    put_bytes,
    put_fixed32,
    put_number,
)

SHARD_LIMIT = 100_000
# A masked CRC-32C.
CRC_BYTES = 4

# The version of the format, which readers that ask for more than it are too new for.
_VERSION = 1

# The numbers of DataType in types.proto. Left out are 20, a resource, which lives in memory only,
# and references (number + 100), which are never stored. Types of less than 8 bits take a byte per
# value.
DTYPE_NAMES: Mapping[int, str] = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    7: "string",
    8: "complex64",
    9: "int64",
    10: "bool",
    11: "qint8",
    12: "quint8",
    13: "qint32",
    14: "bfloat16",
    15: "qint16",
    16: "quint16",
    17: "uint16",
    18: "complex128",
    19: "float16",
    21: "variant",
    22: "uint32",
    23: "uint64",
    24: "float8_e5m2",
    25: "float8_e4m3fn",
    26: "float8_e4m3fnuz",
    27: "float8_e4m3b11fnuz",
    28: "float8_e5m2fnuz",
    29: "int4",
    30: "uint4",
    31: "int2",
    32: "uint2",
    33: "float4_e2m1fn_byte",
}
DTYPE_NUMBERS: Mapping[str, int] = {name: number for number, name in DTYPE_NAMES.items()}


class Header(NamedTuple):
    """What holds for a whole checkpoint.

    Attributes:
        shards: the number of its data files.
        big_endian: whether it was written on a machine with big-endian numbers.
    """

    shards: int
    big_endian: bool


class Entry(NamedTuple):
    """Where one tensor or slice lies.

    Attributes:
        dtype: a key of `DTYPE_NAMES`, or a number that is not known.
        shape: its dimensions.
        shard: the number of the data file.
        offset: of the first byte in that file.
        size: in bytes.
        crc: the masked CRC-32C, as stored; 0 when there is none.
        slices: for a tensor that is stored in slices, (start, length) in each dimension of each;
            length -1 is the whole dimension.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc: int = 0
    slices: tuple[tuple[Range, ...], ...] = ()


# ---------------------------------------------------------------------------- header


def parse_header(value: bytes | memoryview) -> Header:
    """Return the header of a checkpoint that this version of the format can read."""
    shards = endianness = 0
    for field in wire.fields(value):
        if field[0] == 1:
            shards = wire.signed(field)
        elif field[0] == 2:
            endianness = wire.signed(field)
        elif field[0] == 3:
            _check_version(wire.message(field))
    if not 0 < shards <= SHARD_LIMIT:
        raise Malformed(f"expected 1 to {SHARD_LIMIT:,} data files, found {shards:,}")
    if endianness not in (0, 1):
        raise Malformed(f"expected byte order 0 or 1, found {endianness}")
    return Header(shards, endianness == 1)


def encode_header(header: Header) -> bytes:
    """Return the header as TensorFlow writes it."""
    order = put_number(2, int(header.big_endian))
    return put_number(1, header.shards) + order + put_bytes(3, put_number(1, _VERSION))


def _check_version(version: memoryview) -> None:
    for field in wire.fields(version):
        refused = False
        if field[0] == 2:
            refused = wire.signed(field) > _VERSION
        elif field[0] == 3:
            refused = _VERSION in _numbers(field)
        if refused:
            raise Malformed(f"written by a newer TensorFlow: version {_VERSION} cannot read it")


def _numbers(field: Field) -> list[int]:
    """Return the numbers in a repeated field, which are packed or stand alone."""
    if field[1] != wire.BYTES:
        return [wire.signed(field)]
    packed = wire.message(field)
    numbers, at = [], 0
    while at < len(packed):
        number, at = wire.varint(packed, at)
        numbers.append(number)
    return numbers


# ---------------------------------------------------------------------------- reading entries

_DTYPE_TAG, _SHAPE_TAG, _CRC_TAG = 0x08, 0x12, 0x35
_VARINT = rb"([\x80-\xff]{0,8}[\x00-\x7f])"
# What follows the shape in an entry as writers order it: shard, offset, size, crc.
_TAIL = re.compile(
    rb"(?:\x18%b)?(?:\x20%b)?(?:\x28%b)?(?:\x35(.{4}))?\Z" % (_VARINT, _VARINT, _VARINT), re.DOTALL
)


def parse_entry(value: bytes) -> Entry:
    """Return the checked entry: nothing is negative, slices have the dimensions of the tensor.

    Of a number that stands more than once the last counts; the shape must not.
    """
    plain = _plain(value)
    if plain is None:
        return _parse_entry(value)
    head, tail = plain
    shard, offset, size, crc = tail.groups()
    return Entry(
        head.dtype,
        head.shape,
        _number(shard) if shard else 0,
        _number(offset) if offset else 0,
        _number(size) if size else 0,
        int.from_bytes(crc, "little") if crc else 0,
    )


def crc_offset(value: bytes) -> int:
    """Return where the four bytes of the checksum are in an entry, or -1 when it has none."""
    plain = _plain(value)
    if plain is not None:
        return plain[1].start(4)
    found, at = -1, 0
    while at < len(value):
        tag, at = wire.varint(value, at)
        if tag == _CRC_TAG:
            found = at
        at = _after(value, at, tag & 7)
    return found


def _plain(value: bytes) -> tuple[Entry, re.Match[bytes]] | None:
    """Return the dtype and shape of an entry as writers order it, and the match of the rest.

    None for any other entry, which is then read field by field. This is several times as fast,
    and an index may hold 100,000 entries, most of them with one of a few shapes.
    """
    if len(value) < 4 or value[0] != _DTYPE_TAG or value[2] != _SHAPE_TAG:
        return None
    if value[1] | value[3] > 0x7F:
        return None
    at = 4 + value[3]
    tail = _TAIL.match(value, at)
    return None if tail is None else (_head(value[:at]), tail)


def _number(code: bytes) -> int:
    """Return the number that is a varint of at most nine bytes."""
    value = 0
    for byte in reversed(code):
        value = value << 7 | byte & 0x7F
    return value


def _after(value: bytes, at: int, kind: int) -> int:
    """Return where the field ends whose value begins at `at`."""
    if kind == wire.VARINT:
        return wire.varint(value, at)[1]
    length = {wire.FIXED32: 4, wire.FIXED64: 8}.get(kind)
    if kind == wire.BYTES:
        length, at = wire.varint(value, at)
    if length is None or at + length > len(value):
        raise Malformed(f"a field of wire type {kind} does not end in its entry")
    return at + length


def _parse_entry(value: bytes) -> Entry:
    numbers = {1: 0, 3: 0, 4: 0, 5: 0}
    crc = 0
    shape: tuple[int, ...] | None = None
    slices: list[tuple[Range, ...]] = []
    for field in wire.fields(value):
        if field[0] in numbers:
            numbers[field[0]] = natural(field)
        elif field[0] == 2:
            if shape is not None:
                raise Malformed("expected one shape, found two")
            shape = parse_shape(wire.message(field))
        elif field[0] == 6:
            crc = wire.fixed32(field)
        elif field[0] == 7:
            slices.append(parse_slice(wire.message(field)))
    shape = shape or ()
    for extents in slices:
        if len(extents) != len(shape):
            raise Malformed(f"expected slices of {len(shape)} dimensions, found {len(extents)}")
    return Entry(numbers[1], shape, numbers[3], numbers[4], numbers[5], crc, tuple(slices))


_head = functools.lru_cache(maxsize=4096)(_parse_entry)


# ---------------------------------------------------------------------------- writing entries


def encode_entry(entry: Entry) -> bytes:
    """Return the entry as TensorFlow writes it: one with slices has dtype, shape and slices."""
    head = _encoded_head(entry.dtype, entry.shape)
    if entry.slices:
        return head + b"".join(put_bytes(7, encode_slice(extents)) for extents in entry.slices)
    return (
        head
        + put_number(3, entry.shard)
        + put_number(4, entry.offset)
        + put_number(5, entry.size)
        + put_fixed32(6, entry.crc)
    )


@functools.lru_cache(maxsize=4096)
def _encoded_head(dtype: int, shape: tuple[int, ...]) -> bytes:
    return put_number(1, dtype) + put_bytes(2, encode_shape(shape))
