"""The command line: one file per command, and `main`, which maps errors and signals to codes."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ema_cli.cli import options
from ema_cli.cli.diff import diff
from ema_cli.cli.export import export
from ema_cli.cli.inspect import inspect
from ema_cli.cli.map import map_command
from ema_cli.cli.plan import plan
from ema_cli.cli.rename import rename
from ema_cli.cli.run import run
from ema_cli.cli.verify import verify
from ema_cli.cli.watch import watch
from ema_cli.errors import EmaError, StorageError, UsageError
from ema_cli.text import printable

_SECTIONS = {
    "Average": ("plan", "run", "watch"),
    "Look": ("inspect", "map", "diff"),
    "Write": ("rename", "export"),
    "Check": ("verify",),
}


class Terminated(BaseException):
    """SIGTERM arrived: unwind as for Ctrl-C, so that nothing half-written stays."""


class Stopped(EmaError):
    """A signal ended the command; `args` are what happened, the exit code and a hint."""

    @property
    def message(self) -> str:
        """What happened, and that it did no harm."""
        return f"{self.args[0]}; nothing half-written was published"

    @property
    def hint(self) -> str:
        """What to do next; nothing, unless something was left to be gone on with."""
        return str(self.args[2])

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # of this signal
        """128 + the signal's number."""
        return int(self.args[1])


class _Group(click.Group):
    """The commands under the headings of what people want to do."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in _SECTIONS.items():
            with formatter.section(title):
                commands = ((name, self.get_command(ctx, name)) for name in names)
                formatter.write_dl([(n, c.get_short_help_str(70)) for n, c in commands if c])


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from ema_cli import machine

        lines = [f"{package} {version}" for package, version in machine.all_versions().items()]
        click.echo("\n".join(lines))
        ctx.exit()


@click.group(
    cls=_Group,
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
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Average the checkpoints a training run left behind: exactly, offline, in constant memory.

    
    ema-avg plan RUN                       what would be averaged, with every weight
    ema-avg run RUN -o average.safetensors
    """  # click looks for the character itself
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (plan, run, watch, inspect, map_command, diff, rename, export, verify):
    cli.add_command(_command)


@contextmanager
def _sigterm() -> Iterator[None]:
    """Raise `Terminated` in the main thread when SIGTERM arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; no exception leaves.

    With ``EMA_AVG_DEBUG=1`` errors show their tracebacks first.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is no reason to fail
    if "_EMA_AVG_COMPLETE" in os.environ:
        cli.main(arguments, prog_name="ema-avg", standalone_mode=False)
    meta: dict[str, Any] = {"as_json": "--json" in arguments}
    try:
        with _sigterm():
            return _run(arguments, meta)
    except BaseException as error:
        return _ended(error, as_json=meta["as_json"])


def _run(arguments: list[str], meta: dict[str, Any]) -> int:
    with cli.make_context("ema-avg", arguments) as ctx:
        try:
            code = cli.invoke(ctx)
        finally:
            meta.update(ctx.meta)
        sys.stdout.flush()
        return int(code or 0)


def _ended(error: BaseException, *, as_json: bool) -> int:
    """Tell the user what ended the command; returns the exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    error = _signal_behind(error) or error
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return 0
    hint = "\n".join(getattr(error, "__notes__", ()))
    if isinstance(error, Terminated):
        return _report(Stopped("terminated", 143, hint), as_json=as_json)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _report(Stopped("interrupted", 130, hint), as_json=as_json)
    if isinstance(error, SystemExit | GeneratorExit):
        raise error
    if options.debugging():
        traceback.print_exception(error)
    return _report(_as_ema_error(error), as_json=as_json)


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
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f"see {context.command_path} --help" if context else ""
        return UsageError(printable(error.format_message()), hint)
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
    from ema_cli.views import Out

    try:
        out = Out(as_json=as_json)
        out.error(error)
        out.flush()
    except BrokenPipeError:
        _silence_stdout()
    except OSError:
        pass  # nobody can be told; the exit code still can
    return error.exit_code


def _silence_stdout() -> None:
    """Whoever read stdout has gone: keep the interpreter from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def entry() -> NoReturn:
    """Be the ``ema-avg`` command."""
    # An index is hundreds of thousands of tuples without a cycle: looking for one again and again
    # took a fifth of the time over 20,000 tensors.
    gc.set_threshold(1 << 20)
    sys.exit(main())
