"""The formats by name, and what a path holds, told by content rather than by suffix.

A format is an index: parse the headers, check everything, say where each tensor lies. One reader
(`ema_cli.engine`) then serves all formats, and writing is the mirror image (`ema_cli.output`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ema_cli.errors import InputError, UnsupportedInput
from ema_cli.files import open_input
from ema_cli.formats import safetensors, sharded
from ema_cli.formats.safetensors import Known
from ema_cli.tensors import Checkpoint
from ema_cli.text import shorten

__all__ = ["FOREIGN_SUFFIXES", "FORMATS", "Format", "Known", "detect", "known_but_unread", "read"]


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

# Suffixes that name a checkpoint format of somebody else, with what to do about it.
FOREIGN_SUFFIXES: Mapping[str, str] = {
    ".pt": "PyTorch",
    ".pth": "PyTorch",
    ".ckpt": "PyTorch Lightning",
    ".bin": "PyTorch",
    ".distcp": "torch DCP",
    ".h5": "Keras HDF5",
    ".keras": "Keras",
    ".npz": "NumPy",
    ".index": "TensorFlow",
    ".gguf": "GGUF",
    ".onnx": "ONNX",
    ".msgpack": "Flax",
}

# First bytes that name a format whatever the suffix says.
_MAGIC = (
    (b"PK\x03\x04", "a zip container (PyTorch, Keras or NumPy)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x80\x02", "a pickle"),
    (b"GGUF", "a GGUF file"),
)


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
        return os.pread(fd, 16, 0), os.fstat(fd).st_size
    finally:
        os.close(fd)


def read(path: str, known: Known) -> Checkpoint:
    """Return the checkpoint at `path`: headers only, fully checked. Raises `InputError`."""
    name = detect(path)
    if name is None:
        raise known_but_unread(path)
    if name == safetensors.NAME:
        _refuse_disguise(path)
    return FORMATS[name].read(path, known)


def _refuse_disguise(path: str) -> None:
    """Refuse a file called .safetensors that begins as another format does."""
    start, _ = _start(path)
    for magic, title in _MAGIC:
        if start.startswith(magic) and start[8:9] != b"{":
            raise UnsupportedInput(
                f"{shorten(path, 1000)}: expected a safetensors file, found {title}"
            )


def known_but_unread(path: str) -> InputError:
    """Return the error that says what `path` is and what would convert it."""
    shown = shorten(path, 1000)
    if os.path.isdir(path):
        return InputError(
            f"{shown}: expected a checkpoint folder with an index or exactly one "
            f"{safetensors.SUFFIX} file, found none"
        )
    suffix = os.path.splitext(path)[1]
    title = FOREIGN_SUFFIXES.get(suffix)
    if title:
        return UnsupportedInput(
            f"{shown}: {title} checkpoints are not read by this version",
            "save the weights as safetensors first: safetensors.torch.save_file, "
            "safetensors.numpy.save_file or safetensors.tensorflow.save_file",
        )
    return InputError(f"{shown}: not a checkpoint: expected a safetensors file or folder")
