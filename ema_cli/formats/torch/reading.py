"""Reads PyTorch files of both kinds, told apart by how they begin."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ema_cli.errors import DamagedFile, UnsupportedInput
from ema_cli.files import open_input, open_unchanged, read_exact, stamp
from ema_cli.formats.known import Known
from ema_cli.formats.torch import archive, legacy
from ema_cli.formats.torch.indexing import Contents, checkpoint_of
from ema_cli.tensors import Checkpoint, Stamp
from ema_cli.text import shorten

_START = 512
_RESAVE = "load it with the program that wrote it, then torch.save(model.state_dict(), 'OUT.pt')"
# What else is called .pt or .bin.
_OTHERS = (
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file with git lfs pull"),
    (b"GGUF", "a GGUF file"),
)


def sniff(start: bytes) -> bool:
    """Whether a file that begins so may be a PyTorch file."""
    return start.startswith(archive.MAGIC) or legacy.sniff(start)


def read(path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint in the file `path`: all of it checked but the bytes of its tensors.

    Args:
        path: of the file.
        known: what was parsed before.
        key: where the model is in it, or empty to find it.

    Raises `DamagedFile` for each broken invariant, `UnsupportedInput` for what is not read,
    `Disagreement` when it holds several models, `UsageError` when it holds none at `key`.
    """
    fd = open_input(path)
    try:
        file = stamp(fd, path)
        with uncollected():
            return checkpoint_of(file, _contents(fd, file), known, key)
    finally:
        os.close(fd)


def contents_of(file: Stamp) -> Contents:
    """Return what a file holds that was read before; raises `InputChanged` if it changed."""
    fd = open_unchanged(file)
    try:
        with uncollected():
            return _contents(fd, file)
    finally:
        os.close(fd)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from looking for garbage: among 20,000 tensors that takes as long as reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _contents(fd: int, file: Stamp) -> Contents:
    start = bytearray(min(_START, file.size))
    read_exact(fd, memoryview(start), 0, file.path)
    head = bytes(start)
    if head.startswith(archive.MAGIC):
        return archive.contents(fd, file)
    if legacy.sniff(head):
        return legacy.contents(fd, file)
    raise _refusal(file.path, head)


def _refusal(path: str, start: bytes) -> DamagedFile | UnsupportedInput:
    shown = shorten(path, 1000)
    if legacy.is_tar(start):
        return UnsupportedInput(
            f"{shown}: a tar archive, as PyTorch before 0.1.10 wrote it",
            "torch.save(torch.load(FILE, weights_only=False), 'OUT.pt')",
        )
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return UnsupportedInput(f"{shown}: a pickle that torch.save did not write", _RESAVE)
    found = next((title for magic, title in _OTHERS if start.startswith(magic)), "neither")
    return DamagedFile(
        path, f"expected a PyTorch file, a zip archive or a stream of pickles, found {found}"
    )
