"""``--plot FILE.svg``: where the picture goes, and what is in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ema_cli import durable
from ema_cli.cli.plotview import Course, extent, of_plan
from ema_cli.errors import EmaError, OutputExists, StorageError, UsageError, storage_errors
from ema_cli.files import read_at
from ema_cli.text import shorten

if TYPE_CHECKING:
    from ema_cli.distances import Distances
    from ema_cli.plan import Plan
    from ema_cli.tensors import Stamp
    from ema_cli.views import Out
    from ema_cli.views.heat import Map

SUFFIX = ".svg"
_ANOTHER = "choose another name with --plot"
# How much of a file is looked at for the mark of our pictures.
_BEGINNING = 300


def check(path: str | None, *, overwrite: bool | None = None) -> None:
    """Raise unless a picture may be written to `path`, before anything else is done.

    `overwrite` is None where nobody can ask for it.
    """
    if path is None:
        return
    shown = shorten(path, 1000)
    if not path.endswith(SUFFIX) or os.path.basename(path) == SUFFIX:
        raise UsageError(
            f"--plot {shown}: expected a name that ends in {SUFFIX}", "--plot average.svg"
        )
    _refuse_standing(path, shown, overwrite)
    folder = os.path.dirname(path) or "."
    with storage_errors(path, "cannot create"):
        os.stat(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            f"{shown}: cannot create: expected a directory that can be written to",
            "write the picture elsewhere with --plot",
        )


def _refuse_standing(path: str, shown: str, overwrite: bool | None) -> None:
    """Raise `OutputExists` for what may not be replaced."""
    if not durable.exists(path):
        return
    if not overwrite and not _is_ours(path):
        how = "remove it, or choose another name" if overwrite is None else "replace it"
        with_what = " with --plot" if overwrite is None else " with --overwrite"
        raise OutputExists(f"{shown}: exists already", how + with_what)
    if os.path.islink(path) or not os.path.isfile(path):
        raise OutputExists(f"{shown}: only a regular file can be replaced", _ANOTHER)


def _is_ours(path: str) -> bool:
    """Whether a picture that `picture` drew is there: the same command again replaces it."""
    from ema_cli.views.pictures import MARK

    if os.path.islink(path) or not os.path.isfile(path):
        return False
    try:
        return f'{MARK}="ema-avg"'.encode() in read_at(path, 0, _BEGINNING)
    except (EmaError, OSError):
        return False


def check_against(path: str | None, inputs: Iterable[Stamp], outputs: Iterable[str]) -> None:
    """Raise `OutputExists` when the picture would lie where inputs or outputs do."""
    if path is None:
        return
    real, shown = os.path.realpath(path), shorten(path, 1000)
    for output in outputs:
        place = os.path.realpath(output.rstrip("/"))
        if real == place or real.startswith(place + os.sep):
            raise OutputExists(f"{shown}: is the output, or lies inside it", _ANOTHER)
    for stamp in inputs:
        if os.path.realpath(stamp.path) == real:
            raise OutputExists(f"{shown}: is an input", _ANOTHER)


def check_plan(path: str | None, plan: Plan) -> None:
    """Raise `OutputExists` when the picture would lie where inputs or outputs of a plan do."""
    from ema_cli import running

    outputs = [outcome.layout.path for outcome in plan.outcomes if outcome.layout.path]
    check_against(path, running.all_inputs(plan), outputs)


def draw(
    out: Out, path: str, plan: Plan, distances: Sequence[Distances] = (), *, overwrite: bool
) -> None:
    """Write the picture of a plan, and what was measured of its run."""
    save(out, path, plan.request.paths[0], of_plan(plan), distances, overwrite=overwrite)


def save(
    out: Out,
    path: str,
    title: str,
    course: Course,
    distances: Sequence[Distances] = (),
    *,
    overwrite: bool,
) -> None:
    """Write the picture, and say so."""
    save_picture(path, render(title, course, distances), overwrite=overwrite)
    out.say(f"drawn: {shorten(path, 1000)}")


def save_picture(path: str, data: bytes, *, overwrite: bool) -> None:
    """Write the picture durably, all of it or nothing."""
    temporary = durable.stage(path, data)
    try:
        with storage_errors(path, "cannot write"):
            if overwrite or _is_ours(path):
                os.replace(temporary, path)
            else:
                durable.rename_new(temporary, path)
    except StorageError as error:
        durable.remove(temporary)
        if isinstance(error.__cause__, FileExistsError):  # it appeared while we worked
            raise OutputExists(f"{shorten(path, 1000)}: exists already", _ANOTHER) from None
        raise
    durable.sync_directory(os.path.dirname(path))


def render(title: str, course: Course, distances: Sequence[Distances] = ()) -> bytes:
    """Return the picture of what averages make of the checkpoints."""
    from ema_cli.views.pictures import Panel, picture

    panels = [
        Panel(
            curve.label if curve.label == curve.spec else f"{curve.label}: {curve.spec}",
            extent(curve.weights, course.steps).split(", "),
            course.steps,
            curve.weights,
            curve.coefficients,
            course.names,
        )
        for curve in course.curves
    ]
    return picture(title, panels, [_map(one) for one in distances])


def _map(distances: Distances) -> Map:
    """Return the drift of each group of tensors, relative to its norm in the finished average."""
    from ema_cli.views.heat import Map

    count = range(len(distances.steps))
    return Map(
        f"{distances.average}: distance of each checkpoint from the average before its update",
        "Euclidean norm of the difference, relative to that of the finished average, "
        "per group of tensors",
        distances.steps,
        distances.groups,
        [[distances.relative(g, k) for k in count] for g in range(len(distances.groups))],
    )
