"""``ema-avg verify``: whether an output, or a state, is still what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ema_cli.cli import options
from ema_cli.cli.command import Command, Option
from ema_cli.text import plural, printable, shorten, size

if TYPE_CHECKING:
    from ema_cli.verification.auditing import Verified


@click.command(
    cls=Command,
    short_help="Check an output against its sources, or a state.",
    example="ema-avg verify average.safetensors --full",
    codes=(3,),
)
@click.argument("path", metavar="PATH", type=click.Path())
@click.option(
    "--sample",
    cls=Option,
    group="Input",
    metavar="SHARE",
    default="1%",
    show_default=True,
    help="How much is recomputed from the sources.",
)
@click.option("--full", cls=Option, group="Input", is_flag=True, help="Recompute all of it.")
@options.key_option
@options.workers_option
@options.common_options
def verify(path: str, **given: Any) -> int:
    """Check an output's headers and checksums, and recompute blocks of it, bit for bit.

    PATH is an output: a file, a folder, a TensorFlow prefix, or the OUT.ema.json of one. Exit
    status 3 says that nothing is wrong, but that what it was made of is gone or has changed. Or
    PATH is a state, of which every checksum, the ledger and the plan are checked.
    """
    from ema_cli.cli import stateview
    from ema_cli.states.summary import StateSummary
    from ema_cli.verification import auditing

    out = options.way_out(given)
    try:
        found = auditing.verify(path, on_event=out.progress, **given)
    finally:
        out.end_progress()
    if isinstance(found, StateSummary):
        return stateview.verified(out, found)
    out.line(_told(found))
    if found.not_recomputed is not None:
        out.line(f"not recomputed: {found.not_recomputed}")
    out.document(
        "result",
        command="verify",
        kind="output",
        path=found.path,
        file_count=found.files,
        bytes=found.nbytes,
        checksums=found.checksums,
        blocks={"recomputed": found.recomputed, "total": found.total},
        not_recomputed=found.not_recomputed,
    )
    out.flush()
    return 0 if found.not_recomputed is None else 3


def _told(found: Verified) -> str:
    """Return what was verified in one line, whose first word says how far that goes."""
    what = f"{shorten(printable(found.path), 1000)}: {plural(found.files, 'file')}, "
    what += size(found.nbytes)
    what += ", checksums equal" if found.checksums == "equal" else ", no checksums"
    if found.not_recomputed is not None:
        return f"{'checked' if found.checksums == 'equal' else 'opened'}  {what}"
    blocks = f"{found.recomputed:,} of {plural(found.total, 'block')}"
    return f"verified  {what}; {blocks} recomputed, bit for bit equal"
