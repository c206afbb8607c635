"""The opcodes of a pickle that push a number, a string or bytes.

All numbers are little-endian except BINFLOAT's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ema_cli.formats.torch.state import State

Handler = Callable[[State], None]

# Decimal digits of longer numbers could not even be printed.
LONG_LIMIT = 1024

_u2 = struct.Struct("<H").unpack_from
_i4 = struct.Struct("<i").unpack_from
_f8 = struct.Struct(">d").unpack_from


def constant(value: Any) -> Handler:
    """Return a handler that pushes one and the same value."""

    def push(state: State) -> None:
        state.stack.append(value)

    return push


# ---------------------------------------------------------------------------- numbers


def binint(state: State) -> None:
    """Push an integer of four bytes."""
    state.stack.append(_i4(state.data, state.pos)[0])
    state.pos += 4


def binint1(state: State) -> None:
    """Push an integer from 0 to 255."""
    state.stack.append(state.data[state.pos])
    state.pos += 1


def binint2(state: State) -> None:
    """Push an integer from 0 to 65,535."""
    state.stack.append(_u2(state.data, state.pos)[0])
    state.pos += 2


def binfloat(state: State) -> None:
    """Push a number of double precision."""
    state.stack.append(_f8(state.data, state.pos)[0])
    state.pos += 8


def long(width: int) -> Handler:
    """Return a handler that pushes an integer whose length takes `width` bytes."""

    def push(state: State) -> None:
        length = state.length(width)
        if length > LONG_LIMIT:
            state.fail(f"expected an integer of at most {LONG_LIMIT:,} bytes, found {length:,}")
        state.stack.append(int.from_bytes(state.take(length), "little", signed=True))

    return push


# ---------------------------------------------------------------------------- strings, bytes


def unicode(width: int) -> Handler:
    """Return a handler that pushes a string whose length takes `width` bytes."""

    def push(state: State) -> None:
        raw = state.take(state.length(width))
        try:
            state.stack.append(raw.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            state.fail("expected a string in UTF-8, found other bytes")

    return push


def string(width: int) -> Handler:
    """Return a handler that pushes a string of Python 2, which may hold text or bytes."""

    def push(state: State) -> None:
        raw = state.take(state.length(width))
        try:
            state.stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            state.stack.append(raw.decode("latin-1"))

    return push


def binbytes(width: int) -> Handler:
    """Return a handler that pushes bytes whose length takes `width` bytes."""

    def push(state: State) -> None:
        state.stack.append(state.take(state.length(width)))

    return push


def binbytearray(state: State) -> None:
    """Push bytes that can be changed."""
    state.stack.append(bytearray(state.take(state.length(8))))
