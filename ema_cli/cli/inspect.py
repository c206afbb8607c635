"""``ema-avg inspect``: what a checkpoint, a run, an output or a state holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ema_cli.cli import options
from ema_cli.cli.command import Command
from ema_cli.text import plural, shorten, size
from ema_cli.views import Out

if TYPE_CHECKING:
    from ema_cli.runs import Run
    from ema_cli.tensors import Checkpoint


@click.command(
    cls=Command,
    short_help="Show what a checkpoint, a run or a state holds.",
    example="ema-avg inspect train_dir\nema-avg inspect train_dir/checkpoint-1000",
    codes=(3, 10, 13),
)
@click.argument("path", metavar="PATH", type=click.Path())
@options.key_option
@options.name_option
@options.common_options
def inspect(path: str, name: str, key: str | None, **given: Any) -> int:
    """Show the tensors of a checkpoint, the checkpoints of a run, or what a state averages.

    Reads headers only.
    """
    from ema_cli import api, running
    from ema_cli.cli import stateview
    from ema_cli.runs import Run
    from ema_cli.states.summary import StateSummary

    out = options.way_out(given)
    found = api.inspect(path, key=key)
    code = 0
    if isinstance(found, StateSummary):
        stateview.show(out, found)
    elif isinstance(found, Run):
        _run(out, found, path)
        code = 3 if running.unusable(found) else 0
    else:
        _checkpoint(out, found, name)
    out.flush()
    return code


def _run(out: Out, run: Run, path: str) -> None:
    from ema_cli import record
    from ema_cli.cli import planview, timeline

    planview.passed_over(out, run)
    sizes = [sum(file.size for file in checkpoint.files) for checkpoint in run.checkpoints]
    out.table(
        ("checkpoint", "step", "tensors", "bytes"),
        [
            (checkpoint.path, checkpoint.step or 0, len(checkpoint.index.tensors), n_bytes)
            for checkpoint, n_bytes in zip(run.checkpoints, sizes, strict=True)
        ],
    )
    screen = out.screen()
    if screen is not None:
        timeline.draw(screen, run)
    apart = sorted({b - a for a, b in zip(run.steps, run.steps[1:], strict=False)})
    shown = "" if not apart else f", {apart[0]:,} steps apart"
    if len(apart) > 1:
        shown = f", {apart[0]:,} to {apart[-1]:,} steps apart"
    gaps = timeline.gaps(run.steps)
    for gap in gaps:
        out.say(gap.told())
    out.say(f"{plural(len(run.checkpoints), 'checkpoint')}{shown}, {size(sum(sizes))}")
    out.document(
        "result",
        command="inspect",
        kind="run",
        path=path,
        checkpoints=[
            {"path": c.path, "step": c.step, "tensor_count": len(c.index.tensors), "bytes": n_bytes}
            for c, n_bytes in zip(run.checkpoints, sizes, strict=True)
        ],
        gaps=timeline.documents(gaps),
        passed_over=record.passed_over(run),
        notes=list(run.notes),
    )


def _checkpoint(out: Out, checkpoint: Checkpoint, name: str) -> None:
    from ema_cli import provenance
    from ema_cli.naming import role_in

    index = checkpoint.index
    rows: list[dict[str, Any]] = [
        {
            "tensor": tensor.name,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "role": role_in(index, tensor.name, name).value,
            "file": None if tensor.slices else index.names[tensor.extent.file],
            "slices": len(tensor.slices),
        }
        for tensor in index.tensors
    ]
    folder = len({extent.file for extent in index.extents}) > 1
    step = "" if checkpoint.step is None else f", step {checkpoint.step:,}"
    out.table(
        ("tensor", "dtype", "shape", "bytes", "role") + (("file",) if folder else ()),
        [
            (r["tensor"], r["dtype"], str(r["shape"]), r["bytes"], r["role"])
            + ((r["file"] or plural(r["slices"], "slice"),) if folder else ())
            for r in rows
        ],
    )
    out.say(
        f"{index.format}{step}: {plural(len(rows), 'tensor')}, "
        f"{size(index.nbytes)} in {plural(len(checkpoint.files), 'file')}"
    )
    if index.roles_from:
        out.say(f"variables told by {index.roles_from}")
    for note in checkpoint.notes:
        out.say(f"note: {note}")
    origin = provenance.load(checkpoint.path)
    if origin is not None:
        _origin(out, origin)
    out.document(
        "result",
        command="inspect",
        kind="checkpoint",
        path=checkpoint.path,
        format=index.format,
        step=checkpoint.step,
        metadata=dict(index.metadata),
        tensors=rows,
        notes=list(checkpoint.notes),
        provenance=origin,
    )


def _origin(out: Out, origin: Mapping[str, Any]) -> None:
    """Tell what an output of ours was made of."""
    average, inputs = origin.get("average"), origin.get("inputs")
    if not isinstance(average, dict) or not isinstance(inputs, list):
        out.say("a renamed copy made by ema-avg")
        return
    out.say(f"an average made by ema-avg: {shorten(str(average.get('spec')))}")
    out.say(f"  of {plural(len(inputs), 'checkpoint')}; every weight is in the .ema.json beside it")
