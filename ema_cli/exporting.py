"""An output made from a state, at any time, as `ema-avg run` would have made it.

The averages and the copies come from the slot that counts, the structure of the last checkpoint
from what the state kept of it; no source is needed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from ema_cli import plan as planning
from ema_cli.averages import Average
from ema_cli.blueprint import BIASED, Layout
from ema_cli.durable import free_bytes
from ema_cli.engine import OnEvent, about
from ema_cli.errors import Disagreement, UsageError
from ema_cli.layout import Wishes, lay_out
from ema_cli.plan import Costs, Outcome, Plan, Request
from ema_cli.ranges import Destination
from ema_cli.runs import Run
from ema_cli.schedules import Schedule
from ema_cli.selection import COPIED, Choice, Selection, select
from ema_cli.states import records, settings, skeleton, slots
from ema_cli.states.store import State
from ema_cli.tensors import Checkpoint, Index, Stamp
from ema_cli.text import shorten
from ema_cli.work import Work, prepare


def make(state: State, request: Request, average: Average) -> Plan:
    """Return the plan of an output that holds one average of a state.

    Args:
        state: open, with a generation.
        request: what the state is bound to, with the output and wishes asked for.
        average: one of the state's.
    """
    current = state.current
    assert current is not None  # noqa: S101  # it is open for reading
    ordinal = current.binding.labels.index(average.label)
    request = dataclasses.replace(request, averages=(average,))
    last = _last(state)
    wishes = _possible(request.wishes, complete=current.manifest.complete)
    where = f"{shorten(state.path, 1000)}: "
    if current.manifest.skeleton is not None:
        selection = select(last.index, request.rules, request.statistics, wishes.name, where)
    else:
        selection = _held_selection(state, last.index)
    run = Run(tuple(source_of(row, last.index) for row in current.applied))
    full = settings.schedule_of(current.binding, request, average.label, current.applied)
    path = planning.output_path(request.output or "", average, last)
    biased = full.zero_debias and current.manifest.skeleton is not None
    layout = lay_out(path, last, selection, wishes, full.updates if biased else None)
    outcome = Outcome(average, 0, full.weights(), last, selection, layout)
    work = _work(state, request, ordinal, layout)
    free = free_bytes(os.path.dirname(path.rstrip("/")))
    costs = Costs(work.read, layout.nbytes, planning.BASE_BYTES, free)
    return Plan(request, run, (full,), (outcome,), work, costs)


def told_of(plan: Plan, tell: OnEvent | None) -> OnEvent | None:
    """Return what tells of an output's making under its name."""
    name = os.path.basename(plan.outcomes[0].layout.path.rstrip("/"))
    return about(f"writing {shorten(name, 60)}", tell)


def _possible(wishes: Wishes, *, complete: bool) -> Wishes:
    """Return the wishes as far as a state can fulfil them."""
    if wishes.keep_variables:
        raise UsageError(
            "--keep-variables: a state keeps no other values of a variable than its average",
            "use ema-avg run without --state",
        )
    if complete:
        return wishes
    if wishes.optimizer == "keep":
        raise Disagreement(
            "--optimizer keep: the state was made without optimizer state",
            "begin a new state with --optimizer keep",
        )
    return dataclasses.replace(wishes, optimizer="drop")


def _last(state: State) -> Checkpoint:
    """Return the structure of the last applied checkpoint, as it was called.

    Where none was kept, by the class, it is a checkpoint of the tensors that the slot holds.
    """
    current = state.current
    assert current is not None  # noqa: S101
    row = current.applied[-1]
    if current.manifest.skeleton is not None:
        kept = skeleton.read(current.manifest.skeleton, state.skeleton_directory())
        return dataclasses.replace(kept, step=row.step, within=row.name, notes=())
    parts = (records.AVERAGE, records.COPY)
    held = slots.view(current.slot, state.slot_stamp(), current.manifest.checksums, 0, parts=parts)
    return dataclasses.replace(held, step=row.step, within=row.name)


def _held_selection(state: State, index: Index) -> Selection:
    """Return what the class averaged and copied, from the slot."""
    current = state.current
    assert current is not None  # noqa: S101
    shadows = (one for one in current.slot.held if one.part == records.AVERAGE)
    averaged = {name for one in shadows for name in one.variables}
    copied = [tensor for tensor in index.tensors if tensor.name not in averaged]
    return Selection(
        tuple(tensor for tensor in index.tensors if tensor.name in averaged),
        tuple(Choice(tensor, COPIED, "not averaged") for tensor in copied),
        (),
        (),
    )


def source_of(row: records.Row, index: Index) -> Checkpoint:
    """Return a checkpoint of the ledger, to be told of; it is not read any more."""
    stamps = tuple(Stamp(path, size, time, 0) for path, size, time, _ in row.files)
    digests = tuple(digest for *_, digest in row.files)
    return Checkpoint(row.path, stamps, index, digests, row.step, within=row.name)


def _work(state: State, request: Request, ordinal: int, layout: Layout) -> Work:
    """Return the work that moves an average of the slot, and the copies, to where they belong."""
    current = state.current
    assert current is not None  # noqa: S101
    stamp, slot, sums = state.slot_stamp(), current.slot, current.manifest.checksums
    parts = [records.AVERAGE]
    if any(entry.part == BIASED for entry in layout.entries):
        parts.append(records.BIASED)
    views = [slots.view(slot, stamp, sums, ordinal, parts=(part,)) for part in parts]
    copies = slots.view(slot, stamp, sums, ordinal, parts=(records.COPY,))
    checkpoints = [*views, copies, layout.last]
    return prepare(
        checkpoints,
        [_only(k, len(checkpoints)) for k in range(len(views))],
        views[0].index.tensors,
        _destinations(layout, copies, len(parts)),
        dataclasses.replace(request.manner, shadow_dtype="same", like="tensorflow"),
    )


def _only(ordinal: int, count: int) -> Schedule:
    """Return the schedule that takes one of some checkpoints as it is."""
    return Schedule(tuple(float(k == ordinal) for k in range(count)), False, 1, ordinal)


def _destinations(layout: Layout, copies: Checkpoint, parts: int) -> Sequence[Destination]:
    """Return the output as the destination of each part that is read of its own."""
    entries = [entry for entry in layout.entries if entry.part != BIASED]
    rest = [entry for entry in layout.entries if entry.part == BIASED]
    first = Destination(dataclasses.replace(layout, entries=tuple(entries)), 0, 0, copies)
    if parts == 1:
        return [first]
    return [first, Destination(dataclasses.replace(layout, entries=tuple(rest), files=()), 1, 0)]
