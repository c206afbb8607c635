"""The commands' class: options in groups, an example first, the exit codes last."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from ema_cli.cli import configuration
from ema_cli.errors import EXIT_CODES, UsageError

GROUPS = ("Input", "Average", "TensorFlow compatibility", "Output", "Resources", "Common")
# Exit codes every command can end with.
_ALWAYS = (0, 1, 2, 12, 15, 130, 143)


class Option(click.Option):
    """An option that knows under which heading of the help it stands."""

    def __init__(self, *args: Any, group: str = "Common", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return what the environment says, if anything."""
        name = configuration.set_variable(ctx, self)
        return None if name is None else os.environ[name]

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Return it split at blanks where the option may be repeated, pair by pair."""
        text = self.resolve_envvar_value(ctx)
        words = text.split() if text is not None else []
        if self.nargs > 1 and not ctx.resilient_parsing and len(words) % self.nargs:
            raise UsageError(
                f"{configuration.set_variable(ctx, self)}: expected {self.nargs} words for each "
                f"{self.opts[-1]}, found {len(words)}",
                "words that hold blanks can be given on the command line or in a --config file",
            )
        return super().value_from_envvar(ctx)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return what a wrong value is told by: the option, or where it came from."""
        there = configuration.origin(ctx, self) if ctx is not None else ""
        return there or super().get_error_hint(ctx)


class Command(click.Command):
    """A command with grouped options, an example first, and its exit codes last.

    It also keeps the order in which ``--include`` and ``--exclude`` stood on the command line,
    which click forgets between two options.
    """

    def __init__(self, *args: Any, example: str = "", codes: Sequence[int] = (), **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.example = example
        self.codes = sorted({*_ALWAYS, *codes})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, noting the order of the selecting options before."""
        if ctx.resilient_parsing:
            args = [*args, *self._awaited(ctx, args)]
        ctx.meta["as_json"] = "--json" in args or _json_asked(ctx)  # of a usage error too
        try:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        names = [parameter.name for parameter in order]
        ctx.meta["select"] = [name for name in names if name in ("include", "exclude")]
        rest = super().parse_args(ctx, args)
        configuration.settle(ctx)
        return rest

    def _awaited(self, ctx: click.Context, args: Sequence[str]) -> list[str]:
        """Return what completes the last option of half a line: without it click parses nothing."""
        ends = {word: option.nargs for option in self.get_params(ctx) for word in option.opts}
        flags = {word for o in self.params if getattr(o, "is_flag", False) for word in o.opts}
        last = args[-1] if args else ""
        return [""] * ends[last] if last.startswith("-") and last in ends.keys() - flags else []

    def invoke(self, ctx: click.Context) -> Any:
        """Carry out the command, having noted whether it answers in JSON."""
        ctx.meta["as_json"] = bool(ctx.params.get("json"))
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise configuration.named(ctx, error) from error

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example before the description."""
        if self.example:
            with formatter.section("Example"):  # whole at any width: to be copied
                formatter.write("".join(f"  {line}\n" for line in self.example.splitlines()))
        super().format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        records: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records.setdefault(getattr(parameter, "group", "Common"), []).append(record)
        for group in GROUPS:
            if group in records:
                with formatter.section(group):
                    formatter.write_dl(records[group])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes this command can end with."""
        with formatter.section("EXIT STATUS"):
            formatter.write_dl([(str(code), EXIT_CODES[code]) for code in self.codes])


def _json_asked(ctx: click.Context) -> bool:
    """Whether the environment asks for JSON; what a file asks for is known when it is read."""
    told = os.environ.get(f"{ctx.auto_envvar_prefix}_JSON", "")
    return told.lower() in ("1", "true", "yes", "on")


def selected(ctx: click.Context, include: Sequence[str], exclude: Sequence[str]) -> list[Any]:
    """Return the (kind, glob) pairs of both options in the order they were given."""
    remaining = {"include": list(include), "exclude": list(exclude)}
    pairs = [
        (kind, remaining[kind].pop(0)) for kind in ctx.meta.get("select", ()) if remaining[kind]
    ]
    # What came from a configuration file or the environment has no place on the line: it is first.
    return [(kind, glob) for kind, globs in remaining.items() for glob in globs] + pairs
