"""The central directory of a zip archive, and the end records that tell where it is.

All that is said twice has to agree. Source: APPNOTE.TXT 6.3 of PKWARE.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from ema_cli.errors import DamagedFile, UnsupportedInput
from ema_cli.files import read_exact
from ema_cli.formats.zipping import (
    CENTRAL,
    CENTRAL_CRC,
    DESCRIPTOR,
    END,
    END64,
    FULL16,
    FULL32,
    LOCATOR,
    MEMBER_LIMIT,
    STORED,
    UTF8,
    ZIP64,
)
from ema_cli.text import shorten, size

DEFLATED = 8

DIRECTORY_LIMIT = 64 << 20

# No deflate stream yields more: a match of 258 bytes takes at least two bits.
_RATIO_LIMIT = 1032
# Local headers of small members are read several at a time.
BLOCK = 4096
_TAIL = END64.size + LOCATOR.size + END.size
_ENCRYPTED = 1
# Bits 1 and 2 tell how hard a deflated member was compressed.
_KNOWN_FLAGS = 1 << 1 | 1 << 2 | DESCRIPTOR | UTF8
_OTHER_NAME = 0x7075


class Entry(NamedTuple):
    """One entry of the central directory; offsets are relative to the archive."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    nbytes: int
    size: int
    header: int
    crc_at: int


class Window:
    """The stretch of a file that is an archive; offsets are relative to it."""

    def __init__(self, fd: int, path: str, start: int, nbytes: int) -> None:
        self.path = path
        self.start = start
        self.nbytes = nbytes
        self._fd = fd
        self._block = b""
        self._block_at = 0

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes that lie inside."""
        data = bytearray(nbytes)
        read_exact(self._fd, memoryview(data), self.start + offset, self.path)
        return bytes(data)

    def peek(self, offset: int, nbytes: int) -> bytes:
        """Return a few bytes that lie inside; the next ones are likely to be asked for next."""
        begin = offset - self._block_at
        if begin < 0 or begin + nbytes > len(self._block):
            self._block = self.read(offset, min(max(nbytes, BLOCK), self.nbytes - offset))
            self._block_at, begin = offset, 0
        return self._block[begin : begin + nbytes]


def damaged(path: str, name: str, reason: str) -> DamagedFile:
    """Return the error of one member."""
    return DamagedFile(path, f"zip member '{shorten(name)}': {reason}")


def find_directory(window: Window, what: str) -> tuple[int, int, int]:
    """Return how many entries the central directory has, its offset and its size in bytes."""
    path = window.path
    end_at = _find_end(window, what)
    tail = window.read(max(end_at + END.size - _TAIL, 0), min(end_at + END.size, _TAIL))
    end = END.unpack_from(tail, len(tail) - END.size)
    disks, counts, place, ends_at = end[1:3], end[3:5], end[5:7], end_at
    if tail[-LOCATOR.size - END.size :].startswith(b"PK\6\7"):
        ends_at = end_at + END.size - _TAIL
        disks, counts, place = _end64(path, tail, ends_at)
        _check_agreement(path, end[1:5], (*disks, *counts), FULL16)
        _check_agreement(path, end[5:7], place, FULL32)
    nbytes, offset = place
    if any(disks) or counts[0] != counts[1]:
        raise DamagedFile(path, "expected one zip archive, found a part of one in several files")
    if offset + nbytes != ends_at:
        raise DamagedFile(
            path,
            f"expected a zip directory that ends at offset {ends_at:,}, "
            f"found {nbytes:,} bytes at {offset:,}",
        )
    _check_limits(path, counts[0], nbytes)
    return counts[0], offset, nbytes


def _find_end(window: Window, what: str) -> int:
    """Return the offset of the end record: the last one, with a comment up to the end or none."""
    for most in (END.size, END.size + FULL16):
        begin = max(window.nbytes - most, 0)
        tail = window.read(begin, window.nbytes - begin)
        at = tail.rfind(b"PK\5\6", 0, max(len(tail) - END.size + 4, 0))
        if at >= 0 and at + END.size + END.unpack_from(tail, at)[7] == len(tail):
            return begin + at
    if window.read(0, min(window.nbytes, 4)) != b"PK\3\4":
        raise DamagedFile(window.path, f"expected {what}, found no zip archive")
    raise DamagedFile(
        window.path,
        f"expected {what} that ends with a zip end record: it is truncated, or other bytes follow",
    )


def _end64(
    path: str, tail: bytes, ends_at: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return disks, counts, and size and offset of the directory, as the zip64 record has them.

    It is at offset `ends_at`, and `tail` begins there.
    """
    _, disk, offset, disks = LOCATOR.unpack_from(tail, len(tail) - LOCATOR.size - END.size)
    if len(tail) < _TAIL or disk or disks != 1 or offset != ends_at:
        raise DamagedFile(path, "the zip64 locator does not point to the record before it")
    record = END64.unpack_from(tail)
    if record[0] != b"PK\6\6" or record[1] != END64.size - 12:
        raise DamagedFile(path, "expected a zip64 end record before its locator")
    return record[4:6], record[6:8], record[8:10]


def _check_agreement(path: str, narrow: Sequence[int], wide: Sequence[int], saturated: int) -> None:
    """Check that the end record says what the zip64 one says, or that it cannot."""
    for a, b in zip(narrow, wide, strict=True):
        if a not in (b, saturated):
            raise DamagedFile(path, f"the two zip end records disagree: {a:,} and {b:,}")


def _check_limits(path: str, count: int, nbytes: int) -> None:
    if count > MEMBER_LIMIT:
        raise DamagedFile(path, f"expected at most {MEMBER_LIMIT:,} zip members, found {count:,}")
    if nbytes > DIRECTORY_LIMIT:
        raise DamagedFile(
            path,
            f"expected a zip directory of at most {size(DIRECTORY_LIMIT)}, found {size(nbytes)}",
        )
    if count * CENTRAL.size > nbytes:
        raise DamagedFile(path, f"{count:,} zip members need more than {nbytes:,} bytes")


def directory_entries(path: str, directory: bytes, count: int, nbytes: int) -> list[Entry]:
    """Return the entries of the central directory, the first `nbytes` of `directory`."""
    found: list[Entry] = []
    names: set[str] = set()
    at = 0
    for _ in range(count):
        entry, at = _entry(path, directory, at, nbytes)
        # Python's zipfile ends names at a NUL.
        known_as = entry.name.partition("\0")[0]
        if known_as in names:
            raise damaged(path, entry.name, "two members have this name")
        names.add(known_as)
        found.append(entry)
    if at != nbytes:
        raise DamagedFile(path, f"expected a zip directory of {at:,} bytes, found {nbytes:,}")
    return found


def _entry(path: str, directory: bytes, at: int, end: int) -> tuple[Entry, int]:
    """Return the entry at offset `at` of the directory, and where the next one begins."""
    name_at = at + CENTRAL.size
    fields = CENTRAL.unpack_from(directory, at) if name_at <= end else (b"",)
    if fields[0] != b"PK\1\2":
        raise DamagedFile(path, f"expected a zip directory entry at its byte {at:,}")
    _, _, _, flags, method, _, _, crc, nbytes, full = fields[:10]
    name_size, extra_size, comment_size, disk, _, _, header = fields[10:]
    extra_at = name_at + name_size
    after = extra_at + extra_size + comment_size
    if after > end:
        raise DamagedFile(path, f"the zip directory entry at its byte {at:,} is truncated")
    raw_name = directory[name_at:extra_at]
    name = _name(path, raw_name, flags)
    _check_kind(path, name, flags, method)
    if disk:
        raise damaged(path, name, f"expected it in this file, found it in file {disk}")
    if extra_size or FULL32 in (nbytes, full, header):
        extra = directory[extra_at : extra_at + extra_size]
        full, nbytes, header = _widened(path, name, extra, (full, nbytes, header))
    if (full != nbytes and method == STORED) or full > nbytes * _RATIO_LIMIT:
        raise damaged(path, name, f"{nbytes:,} stored bytes cannot be {full:,} bytes")
    return Entry(name, raw_name, flags, method, crc, nbytes, full, header, at + CENTRAL_CRC), after


def _name(path: str, raw: bytes, flags: int) -> str:
    try:
        return raw.decode("utf-8" if flags & UTF8 else "ascii")
    except UnicodeDecodeError:
        kind = "UTF-8" if flags & UTF8 else "ASCII, as it is not marked as UTF-8"
        shown = shorten(raw.decode("latin-1"))
        raise damaged(path, shown, f"expected a name in {kind}") from None


def _check_kind(path: str, name: str, flags: int, method: int) -> None:
    about = f"{shorten(path, 1000)}: zip member '{shorten(name)}'"
    if flags & _ENCRYPTED:
        raise UnsupportedInput(f"{about}: encrypted", "decrypt the file first")
    if method not in (STORED, DEFLATED):
        raise UnsupportedInput(
            f"{about}: compression method {method}, expected stored or deflated",
            "save it again without compression",
        )
    if flags & ~_KNOWN_FLAGS:
        raise damaged(path, name, f"unknown flags {flags:#06x}")


def _widened(
    path: str, name: str, extra: bytes, values: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Return size, stored size and header offset, read from the zip64 field where it has them."""
    wide = iter(zip64(path, name, extra))
    size_, nbytes, header = (next(wide, -1) if value == FULL32 else value for value in values)
    if -1 in (size_, nbytes, header) or next(wide, None) is not None:
        raise damaged(path, name, "its zip64 field does not hold what its entry leaves out")
    return size_, nbytes, header


def zip64(path: str, name: str, extra: bytes) -> tuple[int, ...]:
    """Return the 64-bit numbers of the zip64 field among the extra fields, () without one."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at) if at + 4 <= len(extra) else (0, 0)
        at += 4 + nbytes
        if at > len(extra):
            raise damaged(path, name, "an extra field is truncated")
        if kind in found or kind == _OTHER_NAME:
            raise damaged(path, name, f"unexpected extra field {kind:#06x}")
        found[kind] = extra[at - nbytes : at]
    field = found.get(ZIP64, b"")
    if len(field) % 8:
        raise damaged(path, name, f"expected zip64 numbers of 8 bytes, found {len(field)} bytes")
    return struct.unpack(f"<{len(field) // 8}Q", field)
