"""Compares blocks of an output with what its sources give, and explains the first difference."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from ema_cli import engine, executing, files, verifying
from ema_cli.blueprint import COPY, Entry
from ema_cli.errors import EmaError, InputError
from ema_cli.plan import BLOCK_ELEMENTS as ENGINE_BLOCK
from ema_cli.plan import block_elements
from ema_cli.regions import byte_strides, stored_boxes
from ema_cli.tasks import Piece, Task
from ema_cli.tensors import DType, Tensor, numpy_dtype, swap_width
from ema_cli.verification import checking
from ema_cli.verification.checking import BLOCK_ELEMENTS, Difference, block_of, blocks_of
from ema_cli.verification.claims import DamagedOutput
from ema_cli.verification.recomputing import Again, NotRecomputed
from ema_cli.work import Work

# However small the share, so many blocks are recomputed.
LEAST_BLOCKS = 64
# Elements of a task: fewer than the engine's, so that a sample keeps all workers busy.
_TASK_ELEMENTS = 1 << 19


def total_blocks(work: Work) -> int:
    """Return how many blocks there are to recompute."""
    averaged = sum(-(-one.elements // BLOCK_ELEMENTS) for one in work.averaged)
    copies = [copy.nbytes for copy in work.copies if copy.targets]
    return averaged + sum(-(-n_bytes // block_of(COPY)) for n_bytes in copies)


def sampled(total: int, share: float) -> Sequence[int]:
    """Return which of `total` blocks are recomputed: evenly spread, from a random one on."""
    count = min(total, max(LEAST_BLOCKS, int(-(-total * share // 1))))
    if count == total:
        return range(total)
    phase = secrets.SystemRandom().random()
    return [min(int((k + phase) * total / count), total - 1) for k in range(count)]


def compare(
    made: Again, chosen: Sequence[int], executor: Executor, on_blocks: Callable[[int], None]
) -> None:
    """Compare the `chosen` blocks of an output with what its sources give.

    Raises `DamagedOutput` for one that differs, `NotRecomputed` when a source cannot be read.
    """
    difference = None
    try:
        with _readable(made.work) as work:
            tasks = enumerate(_tasks(dataclasses.replace(made, work=work), chosen))
            limit = 2 * work.manner.workers
            for _, done in engine.bounded(executor, checking.compare, tasks, limit, _forget):
                difference = done.difference
                if difference is not None:
                    break
                on_blocks(done.blocks)
            files.check_all_unchanged(work.inputs)
    except InputError as error:
        files.check_all_unchanged(made.outputs)
        raise NotRecomputed(error.message) from error
    if difference is not None:
        raise _explained(made, difference)


def _forget(ordinal: int, done: checking.Compared) -> None:
    """Nothing is kept of what was compared after the end."""
    del ordinal, done


@contextlib.contextmanager
def _readable(work: Work) -> Iterator[Work]:
    """Yield the work with a temporary file for what cannot be read in place."""
    if not work.spill:
        yield work
        return
    with (
        tempfile.TemporaryDirectory(prefix="ema-avg-") as directory,
        executing.spilled(work, os.path.join(directory, "source")) as readable,
    ):
        yield readable


def _tasks(made: Again, chosen: Sequence[int]) -> Iterator[Task]:
    """Yield the tasks that compare the chosen blocks; their inputs end with the outputs."""
    work, manner = made.work, made.work.manner
    common = Task(
        inputs=(*work.inputs, *made.outputs),
        outputs=tuple(stamp.path for stamp in made.outputs),
        pieces=(),
        handles=files.handle_limit(manner.workers),
        check=False,
        block=block_elements(ENGINE_BLOCK, manner.workers, 1),
        like=manner.like,
        summed=True,
    )
    batch: list[Piece] = []
    filled = 0
    for piece in _chosen(_pieces(work), chosen):
        batch.append(piece)
        filled += piece.elements
        if filled >= _TASK_ELEMENTS:
            yield common._replace(pieces=tuple(batch))
            batch, filled = [], 0
    if batch:
        yield common._replace(pieces=tuple(batch))


def _pieces(work: Work) -> Iterator[Piece]:
    """Yield the pieces of the work that are written; what is read of them is not summed."""
    for piece in engine.pieces(work):
        if any(accumulator.targets for accumulator in piece.accumulators):
            sources = tuple(source._replace(unit=None) for source in piece.sources)
            yield piece._replace(sources=sources)


def _chosen(pieces: Iterable[Piece], chosen: Sequence[int]) -> Iterator[Piece]:
    """Yield the blocks of the pieces that are chosen, neighbours as one piece."""
    first, at = 0, 0
    for piece in pieces:
        count, size = blocks_of(piece), block_of(piece.shadow)
        while at < len(chosen) and chosen[at] < first + count:
            start = end = chosen[at]
            while at < len(chosen) and chosen[at] == end < first + count:
                at, end = at + 1, end + 1
            skipped = (start - first) * size
            elements = min((end - start) * size, piece.elements - skipped)
            yield piece._replace(start=piece.start + skipped, elements=elements)
        first += count


# ---------------------------------------------------------------------------- differences


def _explained(made: Again, difference: Difference) -> EmaError:
    """Return the error that names the tensor and the element, and both values.

    Raises `NotRecomputed` when it is a source that is damaged.
    """
    path = made.outputs[difference.file].path
    found = _element(made, difference)
    if found is None:
        given = difference.expected[difference.at]
        return DamagedOutput(
            path,
            f"byte {difference.offset:,}: its sources give {given:02x}, "
            f"found {difference.found[difference.at]:02x}",
        )
    entry, element, skipped = found
    _check_sources(made.work, entry.source)
    one, other = _values(made, difference, entry.dtype, skipped)
    reason = f"element {element:,}: its sources give {one}, found {other}"
    if made.made_by:
        reason += f", which version {made.made_by} wrote"
    return DamagedOutput(path, reason, entry.name)


def _check_sources(work: Work, name: str) -> None:
    """Raise `NotRecomputed` when a tensor of a source is not what its checksum says."""
    for checkpoint, first in zip(work.checkpoints, work.first_input, strict=True):
        tensor = checkpoint.index.by_name.get(name) if first >= 0 else None
        if tensor is not None and tensor.dtype.bits:
            error = verifying.check(checkpoint, tensor)
            if error is not None:
                raise NotRecomputed(error.message)


def _element(made: Again, difference: Difference) -> tuple[Entry, int, int] | None:
    """Return the entry and the element that a byte belongs to, and which byte of it it is."""
    for entry in made.layout.entries:
        if entry.dtype.bits >= 8:
            place = made.layout.places[entry.name]
            found = _element_at(place, difference.file, difference.offset)
            if found is not None:
                return entry, *found
    return None


def _element_at(tensor: Tensor, file: int, offset: int) -> tuple[int, int] | None:
    width = tensor.dtype.bits // 8
    for box, extent in stored_boxes(tensor):
        if extent.file != file or not 0 <= offset - extent.offset < extent.nbytes:
            continue
        left, place = offset - extent.offset, list(box.starts)
        strides = byte_strides(tensor, box, width)
        for axis in sorted(range(len(strides)), key=lambda axis: -strides[axis]):
            step = min(left // strides[axis], box.lengths[axis] - 1) if strides[axis] else 0
            place[axis] += step
            left -= step * strides[axis]
        if left < width:
            element = 0
            for position, length in zip(place, tensor.shape, strict=True):
                element = element * length + position
            return element, left
    return None


def _values(made: Again, difference: Difference, dtype: DType, skipped: int) -> tuple[str, str]:
    """Return both values of an element, of which byte `skipped` differs first."""
    width, start = dtype.bits // 8, difference.at - skipped
    parts = [difference.expected, difference.found]
    if start < 0 or start + width > len(parts[0]):  # cut by the end of a block
        one, other = (f"byte {part[difference.at]:02x}" for part in parts)
        return one, other
    swap = swap_width(dtype.name) if made.layout.big_endian else 0
    raws = [np.frombuffer(part[start : start + width], np.uint8) for part in parts]
    shown = []
    for raw in raws:
        ordered = raw.view(f"u{swap}").byteswap().view(np.uint8) if swap else raw
        shown.append(str(ordered.view(numpy_dtype(dtype.name))[0]))
    if shown[0] == shown[1]:  # a NaN and another
        shown = [f"{text} ({raw.tobytes().hex()})" for text, raw in zip(shown, raws, strict=True)]
    return shown[0], shown[1]
