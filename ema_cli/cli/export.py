"""``ema-avg export``: an output from a state, at any time."""

from __future__ import annotations

from typing import Any

import click

from ema_cli.cli import completion, options
from ema_cli.cli.command import Command, Option


@click.command(
    cls=Command,
    short_help="Write the average of a state as a checkpoint.",
    example="ema-avg export shadows -o average-{step}.safetensors",
    codes=(11, 13, 14, 17),
)
@click.argument("state", metavar="STATE", type=click.Path(), shell_complete=completion.directories)
@click.option(
    "-o",
    "--output",
    cls=Option,
    group="Output",
    metavar="OUT",
    shell_complete=completion.paths,
    required=True,
    help="Where the result goes; may hold {step} and {average}. DIR/ is for TensorFlow.",
)
@click.option(
    "--average",
    cls=Option,
    group="Average",
    multiple=True,
    metavar="LABEL",
    shell_complete=completion.labels,
    help="Which average, where the state has several; all without it.",
)
@options.look_options
@click.option(
    "--non-finite",
    cls=Option,
    group="Average",
    type=click.Choice(("error", "allow")),
    help="What is done about NaN or infinity in the result.  [default: as the state has it]",
)
@options.overwrite_option
@options.workers_option
@options.common_options
def export(state: str, output: str, **given: Any) -> int:
    """Write what a state holds as a checkpoint, as `ema-avg run` would have written it.

    It needs none of the checkpoints that were averaged, and may be done while another process
    goes on with the state.
    """
    from ema_cli import api
    from ema_cli.cli import planview

    out = options.way_out(given)
    try:
        result = api.export(state, output, **given, on_event=out.progress)
    finally:
        out.end_progress()
    for note in result.notes:
        out.say(f"note: {note}")
    for plan, written in zip(result.plans, result.outputs, strict=True):
        planview.written(out, plan, plan.outcomes[0], written)
    out.document(
        "result",
        command="export",
        state=state,
        step=result.step,
        outputs=[planview.output(written) for written in result.outputs],
        notes=list(result.notes),
    )
    out.flush()
    return 0
