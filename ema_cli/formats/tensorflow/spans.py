"""Protocol buffer messages too large to be loaded: walked field by field, contents left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ema_cli.formats.tensorflow import wire
from ema_cli.formats.tensorflow.wire import Malformed

# Fields walked in one file: the object graph of a SavedModel has about ten for each of its nodes.
FIELD_LIMIT = 1 << 22

# A tag and a number or length: 10 bytes each.
_HEADER = 20
_WINDOW = 1 << 16

# Called with an offset and a count, returns exactly that many bytes.
Read = Callable[[int, int], bytes]


class Span(NamedTuple):
    """A field in the file: bytes `start` to `end` of a message, or a number in `value`."""

    number: int
    kind: int
    start: int
    end: int
    value: int = 0


class Walker:
    """Walks messages that are too large to be loaded, through a small window."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._window = b""
        self._from = 0
        self._fields = 0
        self.whole = Span(0, wire.BYTES, 0, size)

    def fields(self, message: Span) -> Iterator[Span]:
        """Yield the fields of `message`, whose bytes are not looked at."""
        at = message.start
        while at < message.end:
            self._fields += 1
            if self._fields > FIELD_LIMIT:
                raise Malformed(f"expected at most {FIELD_LIMIT:,} fields, found more")
            span = self._field(at, message.end)
            yield span
            at = span.end

    def messages(self, message: Span, number: int) -> Iterator[Span]:
        """Yield the messages in field `number` of `message`."""
        for span in self.fields(message):
            if span.number == number:
                yield delimited(span)

    def fetch(self, span: Span, limit: int) -> bytes:
        """Return the bytes of `span`, of which there must be no more than `limit`."""
        length = span.end - span.start
        if length > limit:
            raise Malformed(
                f"expected at most {limit:,} bytes in field {span.number}, found {length:,}"
            )
        return self._bytes(span.start, length)

    def _field(self, at: int, end: int) -> Span:
        """Return the field at `at`; raises `Malformed` when it does not end before `end`."""
        header = self._peek(at, min(_HEADER, end - at))
        tag, used = wire.varint(header, 0)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise Malformed(f"a field has number {number}")
        value = 0
        if kind in (wire.VARINT, wire.BYTES):
            value, used = wire.varint(header, used)
        elif kind not in (wire.FIXED32, wire.FIXED64):
            raise Malformed(f"field {number} has wire type {kind}")
        length = {wire.VARINT: 0, wire.FIXED32: 4, wire.FIXED64: 8}.get(kind, value)
        start = at + used
        if length > end - start:
            raise Malformed(f"field {number} needs {length:,} bytes, {end - start:,} follow")
        return Span(number, kind, start, start + length, value)

    def _peek(self, at: int, count: int) -> bytes:
        """Return `count` bytes, few enough for the window."""
        begin = at - self._from
        if begin < 0 or begin + count > len(self._window):
            self._window = self._bytes(at, min(_WINDOW, self.whole.end - at))
            self._from, begin = at, 0
        return self._window[begin : begin + count]

    def _bytes(self, at: int, count: int) -> bytes:
        found = self._read(at, count)
        if len(found) != count:
            raise Malformed(f"expected {count:,} bytes at {at:,}, found {len(found):,}")
        return found


def delimited(span: Span) -> Span:
    """Return the span of a string, bytes or message field; raises `Malformed` for another."""
    if span.kind != wire.BYTES:
        raise Malformed(f"field {span.number} has wire type {span.kind}, expected {wire.BYTES}")
    return span
