"""Verifies an output: its headers, its checksums, and what its sources give; or a state."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from ema_cli import engine, files, machine
from ema_cli.asked import check_workers
from ema_cli.engine import Progress
from ema_cli.errors import UsageError
from ema_cli.executing import executor_of
from ema_cli.states.directory import is_state
from ema_cli.states.summary import StateSummary
from ema_cli.states.summary import check as check_state
from ema_cli.text import plural, shorten
from ema_cli.verification import checking, comparing, summing
from ema_cli.verification.checking import Summed, Unsummed
from ema_cli.verification.claims import Output, opened
from ema_cli.verification.recomputing import Again, NotRecomputed, again

_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)\s*%")


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found; anything wrong is an error instead.

    Attributes:
        path: of the output.
        files: how many it has.
        nbytes: how large they are together.
        checksums: ``equal``, or ``none`` where nothing keeps any.
        recomputed: how many blocks were compared with what the sources give.
        total: how many there are, as far as that is known.
        not_recomputed: why none were, or None (exit code 3).
    """

    path: str
    files: int
    nbytes: int
    checksums: str
    recomputed: int
    total: int
    not_recomputed: str | None


def verify(
    path: str | os.PathLike[str],
    *,
    sample: str = "1%",
    full: bool = False,
    key: str | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    on_event: Callable[[Progress], None] | None = None,
) -> Verified | StateSummary:
    """Verify an output against its checksums, and blocks of it against its sources, bit for bit.

    Of a state every checksum, the ledger and the plan are verified; its sources may be gone.

    Args:
        path: the output: a file, a folder or a TensorFlow prefix; or its ``OUT.ema.json``; or a
            state.
        sample: how much of it is recomputed from the sources while they exist, e.g. ``0.5%``;
            at least 64 blocks of 65,536 elements.
        full: recompute all of it.
        key: where the model is inside a checkpoint that holds more, where no provenance tells.
        workers: threads; default from affinity and cgroup limits.
        executor: any `concurrent.futures.Executor`; threads when None.
        on_event: called with `Progress` events.

    Returns:
        How much was compared; of a state, what it holds.

    Raises:
        InputError: the output or the state is damaged, or is not what its sources give.
    """
    share = 1.0 if full else parse_share(sample)
    check_workers(workers)
    workers = workers or machine.default_workers()
    if is_state(os.fspath(path)):
        with executor_of(executor, workers) as pool:
            return check_state(os.fspath(path), pool, _summed(on_event))
    output = opened(os.fspath(path), key or "")
    made, reason = _again(output, key or "", workers)
    total = comparing.total_blocks(made.work) if made else 0
    chosen = comparing.sampled(total, share)
    stored, kept = summing.stored(output), summing.kept(output)
    meter = _Meter(on_event, sum(task.ends[-1] - task.ends[0] for task in (*stored, *kept)))
    meter.total += made.nbytes * len(chosen) // max(total, 1) if made else 0
    meter.add(0)
    with executor_of(executor, workers) as pool:
        summing.check_stored(output, _sums(stored, pool, workers, meter))
        summing.check_kept(output, _sums(kept, pool, workers, meter))
        summing.unpack(output)
        if made is not None:
            meter.what = f"recomputing {plural(len(chosen), 'block')}"
            reason = _compare(made, chosen, total, pool, meter)
    files.check_all_unchanged(output.files)
    return Verified(
        output.path,
        len(output.files),
        output.nbytes,
        "equal" if summing.is_summed(output) else "none",
        len(chosen) if reason is None else 0,
        total,
        reason,
    )


def parse_share(text: str) -> float:
    """Return the share that ``1%`` is. Raises `UsageError`."""
    match = _SHARE.fullmatch(text.strip())
    if match is None or not 0 < float(match[1]) <= 100:
        raise UsageError(
            f"--sample: expected a share above 0% and up to 100%, found '{shorten(text)}'",
            "for example --sample 0.5%; --full is all of it",
        )
    return float(match[1]) / 100


def _summed(on_event: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    """Return what tells how many bytes of a state are verified."""
    if on_event is None:
        return None
    return lambda n_bytes, total: on_event(Progress(n_bytes, total, what="checksums"))


class _Meter:
    """Tells how many bytes are verified, of how many in all."""

    def __init__(self, on_event: Callable[[Progress], None] | None, total: int) -> None:
        self._on_event = on_event
        self._done = 0
        self.total = total
        self.what = "checksums"

    def add(self, n_bytes: int) -> None:
        """Count bytes in."""
        self._done += n_bytes
        if self._on_event is not None:
            self._on_event(Progress(self._done, self.total, what=self.what))


def _sums(
    tasks: Sequence[Unsummed], executor: Executor, workers: int, meter: _Meter
) -> Iterator[Summed]:
    """Yield the checksums of stretches of files as they come."""
    work = enumerate(tasks)
    for _, done in engine.bounded(executor, checking.checksums, work, 2 * workers, _forget):
        meter.add(done.task.ends[-1] - done.task.ends[0])
        yield done


def _forget(ordinal: int, done: object) -> None:
    """What was summed after the end is of no use."""
    del ordinal, done


def _again(output: Output, key: str, workers: int) -> tuple[Again | None, str | None]:
    """Return what would write the output again, or why nothing can."""
    try:
        return again(output, key, workers), None
    except NotRecomputed as error:
        return None, str(error)


def _compare(
    made: Again, chosen: Sequence[int], total: int, executor: Executor, meter: _Meter
) -> str | None:
    """Compare the chosen blocks; returns why they could not be recomputed, if so."""
    blocks = 0

    def count(more: int) -> None:
        nonlocal blocks
        before, blocks = blocks, blocks + more
        meter.add(made.nbytes * blocks // total - made.nbytes * before // total)

    try:
        comparing.compare(made, chosen, executor, count)
    except NotRecomputed as error:
        return str(error)
    return None
