"""CRC-32C and CRC-32, and how the checksum of a whole follows from its parts' in any order.

A CRC is linear: for bytes A followed by n bytes B, ``crc(AB) = shift(crc(A), n) ^ crc(B)`` with
``shift(c, n) = c · x^(8n) mod P``. So each part contributes ``shift(crc(part), bytes after it)``
and the contributions are combined by exclusive or. Source: crc32_combine of zlib; P is the
Castagnoli polynomial of RFC 3720, B.4, or for CRC-32 that of zip files (ISO 3309). Numbers are bit
reflected: bit 31 is x^0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from fastcrc import crc32

CRC32C = "crc32c"
CRC32 = "crc32"
_POLYNOMIALS = {CRC32C: 0x82F63B78, CRC32: 0xEDB88320}
_MASK_DELTA = 0xA282EAD8
_LEVELS = 12  # of four bits: lengths below 2^48 bytes

Array = np.ndarray[Any, np.dtype[Any]]


def crc32c(data: bytes | bytearray | memoryview, previous: int = 0) -> int:
    """Return the CRC-32C of `data`, continuing from that of the bytes before it."""
    return int(crc32.iscsi(data, previous) if previous else crc32.iscsi(data))


def crc32_of(data: bytes | bytearray | memoryview, previous: int = 0) -> int:
    """Return the CRC-32 of `data`, continuing from that of the bytes before it."""
    return int(crc32.iso_hdlc(data, previous) if previous else crc32.iso_hdlc(data))


KINDS: Mapping[str, Callable[[memoryview, int], int]] = {CRC32C: crc32c, CRC32: crc32_of}


def masked(crc: int) -> int:
    """Return the form in which LevelDB's tables and TensorFlow store a CRC-32C."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def unmasked_all(stored: Array) -> Array:
    """Undo `masked` for each number; uint32 in and out."""
    rotated = stored - np.uint32(_MASK_DELTA)
    result: Array = rotated >> np.uint32(17) | rotated << np.uint32(15)
    return result


def shift(crc: int, n_bytes: int, kind: str = CRC32C) -> int:
    """Return the contribution of bytes with this CRC that are followed by `n_bytes` others."""
    for level in range(_LEVELS):
        digit = n_bytes >> 4 * level & 15
        if digit and crc:
            crc = _product(crc, _powers(kind)[level][digit], _POLYNOMIALS[kind])
    return crc


def shift_all(crcs: Array, n_bytes: Array, kind: str = CRC32C) -> Array:
    """`shift` of each pair; uint32 and int64 in, uint32 out."""
    result = crcs
    longest = int(n_bytes.max(initial=0))
    for level in range(_LEVELS):
        if longest >> 4 * level == 0:
            break
        powers = np.array(_powers(kind)[level], np.uint32)
        result = _products(result, powers[n_bytes >> 4 * level & 15], _POLYNOMIALS[kind])
    return result


@functools.cache
def _powers(kind: str) -> list[list[int]]:
    """Return x^(8·digit·16^level) for each level and digit."""
    polynomial = _POLYNOMIALS[kind]
    one, power = 1 << 31, 1 << 23  # x^0 and x^8
    table = []
    for _ in range(_LEVELS):
        row = [one]
        for _ in range(15):
            row.append(_product(row[-1], power, polynomial))
        table.append(row)
        power = _product(row[-1], power, polynomial)
    return table


def _product(a: int, b: int, polynomial: int) -> int:
    """Return a · b mod P."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (polynomial if b & 1 else 0)
    return product


def _products(a: Array, b: Array, polynomial: int) -> Array:
    """`_product` of each pair."""
    product = np.zeros_like(b)
    modulus, one = np.uint32(polynomial), np.uint32(1)
    for bit in range(31, -1, -1):
        product ^= b * (a >> np.uint32(bit) & one)
        b = b >> one ^ modulus * (b & one)
    return product


class Running:
    """The contribution of bytes that are met in ascending order, with gaps between or not.

    Attributes:
        crc: of what was added so far, as if the gaps and all before held nothing.
        end: offset after the last byte added; -1 before the first.
        nbytes: how many were added.
    """

    __slots__ = ("_crc_of", "_kind", "crc", "end", "nbytes")

    def __init__(self, kind: str = CRC32C) -> None:
        self._kind = kind
        self._crc_of = KINDS[kind]
        self.crc = 0
        self.end = -1
        self.nbytes = 0

    def add(self, offset: int, data: memoryview) -> None:
        """Add the bytes that lie at `offset`."""
        if offset != self.end and self.crc:
            self.crc = shift(self.crc, offset - self.end, self._kind)
        self.crc = self._crc_of(data, self.crc)
        self.end = offset + len(data)
        self.nbytes += len(data)

    def contribution(self, end: int) -> int:
        """Return what was added as a part of the bytes that end at offset `end`."""
        return shift(self.crc, end - self.end, self._kind)
