"""The formats by name, and what a path holds, told by content rather than by suffix.

A format is an index: parse the headers, check everything, say where each tensor lies. One reader
(`ema_cli.engine`) then serves all formats, and writing is the mirror image (`ema_cli.output`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ema_cli.errors import InputError
from ema_cli.files import open_input, read_exact
from ema_cli.formats import foreign, safetensors, sharded
from ema_cli.formats.safetensors import Known
from ema_cli.tensors import Checkpoint
from ema_cli.text import shorten

__all__ = ["FORMATS", "Format", "Known", "detect", "read", "read_as"]


class Format(NamedTuple):
    """One row of the table.

    Attributes:
        title: for people.
        folder: whether a checkpoint of it is a folder.
        suffix: of a single file, or empty.
        read: path and known indexes to a checkpoint.
    """

    title: str
    folder: bool
    suffix: str
    read: Callable[[str, Known], Checkpoint]


FORMATS: Mapping[str, Format] = {
    safetensors.NAME: Format("safetensors file", False, safetensors.SUFFIX, safetensors.read),
    sharded.NAME: Format("Hugging Face folder", True, "", sharded.read),
}


def detect(path: str) -> str | None:
    """Return the name of the format of `path`, or None when it is no checkpoint we know.

    Raises `InputError` when it cannot be looked at.
    """
    if os.path.isdir(path):
        return sharded.NAME if sharded.is_checkpoint(path) else None
    if path.endswith(sharded.INDEX_SUFFIX):
        return sharded.NAME
    if path.endswith(safetensors.SUFFIX):
        return safetensors.NAME
    start, file_size = _start(path)
    return safetensors.NAME if safetensors.sniff(start, file_size) else None


def _start(path: str) -> tuple[bytes, int]:
    fd = open_input(path)
    try:
        n_bytes = os.fstat(fd).st_size
        start = bytearray(min(n_bytes, 16))
        read_exact(fd, memoryview(start), 0, path)
        return bytes(start), n_bytes
    finally:
        os.close(fd)


def read(path: str, known: Known) -> Checkpoint:
    """Return the checkpoint at `path`: headers only, fully checked. Raises `InputError`."""
    name = detect(path)
    if name is None:
        raise _unreadable(path)
    return read_as(name, path, known)


def read_as(name: str, path: str, known: Known) -> Checkpoint:
    """Return the checkpoint at `path`, whose format `detect` said is `name`."""
    if name == safetensors.NAME:
        foreign.refuse_disguise(path, _start(path)[0])
    return FORMATS[name].read(path, known)


def _unreadable(path: str) -> InputError:
    """Return the error that says what `path` is and what would convert it."""
    known = foreign.recognise(path)
    if known is not None:
        return foreign.unread(path, known)
    shown = shorten(path, 1000)
    if os.path.isdir(path):
        _, weights = sharded.contents(path)
        found = f"{len(weights)} and no index" if weights else "none"
        return InputError(
            f"{shown}: expected a checkpoint folder with an index or exactly one "
            f"{safetensors.SUFFIX} file, found {found}"
        )
    return InputError(f"{shown}: not a checkpoint: expected a safetensors file or folder")
