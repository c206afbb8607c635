"""Follows a training that goes on: each new checkpoint is mixed into a state, outputs follow.

One process holds the state for as long as it watches. What it does is a committed update or a
published output, or it never was: it may be stopped, or killed, at any moment.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from ema_cli import hints, updating
from ema_cli import plan as planning
from ema_cli.errors import UsageError
from ema_cli.live import pinning
from ema_cli.live.mixing import Mixer
from ema_cli.live.publishing import Publisher, check_output
from ema_cli.live.readiness import NEVER, Lookout, Lost, Sight
from ema_cli.live.reports import Applied, Looked, Missed, OnReport, Published, Report, WatchResult
from ema_cli.plan import Request
from ema_cli.running import OnEvent, Written
from ema_cli.runs import Run
from ema_cli.search import PassedOver
from ema_cli.states import commit, settings
from ema_cli.states.commit import OpenState
from ema_cli.states.records import Row, files_of
from ema_cli.tensors import Checkpoint
from ema_cli.text import command, shorten

SHORTEST_INTERVAL = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class Rhythm:
    """When to look, to write an output and to end; the options of the same names."""

    every: int = 1
    interval: float = 5.0
    idle_timeout: float | None = None
    until_step: int | None = None


def watch_run(
    request: Request,
    path: str,
    rhythm: Rhythm,
    *,
    overwrite: bool = False,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
    on_report: OnReport | None = None,
    stop: threading.Event | None = None,
) -> WatchResult:
    """Follow the run of `request` with the state at `path`; see `ema_cli.watch`."""
    _check(request, rhythm)
    check_output(request, None, overwrite=overwrite)
    lookout = Lookout(request.paths[0], request.choice, path)
    lookout.expect(pinning.left(path))  # while they are there
    with commit.writing(path) as state:
        if state.current is not None:
            settings.check_same(state.current.binding, request, path, "watch")
        mixer = Mixer(state, request, executor, on_event, lookout.refuse)
        publisher = Publisher(
            state,
            request,
            rhythm.every,
            overwrite=overwrite,
            executor=executor,
            on_event=on_event,
        )
        publisher.check()
        tell, stop = on_report or _ignore, stop or threading.Event()
        return _Watch(state, rhythm, lookout, mixer, publisher, tell, stop).follow()


def _ignore(report: Report) -> None:
    del report


def _check(request: Request, rhythm: Rhythm) -> None:
    """Raise `UsageError` for what makes no sense, before anything is done."""
    settings.check_possible(request)
    planning.check_output(request)
    interval, idle = rhythm.interval, rhythm.idle_timeout
    if not SHORTEST_INTERVAL <= interval < float("inf"):
        raise UsageError(
            f"--interval: expected at least {SHORTEST_INTERVAL} s, found {interval}",
            "leave out --interval, or give the seconds between two looks",
        )
    if idle is not None and not 0 <= idle < float("inf"):
        raise UsageError(
            f"--idle-timeout: expected seconds from 0, found {idle}",
            "leave out --idle-timeout to follow the run until you stop it",
        )
    if rhythm.every < 1:
        raise UsageError(
            f"--every: expected at least 1, found {rhythm.every}",
            "--every 1 writes the output after every checkpoint",
        )
    if rhythm.every > 1 and request.output is None:
        raise UsageError("--every: expected -o OUT: what shall be written", hints.OUTPUT)
    if len(request.paths) != 1:
        raise UsageError(
            f"RUN: expected one directory, that of a training run, found {len(request.paths)}",
            "average checkpoints that you name with ema-avg run",
        )
    root = request.paths[0]
    if os.path.lexists(root) and not os.path.isdir(root):
        raise UsageError(
            f"{shorten(root, 1000)}: expected the directory of a training run, found a file",
            f"{command('ema-avg', 'watch', os.path.dirname(root) or '.')} --state DIR",
        )


class _Watch:
    """One watch, from the first look to its end."""

    def __init__(
        self,
        state: OpenState,
        rhythm: Rhythm,
        lookout: Lookout,
        mixer: Mixer,
        publisher: Publisher,
        tell: OnReport,
        stop: threading.Event,
    ) -> None:
        self._state, self._rhythm, self._tell, self._stop = state, rhythm, tell, stop
        self._lookout, self._mixer, self._publisher = lookout, mixer, publisher
        self._applied: list[Row] = []
        self._missed: list[Missed] = []
        self._outputs: list[Written] = []
        self._unrecorded: list[Lost] = []
        self._told: set[str] = set()
        self._active = self._started = time.monotonic()

    def follow(self) -> WatchResult:
        """Look, apply, publish and sleep, until something ends it."""
        self._publisher.publish(self._published)  # what a killed process owed
        sight: Sight | None = None
        while not (ended := self._ended(sight)):
            if sight is not None and self._sleep(sight):
                continue
            sight = self._lookout.look(self._last())
            self._see(sight)
            self._apply(sight.ready)
            self._record(sight)
            self._publisher.publish(self._published)
        self._publisher.publish(self._published, end=True)
        return self._result(ended)

    def _last(self) -> int | None:
        """Return the newest step of the ledger."""
        rows = self._state.current.rows if self._state.current else ()
        return max((row.step for row in rows if row.step is not None), default=None)

    def _ended(self, sight: Sight | None) -> str:
        """Return why to end, or nothing.

        It is not idle while waiting alone can make something ready.
        """
        until, idle, last = self._rhythm.until_step, self._rhythm.idle_timeout, self._last()
        if until is not None and last is not None and last >= until:
            return "until-step"
        if self._stop.is_set():
            return "stopped"
        still = sight is not None and sight.soon == NEVER
        return "idle" if idle is not None and still and self._idle() >= idle else ""

    def _idle(self) -> float:
        """Return for how many seconds nothing was applied."""
        return time.monotonic() - self._active

    def _sleep(self, sight: Sight) -> bool:
        """Wait for the next look; returns whether to stop instead."""
        seconds = min(self._rhythm.interval, sight.soon)
        left = (self._rhythm.idle_timeout or 0.0) - self._idle()
        seconds = min(seconds, left) if left > 0 else seconds
        return self._stop.wait(seconds)

    def _result(self, ended: str) -> WatchResult:
        applied = self._state.current.applied if self._state.current else []
        return WatchResult(
            self._state.path,
            ended,
            tuple(self._applied),
            tuple(self._missed),
            tuple(self._outputs),
            applied[-1].step if applied else None,
            len(applied),
            self._lookout.unusable(self._rhythm.until_step),
            time.monotonic() - self._started,
        )

    # ------------------------------------------------------------------ what a look showed

    def _see(self, sight: Sight) -> None:
        """Tell what a look showed, each thing once, and count what is lost."""
        run = Run((), notes=())
        if sight.run is not None:
            news = updating.news(self._state, sight.run)
            notes = self._new((note, note) for note in (*sight.run.notes, *news.notes))
            passed = [*self._new((f"{e.path}: {e.reason}", e) for e in sight.run.passed_over)]
            passed += self._late(news)
            run = dataclasses.replace(run, notes=tuple(notes), passed_over=tuple(passed))
        waiting = tuple(self._new((line, line) for line in sight.waiting))
        if run.notes or run.passed_over or waiting:
            self._tell(Looked(run, waiting))
        for lost in sight.lost:
            missed = Missed(lost.step, lost.path, lost.reason)
            self._missed.append(missed)
            self._unrecorded.append(lost)
            self._tell(missed)

    def _late(self, news: updating.News) -> list[PassedOver]:
        """Tell what came too late, each once; returns what is from before the state's first."""
        late = self._new((f"late: {entry.path}", (step, entry)) for step, entry in news.late)
        for step, entry in late:
            if entry.unusable:
                missed = Missed(step, entry.path, entry.reason)
                self._missed.append(missed)
                self._tell(missed)
        return [entry for _, entry in late if not entry.unusable]

    def _new(self, told: Iterable[tuple[str, T]]) -> list[T]:
        """Return the values whose keys were not told before."""
        found = {key: value for key, value in told if key not in self._told}
        self._told.update(found)
        return list(found.values())

    def _record(self, sight: Sight) -> None:
        """Write down what was lost, but nothing newer than what is still waited for.

        What is older than the last line of the ledger would count as averaged.
        """
        current, expected = self._state.current, sight.expected
        if current is None:
            return
        now = [lost for lost in self._unrecorded if expected is None or lost.step < expected]
        if now:
            self._state.record([_row(lost, current.root.generation) for lost in now])
            self._unrecorded = [lost for lost in self._unrecorded if lost not in now]

    # ------------------------------------------------------------------ what is done

    def _apply(self, ready: tuple[Checkpoint, ...]) -> None:
        """Mix in what is ready, up to the step at which the watch ends."""
        until = self._rhythm.until_step
        if until is not None:
            end = next((k for k, c in enumerate(ready, 1) if (c.step or 0) >= until), len(ready))
            ready = ready[:end]
        if ready:
            self._publisher.check(ready[-1].index.format)
        for report in self._mixer.mix(ready):
            if isinstance(report, Applied):
                self._applied += report.rows
                self._active = time.monotonic()
            self._tell(report)

    def _published(self, report: Published) -> None:
        self._outputs.append(report.written)
        self._tell(report)


def _row(lost: Lost, generation: int) -> Row:
    """Return the line of the ledger for a checkpoint that was lost."""
    checkpoint = lost.checkpoint
    name = checkpoint.name if checkpoint else os.path.basename(lost.path)
    files = files_of(checkpoint) if checkpoint else ()
    return Row(lost.step, name, lost.path, files, (), lost.reason, generation)
