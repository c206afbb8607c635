"""What a path holds, told by content before suffix."""

from __future__ import annotations

import os

from ema_cli.files import open_input, read_exact
from ema_cli.formats import folders, hdf5, npz, safetensors, tensorflow, torch

_START = 512
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
# A local header of a zip file: 30 bytes, with the length of the name that follows at 26, u16le.
_NAME_LENGTH, _NAME = 26, 30


def detect(path: str) -> str | None:
    """Return the name of the format of `path`, or None when it is no checkpoint we know.

    Raises `InputError` when it cannot be looked at.
    """
    if os.path.isdir(path):
        return _folder(path)
    kind = folders.kind_of(path)
    if kind is not None:
        return kind.name
    if path.endswith(safetensors.SUFFIX):
        return safetensors.NAME
    if tensorflow.prefix_of(path) is not None:
        return tensorflow.NAME
    return _file(path)


def _folder(path: str) -> str | None:
    kind = folders.kind_of(path)
    if kind is not None:
        return kind.name
    inside = folders.only_file(path)
    if inside is not None:
        return detect(inside)
    found = tensorflow.prefix_in(path) or tensorflow.prefix_of(path)
    return tensorflow.NAME if found else None


def _file(path: str) -> str | None:
    start, file_size = start_of(path)
    suffix = os.path.splitext(path)[1]
    if start.startswith(_ZIP):
        return _zip(start, suffix)
    if hdf5.sniff(start) or suffix in hdf5.SUFFIXES:
        return hdf5.NAME
    if torch.sniff(start):
        return torch.NAME
    if suffix == npz.SUFFIX:
        return npz.NAME
    if suffix == hdf5.KERAS_SUFFIX:
        return hdf5.KERAS
    if safetensors.sniff(start, file_size):
        return safetensors.NAME
    # What is called so and is not: damaged, unless it is TensorFlow's first format.
    named = suffix in torch.SUFFIXES and suffix != ".bin" and not tensorflow.is_v1(path)
    return torch.NAME if named else None


def _zip(start: bytes, suffix: str) -> str:
    """Return the format of a zip file, by its first member or else by its suffix."""
    length = int.from_bytes(start[_NAME_LENGTH : _NAME_LENGTH + 2], "little")
    first = start[_NAME : _NAME + length]
    if first.endswith(b".npy") or (suffix == npz.SUFFIX and b"/data.pkl" not in first):
        return npz.NAME
    if first in (b"metadata.json", b"config.json") or suffix == hdf5.KERAS_SUFFIX:
        return hdf5.KERAS
    return torch.NAME


def start_of(path: str) -> tuple[bytes, int]:
    """Return the first bytes of a file, and its size."""
    fd = open_input(path)
    try:
        n_bytes = os.fstat(fd).st_size
        start = bytearray(min(n_bytes, _START))
        read_exact(fd, memoryview(start), 0, path)
        return bytes(start), n_bytes
    finally:
        os.close(fd)
