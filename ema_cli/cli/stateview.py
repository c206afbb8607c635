"""How the work on a state is told: what was mixed in, and the outputs made of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ema_cli.text import command, plural, printable, shorten, size
from ema_cli.views import Out

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
    from ema_cli.cli import planview, plotfile
    from ema_cli.continuing import continue_state

    state, plot = arguments.pop("state"), arguments.pop("plot")
    given = {name: arguments.pop(name) for name in ("overwrite", "strict", "restart")}

    plotfile.check(plot, overwrite=given["overwrite"])

    def planned(run: Run, warnings: Sequence[PlanWarning], notes: Sequence[str]) -> None:
        planview.passed_over(out, run)
        stamps = (stamp for one in run.checkpoints for stamp in one.files)
        plotfile.check_against(plot, stamps, [state, arguments["output"] or state])
        for warning in warnings:
            out.warning(*warning)
        for note in notes:
            out.say(f"note: {note}")

    def tell(rows: Sequence[Row]) -> None:
        out.end_progress()
        steps = span([row.step or 0 for row in rows])
        with contextlib.suppress(BrokenPipeError):  # who has gone does not end the work
            out.line(f"applied  {plural(len(rows), 'checkpoint')}  {steps}  {printable(state)}")
            out.document(
                "applied", state=state, applied=applied(rows), read_bytes=None, seconds=None
            )
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
    _look(out, state)
    _tell(out, result)
    _draw(out, state, plot, overwrite=given["overwrite"])
    _result(out, result)
    out.flush()
    return 3 if result.unusable else 0


def _draw(out: Out, path: str, plot: str | None, *, overwrite: bool) -> None:
    """Draw what the state averages now into a picture."""
    from ema_cli.cli import plotfile, plotview
    from ema_cli.states.summary import summarize

    if plot is not None:
        course = plotview.of_state(summarize(path))
        plotfile.save(out, plot, path, course, overwrite=overwrite)


def _look(out: Out, path: str) -> None:
    """Draw what the state averages now for who looks."""
    from ema_cli.cli import plotview
    from ema_cli.states.summary import summarize

    if out.screen(talk=True) is not None:
        plotview.beside_data(out, plotview.of_state(summarize(path)))


def _tell(out: Out, result: StateResult) -> None:
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


def _result(out: Out, result: StateResult) -> None:
    """Write the last document, when nothing can fail any more."""
    from ema_cli import record
    from ema_cli.cli import planview

    out.document(
        "result",
        command="run",
        state=result.state,
        status="applied" if result.applied else "unchanged",
        applied=applied(result.applied),
        step=result.step,
        checkpoint_count=result.checkpoints,
        outputs=[planview.output(written) for written in result.outputs],
        read_bytes=result.read,
        seconds=result.seconds,
        passed_over=record.passed_over(result.run),
        notes=[*result.run.notes, *result.notes, *result.promises],
    )


def applied(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the checkpoints that were mixed into a state as JSON data."""
    return [{"path": row.path, "step": row.step} for row in rows]


def show(out: Out, state: StateSummary) -> None:
    """Print what a state averages, up to which step, with which weights."""
    from ema_cli.cli import plotview

    rows = state.applied
    plotview.show(out, plotview.of_state(state))
    steps = [row.step or 0 for row in rows]
    for average, weights in zip(state.averages, state.weights, strict=True):
        out.say(f"{average.label}: {average.spec}: {plotview.extent(weights, steps)}")
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
        kind="state",
        path=state.path,
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
        kind="state",
        path=state.path,
        generation=state.generation,
        step=state.step,
        settings=list(state.settings),
        averages=[
            {"label": average.label, "spec": average.spec, "weights": list(weights)}
            for average, weights in zip(state.averages, state.weights, strict=True)
        ],
        ledger=[
            {
                "path": row.path,
                "step": row.step,
                "coefficients": list(row.coefficients),
                "reason": row.missed or None,
            }
            for row in state.rows
        ],
        tensor_count=state.tensors,
        bytes=state.nbytes,
    )


def span(steps: list[int]) -> str:
    """Return ``step 100`` or ``steps 100 to 900``."""
    if len(steps) == 1:
        return f"step {steps[0]:,}"
    return f"steps {steps[0]:,} to {steps[-1]:,}"
