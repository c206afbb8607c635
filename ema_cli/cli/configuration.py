"""Where the value of an option comes from: the line, the environment, a file, or its default."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import click
from click.core import ParameterSource

from ema_cli.errors import UsageError
from ema_cli.hints import did_you_mean, near_path
from ema_cli.text import printable, shorten

PREFIX = "EMA_AVG"
# Variables that belong to no option of one command.
CONFIG_VARIABLE = f"{PREFIX}_CONFIG"
_OTHERS = (CONFIG_VARIABLE, f"{PREFIX}_DEBUG")
_EXAMPLE = "a file of lines such as: [run], then: decay = 0.99"
# Of options that say one thing in two ways, what the higher level says counts alone.
_ALTERNATIVES = (("decay", "average"),)
# What has a meaning for exponential averages only.
_OF_EXPONENTIAL = ("num_updates", "init", "zero_debias")
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "boolean": ((bool,), "true or false"),
    "integer": ((int,), "an integer"),
    "integer range": ((int,), "an integer"),
    "float": ((int, float), "a number"),
}
_TEXT: tuple[tuple[type, ...], str] = ((str, int, float), "text")


# ---------------------------------------------------------------------------- the environment


def variables(ctx: click.Context, option: click.Parameter) -> list[str]:
    """Return the variables that may hold the value of an option, the first that is set counts.

    `plan` shows what `run` would do, so it listens to what `run` is told.
    """
    if not getattr(option, "allow_from_autoenv", False) or ctx.auto_envvar_prefix is None:
        return []
    name = _word(option)
    found = [f"{ctx.auto_envvar_prefix}_{name}"]
    run = _commands(ctx).get("run")
    if ctx.info_name == "plan" and run and option.name in {p.name for p in run.params}:
        found.append(f"{PREFIX}_RUN_{name}")
    return [*found, CONFIG_VARIABLE] if option.name == "config" else found


def _word(option: click.Parameter) -> str:
    """Return an option as it is called in the name of a variable: ``STEP_FROM``."""
    return max(option.opts, key=len).removeprefix("--").replace("-", "_").upper()


def _commands(ctx: click.Context) -> Mapping[str, click.Command]:
    return getattr(ctx.find_root().command, "commands", {})


def set_variable(ctx: click.Context, option: click.Parameter) -> str | None:
    """Return the variable that holds the value of an option; empty ones hold none."""
    return next((name for name in variables(ctx, option) if os.environ.get(name)), None)


def unknown_variables(ctx: click.Context) -> Iterator[tuple[str, str]]:
    """Yield what looks like a setting in the environment and is none, with what was meant."""
    known = [
        f"{PREFIX}_{command.upper()}_{_word(option)}"
        for command, one in _commands(ctx).items()
        for option in one.params
        if getattr(option, "allow_from_autoenv", False)
    ]
    for name in sorted(os.environ):
        if name.startswith(f"{PREFIX}_") and name not in known and name not in _OTHERS:
            yield f"{shorten(name)}: no such setting", did_you_mean(name, [*known, *_OTHERS])


# ---------------------------------------------------------------------------- the file


def configure(ctx: click.Context, option: click.Parameter, path: str | None) -> None:
    """Take defaults from a TOML file: a table per command, an entry per option."""
    if path is None or ctx.resilient_parsing:
        return
    where = f"{origin(ctx, option) or '--config'} {shorten(path)}"
    document = _read(path, where)
    commands = _commands(ctx)
    for name, table in document.items():
        if name not in commands or not isinstance(table, dict):
            raise UsageError(
                f"{where}: expected a table [{'], ['.join(commands)}], found '{shorten(name)}'",
                did_you_mean(name, commands, _EXAMPLE),
            )
    known = _known(ctx.command)
    mine = ctx.info_name or ""
    tables = [mine]
    if mine == "plan":  # what a run would do: its table counts too
        tables = ["run", mine]
        document = {**document, "run": _shared(document.get("run", {}), known)}
    defaults: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for table_name in tables:
        for name, value in document.get(table_name, {}).items():
            there = f"{where}: [{table_name}] {shorten(name)}"
            if name not in known:
                raise UsageError(
                    f"{there}: no such option",
                    did_you_mean(name, known, f"see ema-avg {table_name} --help"),
                )
            key = known[name].name or name
            defaults[key], origins[key] = _value(known[name], value, there), there
    ctx.meta["as_json"] = ctx.meta["as_json"] or defaults.get("json") is True
    ctx.meta["origins"] = origins
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _read(path: str, where: str) -> dict[str, Any]:
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UsageError(f"{where}: cannot open: {reason}", near_path(path, _EXAMPLE)) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no TOML: {printable(str(error))}", _EXAMPLE) from None


def _known(command: click.Command) -> dict[str, click.Option]:
    """Return the options that a file may give, by their names on the line."""
    return {
        word.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and option.allow_from_autoenv
        for word in option.opts
        if word.startswith("--") and word != "--config"
    }


def _shared(table: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name in known}


def _value(option: click.Option, value: Any, there: str) -> Any:
    """Return an entry as click takes it; one of an option that may be repeated needs no list."""
    if not option.multiple:
        return _single(option, value, there)
    texts = isinstance(value, list) and value and not isinstance(value[0], list)
    rows = [value] if not isinstance(value, list) or (option.nargs > 1 and texts) else value
    return [_single(option, row, there) for row in rows]


def _single(option: click.Option, value: Any, there: str) -> Any:
    if option.nargs == 1:
        return _checked(option, value, there)
    if not isinstance(value, list) or len(value) != option.nargs:
        raise UsageError(f"{there}: expected lists of {option.nargs} texts", _EXAMPLE)
    return [_checked(option, part, there) for part in value]


def _checked(option: click.Option, value: Any, there: str) -> Any:
    kinds, words = _KINDS.get(option.type.name, _TEXT)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        found = f"'{shorten(value)}'" if isinstance(value, str) else shorten(repr(value), 60)
        raise UsageError(f"{there}: expected {words}, found {found}", _EXAMPLE)
    return value


# ---------------------------------------------------------------------------- all of them


def origin(ctx: click.Context, option: click.Parameter) -> str:
    """Return which variable or entry of a file an option has its value from, if from any."""
    source = ctx.get_parameter_source(option.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return set_variable(ctx, option) or ""
    if source is ParameterSource.DEFAULT_MAP:
        origins: Mapping[str, str] = ctx.meta.get("origins", {})
        return origins.get(option.name or "", "")
    return ""


def on_the_line(ctx: click.Context, name: str) -> bool:
    """Whether an option or argument was given on the command line."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def settle(ctx: click.Context) -> None:
    """Let options of the environment or a file yield to what a higher level says instead."""
    options = {option.name: option for option in ctx.command.params}
    for names in _ALTERNATIVES:
        levels = {n: ctx.get_parameter_source(n) for n in names if n in options}
        best = min((level for level in levels.values() if level is not None), default=None)
        for name, level in levels.items():
            if level is not None and best is not None and level > best:
                _forget(ctx, options[name])
    averages = ctx.params.get("average") or ()
    if averages and not ctx.params.get("decay") and not any(map(_exponential, averages)):
        for name in _OF_EXPONENTIAL:
            if name in options and not on_the_line(ctx, name):
                _forget(ctx, options[name])


def _exponential(text: str) -> bool:
    return text.partition("=")[2].startswith(("ema:", "half-life:")) or text.startswith(
        ("ema:", "half-life:")
    )


def _forget(ctx: click.Context, option: click.Parameter) -> None:
    """Give an option its default, as if nothing had been said of it."""
    name = option.name or ""
    if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
        empty = () if option.multiple else None
        default = option.default  # `get_default` asks the file first
        missing = type(default).__name__ == "Sentinel" or default is None
        ctx.params[name] = empty if missing else option.type_cast_value(ctx, default)
        ctx.set_parameter_source(name, ParameterSource.DEFAULT)


def named(ctx: click.Context, error: UsageError) -> UsageError:
    """Return an error about an option that names the variable or the entry the option is from."""
    for option in ctx.command.params:
        there, value = origin(ctx, option), ctx.params.get(option.name or "")
        values = value if isinstance(value, tuple) else [value]
        words = [option.opts[-1], *(f"{one}'" for one in values if isinstance(one, str))]
        if there and any(word in error.message for word in words):
            return UsageError(f"{there}: {error.message}", error.hint)
    return error
