"""PyTorch files before 1.6: a stream of pickles and storages. They are read, not written.

Five pickles follow each other: a magic number, 1001 (the version), a dict that tells the byte
order, what was saved, and the list of the keys of its storages. Then, for each key in that order,
i64le the number of elements, and the bytes. torch.save writes this still when it is told to, with
``_use_new_zipfile_serialization=False``.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ema_cli.errors import DamagedFile, UnsupportedInput
from ema_cli.files import read_exact
from ema_cli.formats.torch.indexing import Contents, Stored
from ema_cli.formats.torch.machine import load
from ema_cli.formats.torch.nodes import Global, StorageRef
from ema_cli.formats.torch.survey import storages
from ema_cli.tensors import Stamp
from ema_cli.text import shorten

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# LONG1, ten bytes; protocol 4 has nine bytes for a frame before it.
_MAGIC = b"\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little")
_FRAME = b"\x95"
_VERSION = 1001
# Of a tar archive, and what stands there.
_TAR_AT, _TAR = 257, b"ustar"

# How much of the file is read for the pickles, whose length nothing tells.
_HEADS = (1 << 20, 8 << 20, 64 << 20)
_COUNT = 8

# Whether numbers are big-endian, what was saved, the names it mentions, the keys of storages.
_Said = tuple[bool, Any, list[Global], list[str]]


def sniff(start: bytes) -> bool:
    """Whether a file that begins so is such a stream."""
    at = 11 if start[2:3] == _FRAME else 2
    return start[:1] == b"\x80" and start[at:].startswith(_MAGIC)


def is_tar(start: bytes) -> bool:
    """Whether a file that begins so is a tar archive, as PyTorch before 0.1.10 wrote."""
    return start[_TAR_AT:].startswith(_TAR)


def contents(fd: int, file: Stamp) -> Contents:
    """Return what an open stream holds: all of it checked but the bytes of its storages.

    Raises `DamagedFile`, and `UnsupportedInput` for parts of storages kept as such.
    """
    header, (big_endian, root, names, keys) = _header(fd, file)
    return Contents(
        lambda: (root, names),
        _storages(fd, file, len(header), keys, root),
        big_endian,
        hashlib.sha256(header).hexdigest(),
        "",
        checked=False,
        cloned=False,
    )


def _header(fd: int, file: Stamp) -> tuple[bytes, _Said]:
    """Return the bytes of the pickles, and what they say."""
    *shorter, longest = (limit for limit in _HEADS if limit < file.size or limit == _HEADS[-1])
    for limit in shorter:
        try:
            return _pickles(file.path, _head(fd, file, limit))
        except DamagedFile:
            continue  # it may only have ended too soon
    return _pickles(file.path, _head(fd, file, longest))


def _head(fd: int, file: Stamp, limit: int) -> bytes:
    head = bytearray(min(limit, file.size))
    read_exact(fd, memoryview(head), 0, file.path)
    return bytes(head)


def _pickles(path: str, head: bytes) -> tuple[bytes, _Said]:
    magic, at, _ = load(head, path, "the magic number")
    version, at, _ = load(head, path, "the version", at)
    if magic != MAGIC_NUMBER or version != _VERSION:
        raise DamagedFile(path, f"expected version {_VERSION} of PyTorch's stream format")
    system, at, _ = load(head, path, "the system", at)
    little = system.get("little_endian") if isinstance(system, dict) else None
    if type(little) is not bool:
        raise DamagedFile(path, "expected a dict that tells the byte order")
    root, at, names = load(head, path, "the pickle", at)
    keys, at, _ = load(head, path, "the list of storages", at)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise DamagedFile(path, "expected a list of the keys of storages")
    if len(set(keys)) != len(keys):
        raise DamagedFile(path, "a storage stands twice in the list of storages")
    return head[:at], (not little, root, names, keys)


def _storages(fd: int, file: Stamp, at: int, keys: list[str], root: Any) -> dict[str, Stored]:
    """Return where each storage lies; the first begins, with its length, at offset `at`."""
    mentioned = storages(root)
    found = {}
    for key in keys:
        storage = mentioned.get(key)
        if storage is None:
            raise DamagedFile(file.path, f"nothing is of storage '{shorten(key)}'")
        _check_count(fd, file, storage, at)
        found[key] = Stored(at + _COUNT, storage.nbytes)
        at += _COUNT + storage.nbytes
    if at != file.size:
        kind = "truncated" if at > file.size else "trailing bytes"
        raise DamagedFile(file.path, f"{kind}: expected {at:,} bytes in all, found {file.size:,}")
    return found


def _check_count(fd: int, file: Stamp, storage: StorageRef, at: int) -> None:
    if storage.view is not None:
        raise UnsupportedInput(
            f"{shorten(file.path, 1000)}: storage '{shorten(storage.key)}' is a part of another",
            "save it again: torch.save(torch.load(FILE), 'OUT.pt')",
        )
    if at + _COUNT + storage.nbytes > file.size:
        raise DamagedFile(
            file.path,
            f"truncated: storage '{shorten(storage.key)}' needs {storage.nbytes:,} bytes at "
            f"offset {at + _COUNT:,}, the file has {file.size:,}",
        )
    raw = bytearray(_COUNT)
    read_exact(fd, memoryview(raw), at, file.path)
    count = int.from_bytes(raw, "little", signed=True)
    if count != storage.numel:
        raise DamagedFile(
            file.path,
            f"storage '{shorten(storage.key)}': expected {storage.numel:,} elements, "
            f"found {count:,}",
        )
