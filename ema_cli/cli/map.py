"""``ema-avg map``: what a restore will ask for, and whether it will find it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ema_cli.cli import completion, options
from ema_cli.cli.command import Command, Option, selected
from ema_cli.text import command, plural, shorten
from ema_cli.views import Out

if TYPE_CHECKING:
    from ema_cli.naming import Restored
    from ema_cli.restoring import RestoreMap


@click.command(
    "map",
    cls=Command,
    short_help="Show which saved tensor each variable is restored from.",
    example="ema-avg map average.safetensors",
    codes=(13,),
)
@click.argument("checkpoint", metavar="CKPT", type=click.Path())
@click.option(
    "--for",
    "program",
    cls=Option,
    group="Input",
    metavar="FILE",
    shell_complete=completion.paths,
    help="What the restoring program asks for: a graph (.meta), a checkpoint, a list of names, "
    "or - for stdin.",
)
@options.key_option
@options.select_options(
    "Ask for these variables under their shadows' names.",
    "Ask for these under their own names; the last match of both options wins.",
)
@options.name_option
@click.option(
    "--python", cls=Option, group="Output", is_flag=True, help="Print code for TensorFlow."
)
@options.common_options
@click.pass_context
def map_command(ctx: click.Context, /, checkpoint: str, **given: Any) -> int:
    """Show restore name, variable and source (shadow, plain, missing) of every variable.

    As `ExponentialMovingAverage.variables_to_restore` asks: averaged variables under their
    shadow's name, all others under their own. --include and --exclude choose the moving-average
    variables.
    """
    from ema_cli import api
    from ema_cli.restoring import names_in

    out = options.way_out(given)
    program = names_in(sys.stdin) if given["program"] == "-" else given["program"]
    select = selected(ctx, given["include"], given["exclude"])
    key, name = given["key"], given["name"]
    found = api.restore_map(checkpoint, program=program, select=select, name=name, key=key)
    if given["python"]:
        out.line(python_code(found))
    else:
        rows = [(r.restore_name, r.variable, r.source, r.note) for r in found.rows]
        out.table(("restore name", "variable", "source", "note"), rows)
    _tell(out, found, checkpoint, name, key, python=given["python"])
    out.flush()
    return 13 if found.missing else 0


def _tell(
    out: Out, found: RestoreMap, checkpoint: str, name: str, key: str | None, *, python: bool
) -> None:
    for orphan in found.orphans:
        out.say(f"note: nobody asks for '{shorten(orphan)}'")
    hint = ""
    if found.missing:
        out.say(f"{plural(len(found.missing), 'restore name')} missing: this restore would fail")
        hint = _hint(found, checkpoint, name, key)
        out.say(f"hint: {hint}")
    out.document(
        "result",
        command="map",
        path=checkpoint,
        rows=[row._asdict() for row in found.rows],
        orphans=list(found.orphans),
        missing_count=len(found.missing),
        hint=hint,
        python=python_code(found) if python else None,
    )


def _hint(found: RestoreMap, checkpoint: str, name: str, key: str | None) -> str:
    """Return the command that makes the restore work, or what else would."""
    missing = found.missing
    if any(row.source == "mismatch" for row in missing):
        return "average checkpoints of the program that restores: shapes and dtypes must be equal"
    lost = [row for row in missing if not row.saved_as]
    if lost and all("a partition of '" in row.note for row in lost):
        return (
            "TensorFlow saves partitions under one name but asks for them by several: restore in a "
            "graph without a partitioner, or with Saver({saved name: partitioned variable})"
        )
    if lost:
        return _unsaved(lost, name)
    words = ["ema-avg", "rename", checkpoint, "-o", "OUT"] + (["--key", key] if key else [])
    from ema_cli.naming import SHADOW_NAME

    towards = _towards(found, checkpoint, name, key)
    if towards:
        words += ["--names", towards]
        return command(*words, *([] if name == SHADOW_NAME else ["--name", name]))
    for row in missing:
        replacement = row.restore_name.replace("\\", r"\\")
        words += ["--rule", f"^{re.escape(row.saved_as)}$", replacement]
    return command(*words)


def _towards(found: RestoreMap, checkpoint: str, name: str, key: str | None) -> str:
    """Return the direction of renaming after which every row is found, or an empty string."""
    from ema_cli import renaming
    from ema_cli.errors import EmaError

    asked = {row.restore_name for row in found.rows}
    raw = any(row.saved_as != row.variable for row in found.missing)
    for towards in ("shadow", "variable"):
        if towards == "shadow" and raw:
            continue  # a shadow is saved, if under another name
        try:
            if asked <= renaming.names_after(checkpoint, towards, name, key):
                return towards
        except EmaError:
            continue
    return ""


def _unsaved(lost: Sequence[Restored], name: str) -> str:
    """Say what to do about names that are saved nowhere in the checkpoint."""
    from ema_cli.naming import role_of
    from ema_cli.tensors import Role

    if all(role_of(row.variable, name) is Role.OPTIMIZER for row in lost):
        return "write the optimizer state too: ema-avg run RUN -o OUT --optimizer keep"
    return (
        f"average checkpoints that hold '{shorten(lost[0].variable)}'; no renaming brings it back"
    )


def python_code(found: RestoreMap) -> str:
    """Return code that builds {restore name: variable} in a TensorFlow 1 graph."""
    pairs = "\n".join(f"    {row.restore_name!a}: {row.variable!a}," for row in found.rows)
    return (
        "import tensorflow as tf\n\n"
        f"RESTORE_MAP = {{\n{pairs}\n}}\n"
        "variables = {v.op.name: v for v in tf.compat.v1.global_variables()}\n"
        "saver = tf.compat.v1.train.Saver(\n"
        "    {restore: variables[name] for restore, name in RESTORE_MAP.items()}\n"
        ")"
    )
