"""Carries out a plan on an Executor it is given: blocks outside, checkpoints inside.

For each block of elements the checkpoints pass through one after the other while the accumulators
stay in cache; each input byte is read once, whatever the number of averages. Tasks are plain data
and may run twice, in threads or in other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass

from ema_cli import kernel
from ema_cli.blueprint import COPY
from ema_cli.files import handle_limit
from ema_cli.plan import BLOCK_ELEMENTS, TASK_ELEMENTS, block_elements
from ema_cli.ranges import Copy, Range
from ema_cli.schedules import counting
from ema_cli.tasks import Accumulator, Done, Flaw, Part, Piece, Source, Task, Unit
from ema_cli.tensors import numpy_dtype, swap_width
from ema_cli.work import Work
from ema_cli.worker import run_task


@dataclass(frozen=True, slots=True)
class Progress:
    """An event: bytes read so far and in all."""

    read: int
    total: int


def carry_out(
    work: Work,
    outputs: Sequence[str],
    executor: Executor,
    on_event: Callable[[Progress], None],
    on_part: Callable[[Unit, Part], None],
) -> Flaw | None:
    """Carry out the work into the files `outputs`, which exist at their final sizes.

    Returns the first non-finite value found, when its manner asks for the check. `executor` is
    neither created nor shut down here; what is in flight is bounded by the manner's workers.
    `on_part` is told the checksum of what was read of each unit, in any order.
    """
    done, total = 0, work.read
    on_event(Progress(0, total))
    limit = 2 * work.manner.workers
    for result in bounded(executor, run_task, tasks(work, outputs), limit):
        done += result.read
        on_event(Progress(done, total))
        for unit, part in result.parts.items():
            on_part(unit, part)
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


def tasks(work: Work, outputs: Sequence[str]) -> Iterator[Task]:
    """Yield the tasks of the work; small pieces share one."""
    manner = work.manner
    handles = handle_limit(manner.workers)
    block = block_elements(BLOCK_ELEMENTS, manner.workers, max(len(work.schedules), 1))
    paths = tuple(outputs)
    batch: list[Piece] = []
    filled = 0
    for piece in pieces(work):
        batch.append(piece)
        filled += piece.elements
        if filled >= TASK_ELEMENTS:
            yield Task(work.inputs, paths, tuple(batch), handles, manner.check, block, manner.like)
            batch, filled = [], 0
    if batch:
        yield Task(work.inputs, paths, tuple(batch), handles, manner.check, block, manner.like)


def pieces(work: Work) -> Iterator[Piece]:
    """Yield the ranges and copies, cut into pieces of at most a task."""
    used = counting(work.schedules)
    coefficients = [tuple(schedule.coefficients[k] for k in used) for schedule in work.schedules]
    for one in work.averaged:
        shadow = kernel.shadow_dtype(one.dtype, work.manner.shadow_dtype)
        divisors = [
            s.debias_factor(numpy_dtype(shadow)) if s.zero_debias else None for s in work.schedules
        ]
        sources = _sources(work, one, used)
        accumulators = tuple(
            Accumulator(c, divisor, targets, schedule.decay)
            for c, divisor, targets, schedule in zip(
                coefficients, divisors, one.targets, work.schedules, strict=True
            )
            if targets
        )
        for start in range(0, one.elements, TASK_ELEMENTS):
            count = min(TASK_ELEMENTS, one.elements - start)
            yield Piece(shadow, count, start, sources, accumulators)
    for copy in work.copies:
        yield from _copied_pieces(work, copy)


def _sources(work: Work, one: Range, used: Sequence[int]) -> tuple[Source, ...]:
    sources = []
    for k in used:
        file, offset, grid, unit, dtype = one.places[work.index_of[k]]
        checkpoint = work.checkpoints[k]
        sources.append(
            Source(
                work.first_input[k] + file,
                offset,
                dtype,
                swap_width(dtype) if checkpoint.index.big_endian else 0,
                grid,
                unit if checkpoint.checksums is not None else None,
                checkpoint.index.checksum,
            )
        )
    return tuple(sources)


def _copied_pieces(work: Work, copy: Copy) -> Iterator[Piece]:
    step = TASK_ELEMENTS * 4
    file, offset, grid, unit, _ = copy.place
    kind = work.checkpoints[work.of_file(file)[0]].index.checksum if unit else ""
    sources = (Source(file, offset, COPY, 0, grid, unit, kind),)
    accumulators = (Accumulator((1.0,), None, copy.targets),)
    for start in range(0, copy.nbytes, step):
        count = min(step, copy.nbytes - start)
        yield Piece(COPY, count, start, sources, accumulators)
