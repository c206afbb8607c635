"""The public functions: one per command, with the command's option names and defaults."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from ema_cli import files, machine, specs
from ema_cli import plan as planning
from ema_cli.destination import check_destination, repair
from ema_cli.errors import Disagreement, InputError, NothingToAverage, UsageError
from ema_cli.formats import FORMATS, detect, read
from ema_cli.formats.tensorflow import prefixes
from ema_cli.kernel import LIKE, SHADOW_DTYPES
from ema_cli.layout import NAMES, OPTIMIZER, UNKNOWN, Wishes
from ema_cli.naming import SHADOW_NAME, Rule
from ema_cli.plan import Plan, Request
from ema_cli.running import OnEvent, RunResult, produce, refuse_warnings, run_plan
from ema_cli.runs import ORDERS, Run, find, find_one, is_run
from ema_cli.search import Choice
from ema_cli.selection import STATISTICS
from ema_cli.tensors import AVERAGED_DTYPES, Checkpoint
from ema_cli.text import shorten
from ema_cli.warnings import warnings

if TYPE_CHECKING:
    from ema_cli.comparison import Difference
    from ema_cli.renaming import Renamed
    from ema_cli.restoring import RestoreMap

Select = Sequence[tuple[str, str]]
_WEIGHTS_FILE_LIMIT = 16 << 20


def plan_run(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    average: Sequence[str] = (),
    decay: str | float | None = None,
    num_updates: str | None = None,
    init: str = "first",
    zero_debias: bool = False,
    glob: str | None = None,
    last: int | None = None,
    steps: str | None = None,
    step_from: str | None = None,
    order: str = "step",
    key: str | None = None,
    select: Select = (),
    statistics: str | None = None,
    shadow_dtype: str = "auto",
    like: str = "tensorflow",
    non_finite: str = "error",
    names: str = "auto",
    name: str = SHADOW_NAME,
    keep_variables: bool = False,
    rule: Sequence[tuple[str, str]] = (),
    dtype: str | None = None,
    format: str | None = None,
    max_shard_size: str | int | None = None,
    optimizer: str = "auto",
    unknown: str = "refuse",
    workers: int | None = None,
    strict: bool = False,
) -> Plan:
    """Return the plan of `average_run` with the same arguments; reads headers only.

    Raises the errors of `average_run` that can be known before tensor data moves.
    """
    _check_choices(
        num_updates=num_updates,
        init=init,
        order=order,
        statistics=statistics,
        shadow_dtype=shadow_dtype,
        like=like,
        non_finite=non_finite,
        names=names,
        dtype=dtype,
        optimizer=optimizer,
        unknown=unknown,
    )
    _check_workers(workers)
    averages = specs.parse_averages(
        average,
        None if decay is None else str(decay),
        num_updates=num_updates,
        init=init,
        zero_debias=zero_debias,
        read_text=_read_weights,
    )
    specs.check_like(like, averages)
    window = specs.parse_window(steps) if steps else None
    choice = Choice(glob, last, window, step_from, order, key)
    shard_size = None if max_shard_size is None else specs.parse_size(max_shard_size)
    wishes = Wishes(
        format, names, name, keep_variables, tuple(rule), dtype, shard_size, optimizer, unknown
    )
    plan = planning.make(
        Request(
            paths=_paths(runs),
            output=None if output is None else os.fspath(output),
            averages=tuple(averages),
            implicit=not average and decay is None,
            choice=choice,
            rules=_rules(select),
            statistics=statistics or ("average" if like == "tensorflow" else "copy"),
            shadow_dtype=shadow_dtype if like == "tensorflow" else "same",
            like=like,
            non_finite=non_finite,
            wishes=wishes,
            workers=workers or machine.default_workers(),
        )
    )
    if strict:
        refuse_warnings(warnings(plan), plan.run)
    return plan


def average_run(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    average: Sequence[str] = (),
    decay: str | float | None = None,
    num_updates: str | None = None,
    init: str = "first",
    zero_debias: bool = False,
    glob: str | None = None,
    last: int | None = None,
    steps: str | None = None,
    step_from: str | None = None,
    order: str = "step",
    key: str | None = None,
    select: Select = (),
    statistics: str | None = None,
    shadow_dtype: str = "auto",
    like: str = "tensorflow",
    non_finite: str = "error",
    names: str = "auto",
    name: str = SHADOW_NAME,
    keep_variables: bool = False,
    rule: Sequence[tuple[str, str]] = (),
    dtype: str | None = None,
    format: str | None = None,
    max_shard_size: str | int | None = None,
    optimizer: str = "auto",
    unknown: str = "refuse",
    overwrite: bool = False,
    workers: int | None = None,
    strict: bool = False,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Average the checkpoints of a run and write the result as new checkpoints.

    Args:
        runs: a directory of checkpoints, or several checkpoints.
        output: the output path; may hold ``{step}`` and ``{average}``. A TensorFlow checkpoint is
            named by its prefix, or by a directory with a slash: ``DIR/model.ckpt-{step}``.
        average: ``[LABEL=]SPEC[@WINDOW]`` each; SPEC is ``ema:D``, ``ema:D/step``,
            ``half-life:STEPS``, ``mean``, ``lr:SHAPE``, ``power:SIGMA_REL`` or ``weights:FILE``,
            WINDOW ``last=N`` or ``A:B`` in steps.
        decay: ``D`` or ``"D/step"``, short for ``ema:D`` and ``ema:D/step``.
        num_updates: ``none``, ``count`` or ``step``: the n of TensorFlow's ramp
            min(decay, (1 + n)/(10 + n)).
        init: ``first`` or ``zeros``; zero_debias implies zeros.
        zero_debias: divide by TensorFlow's bias factor.
        glob: directory entries to consider; may contain ``/``.
        last: only the newest N checkpoints, after `glob` and `steps`.
        steps: ``A:B[:C]``, both ends included; with C only steps where C divides step - A.
        step_from: regular expression whose first group is the step in a name.
        order: ``step`` or ``given``.
        key: where the model is inside a checkpoint that holds more, e.g. ``state/model``.
        select: ordered pairs ``("include" | "exclude", glob)``; the last match wins.
        statistics: ``average`` or ``copy`` batch-norm statistics; PyTorch and Keras copy them,
            and so does `like` them.
        shadow_dtype: ``auto`` accumulates half types in float32, ``same`` has TensorFlow's bits.
        like: whose arithmetic: ``tensorflow``, ``torch`` (AveragedModel) or ``keras`` (use_ema),
            in the variables' own dtypes.
        non_finite: ``error`` or ``allow``.
        names: ``auto``, ``shadow`` or ``variable``.
        name: of the shadows.
        keep_variables: also write the last raw values beside the shadows.
        rule: (pattern, replacement) pairs applied to output names.
        dtype: of averaged tensors in the output.
        format: of the output; else its suffix or the input decides.
        max_shard_size: e.g. ``"5GB"``; for folders.
        optimizer: ``auto``, ``keep`` or ``drop`` optimizer state.
        unknown: ``refuse``, ``keep`` or ``drop`` objects in a pickle that are no plain data.
        overwrite: replace an existing output.
        workers: threads; default from affinity and cgroup limits.
        strict: treat warnings and unusable entries as errors.
        executor: any `concurrent.futures.Executor`; threads when None.
        on_event: called with `Progress` events.

    Returns:
        What was written. The bytes do not depend on workers or executor.

    Raises:
        EmaError: one of `ema_cli.errors`; nothing half-written is left under an output's name.
    """
    started = time.monotonic()
    plan = plan_run(
        runs,
        output,
        average=average,
        decay=decay,
        num_updates=num_updates,
        init=init,
        zero_debias=zero_debias,
        glob=glob,
        last=last,
        steps=steps,
        step_from=step_from,
        order=order,
        key=key,
        select=select,
        statistics=statistics,
        shadow_dtype=shadow_dtype,
        like=like,
        non_finite=non_finite,
        names=names,
        name=name,
        keep_variables=keep_variables,
        rule=rule,
        dtype=dtype,
        format=format,
        max_shard_size=max_shard_size,
        optimizer=optimizer,
        unknown=unknown,
        workers=workers,
        strict=strict,
    )
    result = run_plan(plan, overwrite=overwrite, executor=executor, on_event=on_event)
    return dataclasses.replace(result, seconds=time.monotonic() - started)


# ---------------------------------------------------------------------------- looking


def inspect(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint | Run:
    """Return the checkpoint at `path`, or the run in that directory; headers and steps only.

    `key` is where the model is inside a checkpoint that holds more.

    Raises `InputError` when it is neither, `NothingToAverage` for a directory without any.
    """
    text = os.fspath(path)
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
    """
    from ema_cli.restoring import restored

    return restored(read(os.fspath(checkpoint), {}, key or ""), program, _rules(select), name)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    key: str | None = None,
) -> list[Difference]:
    """Return how checkpoint `b` differs from `a`; an empty list when it does not.

    Exact by default: names, dtypes, shapes and bits. With a tolerance two values agree when
    ``|a - b| <= atol + rtol * |b|`` in float64, whatever their dtypes. `key` is where the model is
    inside checkpoints that hold more.
    """
    from ema_cli.comparison import compare

    if not (0 <= atol < float("inf") and 0 <= rtol < float("inf")):
        raise UsageError(f"--atol and --rtol: expected numbers >= 0, found {atol} and {rtol}")
    paths = [os.fspath(path) for path in (a, b)]
    nested = [FORMATS[name].nested if (name := detect(path)) else False for path in paths]
    keys = [key or "" if one or not any(nested) else "" for one in nested]
    one, other = (read(path, {}, mine) for path, mine in zip(paths, keys, strict=True))
    return compare(one, other, atol, rtol)


# ---------------------------------------------------------------------------- renaming


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

    Raises `Disagreement` when two tensors would get one name or nothing would be renamed.
    """
    from ema_cli import renaming

    if names not in (None, *renaming.TOWARDS):
        raise UsageError(f"names: expected shadow or variable, found '{shorten(names)}'")
    _check_workers(workers)
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
    produce(plan.work, [layout], [(document, "")], executor, overwrite=overwrite)
    return renamed


_CHOICES = {
    "num_updates": (None, *specs.NUM_UPDATES),
    "init": specs.INITS,
    "order": ORDERS,
    "statistics": (None, *STATISTICS),
    "shadow_dtype": SHADOW_DTYPES,
    "like": LIKE,
    "non_finite": ("error", "allow"),
    "names": NAMES,
    "dtype": (None, *AVERAGED_DTYPES),
    "optimizer": OPTIMIZER,
    "unknown": UNKNOWN,
}


def _check_choices(**given: str | None) -> None:
    for option, value in given.items():
        if value not in _CHOICES[option]:
            words = ", ".join(str(choice) for choice in _CHOICES[option] if choice)
            raise UsageError(f"{option}: expected one of {words}, found '{shorten(str(value))}'")


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise UsageError(f"workers: expected at least 1, found {workers}")


def _paths(runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    if isinstance(runs, str | os.PathLike):
        return (os.fspath(runs),)
    return tuple(os.fspath(path) for path in runs)


def _rules(select: Select) -> tuple[Rule, ...]:
    for kind, _ in select:
        if kind not in ("include", "exclude"):
            raise UsageError(f"select: expected 'include' or 'exclude', found '{shorten(kind)}'")
    return tuple(Rule(kind == "include", pattern) for kind, pattern in select)


def _read_weights(path: str) -> str:
    try:
        return files.read_small(path, _WEIGHTS_FILE_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{shorten(path)}: not UTF-8: byte {error.start}") from None
