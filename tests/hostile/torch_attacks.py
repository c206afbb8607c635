"""Attacks 74 and 82-85 on torch files: older formats, and what is around the pickle."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Sequence

import numpy as np
from attacks import LATE, READ, REFUSED, Attack, Ends
from growth_attacks import GROWTH_ATTACKS
from pickle_attacks import PICKLE_ATTACKS, PT, SOUND
from raw_pickle import (
    B_BYTES,
    LEGACY_MAGIC,
    PROTO,
    STOP,
    W_BYTES,
    checkpoint,
    glob,
    ints,
    items,
    legacy_checkpoint,
    legacy_file,
    legacy_system,
    listed,
    mapping,
    members,
    number,
    reduce,
    storage,
    tensor,
    text,
    torch_file,
)
from raw_zip import MIB, Part, archive, deflated, zeros
from storage_attacks import STORAGE_ATTACKS, of_bytes

FLOATS = glob("torch", "FloatStorage")


def of_members(
    name: str, item: int, what: str, parts: Sequence[Part], *words: str, ends: Ends = REFUSED
) -> Attack:
    """Return an attack that is a zip file of these members."""
    values = None if ends is REFUSED else SOUND
    return of_bytes(name, item, what, archive(parts), *words, ends=ends, values=values)


# ---------------------------------------------------------------------------- 74: older formats


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for name, content in (("storages", b"\x80\x02K\0."), ("tensors", b"x"), ("pickle", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return out.getvalue()


_VIEWED = tensor(
    storage("0", 6, FLOATS, items(text("v"), number(0), number(6))), 0, ints(2, 3), ints(3, 1)
)
_HALF = legacy_file(legacy_checkpoint())
_SYSTEM = glob("os", "system")
OLDER = (
    of_bytes("a tar file", 74, "what torch wrote before 0.1.10", _tar(), "tar"),
    *(
        of_bytes(f"a stream with {name}", 74, "what torch wrote before 1.6, broken", content)
        for name, content in {
            "another magic number": legacy_file(
                legacy_checkpoint(), magic=LEGACY_MAGIC.replace(b"\xfc", b"\xfd")
            ),
            "another protocol": legacy_file(
                legacy_checkpoint(), protocol=PROTO + b"M\xe8\x03" + STOP
            ),
            "a text for a protocol": legacy_file(
                legacy_checkpoint(), protocol=PROTO + text("1001") + STOP
            ),
            "a list for its system": legacy_file(
                legacy_checkpoint(), system=PROTO + listed() + STOP
            ),
            "a text for its byte order": legacy_file(
                legacy_checkpoint(), system=legacy_system(little=text("yes"))
            ),
            "no keys": legacy_file(legacy_checkpoint(), keys=b""),
            "a mapping for its keys": legacy_file(
                legacy_checkpoint(), keys=PROTO + mapping() + STOP
            ),
            "a key too few": legacy_file(
                legacy_checkpoint(), keys=PROTO + listed(text("0")) + STOP, storages=[(6, W_BYTES)]
            ),
            "a key too many": legacy_file(
                legacy_checkpoint(), keys=PROTO + listed(*map(text, "012")) + STOP
            ),
            "a key twice": legacy_file(
                legacy_checkpoint(), keys=PROTO + listed(text("0"), text("0")) + STOP
            ),
            "a number for a key": legacy_file(
                legacy_checkpoint(), keys=PROTO + listed(text("0"), number(1)) + STOP
            ),
            "another count": legacy_file(
                legacy_checkpoint(), storages=[(5, W_BYTES[:20]), (3, B_BYTES)]
            ),
            "a negative count": legacy_file(
                legacy_checkpoint(), storages=[(-6, W_BYTES), (3, B_BYTES)]
            ),
            "a count of 2^62": legacy_file(
                legacy_checkpoint(), storages=[(1 << 62, W_BYTES), (3, B_BYTES)]
            ),
            "half its data": _HALF[:-6],
            "no data": _HALF[:-52],
            "bytes behind it": legacy_file(legacy_checkpoint(), tail=b"junk"),
            "a view of a storage": legacy_file(legacy_checkpoint(weight=_VIEWED)),
            "no pickle": legacy_file(b""),
            "a pickle without STOP": legacy_file(legacy_checkpoint()[:-1]),
        }.items()
    ),
    of_bytes(
        "a stream that calls",
        69,
        "a call in the pickle of a stream: nothing of it is written again",
        legacy_file(legacy_checkpoint((text("x"), reduce(_SYSTEM, text("true"))))),
        ends=READ,
        values=SOUND,
    ),
    of_bytes(
        "a stream whose system calls",
        69,
        "a call in the pickle that tells of the system",
        legacy_file(
            legacy_checkpoint(),
            system=legacy_system(little=reduce(_SYSTEM, text("true"))),
        ),
    ),
    *(
        of_bytes(
            f"a plain pickle called {suffix}",
            85,
            "what a scanner that goes by names does not look at",
            PROTO + reduce(_SYSTEM, text("true")) + STOP,
            suffix=suffix,
        )
        for suffix in (PT, ".pth", ".bin", ".ckpt")
    ),
)

# ---------------------------------------------------------------------------- 82-86: the container

_PICKLE = checkpoint()
_PARTS = members(_PICKLE)
_W, _B = np.frombuffer(W_BYTES, "<f4"), np.frombuffer(B_BYTES, "<f4")
_SWAPPED = {"0": _W.astype(">f4").tobytes(), "1": _B.astype(">f4").tobytes()}


def replaced(ordinal: int, **fields: object) -> list[Part]:
    """The members of a sound file, one of which has other fields."""
    parts = members(_PICKLE)
    for name, value in fields.items():
        setattr(parts[ordinal], name, value)
    return parts


def _packed(ordinal: int) -> list[Part]:
    parts = members(_PICKLE)
    parts[ordinal] = deflated(parts[ordinal].name, parts[ordinal].data)
    return parts


ROOTS = (
    of_members(
        "two data.pkl", 82, "two pickles of one name", [*_PARTS, Part(b"archive/data.pkl", _PICKLE)]
    ),
    of_members(
        "two roots",
        82,
        "a second pickle under another root",
        [*_PARTS, *members(_PICKLE, root="other")],
    ),
    of_members(
        "a second pickle deeper",
        82,
        "data.pkl at two depths",
        [*_PARTS, Part(b"archive/archive/data.pkl", _PICKLE)],
    ),
    of_members("no data.pkl", 82, "records without a pickle", _PARTS[1:]),
    of_members(
        "data.pkl at the root",
        82,
        "a pickle that lies in no folder",
        [Part(b"data.pkl", _PICKLE), *_PARTS[1:]],
    ),
    of_members("a root that climbs", 82, "no path to us", members(_PICKLE, root=".."), ends=READ),
    of_members(
        "a record twice", 82, "two records of one key", [*_PARTS, Part(b"archive/data/0", W_BYTES)]
    ),
    of_members(
        "a compiled model",
        82,
        "TorchScript: code",
        [
            *_PARTS,
            Part(b"archive/constants.pkl", PROTO + b")."),
            Part(b"archive/code/__torch__.py", b"pass"),
        ],
        "TorchScript",
    ),
)
ORDERS = (
    of_bytes(
        "big-endian",
        83,
        "another byte order: read all the same",
        torch_file(_PICKLE, _SWAPPED, byteorder=b"big"),
        ends=READ,
        values=SOUND,
    ),
    of_bytes(
        "no byte order",
        83,
        "older files have none",
        torch_file(_PICKLE, byteorder=None),
        ends=READ,
        values=SOUND,
    ),
    of_bytes(
        "middle-endian", 83, "a byte order that is none", torch_file(_PICKLE, byteorder=b"middle")
    ),
    of_bytes(
        "an empty byte order", 83, "a byte order that is none", torch_file(_PICKLE, byteorder=b"")
    ),
    of_bytes(
        "a byte order of 1 MB",
        83,
        "a byte order that is none",
        torch_file(_PICKLE, byteorder=b"l" * MIB),
    ),
    of_members(
        "a byte order that is a bomb",
        83,
        "1 KB that inflates to 1 MB",
        [
            *(part for part in _PARTS if b"byteorder" not in part.name),
            Part(b"archive/byteorder", zeros(1), 8, crc=0, size=MIB),
        ],
    ),
)
PACKED = (
    of_members("a deflated record", 84, "data that cannot be read in place", _packed(2)),
    of_members(
        "a deflated pickle", 84, "small and inflated: read all the same", _packed(0), ends=READ
    ),
    of_members(
        "a record that is a bomb",
        84,
        "1 MB that inflates to 1 GiB",
        replaced(2, data=zeros(1024), method=8, size=24),
    ),
    of_members(
        "a pickle that is a bomb",
        84,
        "1 MB that inflates to 1 GiB",
        replaced(0, data=zeros(1024), method=8, size=1 << 30),
    ),
    of_members(
        "a pickle that is a secret bomb",
        84,
        "1 MB that inflates to 1 GiB, said to be small",
        replaced(0, data=zeros(1024), method=8, size=len(_PICKLE)),
    ),
)
_FLIPPED = bytes([W_BYTES[0] ^ 1]) + W_BYTES[1:]
CHECKS = (
    of_members(
        "a flipped byte",
        85,
        "one byte of a storage changed",
        replaced(2, data=_FLIPPED, crc=zlib.crc32(W_BYTES)),
        ends=LATE,
    ),
    of_members(
        "no CRC for a storage",
        85,
        "a CRC of 0 where others have theirs",
        replaced(2, crc=0),
        ends=LATE,
    ),
    of_members(
        "another CRC for the pickle",
        85,
        "a pickle that is not what its CRC says",
        replaced(0, crc=1),
    ),
    of_members(
        "no CRCs at all",
        85,
        "set_crc32_options(False): all are 0, and none is checked",
        [Part(part.name, part.data, crc=0) for part in _PARTS],
        ends=READ,
    ),
    of_members(
        "an encrypted pickle", 85, "a flag that makes other readers skip it", replaced(0, flags=1)
    ),
    of_members(
        "a flag inside only", 85, "local and central flags differ", replaced(0, local={"flags": 1})
    ),
    of_members(
        "a flag outside only",
        85,
        "local and central flags differ",
        replaced(0, central={"flags": 0x20}),
    ),
    of_members(
        "another name inside",
        85,
        "a pickle that scanners look for elsewhere",
        replaced(0, local={"name": b"archive/data.txt"}),
    ),
    of_members(
        "another name outside",
        85,
        "a pickle that scanners look for elsewhere",
        replaced(0, central={"name": b"archive/data.txt"}),
    ),
    of_members(
        "a pickle of another suffix",
        85,
        "a second pickle, that nobody loads",
        [*_PARTS, Part(b"archive/config.p", PROTO + reduce(_SYSTEM, text("true")) + STOP)],
        ends=READ,
    ),
)


TORCH_ATTACKS = (
    *PICKLE_ATTACKS,
    *GROWTH_ATTACKS,
    *STORAGE_ATTACKS,
    *OLDER,
    *ROOTS,
    *ORDERS,
    *PACKED,
    *CHECKS,
)
