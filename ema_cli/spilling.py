"""What cannot be read where it lies is first written to a file from which it can: spilled.

Compressed members and chunks have no bytes to point at. Their format gives them extents in one
more file of the checkpoint, the last, which has no path until it is made here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator

from ema_cli import durable
from ema_cli.errors import StorageError
from ema_cli.files import stamp_of
from ema_cli.formats import FORMATS
from ema_cli.tensors import Checkpoint, Tensor
from ema_cli.text import shorten, size


def is_spilled(checkpoint: Checkpoint, tensor: Tensor) -> bool:
    """Whether a tensor has no bytes yet that could be read."""
    return not tensor.slices and tensor.nbytes > 0 and not _stamp_path(checkpoint, tensor)


def _stamp_path(checkpoint: Checkpoint, tensor: Tensor) -> str:
    return checkpoint.files[tensor.extent.file].path


def spilled(checkpoint: Checkpoint, names: Collection[str]) -> list[str]:
    """Return those of the named tensors that have to be spilled."""
    if checkpoint.files[-1].path:
        return []  # every file is there
    tensors = (tensor for tensor in checkpoint.index.tensors if tensor.name in names)
    return [tensor.name for tensor in tensors if is_spilled(checkpoint, tensor)]


def spilled_bytes(checkpoint: Checkpoint, names: Collection[str]) -> int:
    """Return how many bytes the named tensors take that have to be spilled."""
    by_name = checkpoint.index.by_name
    return sum(by_name[name].nbytes for name in spilled(checkpoint, names))


def spill(checkpoint: Checkpoint, names: Collection[str], path: str) -> Checkpoint:
    """Return the checkpoint with the bytes of the named tensors in a new file at `path`."""
    wanted = spilled(checkpoint, names)
    row = FORMATS[checkpoint.index.format]
    if not wanted or row.spill is None:
        return checkpoint
    needed, free = spilled_bytes(checkpoint, wanted), durable.free_bytes(os.path.dirname(path))
    if needed > free:
        raise StorageError(
            f"{shorten(os.path.dirname(path), 1000)}: needs {size(needed)} for what cannot be read "
            f"in place, the disk has {size(free)} free",
            "free some space, or save the checkpoints without compression",
        )
    os.close(durable.create_locked(path))
    os.truncate(path, checkpoint.files[-1].size)
    row.spill(checkpoint, wanted, path)
    return dataclasses.replace(checkpoint, files=(*checkpoint.files[:-1], stamp_of(path)))


@contextlib.contextmanager
def readable(checkpoint: Checkpoint, names: Collection[str]) -> Iterator[Checkpoint]:
    """Yield the checkpoint with the named tensors readable, by a temporary file if need be."""
    if not spilled(checkpoint, names):
        yield checkpoint
        return
    import tempfile  # with what compresses, which few need

    with tempfile.TemporaryDirectory(prefix="ema-avg-") as directory:
        yield spill(checkpoint, names, os.path.join(directory, "spilled"))
