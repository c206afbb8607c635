"""Zip archives: what PyTorch, Keras and NumPy files are made of.

Layout: members, each a local header, its bytes and perhaps a data descriptor; then the central
directory, which says the same of each member again; then the end records. Source: APPNOTE.TXT 6.3
of PKWARE. Readers disagree about archives that say two things at once (which of two members of
one name counts, which of two headers is right), so here everything is read and has to agree: the
members tile the archive from its first byte to the directory, and the directory ends where the
end records begin. What PyTorch, Keras and NumPy write is like that.
"""

from __future__ import annotations

import array
import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ema_cli.checksums import crc32_of
from ema_cli.errors import DamagedFile
from ema_cli.files import read_exact
from ema_cli.formats.zipdirectory import (
    BLOCK,
    DEFLATED,
    Entry,
    Window,
    damaged,
    directory_entries,
    find_directory,
    zip64,
)
from ema_cli.formats.zipping import (
    DESCRIPTOR,
    FULL32,
    LOCAL,
    LOCAL_CRC,
    STORED,
    Laid,
    NewMember,
    lay_out,
)
from ema_cli.text import shorten, size

__all__ = [
    "DEFLATED",
    "STORED",
    "Archive",
    "Laid",
    "Member",
    "NewMember",
    "inflate_to",
    "lay_out",
    "member_bytes",
    "member_start",
    "member_starts",
    "read_archive",
]

_PIECE = 256 << 10

# With or without a signature, with numbers of 4 or of 8 bytes.
_DESCRIPTORS = {
    12: (False, struct.Struct("<3I")),
    16: (True, struct.Struct("<3I")),
    20: (False, struct.Struct("<I2Q")),
    24: (True, struct.Struct("<I2Q")),
}


class Member(NamedTuple):
    """One member of an archive.

    Attributes:
        name: as the archive has it; never a path.
        offset: of its stored bytes in the file.
        nbytes: how many are stored.
        size: how many they are uncompressed.
        method: 0 (stored) or 8 (deflated).
        crc: CRC-32 of the uncompressed bytes.
        crc_at: every offset in the file where this CRC stands, as u32le.
    """

    name: str
    offset: int
    nbytes: int
    size: int
    method: int
    crc: int
    crc_at: tuple[int, ...]


class Archive(NamedTuple):
    """A checked archive.

    Attributes:
        members: in the order of their bytes.
        by_name: the same by name.
        start: offset of the archive in the file.
        end: offset after it.
        directory: the bytes of the central directory and the end records.
    """

    members: tuple[Member, ...]
    by_name: Mapping[str, Member]
    start: int
    end: int
    directory: bytes

    def structure(self) -> str:
        """Return the SHA-256 of all that is known of the members but their CRCs, in hex."""
        numbers = array.array("Q", (self.start, self.end))
        for member in self.members:
            numbers.extend((len(member.name), *member[1:5], *member.crc_at))
        digest = hashlib.sha256(numbers.tobytes())
        digest.update("".join(member.name for member in self.members).encode("utf-8"))
        return digest.hexdigest()


def read_archive(fd: int, path: str, offset: int, nbytes: int, *, what: str) -> Archive:
    """Return the archive that fills the `nbytes` from `offset` of an open file, all of it checked.

    Args:
        fd: the file.
        path: its name, for errors.
        offset: where the archive begins.
        nbytes: how long it is.
        what: what the archive is expected to be, e.g. ``"a NumPy .npz file"``.

    Raises `DamagedFile` for each broken invariant, `UnsupportedInput` for encryption and for
    compression other than deflate.
    """
    window = Window(fd, path, offset, nbytes)
    count, directory_at, directory_size = find_directory(window, what)
    directory = window.read(directory_at, nbytes - directory_at)
    entries = directory_entries(path, directory, count, directory_size)
    entries.sort(key=_position)
    members: list[Member] = []
    end = 0
    for ordinal, entry in enumerate(entries):
        if entry.header != end:
            raise _misplaced(path, entry, end)
        after = ordinal + 1
        end = min(entries[after].header, directory_at) if after < len(entries) else directory_at
        members.append(_member(window, entry, directory_at, end))
    if end != directory_at:
        raise DamagedFile(path, f"expected the zip directory at offset 0, found {directory_at:,}")
    by_name = {member.name: member for member in members}
    return Archive(tuple(members), by_name, offset, offset + nbytes, directory)


def _position(entry: Entry) -> int:
    return entry.header


def _misplaced(path: str, entry: Entry, expected: int) -> DamagedFile:
    return damaged(
        path,
        entry.name,
        f"expected its header at offset {expected:,}, right after what precedes it, "
        f"found {entry.header:,}",
    )


def _member(window: Window, entry: Entry, directory_at: int, end: int) -> Member:
    """Return a member that fills the archive up to offset `end`, its local header checked."""
    path, name = window.path, entry.name
    name_end = entry.header + LOCAL.size + len(entry.raw_name)
    if name_end > end:
        raise damaged(path, name, f"it overlaps what begins at offset {end:,}")
    raw = window.peek(entry.header, name_end - entry.header)
    fields = LOCAL.unpack_from(raw)
    if fields[0] != b"PK\3\4":
        raise damaged(path, name, f"expected a local header at offset {entry.header:,}")
    if (*fields[2:4], fields[9]) != (entry.flags, entry.method, len(entry.raw_name)):
        raise damaged(path, name, "its two headers disagree about flags, method or name")
    if raw[LOCAL.size :] != entry.raw_name:
        shown = shorten(raw[LOCAL.size :].decode("latin-1"))
        raise damaged(path, name, f"its local header calls it '{shown}'")
    data_at = name_end + fields[10]
    data_end = data_at + entry.nbytes
    if data_end > end:
        raise damaged(path, name, f"it overlaps what begins at offset {end:,}")
    _check_local(window, entry, fields, name_end)
    crc_at = [entry.header + LOCAL_CRC, directory_at + entry.crc_at]
    if entry.flags & DESCRIPTOR:
        told = [crc_at[0]] if fields[6] else []  # in the local header too
        crc_at = [*told, _descriptor(window, entry, data_end, end), crc_at[1]]
    elif data_end != end:
        raise damaged(path, name, f"{end - data_end:,} unexpected bytes follow it")
    start = window.start
    return Member(
        name,
        start + data_at,
        entry.nbytes,
        entry.size,
        entry.method,
        entry.crc,
        tuple(start + at for at in crc_at),
    )


def _check_local(window: Window, entry: Entry, fields: Sequence[int], extra_at: int) -> None:
    """Check CRC and sizes of a local header; it may leave them to the data descriptor, as 0."""
    crc, nbytes, full, extra_size = fields[6], fields[7], fields[8], fields[10]
    if FULL32 in (nbytes, full):
        wide = zip64(window.path, entry.name, window.peek(extra_at, extra_size))
        if len(wide) < 2:
            raise damaged(window.path, entry.name, "expected its sizes in a zip64 field")
        full, nbytes = wide[:2]
    expected = (entry.crc, entry.nbytes, entry.size)
    left_out = bool(entry.flags & DESCRIPTOR)
    for found, right in zip((crc, nbytes, full), expected, strict=True):
        if found != right and not (left_out and found == 0):
            raise damaged(
                window.path, entry.name, f"its two headers disagree: {found:,} and {right:,}"
            )


def _descriptor(window: Window, entry: Entry, at: int, end: int) -> int:
    """Return the offset of the CRC in the data descriptor from `at` to `end`, all of it checked."""
    signed, layout = _DESCRIPTORS.get(end - at, (False, None))
    if layout is None:
        raise damaged(window.path, entry.name, f"{end - at:,} bytes follow it, no descriptor")
    raw = window.peek(at, end - at)
    begin = 4 if signed else 0
    right = (entry.crc, entry.nbytes, entry.size)
    if raw[:begin] != b"PK\7\x08"[:begin] or layout.unpack_from(raw, begin) != right:
        raise damaged(window.path, entry.name, "its data descriptor disagrees with the directory")
    return at + begin


def member_bytes(
    fd: int, path: str, member: Member, limit: int, *, unchecked: bool = False
) -> bytes:
    """Return the uncompressed bytes of a small member, at most `limit`; see `inflate_to`."""
    if max(member.size, member.nbytes) > limit:
        raise damaged(
            path, member.name, f"expected at most {size(limit)}, found {size(member.size)}"
        )
    data = bytearray()
    inflate_to(fd, path, member, data.extend, unchecked=unchecked)
    return bytes(data)


def inflate_to(
    fd: int,
    path: str,
    member: Member,
    write: Callable[[memoryview], object],
    *,
    unchecked: bool = False,
) -> None:
    """Hand the uncompressed bytes of a member to `write`, piece by piece, in bounded memory.

    Args:
        fd: the file.
        path: its name, for errors.
        member: one of its members.
        write: called with pieces of at most 256 KiB; what it got is wrong if this raises.
        unchecked: whether a CRC of 0 means that none was computed.

    Raises `DamagedFile` when there are more or fewer bytes than the member's size, or their CRC
    differs.
    """
    crc = done = 0
    for piece in _pieces(fd, path, member, _PIECE):
        done += len(piece)
        if done > member.size:
            break
        crc = crc32_of(piece, crc)
        write(piece)
    if done != member.size:
        more = "more" if done > member.size else f"{done:,}"
        raise damaged(path, member.name, f"expected {member.size:,} bytes, found {more}")
    if crc != member.crc and not (unchecked and member.crc == 0):
        raise damaged(path, member.name, f"expected CRC-32 {member.crc:#010x}, found {crc:#010x}")


def member_starts(fd: int, path: str, archive: Archive, nbytes: int) -> Iterator[bytes]:
    """Yield the first `nbytes` of each member, as `member_start` returns them."""
    window = Window(fd, path, 0, archive.end)
    for member in archive.members:
        if member.method == STORED:
            yield window.peek(member.offset, min(nbytes, member.size))
        else:
            yield member_start(fd, path, member, nbytes)


def member_start(fd: int, path: str, member: Member, nbytes: int) -> bytes:
    """Return the first uncompressed bytes of a member, at most `nbytes`; no CRC is checked."""
    found = bytearray()
    for piece in _pieces(fd, path, member, max(nbytes, BLOCK)):
        found += piece
        if len(found) >= nbytes:
            break
    return bytes(found[:nbytes])


def _pieces(fd: int, path: str, member: Member, most: int) -> Iterator[memoryview]:
    """Yield the uncompressed bytes of a member in pieces of at most `most`, read in such."""
    pieces = _stored(fd, path, member, most)
    return _inflated(path, member, pieces, most) if member.method == DEFLATED else pieces


def _stored(fd: int, path: str, member: Member, most: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(most, member.nbytes)))
    for offset in range(0, member.nbytes, most):
        piece = buffer[: member.nbytes - offset]
        read_exact(fd, piece, member.offset + offset, path)
        yield piece


def _inflated(
    path: str, member: Member, pieces: Iterator[memoryview], most: int
) -> Iterator[memoryview]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for piece in pieces:
            data: bytes | memoryview = piece
            held_back = True
            while held_back:
                out = inflater.decompress(data, most)
                yield memoryview(out)
                data = inflater.unconsumed_tail
                # What is left after the end stays there for ever.
                held_back = not inflater.eof and (len(out) == most or bool(data))
            if inflater.eof:
                break
    except zlib.error as error:
        raise damaged(path, member.name, f"not a deflate stream: {error}") from None
    left = inflater.unused_data or inflater.unconsumed_tail or next(pieces, None)
    if not inflater.eof or left:
        raise damaged(path, member.name, "its deflate stream does not end where the member does")
