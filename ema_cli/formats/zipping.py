"""How the zip archives that PyTorch and NumPy write are laid out, before any data exists.

Only what those two need: stored members, each with its sizes known. Source: APPNOTE.TXT 6.3 of
PKWARE; what is optional there is as `torch.save` and `numpy.savez` have it, byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from ema_cli.checksums import crc32_of
from ema_cli.errors import UnsupportedInput

STORED = 0

MEMBER_LIMIT = 100_000

# Signature, version needed, flags, method, time, date, CRC, stored size, size, length of the name
# and of the extra fields; both follow.
LOCAL = struct.Struct("<4s5H3I2H")
# Signature, version made by and needed, flags, method, time, date, CRC, stored size, size, length
# of name, extra fields and comment, disk, internal and external attributes, offset of the header.
CENTRAL = struct.Struct("<4s6H3I5H2I")
# Signature, this disk, that of the directory, members on this disk and in all, bytes of the
# directory, its offset, length of the comment.
END = struct.Struct("<4s4H2IH")
# Signature, disk, offset of the zip64 end record, number of disks.
LOCATOR = struct.Struct("<4sIQI")
# Signature, bytes that follow, version made by and needed, then as in the end record.
END64 = struct.Struct("<4sQ2H2I4Q")

DESCRIPTOR, UTF8 = 1 << 3, 1 << 11
ZIP64 = 0x0001
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF

# Where the CRC stands in the two headers.
LOCAL_CRC, CENTRAL_CRC = 14, 16

_ALIGNMENT = 64
# Python's zipfile resorts to zip64 beyond what a signed number holds.
_SIGNED32 = (1 << 31) - 1
# As zipfile writes it: 1980-01-01, made on Unix by version 4.5, mode 0600.
_DATE, _MADE_BY, _VERSION, _MODE = 0x21, 3 << 8 | 45, 45, 0o600 << 16


class NewMember(NamedTuple):
    """A member to be written.

    Attributes:
        name: unique within the archive.
        data: its bytes, or None where somebody else fills them in.
        nbytes: how many.
    """

    name: str
    data: bytes | None
    nbytes: int


class Laid(NamedTuple):
    """Where the parts of a new archive lie.

    Attributes:
        literals: (offset, bytes) of all but the members without data.
        extents: (offset, nbytes) of the bytes of each member.
        crc_at: the offsets where the CRC of each member belongs, as u32le; it stands there for
            the members with data, and 0 for the others.
        total: bytes of the archive.
    """

    literals: list[tuple[int, bytes]]
    extents: list[tuple[int, int]]
    crc_at: list[tuple[int, ...]]
    total: int


class _Sheet:
    """An archive as it grows: known bytes, and gaps that are filled in later."""

    def __init__(self) -> None:
        self.at = 0
        self.literals: list[tuple[int, bytes]] = []
        self._run = bytearray()

    def put(self, data: bytes) -> None:
        self._run += data
        self.at += len(data)

    def skip(self, nbytes: int) -> None:
        if self._run:
            self.literals.append((self.at - len(self._run), bytes(self._run)))
            self._run.clear()
        self.at += nbytes


def lay_out(members: Sequence[NewMember], *, torch: bool) -> Laid:
    """Return the archive of `members` in this order.

    Args:
        members: all of them stored.
        torch: whether it is as `torch.save` writes it (aligned to 64 bytes, CRC and size in a data
            descriptor), or as `numpy.savez` does.

    Raises `UnsupportedInput` for more members than would be read again.
    """
    if len(members) > MEMBER_LIMIT:
        raise UnsupportedInput(
            f"an output of {len(members):,} zip members: expected at most {MEMBER_LIMIT:,}",
            "write safetensors instead",
        )
    sheet = _Sheet()
    directory = bytearray()
    extents: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    for member in members:
        header, crc = sheet.at, crc32_of(member.data) if member.data else 0
        local, central = (_torch if torch else _numpy)(member, header, crc)
        sheet.put(local)
        extents.append((sheet.at, member.nbytes))
        if member.data is None:
            sheet.skip(member.nbytes)
        else:
            sheet.put(member.data)
        crc_at = header + LOCAL_CRC
        if torch and member.nbytes:
            crc_at = sheet.at + 4
            sheet.put(_descriptor(member.nbytes, header, crc))
        places.append((crc_at, len(directory) + CENTRAL_CRC))
        directory += central
    at = sheet.at
    sheet.put(bytes(directory))
    sheet.put(_end_records(len(members), len(directory), at, torch))
    sheet.skip(0)
    crc_places: list[tuple[int, ...]] = [(local, at + central) for local, central in places]
    return Laid(sheet.literals, extents, crc_places, sheet.at)


def _torch(member: NewMember, header: int, crc: int) -> tuple[bytes, bytes]:
    """Return the local header and the directory entry of a member, as miniz writes them."""
    name, nbytes = member.name.encode("utf-8"), member.nbytes
    flags = UTF8 | DESCRIPTOR if nbytes else UTF8
    wide = _zip64(nbytes, header, FULL32 - 1)
    # The stored size, 8 bytes from byte 12, is not known when torch.save writes the local header.
    local_wide = wide if nbytes < FULL32 else wide[:12] + bytes(8) + wide[20:]
    unpadded = header + LOCAL.size + len(name) + len(wide) + 4
    padding = -unpadded % _ALIGNMENT
    extra = local_wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    local = LOCAL.pack(b"PK\3\4", 0, flags, STORED, 0, 0, 0, 0, 0, len(name), len(extra))
    short = min(nbytes, FULL32)
    central = CENTRAL.pack(
        b"PK\1\2", 0, 0, flags, STORED, 0, 0, crc, short, short, len(name), len(wide),
        0, 0, 0, 0, min(header, FULL32),
    )  # fmt: skip
    return local + name + extra, central + name + wide


def _descriptor(nbytes: int, header: int, crc: int) -> bytes:
    wide = nbytes >= FULL32 or header >= FULL32
    return struct.pack("<4sI2Q" if wide else "<4s3I", b"PK\7\x08", crc, nbytes, nbytes)


def _numpy(member: NewMember, header: int, crc: int) -> tuple[bytes, bytes]:
    """Return the local header and the directory entry of a member, as zipfile writes them."""
    name, nbytes = member.name.encode("utf-8"), member.nbytes
    flags = 0 if name.isascii() else UTF8
    local = LOCAL.pack(
        b"PK\3\4", _VERSION, flags, STORED, 0, _DATE, crc, FULL32, FULL32, len(name), 20
    )
    local += name + struct.pack("<2H2Q", ZIP64, 16, nbytes, nbytes)
    wide = _zip64(nbytes, header, _SIGNED32)
    short = FULL32 if nbytes > _SIGNED32 else nbytes
    central = CENTRAL.pack(
        b"PK\1\2", _MADE_BY, _VERSION, flags, STORED, 0, _DATE, crc, short, short, len(name),
        len(wide), 0, 0, 0, _MODE, FULL32 if header > _SIGNED32 else header,
    )  # fmt: skip
    return local, central + name + wide


def _zip64(nbytes: int, header: int, limit: int) -> bytes:
    """Return the extra field with the numbers above `limit`, empty without one."""
    numbers = [nbytes, nbytes] if nbytes > limit else []
    numbers += [header] if header > limit else []
    if not numbers:
        return b""
    return struct.pack(f"<2H{len(numbers)}Q", ZIP64, 8 * len(numbers), *numbers)


def _end_records(count: int, nbytes: int, offset: int, torch: bool) -> bytes:
    """Return what follows a directory of `count` entries and `nbytes` at `offset`."""
    records = b""
    if torch or count > FULL16 or max(nbytes, offset) > _SIGNED32:
        made_by = 3 << 8 | 30 if torch else _VERSION
        records = END64.pack(
            b"PK\6\6", END64.size - 12, made_by, _VERSION, 0, 0, count, count, nbytes, offset
        ) + LOCATOR.pack(b"PK\6\7", 0, offset + nbytes, 1)
    short = min(count, FULL16)
    return records + END.pack(
        b"PK\5\6", 0, 0, short, short, min(nbytes, FULL32), min(offset, FULL32), 0
    )
