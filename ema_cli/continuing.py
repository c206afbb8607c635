"""From a run to a state that has averaged it, and from the state to an output."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from ema_cli import exporting, hints, runs, updating
from ema_cli import plan as planning
from ema_cli.destination import check_destination
from ema_cli.durable import exists, free_bytes
from ema_cli.engine import Progress
from ema_cli.errors import Disagreement, UsageError
from ema_cli.layout import Wishes, lay_out
from ema_cli.plan import Costs, Outcome, Plan, Request
from ema_cli.running import Written, refuse_warnings, run_plan
from ema_cli.runs import Run
from ema_cli.search import PassedOver
from ema_cli.states import commit, directory, settings, store
from ema_cli.states.records import Row
from ema_cli.states.store import State
from ema_cli.tensors import Checkpoint
from ema_cli.text import plural, shorten
from ema_cli.updating import Update
from ema_cli.warnings import PlanWarning, warnings
from ema_cli.work import prepare

OnEvent = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class StateResult:
    """What `average_run` did with a state.

    Attributes:
        state: its directory.
        run: what was found.
        applied: the lines of the ledger for the checkpoints that were mixed in now.
        step: the last step that is averaged.
        checkpoints: how many are averaged in all.
        plans: of the outputs.
        outputs: one per average, in order; none without an output.
        warnings: those of the update.
        notes: what was odd.
        promises: what could not be promised of the outputs.
        read: bytes of tensor data read from checkpoints and the slot.
        seconds: wall clock time.
    """

    state: str
    run: Run
    applied: tuple[Row, ...]
    step: int
    checkpoints: int
    plans: tuple[Plan, ...]
    outputs: tuple[Written, ...]
    warnings: tuple[PlanWarning, ...]
    notes: tuple[str, ...]
    promises: tuple[str, ...]
    read: int
    seconds: float

    @property
    def unusable(self) -> tuple[PassedOver, ...]:
        """Entries that look like checkpoints and could not be used (exit code 3)."""
        return tuple(entry for entry in self.run.passed_over if entry.unusable)


def continue_state(
    request: Request,
    path: str,
    *,
    overwrite: bool = False,
    strict: bool = False,
    restart: bool = False,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
    on_planned: Callable[[Run, Sequence[PlanWarning], Sequence[str]], None] | None = None,
    on_applied: Callable[[tuple[Row, ...]], None] | None = None,
) -> StateResult:
    """Mix the new checkpoints of a run into the state at `path`, and write the output asked for.

    A state that is not there is begun. Nothing new is no error. See `ema_cli.average_run`;
    `on_planned` is told what was found before the work, and `on_applied` as soon as the new
    checkpoints are averaged for good.
    """
    started = time.monotonic()
    run = _find(request, path)
    with commit.writing(path) as state:
        _check_settings(state, request)
        run, new, notes = _seen(state, run)
        update = updating.prepare_update(state, request, run, new) if new else None
        described = describe(state, update) if update else None
        found = warnings(described, again=True, state=path) if described else []
        if strict:
            refuse_warnings(found, run)
        if on_planned is not None:
            on_planned(run, found, notes)
        read, applied = 0, _applied(state)
        if update and described:
            if request.output is not None:
                _check_outputs(described, overwrite=overwrite)
            read = updating.carry_out(state, update, executor, on_event, restart=restart)
            applied = _applied(state)
            if on_applied is not None:
                on_applied(tuple(applied[-len(new) :]))
        written, plans, more = _export(state, request, overwrite, executor, on_event)
        return StateResult(
            path,
            run,
            tuple(applied[len(applied) - len(new) :]),
            applied[-1].step or 0,
            len(applied),
            tuple(plans),
            tuple(written),
            tuple(found),
            tuple(notes),
            tuple(more),
            read,
            time.monotonic() - started,
        )


def _applied(state: State) -> list[Row]:
    """Return what a state has averaged."""
    return state.current.applied if state.current else []


def _find(request: Request, path: str) -> Run:
    """Return the run asked for, before anything is made for its state at `path`."""
    if not path:
        raise UsageError("--state: expected a directory", hints.STATE)
    settings.check_possible(request)
    planning.check_output(request)
    run = runs.find(request.paths, request.choice)
    if run.counted:
        raise Disagreement(
            f"{shorten(run.checkpoints[0].path, 1000)}: no step: none is stored inside and its "
            "name tells none; by their steps a state tells which checkpoints are new",
            "give --step-from 'REGEX' whose first group is the step",
        )
    return run


def _seen(state: State, run: Run) -> tuple[Run, tuple[Checkpoint, ...], list[str]]:
    """Return the run, its checkpoints that are new to a state, and what is odd about the rest."""
    news = updating.news(state, run)
    late = [entry for _, entry in news.late]
    run = dataclasses.replace(run, passed_over=(*run.passed_over, *late))
    return run, news.new, list(news.notes)


def describe(state: State, update: Update) -> Plan:
    """Return an update as a plan over all checkpoints of the state, to be shown and warned of."""
    request, last = update.request, update.new[-1]
    rows = state.current.applied if state.current else []
    known = [exporting.source_of(row, last.index) for row in rows]
    run = dataclasses.replace(update.run, checkpoints=(*known, *update.new))
    wishes = request.wishes
    if request.output is None:  # then nothing has to be sayable in any format
        wishes = Wishes(name=wishes.name, optimizer=wishes.optimizer, unknown="keep")
    outcomes = []
    for ordinal, average in enumerate(request.averages):
        full = update.schedules[ordinal]
        path = planning.output_path(request.output or "", average, last)
        updates = full.updates if full.zero_debias else None
        layout = lay_out(path, last, update.selection, wishes, updates)
        weights = full.weights()
        outcomes.append(Outcome(average, ordinal, weights, last, update.selection, layout))
    nothing = prepare((), (), (), (), request.manner)
    slot = update.holding.slot.nbytes
    averaged = sum(tensor.nbytes for tensor in update.selection.averaged)
    read = averaged * len(update.new) + (state.current.slot.nbytes if state.current else 0)
    costs = Costs(read, slot, planning.BASE_BYTES, free_bytes(state.path))
    return Plan(request, run, update.schedules, tuple(outcomes), nothing, costs)


def _check_outputs(plan: Plan, *, overwrite: bool) -> None:
    """Raise before the work what would be raised after it."""
    inputs = [stamp for checkpoint in plan.run.checkpoints for stamp in checkpoint.files]
    for outcome in plan.outcomes:
        check_destination(outcome.layout, inputs, overwrite=overwrite)


def _export(
    state: State,
    request: Request,
    overwrite: bool,
    executor: Executor | None,
    on_event: OnEvent | None,
) -> tuple[list[Written], list[Plan], list[str]]:
    """Write the output of each average, unless none is asked for."""
    written: list[Written] = []
    plans: list[Plan] = []
    notes: list[str] = []
    for average in request.averages if request.output is not None else ():
        plan = exporting.make(state, request, average)
        tell = exporting.told_of(plan, on_event)
        result = run_plan(plan, overwrite=overwrite, executor=executor, on_event=tell)
        written.extend(result.outputs)
        plans.append(plan)
        notes.extend(result.notes)
    return written, plans, notes


def plan_state(request: Request, path: str) -> Plan:
    """Return what `continue_state` would do, as a plan over all checkpoints of the state."""
    run = _find(request, path)
    if not directory.is_state(path) or not exists(os.path.join(path, directory.ROOT)):
        return _planned(State(path), request, run)
    with store.reading(path) as state:
        _check_settings(state, request)
        return _planned(state, request, run)


def _planned(state: State, request: Request, run: Run) -> Plan:
    run, new, notes = _seen(state, run)
    known = len(_applied(state))
    told = f"{plural(known, 'checkpoint')} averaged already, {len(new):,} new" if known else ""
    run = dataclasses.replace(run, notes=(*run.notes, *notes, *([told] if told else [])))
    if new:
        return describe(state, updating.prepare_update(state, request, run, new))
    plans = [exporting.make(state, request, average) for average in request.averages]
    outcomes = tuple(
        dataclasses.replace(plan.outcomes[0], schedule=k) for k, plan in enumerate(plans)
    )
    schedules = tuple(plan.schedules[0] for plan in plans)
    run = dataclasses.replace(run, checkpoints=plans[0].run.checkpoints)
    return dataclasses.replace(
        plans[0], request=request, run=run, outcomes=outcomes, schedules=schedules
    )


def _check_settings(state: State, request: Request) -> None:
    """Raise `OtherSettings` when a state is bound to others than those asked for."""
    if state.current is not None:
        settings.check_same(state.current.binding, request, state.path)
        settings.bound(state.current.binding, state.place(directory.PLAN))


@dataclass(frozen=True, eq=False)
class ExportResult:
    """What `export` wrote.

    Attributes:
        plans: one per average.
        outputs: one per average, in the same order.
        step: the last step that the state has averaged.
        notes: what could not be promised, e.g. reserved space.
    """

    plans: tuple[Plan, ...]
    outputs: tuple[Written, ...]
    step: int
    notes: tuple[str, ...]


def export_state(
    path: str,
    request: Request,
    labels: Sequence[str],
    *,
    non_finite: str | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
) -> ExportResult:
    """Write outputs from the state at `path`, while another process may write to it.

    Args:
        path: of the state.
        request: the output, and how it shall look.
        labels: of the averages; all when empty.
        non_finite: ``error`` or ``allow``, or None for what the state is bound to.
        overwrite: replace existing outputs.
        executor: given, or None for threads.
        on_event: told of progress.
    """
    with store.reading(path) as state:
        assert state.current is not None  # noqa: S101  # or it could not be opened for reading
        bound = settings.bound(state.current.binding, state.place(directory.PLAN))
        known = [average.label for average in bound.averages]
        for label in labels:
            if label not in known:
                raise UsageError(
                    f"--average {shorten(label)}: expected one of {', '.join(known)}",
                    hints.did_you_mean(label, known, "leave out --average to write all of them"),
                )
        wishes = dataclasses.replace(request.wishes, name=bound.wishes.name)
        asked = dataclasses.replace(
            bound,
            averages=tuple(a for a in bound.averages if not labels or a.label in labels),
            output=request.output,
            wishes=wishes,
            workers=request.workers,
            non_finite=non_finite or bound.non_finite,
        )
        planning.check_output(asked)
        written, plans, notes = _export(state, asked, overwrite, executor, on_event)
        step = state.current.applied[-1].step or 0
        return ExportResult(tuple(plans), tuple(written), step, tuple(notes))
