"""``ema-avg plan``: everything a run would do, before it does anything."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from ema_cli.cli import completion, options, replayed
from ema_cli.cli.command import Command, Option, selected
from ema_cli.views import Out

if TYPE_CHECKING:
    from ema_cli.plan import Plan


@click.command(
    cls=Command,
    short_help="Show what a run would do, with the weight of every checkpoint.",
    example="ema-avg plan train_dir --decay 0.999/step",
    codes=(3, 10, 13, 16),
)
@click.argument("runs", metavar="RUN...", nargs=-1, type=click.Path())
@options.from_option
@options.input_options
@options.average_options
@click.option(
    "-o",
    "--output",
    cls=Option,
    group="Output",
    metavar="OUT",
    shell_complete=completion.paths,
    help="Where a run would write.",
)
@options.output_options
@options.plot_option
@options.state_option
@options.workers_option
@options.strict_option
@options.common_options
@click.pass_context
def plan(ctx: click.Context, /, **given: Any) -> int:
    """Show what `ema-avg run` with the same options would do; reads headers only.

    RUN is a directory of checkpoints, or several checkpoints.
    """
    out, arguments = split(ctx, given)
    plot = arguments.pop("plot")
    replayed.settle(ctx, arguments)
    return show(out, arguments, plot=plot)


def split(ctx: click.Context, given: dict[str, Any]) -> tuple[Out, dict[str, Any]]:
    """Return the way to the user and the arguments of `ema_cli.plan_run`."""
    out = options.way_out(given)
    given["select"] = selected(ctx, given.pop("include"), given.pop("exclude"))
    return out, given


def show(
    out: Out,
    arguments: dict[str, Any],
    *,
    overwrite: bool | None = None,
    plot: str | None = None,
) -> int:
    """Make, print and, where that was asked for, draw the plan; returns the exit code."""
    from ema_cli import running
    from ema_cli.cli import planview, plotfile
    from ema_cli.destination import check_destination
    from ema_cli.errors import OutputExists
    from ema_cli.warnings import warnings

    plotfile.check(plot, overwrite=overwrite)
    made = replayed.planned(arguments)
    plotfile.check_plan(plot, made)
    planview.passed_over(out, made.run)
    for warning in warnings(made, state=arguments.get("state") or ""):
        out.warning(*warning)
    inputs = running.all_inputs(made)
    for outcome in made.outcomes if made.request.output else ():
        try:
            check_destination(outcome.layout, inputs, overwrite=bool(overwrite))
        except OutputExists as error:
            out.warning("output-exists", error.message, error.hint)
    planview.show(out, made)
    if plot is not None:
        plotfile.draw(out, plot, made, overwrite=bool(overwrite))
    out.document("result", command="plan", **document(made))
    out.flush()
    return 3 if running.unusable(made.run) else 0


def document(made: Plan) -> dict[str, Any]:
    """Return the plan as JSON data."""
    from ema_cli import record

    return {
        "averages": [record.describe(made, outcome) for outcome in made.outcomes],
        "passed_over": record.passed_over(made.run),
        "notes": list(made.run.notes),
        "costs": {f"{name}_bytes": n for name, n in dataclasses.asdict(made.costs).items()},
    }
