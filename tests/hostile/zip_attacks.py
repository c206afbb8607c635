"""Attacks 44, 45, 54 and 58-68: what a zip file says of its members."""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attacks import LATE, READ, REFUSED, STEM, Attack, Ends, Values, writing
from npz_attacks import NPZ, SOUND, W, member, npy, said, sound
from raw_zip import (
    MIB,
    U32,
    Part,
    archive,
    assembled,
    central_entry,
    deflated,
    end_record,
    local_header,
    many,
    stored_block,
    zeros,
)


def of_parts(
    name: str,
    item: int,
    what: str,
    parts: Sequence[Part],
    *words: str,
    ends: Ends = REFUSED,
    values: Values | None = None,
    **records: Any,
) -> Attack:
    """Return an attack that is a file of these members, and of such end records."""
    build = writing(NPZ, archive(parts, **records))
    return Attack(name, (item,), what, build, ends, words, values)


def of_first(
    name: str, item: int, what: str, *words: str, ends: Ends = REFUSED, **fields: Any
) -> Attack:
    """Return an attack whose first member is not what it says."""
    first = Part(b"w.npy", member(W), **fields)
    return of_parts(name, item, what, [first, sound()[1]], *words, ends=ends)


def of_end(name: str, item: int, what: str, *words: str, **records: Any) -> Attack:
    """Return an attack whose members are sound and whose end is not."""
    return of_parts(name, item, what, sound(), *words, **records)


def zip64(**sizes: int) -> bytes:
    """Return the extra field of sizes that have no room."""
    data = b"".join(value.to_bytes(8, "little") for value in sizes.values())
    return b"\1\0" + len(data).to_bytes(2, "little") + data


_LZMA = b"\x09\x04\x05\0\x5d\0\0\x80\0" + lzma.compress(
    bytes(MIB), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, "preset": 6}]
)
_SIZE = len(member(W))
METHODS = tuple(
    of_parts(
        f"method {method}, {title}",
        item,
        "a compression that is neither none nor deflate",
        [Part(b"w.npy", data, method, crc=zlib.crc32(bytes(MIB)), size=MIB), sound()[1]],
        str(method),
    )
    for method, title, item, data in (
        (14, "an lzma bomb", 45, _LZMA),
        (12, "a bzip2 bomb", 45, bz2.compress(bytes(MIB))),
        (9, "deflate64", 63, b"\3\0"),
        (93, "zstandard", 63, b"(\xb5/\xfd"),
        (99, "AES", 63, member(W)),
        (0xFFFF, "nothing known", 63, member(W)),
    )
)
NAMES = (
    of_parts(
        "a name twice",
        54,
        "two members of one name: which is read depends on who reads",
        [*sound(), Part(b"w.npy", member(W * 2))],
        "w.npy",
    ),
    of_parts("a member twice", 54, "the same member, named twice", [*sound(), sound()[0]], "w.npy"),
    of_parts(
        "with and without suffix",
        54,
        "two members of one tensor name",
        [*sound(), Part(b"w", member(W * 2))],
    ),
    of_first("another name inside", 61, "local and central names differ", local={"name": b"v.npy"}),
    of_first(
        "a longer name inside", 61, "local and central names differ", local={"name": b"w.npy\0x"}
    ),
    of_first("another case inside", 61, "local and central names differ", local={"name": b"W.npy"}),
)
_FLIPPED = member(W)[:-1] + b"\x7f"
CHECKSUMS = (
    of_first("a flipped byte", 58, "data that are not what both CRCs say", ends=LATE, crc=1),
    of_parts(
        "a flipped byte of the data",
        58,
        "one byte of the payload changed",
        [Part(b"w.npy", _FLIPPED, crc=zlib.crc32(member(W))), sound()[1]],
        ends=LATE,
    ),
    of_parts(
        "a deflated flipped byte",
        58,
        "one byte of the payload changed before it was deflated",
        [deflated(b"w.npy", _FLIPPED, crc=zlib.crc32(member(W))), sound()[1]],
        ends=LATE,
    ),
    of_first("two CRCs", 58, "local and central CRCs differ", local={"crc": 1}),
    of_first("no CRC", 58, "a CRC of 0 in an npz file", ends=LATE, crc=0),
)
_WHOLE = archive(sound())


def of_bytes(name: str, item: int, what: str, content: bytes, *words: str) -> Attack:
    """Return an attack that is these bytes."""
    return Attack(name, (item,), what, writing(NPZ, content), REFUSED, words)


ENDS = (
    of_bytes("no end", 59, "the end record is gone", _WHOLE[:-22]),
    of_bytes("half an end", 59, "the end record is cut", _WHOLE[:-11]),
    of_bytes("all but a byte", 59, "the end record lacks its last byte", _WHOLE[:-1]),
    of_bytes("half a file", 59, "cut in the middle", _WHOLE[: len(_WHOLE) // 2]),
    of_bytes("an end alone", 59, "an end record of nothing", _WHOLE[-22:]),
    of_bytes("four bytes", 59, "only the magic", b"PK\x03\x04"),
    of_bytes(
        "junk before", 60, "1 KB before the first member, offsets not moved", b"j" * 999 + _WHOLE
    ),
    of_end(
        "junk before, told", 60, "1 KB before the first member, offsets moved", prefix=b"j" * 999
    ),
    of_bytes("junk behind", 60, "bytes behind the end record", _WHOLE + b"junk"),
    of_bytes("two files in one", 60, "a whole other file behind", _WHOLE * 2),
    of_end("junk between", 60, "bytes between members and directory", between=b"j" * 999),
    of_parts(
        "junk between members",
        60,
        "bytes between two members",
        [Part(b"w.npy", member(W), after=b"j" * 99), sound()[1]],
    ),
    of_end(
        "a comment that hides an end",
        60,
        "a second end record in the comment",
        comment=_WHOLE[-22:],
    ),
    of_end(
        "a comment longer than it is",
        60,
        "a length that lies",
        comment=b"c" * 9,
        end={"comment": 99},
    ),
    of_end(
        "a comment shorter than it is",
        60,
        "a length that lies",
        comment=b"c" * 99,
        end={"comment": 9},
    ),
)
FLAGS = (
    of_first("encrypted", 62, "the encryption bit", flags=1),
    of_first("encrypted inside", 62, "the encryption bit of the local header", local={"flags": 1}),
    of_first("strongly encrypted", 62, "bits 0 and 6", flags=0x41),
    of_first("a masked header", 62, "bit 13", flags=0x2000),
    of_first("a patch", 62, "bit 5: compressed patched data", flags=0x20),
    of_first("another method inside", 63, "local and central methods differ", local={"method": 8}),
    of_first(
        "another method outside", 63, "local and central methods differ", central={"method": 8}
    ),
    of_first("other flags inside", 63, "local and central flags differ", local={"flags": 8}),
)
SIZES = (
    of_first("a size too large", 64, "a stored member that inflates", size=_SIZE + 4),
    of_first("a size too small", 64, "a stored member that shrinks", size=_SIZE - 4),
    of_first(
        "another size inside", 64, "local and central sizes differ", local={"nbytes": 4, "size": 4}
    ),
    of_first(
        "a size of 4 GiB",
        64,
        "a size without the field it needs",
        central={"nbytes": U32, "size": U32},
    ),
    of_first(
        "a field too short",
        64,
        "a zip64 field of 4 bytes",
        central={"nbytes": U32, "size": U32, "extra": b"\1\0\4\0abcd"},
    ),
    of_first(
        "a field past its end",
        64,
        "an extra field that ends outside",
        central={"extra": b"\1\0\xff\x7f"},
    ),
    of_first("half a field", 64, "an extra field of 3 bytes", central={"extra": b"\1\0\4"}),
    of_first(
        "two zip64 fields",
        64,
        "two fields that say two sizes",
        central={
            "nbytes": U32,
            "size": U32,
            "extra": zip64(size=_SIZE, nbytes=_SIZE) + zip64(size=4, nbytes=4),
        },
    ),
    of_first(
        "a member that ends outside",
        65,
        "a size that reaches behind the file",
        central={"nbytes": 1 << 20, "size": 1 << 20},
        local={"nbytes": 1 << 20, "size": 1 << 20},
    ),
    of_first("a member outside", 65, "an offset behind the file", central={"offset": 1 << 30}),
    of_first("a member in the middle", 65, "an offset at no header", central={"offset": 7}),
    of_first(
        "a member at 2^63",
        65,
        "a zip64 offset that is negative to some",
        central={"offset": U32, "extra": zip64(offset=1 << 63)},
    ),
    of_first("a member on disk 2", 65, "a disk number", central={"disk": 2}),
    of_end("a directory outside", 65, "an offset behind the file", end={"offset": 1 << 30}),
    of_end(
        "a directory too long", 65, "a size that reaches before the file", end={"nbytes": 1 << 30}
    ),
    of_end("a directory too short", 65, "a size that cuts an entry", end={"nbytes": 60}),
    of_end("a directory of nothing", 65, "a size of 0", end={"nbytes": 0}),
)


def _same_place() -> bytes:
    """20 entries for the bytes of one member."""
    part = {**Part(b"w00.npy", member(W)).fields(), "offset": 0}
    entries = [central_entry({**part, "name": b"w%02d.npy" % k}) for k in range(20)]
    return assembled(local_header(part) + member(W), entries)


def _quoted() -> bytes:
    """A member whose bytes hold the header of the next: both share one payload."""
    inner = Part(b"inner.npy", member(W))
    hidden = local_header(inner.fields()) + inner.data
    outer = Part(b"outer.npy", npy(said("'|u1'", shape=f"({len(hidden)},)"), hidden))
    body = local_header(outer.fields()) + outer.data
    at = len(body) - len(hidden)
    entries = [{**outer.fields(), "offset": 0}, {**inner.fields(), "offset": at}]
    return assembled(body, [central_entry(entry) for entry in entries])


def _chained(count: int = 40) -> bytes:
    """Deflated members, each of which quotes the header of the next and shares its stream."""
    data = zeros(1)
    headers: list[tuple[dict[str, Any], bytes]] = []
    body = b""
    for k in reversed(range(count)):
        part = Part(b"w%02d.npy" % k, data, 8, crc=0, size=MIB + 35 * (count - 1 - k))
        header = local_header(part.fields())
        headers.insert(0, (part.fields(), header))
        body = header + data
        data = stored_block(header) + data
    entries, at = [], 0
    for fields, header in headers:
        entries.append(central_entry({**fields, "offset": at}))
        at += len(header) + len(stored_block(b""))
    return assembled(body, entries)


OVERLAPS = (
    of_bytes("one payload for 20 names", 66, "20 entries for one local header", _same_place()),
    of_bytes("a member inside a member", 66, "a payload that is part of another's", _quoted()),
    of_bytes("a chain of bombs", 66, "40 deflated members that share one megabyte", _chained()),
    of_first(
        "a member over its directory",
        66,
        "a size that reaches into the directory",
        central={"nbytes": _SIZE + 400, "size": _SIZE + 400},
        local={"nbytes": _SIZE + 400, "size": _SIZE + 400},
    ),
)
_MORE = {"count": 3, "here": 3}
COUNTS = (
    of_end("a count too large", 67, "the end record says 3 members of 2", end=_MORE),
    of_end(
        "a count too small", 67, "the end record says 1 member of 2", end={"count": 1, "here": 1}
    ),
    of_end("two counts", 67, "2 members, 1 of them on this disk", end={"here": 1}),
    of_end("another disk", 67, "a file that says it is the last of several", end={"disk": 1}),
    of_end("a start on another disk", 67, "a directory on another disk", end={"start": 1}),
    of_end(
        "65,535 members without zip64",
        67,
        "a ceiling and no record",
        end={"count": 0xFFFF, "here": 0xFFFF},
    ),
    of_end("two counts, zip64", 67, "the two end records disagree", end64={"count": 3, "here": 3}),
    of_end(
        "2^60 members",
        67,
        "a count that would need 2^60 entries",
        end={"count": 0xFFFF, "here": 0xFFFF},
        end64={"count": 1 << 60, "here": 1 << 60},
    ),
    of_end(
        "a locator behind the file",
        67,
        "the record is said to lie at 2^40",
        end64={},
        locator={"offset": 1 << 40},
    ),
    of_end(
        "a locator of another place",
        67,
        "the record lies where the locator does not say",
        end64={},
        locator={"offset": 0},
    ),
    of_end("a locator of several disks", 67, "3 disks", end64={}, locator={"disks": 3}),
    of_end("a locator of another disk", 67, "disk 1", end64={}, locator={"disk": 1}),
    of_end(
        "a record of another length", 67, "an end record of 2^40 bytes", end64={"record": 1 << 40}
    ),
    of_end(
        "a zip64 directory elsewhere", 67, "the two end records say two places", end64={"offset": 4}
    ),
)


def _holes(folder: Path) -> Path:
    """A directory of 3 GiB, which is a hole."""
    path = folder / f"{STEM}{NPZ}"
    size = 3 << 30
    with open(path, "wb") as file:
        file.write(archive(sound())[:400])
        file.truncate(400 + size)
        file.seek(0, os.SEEK_END)
        file.write(end_record(9, size, 400))
    return path


def _crowd(folder: Path) -> Path:
    """200,000 members."""
    path = folder / f"{STEM}{NPZ}"
    path.write_bytes(many(200_000, npy(said(shape="(0,)"))))
    return path


CROWDS = (
    Attack("200,000 members", (68,), "more members than any checkpoint has", _crowd),
    Attack("a directory of 3 GiB", (68,), "a directory that is a hole", _holes),
)
SOUND_ZIPS = (
    of_end(
        "a comment", 60, "what zip tools write", comment=b"made by hand", ends=READ, values=SOUND
    ),
    of_end("zip64 records", 67, "what big files need", end64={}, ends=READ, values=SOUND),
    of_parts(
        "deflated",
        44,
        "what savez_compressed writes",
        [deflated(part.name, part.data) for part in sound()],
        ends=READ,
        values=SOUND,
    ),
)
ZIP_ATTACKS = (
    *METHODS,
    *NAMES,
    *CHECKSUMS,
    *ENDS,
    *FLAGS,
    *SIZES,
    *OVERLAPS,
    *COUNTS,
    *CROWDS,
    *SOUND_ZIPS,
)
