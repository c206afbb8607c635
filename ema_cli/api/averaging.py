"""The functions that average: what would be done, and doing it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from ema_cli import asked
from ema_cli import plan as planning
from ema_cli.asked import Select
from ema_cli.errors import UsageError
from ema_cli.naming import SHADOW_NAME
from ema_cli.plan import Plan, Request
from ema_cli.running import (
    OnEvent,
    RunResult,
    refuse_measuring,
    refuse_warnings,
    run_plan,
)
from ema_cli.warnings import warnings

if TYPE_CHECKING:
    from ema_cli.continuing import ExportResult, StateResult


def plan_run(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
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
    state: str | os.PathLike[str] | None = None,
    provenance: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    strict: bool = False,
) -> Plan:
    """Return what `average_run` would do; reads headers and scalar steps only.

    The arguments are those of `average_run`.

    Raises:
        EmaError: what can be known before tensor data moves; see `ema_cli.errors`.
    """
    given = locals()
    if state is None or provenance is not None:
        plan = _planned(given)
    else:
        from ema_cli.continuing import plan_state

        plan = plan_state(_request(given), os.fspath(state))
    if strict:
        refuse_warnings(warnings(plan), plan.run)
    return plan


def average_run(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
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
    stats: bool = False,
    outliers: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    state: str | os.PathLike[str] | None = None,
    provenance: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    strict: bool = False,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
) -> RunResult | StateResult:
    """Average the checkpoints of a run and write the result as new checkpoints.

    Args:
        runs: a directory of checkpoints, or several checkpoints.
        output: the output path, which may hold ``{step}`` and ``{average}``; None with a state
            only. A TensorFlow checkpoint is named by its prefix, or by a directory with a slash:
            ``DIR/model.ckpt-{step}``.
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
        stats: measure how far each checkpoint lies from each average just before it is mixed in,
            per group of tensors, and warn of outliers.
        outliers: ``warn`` of checkpoints that do not seem to belong, or make the first an
            ``error``; implies `stats`.
        overwrite: replace an existing output.
        restart: start over instead of continuing what a killed process left of this very run.
        state: directory that keeps the shadows: only what is newer than its last checkpoint is
            mixed in. It is begun if it is not there, and bound to its averages for ever.
        provenance: the ``OUT.ema.json`` of an output: its inputs, selection and averages are taken
            once more, unchanged, and no others; how the output looks may be given beside it.
        workers: threads; default from affinity and cgroup limits.
        strict: treat warnings and unusable entries as errors.
        executor: any `concurrent.futures.Executor`; threads when None.
        on_event: called with `Progress` events.

    Returns:
        What was written. The bytes do not depend on workers or executor.

    Raises:
        EmaError: one of `ema_cli.errors`; nothing half-written is left under an output's name.
    """
    given, started = locals(), time.monotonic()
    if state is not None and provenance is None:
        from ema_cli.continuing import continue_state

        refuse_measuring(stats=stats, outliers=outliers)

        return continue_state(
            _request(given),
            os.fspath(state),
            overwrite=overwrite,
            strict=strict,
            restart=restart,
            executor=executor,
            on_event=on_event,
        )
    plan = _planned(given)
    if strict:
        refuse_warnings(warnings(plan), plan.run)
    result = run_plan(
        plan,
        overwrite=overwrite,
        restart=restart,
        stats=stats,
        outliers=outliers,
        strict=strict,
        executor=executor,
        on_event=on_event,
    )
    return dataclasses.replace(result, seconds=time.monotonic() - started)


def _request(given: Mapping[str, Any]) -> Request:
    if not given["runs"]:
        raise UsageError("runs: expected a directory of checkpoints, or several checkpoints")
    return asked.request(**given)


def _planned(given: Mapping[str, Any]) -> Plan:
    """Return the plan that the keywords of `average_run` without a state make."""
    if given["provenance"] is None:
        return planning.make(_request(given))
    from ema_cli import replaying

    defaults = average_run.__kwdefaults__ or {}
    replaying.check_alone(given, defaults)
    look = {k: given[k] for k in replaying.SUGGESTED if given[k] != defaults[k]}
    return replaying.plan_again(
        given["provenance"], given["output"], workers=given["workers"], **look
    )


def export(
    state: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    average: Sequence[str] = (),
    names: str = "auto",
    rule: Sequence[tuple[str, str]] = (),
    dtype: str | None = None,
    format: str | None = None,
    max_shard_size: str | int | None = None,
    optimizer: str = "auto",
    unknown: str = "refuse",
    non_finite: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
) -> ExportResult:
    """Write what a state holds as new checkpoints, as `average_run` would have written them.

    It needs none of the sources, and another process may go on with the state meanwhile.

    Args:
        state: the directory.
        output: the output path; may hold ``{step}`` and ``{average}``.
        average: labels of the averages, where the state has several; all when empty.
        names: ``auto``, ``shadow`` or ``variable``.
        rule: (pattern, replacement) pairs applied to output names.
        dtype: of averaged tensors in the output.
        format: of the output; else its suffix or that of the checkpoints decides.
        max_shard_size: e.g. ``"5GB"``; for folders.
        optimizer: ``auto``, ``keep`` or ``drop`` optimizer state.
        unknown: ``refuse``, ``keep`` or ``drop`` objects in a pickle that are no plain data.
        non_finite: ``error`` or ``allow``; None as the state has it.
        overwrite: replace an existing output.
        workers: threads; default from affinity and cgroup limits.
        executor: any `concurrent.futures.Executor`; threads when None.
        on_event: called with `Progress` events.

    Returns:
        What was written, from which plans.

    Raises:
        EmaError: one of `ema_cli.errors`; nothing half-written is left under an output's name.
    """
    given = locals()
    from ema_cli.continuing import export_state

    labels = given.pop("average")
    request = asked.request(**{**given, "non_finite": non_finite or "error"})
    return export_state(
        os.fspath(state),
        request,
        labels,
        non_finite=non_finite,
        overwrite=overwrite,
        executor=executor,
        on_event=on_event,
    )
