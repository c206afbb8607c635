"""``ema-avg watch``: the main job while the training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ema_cli.cli import completion, options
from ema_cli.cli.command import Command, Option
from ema_cli.cli.plan import split
from ema_cli.cli.signals import Unread
from ema_cli.cli.stateview import applied, span
from ema_cli.text import plural, printable, shorten, size

if TYPE_CHECKING:
    from ema_cli.live.reports import Applied, Looked, Missed, Published, Report, WatchResult
    from ema_cli.views import Out

RESUME = "the same command goes on where this one stopped"


@click.command(
    cls=Command,
    short_help="Average a training while it goes on.",
    example="ema-avg watch train_dir --state shadows -o average-{step}.safetensors "
    "--until-step 2000",
    codes=(3, 10, 11, 13, 14, 16, 17, 141),
)
@click.argument("run", metavar="RUN", type=click.Path())
@click.option(
    "--state",
    cls=Option,
    group="Input",
    metavar="DIR",
    type=click.Path(),
    shell_complete=completion.directories,
    required=True,
    help="Where the shadows are kept; begun if it is not there.",
)
@click.option(
    "--glob",
    cls=Option,
    group="Input",
    metavar="GLOB",
    help="Entries of RUN to consider; may contain '/'.",
)
@click.option(
    "--steps",
    cls=Option,
    group="Input",
    metavar="A:B[:C]",
    help="Only steps A to B, both included; with C only A, A + C, A + 2C and so on.",
)
@click.option(
    "--step-from",
    cls=Option,
    group="Input",
    metavar="REGEX",
    help="How a name tells the step: the first group is it.",
)
@options.key_option
@click.option(
    "--interval",
    cls=Option,
    group="Input",
    type=float,
    default=5.0,
    show_default=True,
    metavar="S",
    help="Seconds from one look at RUN to the next.",
)
@click.option(
    "--idle-timeout",
    cls=Option,
    group="Input",
    type=float,
    metavar="S",
    help="End when nothing new came for S seconds.",
)
@click.option(
    "--until-step",
    cls=Option,
    group="Input",
    type=int,
    metavar="N",
    help="End when step N is reached.",
)
@options.average_options
@click.option(
    "-o",
    "--output",
    cls=Option,
    group="Output",
    metavar="OUT",
    shell_complete=completion.paths,
    help="Where the result goes; may hold {step} and {average}. Folders and prefixes need {step}.",
)
@click.option(
    "--every",
    cls=Option,
    group="Output",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Write OUT after each N-th checkpoint, and at the end.",
)
@options.look_options
@options.overwrite_option
@options.workers_option
@options.common_options
@click.pass_context
def watch(ctx: click.Context, /, **given: Any) -> int:
    """Mix each new checkpoint of a training that goes on into a state, and write the average.

    RUN is the directory the training saves to; it need not be there yet. A checkpoint is taken when
    it is complete and nothing has changed it for a while, in the order of the steps. No checkpoint
    is ever deleted. The state can be continued, exported and verified by the other commands.
    """
    from ema_cli import api

    out, arguments = split(ctx, given)
    if not arguments["average"] and arguments["decay"] is None:
        from ema_cli.cli import planview

        out.say(planview.RAMP)
    try:
        result = api.watch(**arguments, on_event=out.progress, on_report=_Told(out).tell)
    except Exception:
        raise
    except BaseException as ended:
        ended.__notes__ = [RESUME]  # whatever an update was about to say of itself
        raise
    finally:
        out.end_progress()
    _end(out, result)
    return 3 if result.missed or result.unusable else 0


class _Told:
    """Tells what happens as it happens: stdout is flushed after each line."""

    def __init__(self, out: Out) -> None:
        self._out = out
        self._first = True

    def tell(self, report: Report) -> None:
        """Tell one report."""
        getattr(self, f"_{type(report).__name__.lower()}")(report)
        self._out.flush()
        if self._out.unread:
            raise Unread

    def _looked(self, report: Looked) -> None:
        from ema_cli.cli import planview
        from ema_cli.live.readiness import NOT_THERE

        if self._first:
            planview.passed_over(self._out, report.run)
        else:
            for note in report.run.notes:
                self._out.say(f"note: {note}")
            for entry in report.run.passed_over:
                self._out.detail(f"passed over: {shorten(entry.path, 1000)}: {entry.reason}")
        self._first = self._first and not (report.run.passed_over or report.run.notes)
        for line in report.waiting:
            whole = line.endswith(NOT_THERE)  # perhaps a mistake, which would wait for ever
            (self._out.say if whole else self._out.detail)(f"waiting: {line}")

    def _applied(self, report: Applied) -> None:
        for warning in report.warnings:
            self._out.warning(*warning)
        rows, where = report.rows, printable(report.state)
        steps = span([row.step or 0 for row in rows])
        self._out.line(f"applied  {plural(len(rows), 'checkpoint')}  {steps}  {where}")
        self._out.document(
            "applied",
            state=report.state,
            applied=applied(rows),
            read_bytes=report.read,
            seconds=report.seconds,
        )
        self._out.detail(f"read {size(report.read)} in {report.seconds:.1f} s")

    def _published(self, report: Published) -> None:
        from ema_cli.cli import planview

        for note in report.notes:
            self._out.say(f"note: {note}")
        one = report.written
        self._out.line(f"{one.status}  {size(one.nbytes)}  {printable(one.path)}")
        self._out.document("written", step=report.step, **planview.output(one))

    def _missed(self, report: Missed) -> None:
        path = printable(report.path)
        self._out.line(f"missed  step {report.step:,}  {path}: {report.reason}")
        self._out.document("missed", path=report.path, step=report.step, reason=report.reason)

    def _dropped(self, report: Any) -> None:
        self._out.say(f"dropped: {report.reason}")


def _end(out: Out, result: WatchResult) -> None:
    from ema_cli import record
    from ema_cli.cli import planview

    reached = "" if result.step is None else f" up to step {result.step:,}"
    out.say(
        f"{plural(result.checkpoints, 'checkpoint')} averaged{reached}, "
        f"{len(result.applied):,} of them now; ended: {result.ended}"
    )
    for entry in result.unusable:
        out.say(f"unusable: {shorten(entry.path, 1000)}: {entry.reason}")
    if result.missed or result.unusable:
        out.say("done, but something that looks like a checkpoint could not be used")
    out.document(
        "result",
        command="watch",
        state=result.state,
        ended=result.ended,
        applied=applied(result.applied),
        missed=[{"path": m.path, "step": m.step, "reason": m.reason} for m in result.missed],
        step=result.step,
        checkpoint_count=result.checkpoints,
        outputs=[planview.output(written) for written in result.outputs],
        seconds=result.seconds,
        passed_over=record.entries(result.unusable),
    )
    out.flush()
