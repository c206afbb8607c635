"""How the distances of checkpoints from an average are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ema_cli.text import printable
from ema_cli.views import Cell, Out

if TYPE_CHECKING:
    from ema_cli.distances import Distances
    from ema_cli.running import RunResult

# Of a checkpoint that was not mixed in by an update.
NONE = "-"


def show(out: Out, result: RunResult, *, tables: bool = True) -> None:
    """Print a table for each average, if `tables` are asked for, and warn of outliers."""
    for one in result.distances if tables else ():
        if len(result.distances) > 1:
            out.line(f"{printable(one.average)}:")
        columns, rows = _table(out, result, one)
        out.table(columns, rows)
        out.line()
    for warning in result.warnings:
        if warning.code in ("outlier", "duplicate"):
            out.warning(*warning)


def _table(out: Out, result: RunResult, distances: Distances) -> tuple[list[str], list[list[Cell]]]:
    """Return the distance of each checkpoint and the group it is farthest in; with -v all groups.

    Distances are shares of the norm of the finished average.
    """
    run = result.plan.run
    groups = range(len(distances.groups)) if out.verbose else range(0)
    columns = ["checkpoint", "step", "distance", "farthest group", "distance there"]
    columns += [distances.groups[group] for group in groups]
    rows: list[list[Cell]] = []
    for k, checkpoint in enumerate(run.checkpoints):
        shown = checkpoint.name if run.searched else checkpoint.path
        worst = distances.worst(k)
        row: list[Cell] = [shown, checkpoint.step or 0, _number(distances.total(k))]
        if worst is None:
            row += [NONE, NONE]
        else:
            row += [distances.groups[worst], _number(distances.relative(worst, k))]
        rows.append(row + [_number(distances.relative(group, k)) for group in groups])
    return columns, rows


def _number(share: float | None) -> str:
    return NONE if share is None else f"{share:.4g}"


def document(result: RunResult) -> dict[str, Any]:
    """Return the distances and outliers as JSON data."""
    return {
        "distances": [{"average": one.average, **one.to_json()} for one in result.distances],
        "outliers": [one._asdict() for one in result.outliers],
    }
