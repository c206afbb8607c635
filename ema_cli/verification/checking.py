"""Compares what an output holds with what its sources give: the worker's side of `verify`.

A task is one of the engine's, and is computed by the very code that would write it; but where that
writes, the bytes that are there already are read and compared.
"""

from __future__ import annotations

from typing import NamedTuple

from ema_cli import kernel, provenance
from ema_cli.blueprint import COPY
from ema_cli.checksums import CRC32C
from ema_cli.files import Handles, open_unchanged, page_buffer, read_exact
from ema_cli.ranges import Target
from ema_cli.tasks import Piece, Task
from ema_cli.worker import COPY_BLOCK, Worker, place

# Elements of a block, the unit of what is sampled; of a copy it has as many bytes as those of
# float32.
BLOCK_ELEMENTS = 1 << 16
# Bytes that are told on both sides of the first one that differs: the widest element, complex128,
# and half as much again.
_AROUND = 24


class Difference(NamedTuple):
    """The first byte of an output that is not what its sources give.

    Attributes:
        file: ordinal of the output file.
        offset: of the byte.
        at: its place in `expected` and `found`.
        expected: the bytes around it, as far as they follow each other in the file.
        found: what is there.
    """

    file: int
    offset: int
    at: int
    expected: bytes
    found: bytes


class Compared(NamedTuple):
    """What a task compared: how many blocks, and the first difference it met."""

    blocks: int
    difference: Difference | None = None


class Unsummed(NamedTuple):
    """Stretches of a file that are to be summed, each between neighbouring `ends`."""

    file: int
    path: str
    ends: tuple[int, ...]
    kind: str = CRC32C


class Summed(NamedTuple):
    """The checksum of each of some stretches."""

    task: Unsummed
    crcs: list[int]


def checksums(task: Unsummed) -> Summed:
    """Return the checksums of some stretches of a file."""
    return Summed(task, provenance.checksums(task.path, task.ends, task.kind))


def blocks_of(piece: Piece) -> int:
    """Return how many blocks a piece has, the last of which may be short."""
    return -(-piece.elements // block_of(piece.shadow))


def block_of(shadow: str) -> int:
    """Return the elements of a block of a piece, or the bytes of one to copy."""
    return BLOCK_ELEMENTS * 4 if shadow == COPY else BLOCK_ELEMENTS


def compare(task: Task) -> Compared:
    """Compare the pieces of a task; its `inputs` end with the output files."""
    first = len(task.inputs) - len(task.outputs)
    with (
        Handles(lambda k: open_unchanged(task.inputs[k]), task.handles) as inputs,
        Handles(lambda k: open_unchanged(task.inputs[first + k]), task.handles) as outputs,
    ):
        work = _Comparison(task, inputs, outputs)
        try:
            for piece in task.pieces:
                (work.copy if piece.shadow == COPY else work.average)(piece)
        except _Differs as found:
            return Compared(0, found.args[0])
    return Compared(sum(map(blocks_of, task.pieces)))


class _Differs(Exception):
    """A difference was found; the argument tells which."""


class _Comparison(Worker):
    """Reads and compares where a worker writes."""

    def __init__(self, task: Task, inputs: Handles, outputs: Handles) -> None:
        super().__init__(task, inputs, outputs)
        self._found = page_buffer(max(COPY_BLOCK, task.block * 8))

    def put(self, target: Target, piece: Piece, start: int, block: kernel.Array) -> None:
        """Compare a block with what a target holds of a piece from `start` on."""
        fd, path = self.outputs.fd(target.file), self.task.outputs[target.file]
        if target.swap:
            block = block.view(f"u{target.swap}").byteswap().view(block.dtype)

        def compare(expected: memoryview, offset: int) -> None:
            found = self._found[: len(expected)]
            read_exact(fd, found, offset, path)
            if found.tobytes() != expected.tobytes():  # views compare byte by byte
                raise _Differs(_difference(target.file, offset, expected, found))

        place(target, piece.start + start, block, compare)


def _difference(file: int, offset: int, expected: memoryview, found: memoryview) -> Difference:
    pairs = enumerate(zip(expected, found, strict=True))
    at = next(k for k, (one, other) in pairs if one != other)
    start = max(at - _AROUND, 0)
    around = slice(start, at + _AROUND)
    return Difference(
        file, offset + at, at - start, expected[around].tobytes(), found[around].tobytes()
    )
