"""The command line: one file per command, and `main`, which maps errors and signals to codes."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import click

from ema_cli.cli import mistakes, options
from ema_cli.cli.diff import diff
from ema_cli.cli.export import export
from ema_cli.cli.group import Group
from ema_cli.cli.inspect import inspect
from ema_cli.cli.map import map_command
from ema_cli.cli.plan import plan
from ema_cli.cli.rename import rename
from ema_cli.cli.run import run
from ema_cli.cli.signals import Signals, Terminated, Unread
from ema_cli.cli.verify import verify
from ema_cli.cli.watch import watch
from ema_cli.errors import EmaError, StorageError, UsageError
from ema_cli.text import printable
from ema_cli.views import Out, silence


class Stopped(EmaError):
    """Not an error ended the command; `args` are what did, the code, a hint, whether it writes."""

    @property
    def message(self) -> str:
        """What happened, and that it did no harm."""
        return (
            f"{self.args[0]}; nothing half-written was published" if self.args[3] else self.args[0]
        )

    @property
    def hint(self) -> str:
        """What to do next; nothing, unless something was left to be gone on with."""
        return str(self.args[2])

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # of this signal
        """128 + the signal's number."""
        return int(self.args[1])


# What ends a command from outside: its name and exit code.
_STOPPED: dict[type[BaseException], tuple[str, int]] = {
    Terminated: ("terminated", 143),
    KeyboardInterrupt: ("interrupted", 130),
    click.Abort: ("interrupted", 130),
    Unread: ("stopped: nobody reads its output any more", 141),
}
# Commands that write nothing.
_READERS = (None, "plan", "inspect", "map", "diff", "verify")


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from ema_cli import machine
        from ema_cli.views import Out

        versions = machine.all_versions()
        out = Out(as_json=ctx.meta["as_json"])
        for package, version in versions.items():
            out.line(f"{package} {version}")
        out.document("result", command="version", versions=versions)
        out.flush()
        ctx.exit()


def _misplaced(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """``--json`` before the command: only ``--version``, which ends the work, can mean it."""
    if value and not ctx.resilient_parsing:
        raise UsageError("--json: expected after a command", "ema-avg COMMAND --json")


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "EMA_AVG"},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the versions that matter and exit.",
)
@click.option("--json", is_flag=True, hidden=True, expose_value=False, callback=_misplaced)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Average the checkpoints a training run left behind: exactly, offline, in constant memory."""
    if ctx.invoked_subcommand is None:
        click.echo(cli.overview(ctx))


for _command in (plan, run, watch, inspect, map_command, diff, rename, export, verify):
    cli.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; no exception leaves.

    With ``EMA_AVG_DEBUG=1`` errors show their tracebacks first.
    """
    meta: dict[str, Any] = {"as_json": False}
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        meta["as_json"] = "--json" in arguments
        Out.current = None
        _open_streams()
        if "_EMA_AVG_COMPLETE" in os.environ:
            from ema_cli.cli import shells

            return shells.answer(cli, os.environ)
        return _heeding_signals(arguments, meta)
    except Exception as error:  # memory can run out before and after the command, too
        return _ended(error, meta)


def _heeding_signals(arguments: list[str], meta: dict[str, Any]) -> int:
    with Signals(_say) as signals:
        try:
            with mistakes.told(arguments):
                return _run(arguments, meta)
        except BaseException as error:
            signals.ending()
            return _ended(error, meta)
        finally:
            if not _is_written(sys.stderr):
                silence(sys.stderr)


def _open_streams() -> None:
    """See to it that there are streams, and that they can be told any text.

    A descriptor that was closed would become that of a file we write.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+" if number else "r", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is no reason to fail


def _say(text: str) -> None:
    """Say at once what a signal does; called by its handler."""
    if Out.current is not None:
        Out.current.interrupted(text)


def _run(arguments: list[str], meta: dict[str, Any]) -> int:
    with cli.make_context("ema-avg", arguments) as ctx:
        try:
            code = cli.invoke(ctx)
        finally:
            meta.update(ctx.meta, command=ctx.invoked_subcommand)
        sys.stdout.flush()
        return int(code or 0)


def _ended(error: BaseException, meta: dict[str, Any]) -> int:
    """Tell the user what ended the command; returns the exit code."""
    as_json = bool(meta["as_json"])
    if Out.current is not None:
        Out.current.end_progress()
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    error = _signal_behind(error) or error
    if isinstance(error, BrokenPipeError) and _is_unread():
        silence(sys.stdout)
        return 0
    if isinstance(error, tuple(_STOPPED)):
        what, code = next(told for kind, told in _STOPPED.items() if isinstance(error, kind))
        hint = "\n".join(getattr(error, "__notes__", ()))
        writing = meta.get("command") not in _READERS
        return _report(Stopped(what, code, hint, writing), as_json=as_json)
    if isinstance(error, SystemExit | GeneratorExit):
        raise error
    if options.debugging():
        traceback.print_exception(error)
    return _report(_as_ema_error(error), as_json=as_json)


def _is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def _signal_behind(error: BaseException) -> BaseException | None:
    """Return the signal while whose unwinding `error` was raised, if that is what happened.

    A signal that interrupts a lock being taken back makes the interpreter's own threading code
    fail on the way out; what ended the command is still the signal.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt | Terminated):
        cause = cause.__context__
    return cause


def _as_ema_error(error: BaseException) -> EmaError:
    """Return `error` as one of ours; what is none of ours is an internal error."""
    if isinstance(error, EmaError):
        return error
    if isinstance(error, OSError):
        name = error.filename  # a number where a descriptor was listed
        named = printable(os.fsdecode(name)) if isinstance(name, str | bytes) else ""
        named = named or ("standard output" if name is None else "a directory")
        where = f"{named}: "
        return StorageError(f"{where}{os.strerror(error.errno or 0)}")
    if isinstance(error, MemoryError):
        return EmaError("out of memory", "use fewer --workers")
    return EmaError(
        f"internal error: {type(error).__name__}: {printable(str(error))}",
        "run again with EMA_AVG_DEBUG=1 and report what it shows",
    )


def _report(error: EmaError, *, as_json: bool) -> int:
    try:
        out = Out(as_json=as_json)
        out.error(error)
        out.flush()
    except OSError:
        silence(sys.stdout)  # nobody can be told; the exit code still can
    return error.exit_code


def _is_written(stream: TextIO) -> bool:
    """Whether all that was told to a stream has gone out."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def entry() -> NoReturn:
    """Be the ``ema-avg`` command."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the interpreter's end has nothing to tell
    sys.exit(code)
