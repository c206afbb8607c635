"""How the work on a state is told: what was mixed in, and the outputs made of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ema_cli.text import command, percent, plural, printable, shorten, size
from ema_cli.views import Cell, Out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ema_cli.continuing import StateResult
    from ema_cli.runs import Run
    from ema_cli.states.records import Row
    from ema_cli.states.summary import StateSummary
    from ema_cli.warnings import PlanWarning


def continued(out: Out, arguments: dict[str, Any]) -> int:
    """Carry out ``ema-avg run --state``; returns the exit code."""
    from ema_cli import asked
    from ema_cli.cli import planview
    from ema_cli.continuing import continue_state

    state = arguments.pop("state")
    given = {name: arguments.pop(name) for name in ("overwrite", "strict", "restart")}

    def planned(run: Run, warnings: Sequence[PlanWarning], notes: Sequence[str]) -> None:
        planview.passed_over(out, run)
        for warning in warnings:
            out.warning(*warning)
        for note in notes:
            out.say(f"note: {note}")

    def tell(rows: Sequence[Row]) -> None:
        out.end_progress()
        steps = span([row.step or 0 for row in rows])
        with contextlib.suppress(BrokenPipeError):  # who has gone does not end the work
            out.line(f"applied  {plural(len(rows), 'checkpoint')}  {steps}  {printable(state)}")
            out.flush()

    try:
        result = continue_state(
            asked.request(**arguments),
            state,
            **given,
            on_event=out.progress,
            on_planned=planned,
            on_applied=tell,
        )
    finally:
        out.end_progress()
    for note in result.promises:
        out.say(f"note: {note}")
    _tell(out, result)
    out.flush()
    return 3 if result.unusable else 0


def _tell(out: Out, result: StateResult) -> None:
    from ema_cli import record
    from ema_cli.cli import planview

    if not result.applied:
        out.line(f"unchanged  step {result.step:,}  {printable(result.state)}")
    for plan, written in zip(result.plans, result.outputs, strict=True):
        planview.written(out, plan, plan.outcomes[0], written)
    out.say(
        f"{plural(result.checkpoints, 'checkpoint')} averaged up to step {result.step:,}; "
        f"read {size(result.read)} in {result.seconds:.1f} s"
    )
    if result.unusable:
        out.say("done, but something that looks like a checkpoint could not be used")
    out.document(
        "result",
        command="run",
        state=result.state,
        status="applied" if result.applied else "unchanged",
        applied=[{"step": row.step, "path": row.path} for row in result.applied],
        step=result.step,
        checkpoints=result.checkpoints,
        outputs=[planview.output(written) for written in result.outputs],
        read_bytes=result.read,
        seconds=result.seconds,
        unusable=[entry.path for entry in result.unusable],
        passed_over=record.passed_over(result.run),
    )


def show(out: Out, state: StateSummary) -> None:
    """Print what a state averages, up to which step, with which weights."""
    from ema_cli.schedules import effective_count, mean_age

    rows = state.applied
    single = len(state.averages) == 1
    columns = ["checkpoint", "step"]
    for average in state.averages:
        suffix = "" if single else f" {average.label}"
        columns += [f"coefficient{suffix}", f"weight{suffix}"]
    table: list[list[Cell]] = []
    for k, row in enumerate(rows):
        cells: list[Cell] = [row.name, row.step or 0]
        for coefficient, weights in zip(row.coefficients, state.weights, strict=True):
            cells += [f"{coefficient:.9g}", percent(weights[k])]
        table.append(cells)
    out.table(columns, table)
    steps = [row.step or 0 for row in rows]
    for average, weights in zip(state.averages, state.weights, strict=True):
        out.say(
            f"{average.label}: {average.spec}: effective number of checkpoints "
            f"{effective_count(weights):.1f}, mean age {mean_age(weights, steps):,.0f} steps"
        )
    for row in state.rows:
        if row.missed:
            out.say(f"missed: step {row.step}: {shorten(row.path, 1000)}: {row.missed}")
    out.say(
        f"state of {plural(len(rows), 'checkpoint')} up to step {state.step or 0:,}: "
        f"{plural(state.tensors, 'tensor')}, {size(state.nbytes)} on disk"
    )
    out.say(f"bound to {command(*state.settings)}")
    _document(out, state)


def verified(out: Out, state: StateSummary) -> int:
    """Tell that a state is intact; returns the exit code."""
    out.line(
        f"verified  {printable(state.path)}: {plural(len(state.applied), 'checkpoint')} up to step "
        f"{state.step or 0:,}, every checksum, the ledger and the plan"
    )
    out.document(
        "result",
        command="verify",
        state=state.path,
        generation=state.generation,
        step=state.step,
        bytes=state.nbytes,
    )
    out.flush()
    return 0


def _document(out: Out, state: StateSummary) -> None:
    out.document(
        "result",
        command="inspect",
        state=state.path,
        generation=state.generation,
        step=state.step,
        settings=list(state.settings),
        averages=[
            {"label": average.label, "spec": average.spec, "weights": list(weights)}
            for average, weights in zip(state.averages, state.weights, strict=True)
        ],
        ledger=[
            {
                "step": row.step,
                "path": row.path,
                "coefficients": list(row.coefficients),
                "missed": row.missed or None,
            }
            for row in state.rows
        ],
        tensors=state.tensors,
        bytes=state.nbytes,
    )


def span(steps: list[int]) -> str:
    """Return ``step 100`` or ``steps 100 to 900``."""
    if len(steps) == 1:
        return f"step {steps[0]:,}"
    return f"steps {steps[0]:,} to {steps[-1]:,}"
