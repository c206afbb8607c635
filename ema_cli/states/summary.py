"""What a state holds, told without reading its shadows; and whether all of it is intact."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from ema_cli import provenance
from ema_cli.averages import Average
from ema_cli.errors import DamagedState
from ema_cli.plan import Request
from ema_cli.states import directory, settings, skeleton, slots, store
from ema_cli.states.binding import RUN
from ema_cli.states.records import Row
from ema_cli.states.store import State
from ema_cli.text import shorten

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class StateSummary:
    """A state as it counts now.

    Attributes:
        path: of its directory.
        generation: how many commits there were.
        step: the last step that is averaged.
        rows: the ledger: what was applied, and what was missed.
        settings: the options it is bound to.
        averages: what is averaged.
        weights: of each average, the weight of each applied checkpoint.
        tensors: how many the slot holds.
        nbytes: of all its files.
        whole: whether optimizer state is held too.
    """

    path: str
    generation: int
    step: int | None
    rows: tuple[Row, ...]
    settings: tuple[str, ...]
    averages: tuple[Average, ...]
    weights: tuple[tuple[float, ...], ...]
    tensors: int
    nbytes: int
    whole: bool

    @property
    def applied(self) -> list[Row]:
        """The checkpoints that are averaged."""
        return [row for row in self.rows if not row.missed]


def summarize(path: str) -> StateSummary:
    """Return what the state at `path` holds; another process may write to it meanwhile."""
    with store.reading(path) as state:
        return _summary(state)


def _summary(state: State) -> StateSummary:
    current = state.current
    assert current is not None  # noqa: S101  # or it could not be opened for reading
    where = state.place(directory.PLAN)
    request = settings.bound(current.binding, where)
    words = current.binding.settings
    if not isinstance(words, tuple):  # the arguments of the class
        words = tuple(f"{name}={value}" for name, value in words.items())
    return StateSummary(
        state.path,
        current.root.generation,
        current.applied[-1].step if current.applied else None,
        current.rows,
        words,
        request.averages,
        _weights(state, request),
        len(current.slot.held),
        _disk_bytes(state.path),
        current.manifest.complete,
    )


def _disk_bytes(path: str) -> int:
    walked = os.walk(path, onerror=None)
    return sum(
        os.lstat(os.path.join(folder, name)).st_blocks * 512
        for folder, _, names in walked
        for name in names
        if os.path.lexists(os.path.join(folder, name))
    )


def _weights(state: State, request: Request) -> tuple[tuple[float, ...], ...]:
    """Return the weights of each average; the ledger's coefficients must be those of its plan."""
    assert state.current is not None  # noqa: S101
    current = state.current
    rows = current.applied
    steps = [row.step for row in rows if row.step is not None]
    where = state.place(directory.LEDGER)
    in_order = current.binding.by == RUN  # the class takes what it is given
    if in_order and any(later <= step for step, later in itertools.pairwise(steps)):
        raise DamagedState(where, "expected steps that increase")
    weights = []
    for k, average in enumerate(request.averages):
        full = settings.schedule_of(current.binding, request, average.label, rows)
        told = [row.coefficients[k] if k < len(row.coefficients) else None for row in rows]
        # What a later checkpoint overwrites was a coefficient when it was applied.
        start = next((n for n, c in enumerate(full.coefficients) if c), 0)
        if tuple(told[start:]) != full.coefficients[start:]:
            raise DamagedState(where, f"expected the coefficients of {shorten(average.spec)}")
        weights.append(full.weights())
    return tuple(weights)


def check(
    path: str, executor: Executor, on_summed: Callable[[int, int], None] | None = None
) -> StateSummary:
    """Verify every checksum of the state at `path`, its ledger and its plan; reads all of it.

    `on_summed` is told how many bytes are read, of how many in all.

    Raises `DamagedState` or `DamagedFile` for the first thing that is not what was written.
    """
    with store.reading(path) as state:
        found = _summary(state)
        _check_slot(state, executor, on_summed or _ignore)
        current = state.current
        if current is not None and current.manifest.skeleton is not None:
            skeleton.read(current.manifest.skeleton, state.skeleton_directory())
        return found


def _ignore(n_bytes: int, total: int) -> None:
    del n_bytes, total


def _check_slot(state: State, executor: Executor, on_summed: Callable[[int, int], None]) -> None:
    current = state.current
    assert current is not None  # noqa: S101
    slot, where = current.slot, state.slot_stamp().path
    ends = slots.chunk_ends(slot.nbytes)
    starts = [0, *ends[:-1]]
    chunks = [(start, end - start) for start, end in zip(starts, ends, strict=True)]
    cut = provenance.cuts(slot.nbytes, chunks)
    on_summed(0, slot.nbytes)
    futures = [executor.submit(provenance.checksums, where, part) for part in cut]
    crcs: list[int] = []
    for future, part in zip(futures, cut, strict=True):
        crcs += future.result()
        on_summed(part[-1], slot.nbytes)
    for k, (crc, expected) in enumerate(zip(crcs, current.manifest.checksums, strict=True)):
        if crc != expected:
            raise DamagedState(
                where,
                f"bytes {starts[k]:,} to {ends[k]:,}: expected checksum {expected:08x}, found "
                f"{crc:08x}, in {_inside(state, starts[k], ends[k])}",
            )


def _inside(state: State, start: int, end: int) -> str:
    """Return the names of the first tensors in some bytes of the slot."""
    assert state.current is not None  # noqa: S101
    slot = state.current.slot
    names = [
        f"'{shorten(held.name)}'"
        for held, extent in zip(slot.held, slot.extents, strict=True)
        if extent.offset < end and extent.offset + extent.nbytes > start and extent.nbytes
    ]
    if len(names) > _SHOWN:
        return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"
    return ", ".join(names) or "what is before the tensors"
