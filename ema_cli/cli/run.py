"""``ema-avg run``: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ema_cli.cli import completion, options, replayed, stateview
from ema_cli.cli.command import Command, Option
from ema_cli.cli.plan import document, show, split
from ema_cli.text import plural, shorten, size

if TYPE_CHECKING:
    from ema_cli.running import RunResult
    from ema_cli.views import Out


@click.command(
    cls=Command,
    short_help="Average the checkpoints of a run and write the result.",
    example="ema-avg run train_dir -o average.safetensors --decay 0.999/step\n"
    "ema-avg run --from average.safetensors.ema.json -o again.safetensors",
    codes=(3, 10, 11, 13, 14, 16, 17),
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
    help="Where the result goes; may hold {step} and {average}. DIR/ is for TensorFlow.",
)
@options.output_options
@options.stats_options
@options.plot_option
@options.overwrite_option
@options.restart_option
@options.state_option
@options.workers_option
@click.option("-n", "--dry-run", cls=Option, is_flag=True, help="The same as plan.")
@options.strict_option
@options.common_options
@click.pass_context
def run(ctx: click.Context, /, **given: Any) -> int:
    """Average the checkpoints of a run and write the result as a new checkpoint.

    RUN is a directory of checkpoints, or several checkpoints. Without --decay or --average it is
    TensorFlow's warm-up ramp, which suits any number of files. With --from it is what an earlier
    output was made of, so that the same bytes come out.
    """
    out, arguments = split(ctx, given)
    plot = arguments.pop("plot")
    replayed.settle(ctx, arguments)
    restart = arguments.pop("restart")
    measured = {name: arguments.pop(name) for name in ("stats", "outliers")}
    if arguments.pop("dry_run"):
        return show(out, arguments, overwrite=arguments.pop("overwrite"), plot=plot)
    if arguments["state"] is not None:
        from ema_cli.running import refuse_measuring

        refuse_measuring(**measured)
        return stateview.continued(out, {**arguments, "restart": restart, "plot": plot})
    if arguments["output"] is None:
        [output] = (parameter for parameter in run.params if parameter.name == "output")
        raise click.MissingParameter(ctx=ctx, param=output)
    return _carry_out(out, arguments, plot=plot, restart=restart, **measured)


def _carry_out(out: Out, arguments: dict[str, Any], *, plot: str | None, **how: Any) -> int:
    from ema_cli import running
    from ema_cli.cli import planview, plotfile, plotview
    from ema_cli.warnings import warnings

    overwrite = arguments.pop("overwrite")
    plotfile.check(plot, overwrite=overwrite)
    made = replayed.planned(arguments)
    plotfile.check_plan(plot, made)
    told = how["stats"] or how["outliers"] is not None
    how["stats"] = told or plot is not None
    planview.passed_over(out, made.run)
    for warning in warnings(made, again=True):
        out.warning(*warning)
    if made.request.implicit:
        out.say(planview.RAMP)
    for stamp in made.work.inputs if out.verbose else ():
        out.detail(f"reads: {shorten(stamp.path, 1000)}, {size(stamp.size)}")
    out.document("plan", **document(made))
    plotview.beside_data(out, plotview.of_plan(made))
    try:
        result = running.run_plan(
            made,
            overwrite=overwrite,
            strict=arguments["strict"],
            on_event=out.progress,
            **how,
        )
    finally:
        out.end_progress()
    _tell(out, result, distances=told)
    if plot is not None:
        plotfile.draw(out, plot, made, result.distances, overwrite=overwrite)
    _document(out, result)
    out.flush()
    return 3 if result.unusable else 0


def _tell(out: Out, result: RunResult, *, distances: bool) -> None:
    from ema_cli.cli import planview, statsview
    from ema_cli.schedules import counting

    plan = result.plan
    for note in result.notes:
        out.say(f"note: {note}")
    statsview.show(out, result, tables=distances)
    for outcome, written in zip(plan.outcomes, result.outputs, strict=True):
        planview.written(out, plan, outcome, written)
    out.say(
        f"read {size(result.read)} of {plural(len(counting(plan.schedules)), 'checkpoint')} "
        f"in {result.seconds:.1f} s"
    )
    if any(entry.unusable for entry in plan.run.passed_over):
        out.say("done, but something that looks like a checkpoint could not be used")


def _document(out: Out, result: RunResult) -> None:
    """Write the last document, when nothing can fail any more."""
    from ema_cli import record
    from ema_cli.cli import planview, statsview

    out.document(
        "result",
        command="run",
        state=None,
        outputs=[planview.output(written) for written in result.outputs],
        read_bytes=result.read,
        seconds=result.seconds,
        passed_over=record.passed_over(result.plan.run),
        notes=[*result.plan.run.notes, *result.notes],
        **statsview.document(result),
    )
