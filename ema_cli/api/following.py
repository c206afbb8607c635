"""The function that follows a training."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor

from ema_cli import asked
from ema_cli.asked import Select
from ema_cli.live.reports import OnReport, WatchResult
from ema_cli.live.watching import Rhythm, watch_run
from ema_cli.naming import SHADOW_NAME
from ema_cli.running import OnEvent


def watch(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    state: str | os.PathLike[str],
    every: int = 1,
    interval: float = 5.0,
    idle_timeout: float | None = None,
    until_step: int | None = None,
    average: Sequence[str] = (),
    decay: str | float | None = None,
    num_updates: str | None = None,
    init: str = "first",
    zero_debias: bool = False,
    glob: str | None = None,
    steps: str | None = None,
    step_from: str | None = None,
    key: str | None = None,
    select: Select = (),
    statistics: str | None = None,
    shadow_dtype: str = "auto",
    like: str = "tensorflow",
    non_finite: str = "error",
    names: str = "auto",
    name: str = SHADOW_NAME,
    rule: Sequence[tuple[str, str]] = (),
    dtype: str | None = None,
    format: str | None = None,
    max_shard_size: str | int | None = None,
    optimizer: str = "auto",
    unknown: str = "refuse",
    overwrite: bool = False,
    workers: int | None = None,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
    on_report: OnReport | None = None,
    stop: threading.Event | None = None,
) -> WatchResult:
    """Mix each new checkpoint of a training that goes on into a state, and publish the average.

    The result is that of `average_run` over the same checkpoints, bit for bit. The arguments that
    are not told of here are those of `average_run`.

    Args:
        run: the directory of the training, which need not be there yet.
        output: the output path, or None; may hold ``{step}`` and ``{average}``. A folder or a
            TensorFlow checkpoint needs ``{step}``; a single file without it is replaced each time,
            if it is one of ours.
        state: directory that keeps the shadows; see `average_run`.
        every: an output follows each N-th checkpoint, and the last one.
        interval: seconds from one look at the directory to the next.
        idle_timeout: end when nothing was applied for so many seconds.
        until_step: end when this step is reached; nothing beyond it is applied.
        average: as in `average_run`, without windows, lr: and weights:.
        decay: as in `average_run`.
        num_updates: as in `average_run`.
        init: as in `average_run`.
        zero_debias: as in `average_run`.
        glob: directory entries to consider; may contain ``/``.
        steps: ``A:B[:C]``, both ends included; with C only steps where C divides step - A.
        step_from: regular expression whose first group is the step in a name.
        key: where the model is inside a checkpoint that holds more.
        select: ordered pairs ``("include" | "exclude", glob)``; the last match wins.
        statistics: ``average`` or ``copy`` batch-norm statistics.
        shadow_dtype: ``auto`` or ``same``.
        like: ``tensorflow``, ``torch`` or ``keras``.
        non_finite: ``error`` or ``allow``.
        names: ``auto``, ``shadow`` or ``variable``.
        name: of the shadows.
        rule: (pattern, replacement) pairs applied to output names.
        dtype: of averaged tensors in the output.
        format: of the output; else its suffix or the checkpoints decide.
        max_shard_size: e.g. ``"5GB"``; for folders.
        optimizer: ``auto``, ``keep`` or ``drop`` optimizer state.
        unknown: ``refuse``, ``keep`` or ``drop`` objects in a pickle that are no plain data.
        overwrite: replace existing outputs, whoever made them.
        workers: threads; default from affinity and cgroup limits.
        executor: any `concurrent.futures.Executor`; threads when None.
        on_event: called with `Progress` events.
        on_report: called with what is applied, published, missed or dropped, as it happens; see
            `ema_cli.live.reports`.
        stop: set it to end the watch after what it is doing.

    Returns:
        What was applied and published, and why the watch ended.

    Raises:
        EmaError: one of `ema_cli.errors`; the state holds what was applied before.
    """
    given = locals()
    request = asked.request(runs=given.pop("run"), **given)
    return watch_run(
        request,
        os.fspath(state),
        Rhythm(every, interval, idle_timeout, until_step),
        overwrite=overwrite,
        executor=executor,
        on_event=on_event,
        on_report=on_report,
        stop=stop,
    )
