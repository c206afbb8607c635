"""Carries out a plan on an Executor it is given: blocks outside, checkpoints inside.

For each block of elements the checkpoints pass through one after the other while the accumulators
stay in cache; each input byte is read once, whatever the number of averages. Tasks are plain data
and may run twice, in threads or in other processes.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from ema_cli import interruption, kernel
from ema_cli.blueprint import COPY
from ema_cli.files import handle_limit
from ema_cli.plan import BLOCK_ELEMENTS, block_elements
from ema_cli.plan import TASK_ELEMENTS as TASK_ELEMENTS
from ema_cli.progress import Log
from ema_cli.ranges import Copy, Range
from ema_cli.schedules import counting
from ema_cli.tasks import Accumulator, Done, Flaw, Piece, Source, Task
from ema_cli.tensors import numpy_dtype, swap_width
from ema_cli.work import Work
from ema_cli.worker import run_task

W = TypeVar("W")
T = TypeVar("T")

# Seconds that a signal waits at most, while tasks are waited for.
_MOMENT = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is.

    Attributes:
        read: bytes read so far.
        total: bytes in all.
        note: something to tell, or empty.
        earlier: of `read`, what another process had read before this one went on.
        what: what is worked on, such as ``20 checkpoints, steps 100 to 2,000``; or empty.
    """

    read: int
    total: int
    note: str = ""
    earlier: int = 0
    what: str = ""


OnEvent = Callable[[Progress], None]


def about(what: str, tell: OnEvent | None) -> OnEvent | None:
    """Return what tells events as being about `what`."""
    if tell is None:
        return None
    return lambda event: tell(dataclasses.replace(event, what=what))


def carry_out(
    work: Work,
    outputs: Sequence[str],
    executor: Executor,
    on_event: Callable[[Progress], None],
    on_done: Callable[[Done], None],
    log: Log | None = None,
) -> Flaw | None:
    """Carry out the work into the files `outputs`, which exist at their final sizes.

    Returns the first non-finite value found, when its manner asks for the check. `executor` is
    neither created nor shut down here; what is in flight is bounded by the manner's workers.
    `on_done` is told what each task did, in any order. What `log` holds already was done by an
    earlier process and is not done again; whatever is finished goes there.
    """
    read, total = 0, work.read
    on_event(Progress(0, total))
    earlier = dict(log.done) if log is not None else {}
    for done in earlier.values():
        read += done.read
        on_done(done)
    before = read
    if earlier:
        on_event(Progress(read, total, earlier=before))
    left = ((k, task) for k, task in enumerate(tasks(work, outputs)) if k not in earlier)

    def record(ordinal: int, done: Done) -> None:
        if log is not None and done.flaw is None:
            with interruption.held():
                log.add(ordinal, done)

    for ordinal, done in bounded(executor, run_task, left, 2 * work.manner.workers, record):
        read += done.read
        on_event(Progress(read, total, earlier=before))
        on_done(done)
        record(ordinal, done)
        if done.flaw is not None:
            return done.flaw
    return None


def bounded(
    executor: Executor,
    function: Callable[[W], T],
    work: Iterable[tuple[int, W]],
    limit: int,
    late: Callable[[int, T], None],
) -> Iterator[tuple[int, T]]:
    """Yield the ordinals and results of tasks as they come; at most `limit` are in flight.

    When something ends this early, those that run are waited for, and `late` is told what they
    did: it is no less done.
    """
    pending: dict[Future[T], int] = {}

    def finished() -> Iterator[tuple[int, T]]:
        done: set[Future[T]] = set()
        while not done:
            with interruption.held():
                done = wait(pending, _MOMENT, FIRST_COMPLETED).done
        for future in done:
            yield pending.pop(future), future.result()

    try:
        for ordinal, task in work:
            with interruption.held():
                pending[executor.submit(function, task)] = ordinal
            if len(pending) >= limit:
                yield from finished()
        while pending:
            yield from finished()
    finally:
        # Whoever would notice that one was cancelled may have gone: the others are waited for.
        running = [future for future in pending if not future.cancel()]
        for future in wait(running).done:
            if not future.cancelled() and future.exception() is None:
                with contextlib.suppress(Exception):  # another error is on its way
                    late(pending[future], future.result())


def tasks(work: Work, outputs: Sequence[str]) -> Iterator[Task]:
    """Yield the tasks of the work; small pieces share one."""
    manner = work.manner
    handles = handle_limit(manner.workers)
    block = block_elements(BLOCK_ELEMENTS, manner.workers, max(len(work.schedules), 1))
    if manner.measured:  # in whole chunks, so that distances do not depend on the block
        block -= block % kernel.CHUNK
    common = Task(
        *(work.inputs, tuple(outputs), (), handles),
        *(manner.check, block, manner.like, manner.summed),
    )
    batch: list[Piece] = []
    filled = 0
    for piece in pieces(work):
        batch.append(piece)
        filled += piece.elements
        if filled >= TASK_ELEMENTS:
            yield common._replace(pieces=tuple(batch))
            batch, filled = [], 0
    if batch:
        yield common._replace(pieces=tuple(batch))


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
            Accumulator(c, divisor, targets, schedule.decay, ordinal)
            for ordinal, (c, divisor, targets, schedule) in enumerate(
                zip(coefficients, divisors, one.targets, work.schedules, strict=True)
            )
            if targets
        )
        for start in range(0, one.elements, TASK_ELEMENTS):
            count = min(TASK_ELEMENTS, one.elements - start)
            segments = _within(one.segments, start, start + count)
            yield Piece(shadow, count, start, sources, accumulators, segments)
    for copy in work.copies:
        yield from _copied_pieces(work, copy)


def _within(segments: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[Any, ...]:
    """Return the segments of a range that its elements from `start` to `stop` lie in."""
    first = bisect.bisect_right(segments, start, key=operator.itemgetter(0))
    last = bisect.bisect_left(segments, stop, key=operator.itemgetter(0))
    return tuple(segments[first : last + 1])


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
