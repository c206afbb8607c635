"""Blocks of a table: keys and values in order, keys without what they share with the one before.

An entry is ``varint32 shared, varint32 unshared, varint32 value length, unshared bytes of the key,
value``: the key begins with `shared` bytes of the key before. After the entries come the u32le
offset of each restart, where a key is written whole, and their u32le number. Source:
table_format.md of LevelDB; block_builder.cc of TensorFlow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ema_cli.formats.tensorflow.wire import Malformed, put_varint, varint

# Entries from one restart to the next, in all blocks that TensorFlow writes but the index.
INTERVAL = 16


class Item(NamedTuple):
    """A key with its value.

    Attributes:
        key: the whole key.
        value: its bytes.
        offset: where the value lies in the file, or -1 when its block is compressed.
    """

    key: bytes
    value: bytes
    offset: int


# ---------------------------------------------------------------------------- reading


def walk(block: bytes, base: int, floor: bytes | None, ceiling: bytes | None) -> Iterator[Item]:
    """Yield the items of a block at `base`; keys are above `floor` and at most `ceiling`.

    No `floor`: the first block of a table, which alone can hold the empty key.
    """
    restarts, end = _restarts(block)
    # At most this many bytes can be shared where every sixteenth key is written whole.
    room = INTERVAL * len(block)
    previous = floor or b""
    at = 0
    for stop in (*restarts[1:], end):
        if at < stop and block[at]:
            raise Malformed(f"the key at the restart {base + at:,} shares bytes with another")
        while at < stop:
            # Two of the bytes may be part of the restarts: then the item runs past `stop`.
            shared, unshared, size = block[at], block[at + 1], block[at + 2]
            start = at + 3
            if shared | unshared | size > 0x7F:
                shared, unshared, size, start = _long_head(block, at)
                room -= shared
            value_at = start + unshared
            after = value_at + size
            if after > stop or shared > len(previous) or room < 0:
                raise Malformed(_wrong_head(base + at, shared, len(previous), after > stop))
            key = previous[:shared] + block[start:value_at]
            if key <= previous and (at or floor is not None):
                raise Malformed(f"the key at byte {base + at:,} is not above the one before it")
            yield Item(key, block[value_at:after], base + value_at)
            previous = key
            at = after
    if ceiling is not None and previous > ceiling:
        raise Malformed(f"the last key of the block at byte {base:,} is above its separator")


def _restarts(block: bytes) -> tuple[tuple[int, ...], int]:
    """Return the offsets of the restarts, and where the entries end."""
    count = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * count
    # An entry takes three bytes or more, and a restart is where one begins.
    if not 0 < count <= end // 3 + 1:
        raise Malformed(f"a block of {len(block):,} bytes claims {count:,} restarts")
    restarts = struct.unpack_from(f"<{count}I", block, end)
    before = -1
    for restart in restarts:
        # The only restart of an empty block is its end.
        if restart <= before or restart >= max(end, 1):
            raise Malformed(f"a restart at {restart:,} follows one at {before:,} of {end:,}")
        before = restart
    if restarts[0]:
        raise Malformed(f"expected the first restart at 0, found {restarts[0]:,}")
    return restarts, end


def _long_head(block: bytes, at: int) -> tuple[int, int, int, int]:
    """Return the three lengths before an entry, and the position after them."""
    shared, at = varint(block, at, 5)
    unshared, at = varint(block, at, 5)
    size, at = varint(block, at, 5)
    return shared, unshared, size, at


def _wrong_head(at: int, shared: int, previous: int, too_long: bool) -> str:
    if too_long:
        return f"the entry at byte {at:,} runs past the entries of its block"
    if shared > previous:
        return f"the key at byte {at:,} shares {shared:,} bytes with one of {previous:,}"
    return f"the keys up to byte {at:,} share more bytes than a table with restarts allows"


# ---------------------------------------------------------------------------- writing


class Block:
    """A block that grows; it is false while it holds no entry."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._entries = bytearray()
        self._restarts = [0]
        self._since = 0  # entries since the last restart
        self._last = b""

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def size(self) -> int:
        """Bytes of the block as `finish` would return it."""
        return len(self._entries) + 4 * len(self._restarts) + 4

    def add(self, key: bytes, value: bytes) -> None:
        """Append an entry whose key is above all others."""
        if self._since < self._interval:
            shared = shared_bytes(self._last, key)
        else:
            shared = 0
            self._restarts.append(len(self._entries))
            self._since = 0
        self._since += 1
        self._last = key
        for number in (shared, len(key) - shared, len(value)):
            self._entries += put_varint(number)
        self._entries += key[shared:]
        self._entries += value

    def finish(self) -> bytes:
        """Return the block as it is stored, without its trailer."""
        restarts = (*self._restarts, len(self._restarts))
        return bytes(self._entries) + struct.pack(f"<{len(restarts)}I", *restarts)


def shared_bytes(a: bytes, b: bytes) -> int:
    """Return how many bytes at the beginning of both are the same."""
    common = min(len(a), len(b))
    differ = int.from_bytes(a[:common], "big") ^ int.from_bytes(b[:common], "big")
    return common - (differ.bit_length() + 7) // 8
