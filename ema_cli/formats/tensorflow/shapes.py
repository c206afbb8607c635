"""Shapes and slices as TensorFlow's messages hold them.

::

    TensorShapeProto  2 dim (repeated) {1 size  2 name}  3 unknown_rank
    TensorSliceProto  1 extent (repeated) {1 start  2 length}

Fields that are zero are left out, except the length of an extent; an extent without a length is
the whole dimension. Source: tensor_shape.proto and tensor_slice.proto of TensorFlow.
"""

from __future__ import annotations

from collections.abc import Sequence

from ema_cli.formats.tensorflow import wire
from ema_cli.formats.tensorflow.ordered import EVERYTHING, Range
from ema_cli.formats.tensorflow.wire import Field, Malformed, put_bytes, put_number, put_varint

# NumPy 1 holds no more than 32 dimensions.
DIMENSION_LIMIT = 32


# ---------------------------------------------------------------------------- reading


def parse_shape(value: memoryview) -> tuple[int, ...]:
    """Return the dimensions in a TensorShapeProto."""
    shape = []
    for field in wire.fields(value):
        if field[0] == 2:
            shape.append(_dimension(wire.message(field)))
        elif field[0] == 3 and wire.unsigned(field):
            raise Malformed("a tensor of unknown rank")
        if len(shape) > DIMENSION_LIMIT:
            raise Malformed(f"expected at most {DIMENSION_LIMIT} dimensions, found more")
    return tuple(shape)


def _dimension(value: memoryview) -> int:
    size = 0
    for field in wire.fields(value):
        if field[0] == 1:
            size = natural(field)
        elif field[0] == 2:
            wire.message(field)
    return size


def parse_slice(value: memoryview) -> tuple[Range, ...]:
    """Return (start, length) of each dimension in a TensorSliceProto; length -1 is all of it."""
    return tuple(_extent(wire.message(field)) for field in wire.fields(value) if field[0] == 1)


def _extent(value: memoryview) -> Range:
    start, length = EVERYTHING
    for field in wire.fields(value):
        if field[0] == 1:
            start = natural(field)
        elif field[0] == 2:
            length = natural(field)
    if length < 0 < start:
        raise Malformed(f"a slice begins at {start:,}, but has no length")
    return start, length


def natural(field: Field) -> int:
    """Return an int32 or int64 field that cannot be negative."""
    value = wire.signed(field)
    if value < 0:
        raise Malformed(f"field {field[0]} holds {value:,}, expected no negative number")
    return value


# ---------------------------------------------------------------------------- writing


def encode_shape(shape: Sequence[int]) -> bytes:
    """Return the TensorShapeProto as TensorFlow writes it."""
    return b"".join(put_bytes(2, put_number(1, size)) for size in shape)


def encode_slice(extents: Sequence[Range]) -> bytes:
    """Return the TensorSliceProto as TensorFlow writes it."""
    return b"".join(put_bytes(1, _encode_extent(start, length)) for start, length in extents)


def _encode_extent(start: int, length: int) -> bytes:
    if (start, length) == EVERYTHING:
        return b""
    # The length is part of a oneof: it is written even when it is zero.
    return put_number(1, start) + bytes([2 << 3 | wire.VARINT]) + put_varint(length)
