"""What a worker is given and what it gives back: plain data that can go to another process."""

from __future__ import annotations

from typing import NamedTuple

from ema_cli.chunks import Made
from ema_cli.ranges import Span, Target
from ema_cli.regions import Grid
from ema_cli.tensors import Stamp


class Accumulator(NamedTuple):
    """One average of a piece: coefficients as long as the sources, and where the result goes.

    The `decay` is that of an exponential average, else None; `schedule` is its ordinal in the work.
    """

    coefficients: tuple[float, ...]
    divisor: float | None
    targets: tuple[Target, ...]
    decay: float | None = None
    schedule: int = 0


class Source(NamedTuple):
    """Where a piece lies in one checkpoint.

    Attributes:
        file: ordinal of an input file.
        offset: in bytes, of its range.
        dtype: of its elements, or ``copy`` for bytes.
        swap: bytes that change places together to be in little-endian order; 0 for none.
        grid: the rows of its range, or None.
        unit: the bytes it is verified with, or None.
        checksum: what their checksum is.
    """

    file: int
    offset: int
    dtype: str
    swap: int = 0
    grid: Grid | None = None
    unit: Span | None = None
    checksum: str = ""


class Piece(NamedTuple):
    """A stretch of elements, or of bytes to copy when `shadow` is ``copy``.

    Attributes:
        shadow: dtype of the accumulators.
        elements: how many.
        start: the first one's place in its range, from which sources and targets are counted.
        sources: one per checkpoint that counts.
        accumulators: one per average.
        segments: which group of tensors its elements belong to, as (end in the range, ordinal);
            empty where nothing is measured.
    """

    shadow: str
    elements: int
    start: int
    sources: tuple[Source, ...]
    accumulators: tuple[Accumulator, ...]
    segments: tuple[tuple[int, int], ...] = ()


class Task(NamedTuple):
    """Some pieces with all that is needed to work on them anywhere.

    Attributes:
        inputs: the input files, by `Source.file`.
        outputs: paths of the output files, by `Target.file`.
        pieces: what to do.
        handles: how many input files, and how many output files, may stay open.
        check: report the first non-finite value instead of writing it.
        block: elements that are worked on at a time.
        like: whose arithmetic.
        summed: let the kernel copy nothing unseen.
    """

    inputs: tuple[Stamp, ...]
    outputs: tuple[str, ...]
    pieces: tuple[Piece, ...]
    handles: int
    check: bool
    block: int
    like: str = "tensorflow"
    summed: bool = False


class Flaw(NamedTuple):
    """A non-finite value: which piece of its task, which accumulator, which element."""

    piece: Piece
    accumulator: int
    element: int
    dtype: str


class Unit(NamedTuple):
    """Bytes of an input file that are verified together, when a `group` has read them all."""

    file: int
    group: int
    start: int
    end: int


class Part(NamedTuple):
    """What some bytes of a unit contribute to its checksum, and how many they are."""

    crc: int
    nbytes: int


class Cloned(NamedTuple):
    """A piece of a task that the kernel copied, unseen, to an output file."""

    piece: int
    file: int


class Sum(NamedTuple):
    """What a sum of squares is of: an average, a source (-1: the finished average) and a group."""

    schedule: int
    source: int
    group: int


class Done(NamedTuple):
    """What a task did.

    Attributes:
        read: bytes.
        written: bytes.
        parts: the units it read of.
        made: what it contributes to the CRC-32C of each chunk, by output file and chunk.
        flaw: the first it met.
        cloned: its pieces that contribute nothing, because nobody saw their bytes.
        measured: what it contributes to the sums of squares that distances are made of.
    """

    read: int
    written: int
    parts: dict[Unit, Part]
    made: Made
    flaw: Flaw | None = None
    cloned: tuple[Cloned, ...] = ()
    measured: dict[Sum, float] = {}  # noqa: RUF012  # never changed
