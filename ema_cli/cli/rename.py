"""``ema-avg rename``: the same values under other names."""

from __future__ import annotations

from typing import Any

import click

from ema_cli.cli import completion, options
from ema_cli.cli.command import Command, Option
from ema_cli.text import plural, printable, shorten

# More names than this are counted rather than listed.
MANY = 10


@click.command(
    cls=Command,
    short_help="Copy a checkpoint under other tensor names.",
    example="ema-avg rename average.safetensors -o model.safetensors --names variable",
    codes=(11, 13, 14),
)
@click.argument("checkpoint", metavar="IN", type=click.Path())
@click.option(
    "-o",
    "--output",
    cls=Option,
    group="Output",
    metavar="OUT",
    shell_complete=completion.paths,
    required=True,
    help="Where the copy goes.",
)
@click.option(
    "--names",
    cls=Option,
    group="Output",
    type=click.Choice(("shadow", "variable")),
    help="variable: shadows replace their variables; shadow: the other way.",
)
@options.name_option
@options.key_option
@options.rule_option
@options.format_option
@options.overwrite_option
@options.workers_option
@click.option("-n", "--dry-run", cls=Option, is_flag=True, help="Tell what would be renamed.")
@options.common_options
def rename(checkpoint: str, output: str, **given: Any) -> int:
    """Write a copy of a checkpoint under other names; the values stay bit for bit."""
    from ema_cli import api

    out = options.way_out(given)
    try:
        done = api.rename(checkpoint, output, **given, on_event=out.progress)
    finally:
        out.end_progress()
    tell = out.say if given["dry_run"] else out.detail
    for old, new in done.renamed:
        tell(f"renamed: {shorten(old)} to {shorten(new)}")
    for name in done.replaced:
        out.say(f"replaced by its shadow: {shorten(name)}")
    many = len(done.left_out) > MANY
    for name in done.left_out:
        (out.detail if many else out.say)(f"left out: {shorten(name)}")
    if many:
        out.say(f"left out: {plural(len(done.left_out), 'tensor')} (-v lists them)")
    for note in done.notes:
        out.say(f"note: {note}")
    out.say(f"{plural(len(done.renamed), 'tensor')} renamed, {done.kept:,} kept")
    out.line(printable(done.path))
    out.document(
        "result",
        command="rename",
        path=checkpoint,
        outputs=[
            {
                "path": done.path,
                "status": "planned" if given["dry_run"] else "written",
                "bytes": done.nbytes,
            }
        ],
        renamed=[{"from": old, "to": new} for old, new in done.renamed],
        replaced=list(done.replaced),
        left_out=[
            {"tensor": name, "reason": reason}
            for name, reason in zip(done.left_out, done.reasons, strict=True)
        ],
        kept_count=done.kept,
        notes=list(done.notes),
    )
    out.flush()
    return 0
