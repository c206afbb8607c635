"""Writes tensors that do not lie in their file as one to a file where they do.

The child process reads a box of a dataset at a time, each chunk once, and the rows of the box go to
their places: memory stays bounded whatever a dataset's size and chunks are.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence

from ema_cli.durable import write_exact
from ema_cli.errors import storage_errors
from ema_cli.formats.hdf5 import isolation
from ema_cli.formats.hdf5.isolation import Window
from ema_cli.formats.hdf5.structure import Dataset
from ema_cli.tensors import Extent

# At most so much is read at once, if a chunk is no larger.
BOX_BYTES = 16 << 20
_ALIGNMENT = 64

Box = tuple[tuple[int, ...], tuple[int, ...]]


def aligned(offset: int) -> int:
    """Return where the next tensor begins."""
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def size_of(extents: Iterable[Extent]) -> int:
    """Return the size of a file with these extents."""
    return max((offset + n_bytes for _, offset, n_bytes in extents), default=0)


def boxes_of(shape: Sequence[int], chunk: Sequence[int], width: int) -> list[Box]:
    """Return (starts, lengths) pairs that cover `shape`, in C order.

    Each consists of whole chunks, as many of them along the last dimensions as fit.
    """
    lengths = [1] * len(shape)
    if chunk:
        lengths = [min(pair) for pair in zip(chunk, shape, strict=True)]
    for axis in reversed(range(len(shape))):
        rest = math.prod(lengths) // lengths[axis] * width
        fitting = max(BOX_BYTES // rest // lengths[axis], 1) * lengths[axis]
        lengths[axis] = min(fitting, shape[axis])
        if lengths[axis] < shape[axis]:
            break
    starts = [range(0, n, step) for n, step in zip(shape, lengths, strict=True)]
    return [
        (place, tuple(min(n, s - at) for n, s, at in zip(lengths, shape, place, strict=True)))
        for place in itertools.product(*starts)
    ]


def rows_of(shape: Sequence[int], box: Box, width: int) -> Iterator[tuple[int, int]]:
    """Yield (offset in the tensor, bytes) of the stretches that a box consists of, in C order."""
    starts, lengths = box
    k, run = len(shape), 1
    while k and lengths[k - 1] == shape[k - 1]:
        k -= 1
        run *= lengths[k]
    if k:
        k -= 1
        run *= lengths[k]
    below = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(at * n for at, n in zip(starts, below, strict=True))
    for place in itertools.product(*(range(n) for n in lengths[:k])):
        skipped = sum(at * n for at, n in zip(place, below, strict=False))
        yield (first + skipped) * width, run * width


def write_datasets(
    fd: int,
    path: str,
    window: Window,
    wanted: Iterable[tuple[Dataset, Extent]],
    target: str,
) -> None:
    """Write datasets to their extents of the file `target`, little-endian, in C order.

    Args:
        fd: the file they are in.
        path: its name, for errors.
        window: where in it the HDF5 file lies.
        wanted: datasets, each with its extent.
        target: a file that exists, of full size.
    """
    with storage_errors(target, "cannot open"):
        out = os.open(target, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for dataset, extent in wanted:
            width = dataset.nbytes // math.prod(dataset.shape)
            boxes = boxes_of(dataset.shape, dataset.chunk, width)
            sizes = [math.prod(lengths) * width for _, lengths in boxes]
            chunk = math.prod(dataset.chunk) * width
            pieces = isolation.read_boxes(fd, path, window, dataset.path, boxes, sizes, chunk)
            with contextlib.closing(pieces):
                for box, data in zip(boxes, pieces, strict=True):
                    done = 0
                    for offset, n_bytes in rows_of(dataset.shape, box, width):
                        piece = data[done : done + n_bytes]
                        write_exact(out, piece, extent.offset + offset, target)
                        done += n_bytes
    finally:
        os.close(out)
