"""``--from OUT.ema.json`` of ``run`` and ``plan``: what it decides, and what may be said beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ema_cli.cli import configuration

if TYPE_CHECKING:
    from ema_cli.plan import Plan


def settle(ctx: click.Context, arguments: dict[str, Any]) -> None:
    """Check that what a run averages is told once: by RUN and options, or by a provenance.

    What a provenance tells, neither the environment nor a file says otherwise: `arguments` keep
    only what the command line says of the output.
    """
    if arguments["provenance"] is None:
        if not arguments["runs"]:
            [runs] = (p for p in ctx.command.params if p.name == "runs")
            raise click.MissingParameter(ctx=ctx, param=runs)
        return
    from ema_cli import replaying

    for option in ctx.command.params:
        name = option.name or ""
        decides = name in replaying.DECIDED or name in ("include", "exclude")
        if decides and configuration.on_the_line(ctx, name):
            shown = option.opts[-1] if isinstance(option, click.Option) else "RUN"
            raise replaying.decided(shown)
    for name in (*replaying.DECIDED, *replaying.SUGGESTED):
        if name not in replaying.SUGGESTED or not configuration.on_the_line(ctx, name):
            arguments.pop(name)
    arguments["state"] = None


def planned(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `ema_cli.plan_run`, or of what a provenance tells."""
    from ema_cli import api

    if arguments["provenance"] is None:
        return api.plan_run(**arguments)
    from ema_cli import replaying

    look = {name: arguments[name] for name in replaying.SUGGESTED if name in arguments}
    made = replaying.plan_again(
        arguments["provenance"], arguments["output"], workers=arguments["workers"], **look
    )
    if arguments["strict"]:
        from ema_cli.running import refuse_warnings
        from ema_cli.warnings import warnings

        refuse_warnings(warnings(made), made.run)
    return made
