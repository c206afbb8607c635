"""Defaults from a TOML file: a table per command, an entry per option."""

from __future__ import annotations

from typing import Any

import click

from ema_cli.errors import UsageError
from ema_cli.text import near_misses, shorten


def configure(ctx: click.Context, _: click.Parameter, path: str | None) -> None:
    """Take defaults from a TOML file: a table per command, an entry per option."""
    if path is None:
        return
    import tomllib

    where = f"--config {shorten(path)}"
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None
    commands = ctx.find_root().command.commands  # type: ignore[attr-defined]  # it is a group
    for name, table in document.items():
        if name not in commands or not isinstance(table, dict):
            raise UsageError(
                f"{where}: expected a table [{'], ['.join(commands)}], found '{shorten(name)}'"
            )
    known = {
        word.removeprefix("--"): parameter
        for parameter in ctx.command.params
        for word in parameter.opts
        if word.startswith("--") and word != "--config"
    }
    defaults: dict[str, Any] = {}
    table = document.get(ctx.info_name or "", {})
    if ctx.info_name == "plan":  # what a run would do: its table counts too
        shared = {k: v for k, v in document.get("run", {}).items() if k in known}
        table = {**shared, **table}
    for name, value in table.items():
        if name not in known:
            close = near_misses(name, known)
            raise UsageError(
                f"{where}: [{ctx.info_name}] has no option '{shorten(name)}'",
                f"did you mean {close[0]}" if close else "",
            )
        parameter = known[name]
        single = getattr(parameter, "multiple", False) and not isinstance(value, list)
        defaults[parameter.name or name] = [value] if single else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
