"""The functions that look at checkpoints and copy them under other names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from ema_cli import machine
from ema_cli.asked import Select, check_workers, rules_of
from ema_cli.destination import check_destination, repair
from ema_cli.engine import OnEvent, about
from ema_cli.errors import Disagreement, NothingToAverage, UsageError
from ema_cli.formats import FORMATS, detect, read
from ema_cli.formats.tensorflow import prefixes
from ema_cli.layout import Wishes
from ema_cli.naming import SHADOW_NAME
from ema_cli.plan import Request
from ema_cli.producing import produce
from ema_cli.runs import Run, find, find_one, is_run
from ema_cli.search import Choice
from ema_cli.states.directory import is_state
from ema_cli.states.summary import StateSummary, summarize
from ema_cli.tensors import Checkpoint
from ema_cli.text import shorten

if TYPE_CHECKING:
    from ema_cli.comparison import Comparison
    from ema_cli.renaming import Renamed
    from ema_cli.restoring import RestoreMap


def inspect(
    path: str | os.PathLike[str], *, key: str | None = None
) -> Checkpoint | Run | StateSummary:
    """Return the checkpoint, run or state at `path`; headers, steps and the ledger only.

    Args:
        path: of a checkpoint, a directory of checkpoints, or a state.
        key: where the model is inside a checkpoint that holds more.

    Raises:
        InputError: it is none of them, or damaged.
        NothingToAverage: a directory without a checkpoint.
    """
    text = os.fspath(path)
    if is_state(text):
        return summarize(text)
    choice = Choice(key=key)
    if os.path.isdir(text) and is_run(text, choice):
        try:
            return find([text], choice)
        except (NothingToAverage, Disagreement) as error:
            # Outputs of ours, or one checkpoint without a step, can be looked at all the same.
            several = isinstance(error, Disagreement) and len(prefixes(text)) > 1
            if several or detect(text) is None:
                raise
    return find_one(text, key)


def restore_map(
    checkpoint: str | os.PathLike[str],
    *,
    program: str | Sequence[str] | None = None,
    select: Select = (),
    name: str = SHADOW_NAME,
    key: str | None = None,
) -> RestoreMap:
    """Return what ``variables_to_restore`` asks for, and where in the checkpoint it is found.

    Args:
        checkpoint: the one to restore from.
        program: what the restoring program asks for: its graph (a ``.meta`` file or a
            ``saved_model.pb``), a checkpoint with its variables, a text file with one restore name
            per line, or these names; without it, the variables the checkpoint itself tells of.
        select: ordered pairs ``("include" | "exclude", glob)`` that choose the moving-average
            variables.
        name: of the shadows.
        key: where the model is inside a checkpoint that holds more.

    Raises:
        InputError: the checkpoint or what `program` names cannot be read.
        UsageError: an unknown `select`.
    """
    from ema_cli.restoring import restored

    return restored(read(os.fspath(checkpoint), {}, key or ""), program, rules_of(select), name)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    key: str | None = None,
) -> Comparison:
    """Return how checkpoint `b` differs from `a`; what is returned is false when it does not.

    Exact by default: names, dtypes, shapes and bits. With a tolerance two values agree when
    ``|a - b| <= atol + rtol * |b|`` in float64, whatever their dtypes.

    Args:
        a: a checkpoint.
        b: another one, of whatever format.
        atol: largest absolute difference that counts as none.
        rtol: the same, relative to `b`.
        key: where the model is inside checkpoints that hold more.

    Returns:
        The differences, how many elements changed how much, and how much each tensor did.

    Raises:
        InputError: one of them cannot be read.
        UsageError: a tolerance that is negative or no number.
    """
    from ema_cli.comparison import compare

    if not (0 <= atol < float("inf") and 0 <= rtol < float("inf")):
        raise UsageError(
            f"--atol and --rtol: expected numbers >= 0, found {atol} and {rtol}",
            "leave them out for an exact comparison, or try --atol 1e-6",
        )
    paths = [os.fspath(path) for path in (a, b)]
    nested = [FORMATS[name].nested if (name := detect(path)) else False for path in paths]
    keys = [key or "" if one or not any(nested) else "" for one in nested]
    one, other = (read(path, {}, mine) for path, mine in zip(paths, keys, strict=True))
    return compare(one, other, atol, rtol)


def rename(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    names: str | None = None,
    name: str = SHADOW_NAME,
    rule: Sequence[tuple[str, str]] = (),
    format: str | None = None,
    key: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    executor: Executor | None = None,
    dry_run: bool = False,
    on_event: OnEvent | None = None,
) -> Renamed:
    """Write a copy of a checkpoint under other names; the values stay bit for bit.

    Args:
        checkpoint: what to rename.
        output: where the copy goes.
        names: ``variable``: shadows replace their variables; ``shadow``: what would be averaged
            is renamed to its shadow's name; None: only `rule` applies.
        name: of the shadows.
        rule: (pattern, replacement) pairs applied afterwards.
        format: of the output; else its suffix or the input decides.
        key: where the model is inside a checkpoint that holds more.
        overwrite: replace an existing output.
        workers: threads; default from affinity and cgroup limits.
        executor: any `concurrent.futures.Executor`; threads when None.
        dry_run: only return what would be renamed.
        on_event: called with `Progress` events.

    Returns:
        What was renamed, and what was left out for it.

    Raises:
        Disagreement: two tensors would get one name, or nothing would be renamed.
        EmaError: one of `ema_cli.errors`; nothing half-written is left under the output's name.
    """
    from ema_cli import renaming

    if names not in (None, *renaming.TOWARDS):
        raise UsageError(
            f"names: expected shadow or variable, found '{shorten(names)}'",
            "leave it out when only `rule` shall rename",
        )
    check_workers(workers)
    request = Request(
        (os.fspath(checkpoint),),
        os.fspath(output),
        (),
        choice=Choice(key=key),
        wishes=Wishes(format=format, names=names or "auto", name=name, rules=tuple(rule)),
        workers=workers or machine.default_workers(),
    )
    plan, layout, renamed = renaming.make(request, towards=names)
    if not dry_run:
        repair(layout)
    check_destination(layout, plan.work.inputs, overwrite=overwrite)
    if dry_run:
        return renamed
    document = renaming.document(layout, plan.run.checkpoints[0], renamed)
    tell = about(f"writing {shorten(os.path.basename(layout.path.rstrip('/')), 60)}", on_event)
    produce(plan.work, [layout], [(document, "")], executor, tell, overwrite=overwrite)
    return renamed
