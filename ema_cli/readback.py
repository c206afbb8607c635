"""Whether what a task wrote is there still: all of it is read and summed once more."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import numpy as np

from ema_cli.blueprint import COPY
from ema_cli.chunks import Chunks
from ema_cli.errors import InputError, storage_errors
from ema_cli.files import Handles, open_unchanged, read_exact
from ema_cli.ranges import Target
from ema_cli.tasks import Done, Piece, Task
from ema_cli.tensors import numpy_dtype
from ema_cli.worker import COPY_BLOCK, place, size_of


def is_intact(task: Task, done: Done) -> bool:
    """Whether the outputs of a task hold what it wrote, by the checksums in `done`.

    What the kernel copied has none; it is compared with the input.
    """
    made = Chunks(functools.cache(lambda file: size_of(task.outputs[file])))
    cloned = {one.piece for one in done.cloned}
    try:
        with Handles(lambda k: _open(task.outputs[k]), task.handles) as outputs:
            for ordinal, piece in enumerate(task.pieces):
                if ordinal not in cloned:
                    _sum(task, piece, outputs, made)
                elif not _is_copy(task, piece, outputs):
                    return False
        return made.made() == done.made
    except InputError:
        return False  # truncated, or the input changed: whoever does it again says so


def _open(path: str) -> int:
    with storage_errors(path, "cannot open"):
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _sum(task: Task, piece: Piece, outputs: Handles, made: Chunks) -> None:
    """Count in what a piece wrote, in the same steps."""
    step = COPY_BLOCK if piece.shadow == COPY else task.block
    for target in [target for one in piece.accumulators for target in one.targets]:
        dtype = np.dtype(np.uint8) if target.dtype == COPY else numpy_dtype(target.dtype)
        buffer = np.empty(min(step, piece.elements), dtype)
        read = _reader(task, target, outputs, made)
        for start in range(0, piece.elements, step):
            count = min(step, piece.elements - start)
            place(target, piece.start + start, buffer[:count], read)


def _reader(
    task: Task, target: Target, outputs: Handles, made: Chunks
) -> Callable[[memoryview, int], None]:
    fd, path = outputs.fd(target.file), task.outputs[target.file]

    def read(part: memoryview, offset: int) -> None:
        read_exact(fd, part, offset, path)
        made.add(target.file, offset, part)

    return read


def _is_copy(task: Task, piece: Piece, outputs: Handles) -> bool:
    """Whether the bytes that the kernel copied are those of the input."""
    source, target = piece.sources[0], piece.accumulators[0].targets[0]
    theirs, mine = (bytearray(min(COPY_BLOCK, piece.elements)) for _ in range(2))
    with Handles(lambda k: open_unchanged(task.inputs[k]), 1) as inputs:
        for start in range(piece.start, piece.start + piece.elements, COPY_BLOCK):
            count = min(COPY_BLOCK, piece.start + piece.elements - start)
            for fd, path, at, buffer in (
                (inputs.fd(source.file), task.inputs[source.file].path, source.offset, theirs),
                (outputs.fd(target.file), task.outputs[target.file], target.offset, mine),
            ):
                read_exact(fd, memoryview(buffer)[:count], at + start, path)
            if theirs[:count] != mine[:count]:
                return False
    return True
