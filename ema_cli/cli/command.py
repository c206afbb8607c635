"""The commands' class: options in groups, an example first, the exit codes last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ema_cli.errors import EXIT_CODES

GROUPS = ("Input", "Average", "TensorFlow compatibility", "Output", "Resources", "Common")
# Exit codes every command can end with.
_ALWAYS = (0, 1, 2, 12, 15, 130, 143)


class Option(click.Option):
    """An option that knows under which heading of the help it stands."""

    def __init__(self, *args: Any, group: str = "Common", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


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
        try:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        names = [parameter.name for parameter in order]
        ctx.meta["select"] = [name for name in names if name in ("include", "exclude")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Carry out the command, having noted whether it answers in JSON."""
        ctx.meta["as_json"] = bool(ctx.params.get("json"))
        return super().invoke(ctx)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example before the description."""
        if self.example:
            with formatter.section("Example"):
                formatter.write_text(self.example)
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
        with formatter.section("Exit status"):
            formatter.write_dl([(str(code), EXIT_CODES[code]) for code in self.codes])


def selected(ctx: click.Context, include: Sequence[str], exclude: Sequence[str]) -> list[Any]:
    """Return the (kind, glob) pairs of both options in the order they were given."""
    remaining = {"include": list(include), "exclude": list(exclude)}
    pairs = [
        (kind, remaining[kind].pop(0)) for kind in ctx.meta.get("select", ()) if remaining[kind]
    ]
    # What came from a configuration file or the environment has no place on the line: it is first.
    return [(kind, glob) for kind, globs in remaining.items() for glob in globs] + pairs
