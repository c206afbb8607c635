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
    example="ema-avg diff average.safetensors train_dir/checkpoint-2000 --rtol 0.01",
    codes=(13,),
)
@click.argument("a", metavar="A", type=click.Path())
@click.argument("b", metavar="B", type=click.Path())
@click.option(
    "--atol",
    cls=Option,
    group="Input",
    type=float,
    default=0.0,
    help="How far apart two values may be.",
)
@click.option(
    "--rtol",
    cls=Option,
    group="Input",
    type=float,
    default=0.0,
    help="How far apart two values may be, in relation to that of B.",
)
@options.key_option
@options.common_options
def diff(a: str, b: str, atol: float, rtol: float, key: str | None, **given: Any) -> int:
    """Compare names, shapes, dtypes and values; exact unless a tolerance is given.

    With a tolerance two values agree when |a - b| <= atol + rtol * |b|. A terminal is shown the
    tensors that changed most and how many elements changed how much; -v and a pipe get everything.
    """
    from ema_cli import api
    from ema_cli.cli import diffview

    out = options.way_out(given)
    found = api.diff(a, b, atol=atol, rtol=rtol, key=key)
    diffview.show(out, found)
    count = len(found.differences)
    verb = "differs" if count == 1 else "differ"
    out.say(f"{plural(count, 'tensor')} {verb}" if found else "no difference")
    out.document(
        "result",
        command="diff",
        paths=[a, b],
        differences=[dataclasses.asdict(difference) for difference in found.differences],
        histogram=[dataclasses.asdict(one) for one in found.histogram],
    )
    out.flush()
    return 13 if found else 0
