"""What click finds wrong with a command line, told as one of our errors with what was meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from ema_cli.errors import UsageError
from ema_cli.hints import did_you_mean
from ema_cli.text import command, near_misses, printable

_NOT_ONE_OF = re.compile(r"'(.*)' is not one of ", re.DOTALL)


@contextmanager
def told(arguments: Sequence[str]) -> Iterator[None]:
    """Turn an error of click's over these arguments into a `UsageError`."""
    try:
        yield
    except click.ClickException as error:
        raise UsageError(_message(error), _hint(error, arguments)) from error


def _message(error: click.ClickException) -> str:
    """Return what is wrong as *where: what*, without click's capitals and periods."""
    if isinstance(error, click.NoSuchOption):
        return f"{printable(error.option_name)}: no such option"
    if isinstance(error, click.exceptions.NoSuchCommand):
        return f"{printable(error.command_name)}: no such command"
    if _asks_output(error):
        return "-o: expected where the result goes"
    text = error.message.strip() if isinstance(error, click.BadParameter) else ""
    where = _where(error)
    if not text or not where:
        text, where = error.format_message(), ""
    return printable(f"{where}{text[:1].lower()}{text[1:]}".removesuffix("."))


def _asks_output(error: click.ClickException) -> bool:
    param = error.param if isinstance(error, click.MissingParameter) else None
    return param is not None and param.name == "output"


def _where(error: click.ClickException) -> str:
    if not isinstance(error, click.BadParameter) or error.param is None or error.ctx is None:
        return ""
    hint = error.param.get_error_hint(error.ctx)
    return f"{hint.strip(chr(39))}: "


def _hint(error: click.ClickException, arguments: Sequence[str]) -> str:
    """Return the command that was probably meant, or where the right ones are told."""
    context = getattr(error, "ctx", None)
    see = f"see {context.command_path} --help" if context else ""
    if isinstance(error, click.NoSuchOption):
        known = [name for p in context.command.params for name in p.opts] if context else []
        return _elsewhere(context, error.option_name) or (
            _instead(error.option_name, known, arguments) or see
        )
    if isinstance(error, click.exceptions.NoSuchCommand):
        known = list(context.command.commands) if context else []
        return _instead(error.command_name, known, arguments) or see
    if _asks_output(error):
        return command("ema-avg", *arguments, "-o", "average.safetensors")
    found = _NOT_ONE_OF.match(getattr(error, "message", ""))
    if found and isinstance(getattr(error, "param", None), click.Parameter):
        choices = getattr(error.param.type, "choices", ())  # type: ignore[attr-defined]
        return did_you_mean(found[1], choices, see)
    return see


def _elsewhere(context: click.Context | None, option: str) -> str:
    """Return which other commands have exactly this option."""
    group = context.find_root().command if context else None
    commands = group.commands if isinstance(group, click.Group) else {}
    having = [name for name, c in commands.items() if any(option in p.opts for p in c.params)]
    return (
        f"it is an option of {' and '.join(f'ema-avg {name}' for name in having)}" if having else ""
    )


def _instead(wrong: str, known: Sequence[str], arguments: Sequence[str]) -> str:
    """Return the command line with what looks most like the wrong word, or nothing."""
    close = near_misses(wrong, known, 0.65)[:1]
    words = [
        close[0] + word[len(wrong) :] if word == wrong or word.startswith(f"{wrong}=") else word
        for word in arguments
        if close
    ]
    return command("ema-avg", *words) if words else ""
