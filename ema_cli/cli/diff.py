"""``ema-avg diff``: how two checkpoints differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from ema_cli.cli import options
from ema_cli.cli.command import Command, Option
from ema_cli.text import plural


@click.command(
    cls=Command,
    short_help="Compare two checkpoints tensor by tensor.",
    example="ema-avg diff average.safetensors checkpoint-1000.safetensors --rtol 1e-6",
    codes=(13,),
)
@click.argument("a", metavar="A", type=click.Path())
@click.argument("b", metavar="B", type=click.Path())
@click.option(
    "--atol", cls=Option, group="Input", type=float, default=0.0, help="Absolute tolerance."
)
@click.option(
    "--rtol",
    cls=Option,
    group="Input",
    type=float,
    default=0.0,
    help="Tolerance relative to B.",
)
@options.key_option
@options.common_options
def diff(a: str, b: str, atol: float, rtol: float, key: str | None, **given: Any) -> int:
    """Compare names, shapes, dtypes and values; exact unless a tolerance is given.

    With a tolerance two values agree when |a - b| <= atol + rtol * |b|.
    """
    from ema_cli import api

    out = options.way_out(given)
    found = api.diff(a, b, atol=atol, rtol=rtol, key=key)
    if found:
        out.table(
            ("tensor", "difference", "A", "B", "elements", "max abs", "max rel"),
            [
                (
                    d.tensor,
                    d.kind,
                    d.a,
                    d.b,
                    f"{d.count} of {d.total}" if d.total else "",
                    f"{d.max_abs:.6g}" if d.total else "",
                    f"{d.max_rel:.6g}" if d.total else "",
                )
                for d in found
            ],
        )
    verb = "differs" if len(found) == 1 else "differ"
    out.say(f"{plural(len(found), 'tensor')} {verb}" if found else "no difference")
    out.document("result", command="diff", differences=[dataclasses.asdict(d) for d in found])
    out.flush()
    return 13 if found else 0
