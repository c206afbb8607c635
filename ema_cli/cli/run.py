"""``ema-avg run``: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ema_cli.cli import options, stateview
from ema_cli.cli.command import Command, Option
from ema_cli.cli.plan import document, show, split
from ema_cli.errors import UsageError
from ema_cli.text import plural, size

if TYPE_CHECKING:
    from ema_cli.running import RunResult
    from ema_cli.views import Out


@click.command(
    cls=Command,
    short_help="Average the checkpoints of a run and write the result.",
    example="ema-avg run train_dir -o average.safetensors --decay 0.999/step",
    codes=(3, 10, 11, 13, 14, 16, 17),
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path())
@options.input_options
@options.average_options
@click.option(
    "-o",
    "--output",
    cls=Option,
    group="Output",
    metavar="OUT",
    help="Where the result goes; may hold {step} and {average}. DIR/ is for TensorFlow.",
)
@options.output_options
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
    TensorFlow's warm-up ramp, which suits any number of files.
    """
    out, arguments = split(ctx, given)
    restart = arguments.pop("restart")
    if arguments.pop("dry_run"):
        return show(out, arguments, overwrite=arguments.pop("overwrite"))
    if arguments["state"] is not None:
        return stateview.continued(out, {**arguments, "restart": restart})
    if arguments["output"] is None:
        raise UsageError("expected -o OUT: where the result goes")
    return _carry_out(out, arguments, restart=restart)


def _carry_out(out: Out, arguments: dict[str, Any], *, restart: bool) -> int:
    from ema_cli import api, running
    from ema_cli.cli import planview
    from ema_cli.warnings import warnings

    overwrite = arguments.pop("overwrite")
    made = api.plan_run(**arguments)
    planview.passed_over(out, made.run)
    for warning in warnings(made, again=True):
        out.warning(*warning)
    if made.request.implicit:
        out.say(planview.RAMP)
    out.document("plan", **document(made))
    try:
        result = running.run_plan(made, overwrite=overwrite, restart=restart, on_event=out.progress)
    finally:
        out.end_progress()
    _tell(out, result)
    out.flush()
    return 3 if result.unusable else 0


def _tell(out: Out, result: RunResult) -> None:
    from ema_cli.cli import planview

    plan = result.plan
    for note in result.notes:
        out.say(f"note: {note}")
    for outcome, written in zip(plan.outcomes, result.outputs, strict=True):
        planview.written(out, plan, outcome, written)
    out.say(
        f"read {size(result.read)} of {plural(len(plan.run.checkpoints), 'checkpoint')} "
        f"in {result.seconds:.1f} s"
    )
    if any(entry.unusable for entry in plan.run.passed_over):
        out.say("done, but something that looks like a checkpoint could not be used")
    out.document(
        "result",
        command="run",
        outputs=[planview.output(written) for written in result.outputs],
        read_bytes=result.read,
        seconds=result.seconds,
        unusable=[entry.path for entry in result.unusable],
    )
