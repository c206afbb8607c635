"""PyTorch files since 1.6: zip archives of a pickle and one member for each storage.

Members of ``R/``, where R is any name: ``data.pkl``; ``byteorder`` ("little" unless it says
"big"); ``data/KEY``, the bytes of the storage with that key, stored and never compressed. Others
do not matter here. Every member has a CRC-32, which torch.load does not look at; torch.save can
be told to leave them all 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ema_cli.errors import DamagedFile, UnsupportedInput
from ema_cli.formats import zips
from ema_cli.formats.torch.indexing import Contents, Stored
from ema_cli.formats.torch.machine import load
from ema_cli.formats.torch.nodes import Global
from ema_cli.formats.zips import STORED, Archive, Member
from ema_cli.tensors import Stamp
from ema_cli.text import shorten

PICKLE = "data.pkl"
# 20,000 tensors take 3 MiB; the machine takes half a second for as much.
PICKLE_LIMIT = 64 << 20
MAGIC = (b"PK\3\4", b"PK\5\6")

_WHAT = "a PyTorch file"
_BYTE_ORDERS = {b"little": False, b"big": True}
_SHORT = 64


def contents(fd: int, file: Stamp) -> Contents:
    """Return what an open archive holds: all of it checked but the bytes of its storages.

    Raises `DamagedFile`, and `UnsupportedInput` for TorchScript and compressed storages.
    """
    archive = zips.read_archive(fd, file.path, 0, file.size, what=_WHAT)
    pickled = _pickle(file.path, archive)
    stem = pickled.name.removesuffix(PICKLE)
    _refuse_script(file.path, archive, stem)
    # torch.serialization.set_crc32_options(False) leaves every CRC 0.
    unchecked = not any(member.crc for member in archive.members)
    for member in archive.members:  # what no tensor lies in comes along in copies
        if member is not pickled and not member.name.startswith(f"{stem}data/"):
            zips.inflate_to(fd, file.path, member, _ignore, unchecked=unchecked)
    data = zips.member_bytes(fd, file.path, pickled, PICKLE_LIMIT, unchecked=unchecked)

    def parse() -> tuple[Any, Sequence[Global]]:
        root, end, names = load(data, file.path, PICKLE)
        if end != len(data):
            raise DamagedFile(file.path, f"{PICKLE}: {len(data) - end:,} bytes follow its end")
        return root, names

    return Contents(
        parse,
        _storages(file.path, archive, f"{stem}data/"),
        _big_endian(fd, file.path, archive.by_name.get(f"{stem}byteorder"), unchecked),
        hashlib.sha256(archive.directory + data).hexdigest(),
        hashlib.sha256(f"{archive.structure()} {unchecked} ".encode() + data).hexdigest(),
        not unchecked,
        cloned=True,
    )


def _ignore(data: memoryview) -> None:
    del data


def _pickle(path: str, archive: Archive) -> Member:
    """Return the only member called ``R/data.pkl``."""
    found = [m for m in archive.members if m.name.endswith(f"/{PICKLE}")]
    if len(found) != 1 or found[0].name.count("/") != 1:
        names = ", ".join(shorten(member.name) for member in (found or archive.members)[:3])
        raise DamagedFile(
            path,
            f"expected {_WHAT}, a zip file with one NAME/{PICKLE}, found {len(found)}: it holds "
            + (names or "nothing"),
        )
    return found[0]


def _refuse_script(path: str, archive: Archive, stem: str) -> None:
    script = f"{stem}constants.pkl" in archive.by_name or any(
        member.name.startswith(f"{stem}code/") for member in archive.members
    )
    if script:
        raise UnsupportedInput(
            f"{shorten(path, 1000)}: a TorchScript archive, which holds a program",
            "save its tensors: torch.save(torch.jit.load(FILE).state_dict(), 'OUT.pt')",
        )


def _storages(path: str, archive: Archive, prefix: str) -> dict[str, Stored]:
    found = {}
    for member in archive.members:
        if not member.name.startswith(prefix):
            continue
        if member.method != STORED:
            raise UnsupportedInput(
                f"{shorten(path, 1000)}: zip member '{shorten(member.name)}' is compressed",
                "save it again with torch.save, which compresses nothing",
            )
        key = member.name.removeprefix(prefix)
        found[key] = Stored(member.offset, member.size, member.crc, member.crc_at)
    return found


def _big_endian(fd: int, path: str, member: Member | None, unchecked: bool) -> bool:
    if member is None:
        return False
    order = zips.member_bytes(fd, path, member, _SHORT, unchecked=unchecked)
    if order not in _BYTE_ORDERS:
        found = shorten(order.decode("latin-1"))
        raise DamagedFile(path, f"expected byte order little or big, found '{found}'")
    return _BYTE_ORDERS[order]
