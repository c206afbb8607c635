"""Carries out a plan on an Executor it is given: blocks outside, checkpoints inside.

For each block of elements the checkpoints pass through one after the other while the accumulators
stay in cache; each input byte is read once, whatever the number of averages. Tasks are plain data
and may run twice, in threads or in other processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ema_cli import kernel
from ema_cli.durable import start_writing, write_exact
from ema_cli.errors import storage_errors
from ema_cli.files import Handles, handle_limit, open_unchanged, read_exact
from ema_cli.layout import BIASED, COPY
from ema_cli.plan import BLOCK_ELEMENTS, TASK_ELEMENTS, Plan, block_elements
from ema_cli.ranges import Copy, Range, Target
from ema_cli.schedules import counting
from ema_cli.tensors import DTYPES, NumpyDType, Stamp, numpy_dtype

COPY_BLOCK = 1 << 20


class Accumulator(NamedTuple):
    """One average of a piece: coefficients as long as the sources, and where the result goes."""

    coefficients: tuple[float, ...]
    divisor: float | None
    targets: tuple[Target, ...]


class Source(NamedTuple):
    """Where a piece lies in one checkpoint: the ordinal of an input file, and a byte offset."""

    file: int
    offset: int
    dtype: str


class Piece(NamedTuple):
    """A stretch of elements, or of bytes to copy when `shadow` is ``copy``."""

    shadow: str
    elements: int
    sources: tuple[Source, ...]
    accumulators: tuple[Accumulator, ...]


class Task(NamedTuple):
    """Some pieces with all that is needed to work on them anywhere.

    Attributes:
        inputs: the input files, by `Source.file`.
        outputs: paths of the output files, by `Target.file`.
        pieces: what to do.
        handles: how many input files, and how many output files, may stay open.
        check: report the first non-finite value instead of writing it.
        block: elements that are worked on at a time.
    """

    inputs: tuple[Stamp, ...]
    outputs: tuple[str, ...]
    pieces: tuple[Piece, ...]
    handles: int
    check: bool
    block: int


class Flaw(NamedTuple):
    """A non-finite value: which piece of its task, which accumulator, which element."""

    piece: Piece
    accumulator: int
    element: int
    dtype: str


class Done(NamedTuple):
    """What a task did: bytes read and written, and the first flaw it met."""

    read: int
    written: int
    flaw: Flaw | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """An event: bytes read so far and in all."""

    read: int
    total: int


# ---------------------------------------------------------------------------- in the parent


def carry_out(
    plan: Plan,
    outputs: Sequence[str],
    executor: Executor,
    on_event: Callable[[Progress], None],
) -> Flaw | None:
    """Compute the plan into the files `outputs`, which exist at their final sizes.

    Returns the first non-finite value found, when the plan asks for the check. `executor` is
    neither created nor shut down here; what is in flight is bounded by the plan's workers.
    """
    done = 0
    on_event(Progress(0, plan.costs.read))
    limit = 2 * plan.request.workers
    for result in bounded(executor, run_task, tasks(plan, outputs), limit):
        done += result.read
        on_event(Progress(done, plan.costs.read))
        if result.flaw is not None:
            return result.flaw
    return None


def bounded(
    executor: Executor, function: Callable[[Task], Done], work: Iterable[Task], limit: int
) -> Iterator[Done]:
    """Yield results as they come; never more than `limit` tasks are in flight."""
    pending: set[Future[Done]] = set()
    try:
        for task in work:
            pending.add(executor.submit(function, task))
            if len(pending) >= limit:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def tasks(plan: Plan, outputs: Sequence[str]) -> Iterator[Task]:
    """Yield the tasks of a plan; small pieces share one."""
    handles = handle_limit(plan.request.workers)
    check = plan.request.non_finite == "error"
    block = block_elements(BLOCK_ELEMENTS, plan.request.workers, max(len(plan.schedules), 1))
    paths = tuple(outputs)
    batch: list[Piece] = []
    filled = 0
    for piece in pieces(plan):
        batch.append(piece)
        filled += piece.elements
        if filled >= TASK_ELEMENTS:
            yield Task(plan.inputs, paths, tuple(batch), handles, check, block)
            batch, filled = [], 0
    if batch:
        yield Task(plan.inputs, paths, tuple(batch), handles, check, block)


def pieces(plan: Plan) -> Iterator[Piece]:
    """Yield the ranges and copies of a plan, cut into pieces of at most a task."""
    used = counting(plan.schedules)
    coefficients = [tuple(schedule.coefficients[k] for k in used) for schedule in plan.schedules]
    for work in plan.averaged:
        shadow = kernel.shadow_dtype(work.dtype, plan.request.shadow_dtype)
        divisors = [
            s.debias_factor(numpy_dtype(shadow)) if s.zero_debias else None for s in plan.schedules
        ]
        for start in range(0, work.elements, TASK_ELEMENTS):
            count = min(TASK_ELEMENTS, work.elements - start)
            yield Piece(
                shadow,
                count,
                _sources(plan, work, used, start),
                tuple(
                    Accumulator(c, divisor, _targets(targets, start))
                    for c, divisor, targets in zip(
                        coefficients, divisors, work.targets, strict=True
                    )
                    if targets
                ),
            )
    for copy in plan.copies:
        yield from _copied_pieces(copy)


def _sources(plan: Plan, work: Range, used: Sequence[int], start: int) -> tuple[Source, ...]:
    skipped = start * DTYPES[work.dtype].bits // 8
    sources = []
    for k in used:
        file, offset = work.places[plan.index_of[k]]
        sources.append(Source(plan.first_input[k] + file, offset + skipped, work.dtype))
    return tuple(sources)


def _targets(targets: Sequence[Target], start: int) -> tuple[Target, ...]:
    return tuple(
        t._replace(offset=t.offset + start * (1 if t.dtype == COPY else DTYPES[t.dtype].bits // 8))
        for t in targets
    )


def _copied_pieces(copy: Copy) -> Iterator[Piece]:
    step = TASK_ELEMENTS * 4
    for start in range(0, copy.nbytes, step):
        source = Source(copy.file, copy.offset + start, COPY)
        accumulator = Accumulator((1.0,), None, _targets(copy.targets, start))
        yield Piece(COPY, min(step, copy.nbytes - start), (source,), (accumulator,))


# ---------------------------------------------------------------------------- in a worker


def run_task(task: Task) -> Done:
    """Work on all pieces of a task; running it again writes the same bytes again."""
    read = written = 0
    with (
        Handles(lambda k: open_unchanged(task.inputs[k]), task.handles) as inputs,
        Handles(lambda k: _open_output(task.outputs[k]), task.handles) as outputs,
    ):
        for piece in task.pieces:
            worker = _copy if piece.shadow == COPY else _average
            result = worker(task, piece, inputs, outputs)
            read, written = read + result.read, written + result.written
            if result.flaw is not None:
                return Done(read, written, result.flaw)
    return Done(read, written)


def _open_output(path: str) -> int:
    with storage_errors(path, "cannot open"):
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _copy(task: Task, piece: Piece, inputs: Handles, outputs: Handles) -> Done:
    source = piece.sources[0]
    path = task.inputs[source.file].path
    buffer = memoryview(bytearray(min(COPY_BLOCK, piece.elements)))
    written = 0
    for start in range(0, piece.elements, COPY_BLOCK):
        view = buffer[: min(COPY_BLOCK, piece.elements - start)]
        read_exact(inputs.fd(source.file), view, source.offset + start, path)
        for target in piece.accumulators[0].targets:
            write_exact(
                outputs.fd(target.file), view, target.offset + start, task.outputs[target.file]
            )
            written += len(view)
    return Done(piece.elements, written)


def _average(task: Task, piece: Piece, inputs: Handles, outputs: Handles) -> Done:
    """Average one piece block by block."""
    block = min(task.block, piece.elements)
    buffers = _Buffers(piece, block)
    read = written = 0
    with kernel.quiet():
        for start in range(0, piece.elements, block):
            count = min(block, piece.elements - start)
            read += _mix(task, buffers, inputs, start, count)
            for ordinal, accumulator in enumerate(piece.accumulators):
                for target in accumulator.targets:
                    out = buffers.finished(ordinal, accumulator, target, count)
                    bad = kernel.first_non_finite(out) if task.check else None
                    if bad is not None:
                        return Done(read, written, Flaw(piece, ordinal, start + bad, target.dtype))
                    offset = target.offset + start * out.itemsize
                    fd = outputs.fd(target.file)
                    write_exact(fd, out.view(np.uint8).data, offset, task.outputs[target.file])
                    start_writing(fd, offset, out.nbytes)
                    written += out.nbytes
    return Done(read, written)


_KEPT = threading.local()


def _reused(purpose: str, dtype: NumpyDType, elements: int) -> kernel.Array:
    """Return this thread's array for one purpose, kept from task to task.

    Memory the kernel gives anew is cleared page by page, which costs as much as averaging in it.
    """
    n_bytes = elements * dtype.itemsize
    kept: kernel.Array | None = getattr(_KEPT, purpose, None)
    if kept is None or len(kept) < n_bytes:
        kept = np.empty(n_bytes, np.uint8)
        setattr(_KEPT, purpose, kept)
    return kept[:n_bytes].view(dtype)


class _Buffers:
    """The arrays a worker reuses for all blocks of a piece, and what it does with each source.

    Attributes:
        shadows: the accumulators.
        steps: for each source that counts, its dtype's read buffer (as an array and as bytes) and
            the (accumulator, coefficient) pairs it is mixed in with.
    """

    def __init__(self, piece: Piece, block: int) -> None:
        shadow = numpy_dtype(piece.shadow)
        raw = {
            dtype: _reused(f"raw {dtype}", numpy_dtype(dtype), block)
            for dtype in {source.dtype for source in piece.sources}
        }
        self.value = _reused("value", shadow, block)
        self.scratch = _reused("scratch", shadow, block)
        self.shadows = [
            _reused(f"shadow {k}", shadow, block) for k in range(len(piece.accumulators))
        ]
        self.steps: list[tuple[Source, kernel.Array, list[tuple[int, Any]]]] = []
        for k, source in enumerate(piece.sources):
            coefficients = [
                (ordinal, kernel.cast_coefficient(accumulator.coefficients[k], piece.shadow))
                for ordinal, accumulator in enumerate(piece.accumulators)
            ]
            mixed = [(ordinal, c) for ordinal, c in coefficients if c != 0]
            if mixed:
                self.steps.append((source, raw[source.dtype], mixed))
        copied_first = {
            ordinal
            for ordinal, accumulator in enumerate(piece.accumulators)
            if next((c for c in accumulator.coefficients if c), 0) == 1
        }
        self.from_zero = [k for k in range(len(self.shadows)) if k not in copied_first]
        self._out: dict[str, Any] = {}

    def finished(
        self, ordinal: int, accumulator: Accumulator, target: Target, count: int
    ) -> kernel.Array:
        """Return the result for `target`: debiased unless it is the biased one, then narrowed."""
        shadow = self.shadows[ordinal][:count]
        if accumulator.divisor is not None and target.part != BIASED:
            kernel.divide(shadow, accumulator.divisor, self.scratch[:count])
            shadow = self.scratch[:count]
        wanted = numpy_dtype(target.dtype)
        if wanted == shadow.dtype:
            return shadow
        if target.dtype not in self._out:
            self._out[target.dtype] = _reused(f"out {target.dtype}", wanted, len(self.scratch))
        out: kernel.Array = self._out[target.dtype][:count]
        kernel.narrow(shadow, out)
        return out


def _mix(task: Task, buffers: _Buffers, inputs: Handles, start: int, count: int) -> int:
    """Pass the checkpoints through one block; returns the bytes read.

    Between any two of these calls another thread may hold the interpreter: few calls on large
    blocks are what makes several threads pay.
    """
    read = 0
    shadows = [shadow[:count] for shadow in buffers.shadows]
    value, scratch = buffers.value[:count], buffers.scratch[:count]
    alone = len(shadows) == 1
    for ordinal in buffers.from_zero:
        shadows[ordinal].fill(0)
    for source, buffer, mixed in buffers.steps:
        # A single average that is copied is read, or widened, straight into its accumulator.
        into = shadows[0] if alone and mixed[0][1] == 1 else value
        raw = into if buffer.dtype == value.dtype else buffer[:count]
        offset = source.offset + start * raw.itemsize
        path = task.inputs[source.file].path
        read_exact(inputs.fd(source.file), raw.view(np.uint8).data, offset, path)
        read += raw.nbytes
        if raw is not into:
            kernel.widen(raw, into)
        if into is not value:
            continue
        for ordinal, c in mixed:
            kernel.update(shadows[ordinal], value, c, value if alone else scratch)
    return read
