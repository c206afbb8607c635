"""Zip files written field by field, so that every field can lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
MIB = 1 << 20
U32 = 0xFFFFFFFF


@dataclass
class Part:
    """A member: what is stored, and what its headers say of it.

    Attributes:
        name: as in both headers.
        data: the bytes as they lie in the file.
        method: 0 stored, 8 deflated.
        flags: of both headers.
        crc: of what is stored, unless given.
        size: bytes once inflated; those stored, unless given.
        local: fields of the local header that differ (``name``, ``extra``, ``crc``, …).
        central: fields of the central entry that differ (also ``offset``).
        after: bytes between the data and the next local header.
    """

    name: bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    local: Mapping[str, Any] = field(default_factory=dict)
    central: Mapping[str, Any] = field(default_factory=dict)
    after: bytes = b""

    def fields(self) -> dict[str, Any]:
        """What an honest header says."""
        return {
            "version": 20,
            "flags": self.flags,
            "method": self.method,
            "crc": zlib.crc32(self.data) if self.crc is None else self.crc,
            "nbytes": len(self.data),
            "size": len(self.data) if self.size is None else self.size,
            "name": self.name,
            "extra": b"",
            "comment": b"",
            "disk": 0,
        }


def deflated(name: bytes, data: bytes, **fields: Any) -> Part:
    """Return a deflated member."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(data) + packer.flush()
    return Part(name, packed, **{"method": 8, "crc": zlib.crc32(data), "size": len(data), **fields})


def zeros(n_mib: int) -> bytes:
    """Return a deflate stream of so many MiB of zeros: each MiB is the same 1 kB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    one = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return one * n_mib + packer.flush()


def local_header(said: Mapping[str, Any]) -> bytes:
    """Return a local header with its name and extra field."""
    numbers = (said["version"], said["flags"], said["method"], 0, 0)
    sizes = (said["crc"], said["nbytes"], said["size"], len(said["name"]), len(said["extra"]))
    return LOCAL.pack(b"PK\x03\x04", *numbers, *sizes) + said["name"] + said["extra"]


def central_entry(said: Mapping[str, Any]) -> bytes:
    """Return an entry of the central directory."""
    numbers = (said["version"], said["version"], said["flags"], said["method"], 0, 0)
    sizes = (said["crc"], said["nbytes"], said["size"], len(said["name"]), len(said["extra"]))
    rest = (len(said["comment"]), said["disk"], 0, 0, said["offset"])
    tail: bytes = said["name"] + said["extra"] + said["comment"]
    return CENTRAL.pack(b"PK\x01\x02", *numbers, *sizes, *rest) + tail


def archive(
    parts: Sequence[Part],
    *,
    end: Mapping[str, Any] | None = None,
    end64: Mapping[str, Any] | None = None,
    locator: Mapping[str, Any] | None = None,
    comment: bytes = b"",
    prefix: bytes = b"",
    between: bytes = b"",
    suffix: bytes = b"",
) -> bytes:
    """Return a zip file of these parts.

    `end`, `end64` and `locator` are what the end records say differently (the latter two exist only
    where given); `prefix` goes before the first member, moving every offset, `between` before the
    central directory and `suffix` behind everything.
    """
    body, entries = bytearray(prefix), b""
    for part in parts:
        said = {**part.fields(), "offset": len(body)}
        body += local_header({**said, **part.local}) + part.data + part.after
        entries += central_entry({**said, **part.central})
    body += between
    honest = {"count": len(parts), "here": len(parts), "nbytes": len(entries), "offset": len(body)}
    at = len(body) + len(entries)
    records = b""
    if end64 is not None:
        records += _end64({**honest, **end64})
        records += _locator({"offset": at, "disk": 0, "disks": 1, **(locator or {})})
    records += _end({**honest, **(end or {})}, comment)
    return bytes(body) + entries + records + suffix


def assembled(body: bytes, entries: Sequence[bytes]) -> bytes:
    """Return a zip file of this body and these entries of its directory."""
    rows = {"count": len(entries), "here": len(entries), "offset": len(body)}
    directory = b"".join(entries)
    return body + directory + _end({**rows, "nbytes": len(directory)}, b"")


def end_record(count: int, nbytes: int, offset: int) -> bytes:
    """Return an end record."""
    return _end({"count": count, "here": count, "nbytes": nbytes, "offset": offset}, b"")


def stored_block(data: bytes) -> bytes:
    """Return a deflate block that is not compressed, and not the last."""
    length = len(data).to_bytes(2, "little")
    return b"\0" + length + bytes(byte ^ 0xFF for byte in length) + data


def _end(said: Mapping[str, Any], comment: bytes) -> bytes:
    disks = (said.get("disk", 0), said.get("start", 0))
    rest = (said["here"], said["count"], said["nbytes"], said["offset"])
    length = said.get("comment", len(comment))
    return END.pack(b"PK\x05\x06", *disks, *rest, length) + comment


def _end64(said: Mapping[str, Any]) -> bytes:
    rest = (said["here"], said["count"], said["nbytes"], said["offset"])
    disks = (said.get("disk", 0), said.get("start", 0))
    return END64.pack(b"PK\x06\x06", said.get("record", 44), 45, 45, *disks, *rest)


def _locator(said: Mapping[str, Any]) -> bytes:
    return LOCATOR.pack(b"PK\x06\x07", said["disk"], said["offset"], said["disks"])


def many(count: int, data: bytes) -> bytes:
    """Return a sound zip64 file of `count` members ``00000000.npy`` and so on, all alike."""
    names = np.char.add(np.char.zfill(np.arange(count).astype("S8"), 8), b".npy")
    part = Part(b"?" * 12, data)
    local = _rows(local_header(part.fields()) + data, names, 30)
    entries = _rows(central_entry({**part.fields(), "offset": 0}), names, 46)
    offsets = np.arange(count, dtype="<u4") * local.shape[1]
    entries[:, 42:46] = offsets.view(np.uint8).reshape(-1, 4)
    rows = {"count": count, "here": count, "nbytes": entries.size, "offset": local.size}
    at = local.size + entries.size
    records = _end64(rows) + _locator({"disk": 0, "offset": at, "disks": 1})
    return local.tobytes() + entries.tobytes() + records + _end(_ceiling(rows), b"")


def _ceiling(rows: Mapping[str, int]) -> dict[str, int]:
    """What the end record says of numbers that it has no room for."""
    said = {name: min(rows[name], 0xFFFF) for name in ("count", "here")}
    return {**said, "nbytes": rows["nbytes"], "offset": rows["offset"]}


def _rows(one: bytes, names: np.ndarray, at: int) -> np.ndarray:
    rows = np.tile(np.frombuffer(one, np.uint8), (len(names), 1))
    rows[:, at : at + names.itemsize] = names.view(np.uint8).reshape(len(names), -1)
    return rows
