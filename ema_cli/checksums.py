"""CRC-32C, and how the checksum of a whole follows from those of its parts in any order.

A CRC is linear: for bytes A followed by n bytes B, ``crc(AB) = shift(crc(A), n) ^ crc(B)`` with
``shift(c, n) = c · x^(8n) mod P``. So each part contributes ``shift(crc(part), bytes after it)``
and the contributions are combined by exclusive or. Source: crc32_combine of zlib; P is the
Castagnoli polynomial of RFC 3720, B.4. Numbers are bit reflected: bit 31 is x^0.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from fastcrc import crc32

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_LEVELS = 12  # of four bits: lengths below 2^48 bytes

Array = np.ndarray[Any, np.dtype[Any]]


def crc32c(data: bytes | bytearray | memoryview, previous: int = 0) -> int:
    """Return the CRC-32C of `data`, continuing from that of the bytes before it."""
    return int(crc32.iscsi(data, previous) if previous else crc32.iscsi(data))


def masked(crc: int) -> int:
    """Return the form in which LevelDB's tables and TensorFlow store a CRC-32C."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def unmasked(stored: int) -> int:
    """Undo `masked`."""
    rotated = (stored - _MASK_DELTA) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def unmasked_all(stored: Array) -> Array:
    """`unmasked` of each number; uint32 in and out."""
    rotated = stored - np.uint32(_MASK_DELTA)
    result: Array = rotated >> np.uint32(17) | rotated << np.uint32(15)
    return result


def shift(crc: int, n_bytes: int) -> int:
    """Return the contribution of bytes with this CRC that are followed by `n_bytes` others."""
    for level in range(_LEVELS):
        digit = n_bytes >> 4 * level & 15
        if digit and crc:
            crc = _product(crc, _powers()[level][digit])
    return crc


def shift_all(crcs: Array, n_bytes: Array) -> Array:
    """`shift` of each pair; uint32 and int64 in, uint32 out."""
    result = crcs
    longest = int(n_bytes.max(initial=0))
    for level in range(_LEVELS):
        if longest >> 4 * level == 0:
            break
        powers = np.array(_powers()[level], np.uint32)
        result = _products(result, powers[n_bytes >> 4 * level & 15])
    return result


@functools.cache
def _powers() -> list[list[int]]:
    """Return x^(8·digit·16^level) for each level and digit."""
    one, power = 1 << 31, 1 << 23  # x^0 and x^8
    table = []
    for _ in range(_LEVELS):
        row = [one]
        for _ in range(15):
            row.append(_product(row[-1], power))
        table.append(row)
        power = _product(row[-1], power)
    return table


def _product(a: int, b: int) -> int:
    """Return a · b mod P."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _products(a: Array, b: Array) -> Array:
    """`_product` of each pair."""
    product = np.zeros_like(b)
    polynomial, one = np.uint32(_POLYNOMIAL), np.uint32(1)
    for bit in range(31, -1, -1):
        product ^= b * (a >> np.uint32(bit) & one)
        b = b >> one ^ polynomial * (b & one)
    return product


class Running:
    """The contribution of bytes that are met in ascending order, with gaps between or not.

    Attributes:
        crc: of what was added so far, as if the gaps and all before held nothing.
        end: offset after the last byte added; -1 before the first.
        nbytes: how many were added.
    """

    __slots__ = ("crc", "end", "nbytes")

    def __init__(self) -> None:
        self.crc = 0
        self.end = -1
        self.nbytes = 0

    def add(self, offset: int, data: memoryview) -> None:
        """Add the bytes that lie at `offset`."""
        if offset != self.end and self.crc:
            self.crc = shift(self.crc, offset - self.end)
        self.crc = crc32c(data, self.crc)
        self.end = offset + len(data)
        self.nbytes += len(data)

    def contribution(self, end: int) -> int:
        """Return what was added as a part of the bytes that end at offset `end`."""
        return shift(self.crc, end - self.end)
