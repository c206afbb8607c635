"""Checkpoint formats of others that are recognised but not read, and what converts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from ema_cli.errors import UnsupportedInput
from ema_cli.text import shorten


class Foreign(NamedTuple):
    """A format of somebody else: its name, and the command or call that converts it."""

    title: str
    convert: str


SUFFIXES: Mapping[str, Foreign] = {
    ".distcp": Foreign(
        "torch DCP", "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR OUT.pt"
    ),
    ".gguf": Foreign("GGUF", "average the checkpoints the GGUF file was made from"),
    ".onnx": Foreign("ONNX", "average the checkpoints the ONNX file was exported from"),
    ".msgpack": Foreign(
        "Flax", "transformers: model.save_pretrained(DIR, safe_serialization=True)"
    ),
}

# A file that is enough to tell what a folder holds.
_FOLDERS: Mapping[str, Foreign] = {
    ".metadata": SUFFIXES[".distcp"],
    "zero_to_fp32.py": Foreign(
        "DeepSpeed ZeRO", "python zero_to_fp32.py . OUT --safe_serialization"
    ),
    "flax_model.msgpack": SUFFIXES[".msgpack"],
}

# First bytes that name a format whatever the suffix says.
_MAGIC = (
    (b"PK\x03\x04", "a zip container (PyTorch, Keras or NumPy)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x80\x02", "a pickle"),
    (b"GGUF", "a GGUF file"),
)


def recognise(path: str) -> Foreign | None:
    """Return what `path` is, by its suffix or by what its folder holds, or None."""
    if not os.path.isdir(path):
        return SUFFIXES.get(os.path.splitext(path)[1])
    return next(
        (foreign for name, foreign in _FOLDERS.items() if os.path.isfile(os.path.join(path, name))),
        None,
    )


def refuse_disguise(path: str, start: bytes) -> None:
    """Refuse a file called .safetensors whose first bytes are those of another format."""
    for magic, title in _MAGIC:
        if start.startswith(magic) and start[8:9] != b"{":
            raise UnsupportedInput(
                f"{shorten(path, 1000)}: expected a safetensors file, found {title}",
                "give the file the suffix of what it is, such as .pt, .npz or .h5",
            )


def unread(path: str, foreign: Foreign) -> UnsupportedInput:
    """Return the error for a known format that is not read."""
    return UnsupportedInput(
        f"{shorten(path, 1000)}: {foreign.title} checkpoints are not read by this version",
        f"convert it first: {foreign.convert}",
    )
