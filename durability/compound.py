"""Two faults in a row: a command fails or is killed, is given again, and then the power is cut.

A failed fsync is reported once: the kernel counts the pages as clean from then on, and no later
fsync writes them, though they can still be read. A killed process leaves names that are not durable
yet. Whatever the second try acknowledges must survive without either.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from durability import explore, points, strace
from durability.points import Point
from durability.pool import Found
from durability.recording import Recorder
from durability.scenario import BATCH, CREATE, UPDATES, Scenario
from durability.simulate import Began

PREFIX = "compound:"
SYNCS = ("fsync", "fdatasync")
STEPS = (CREATE, UPDATES[0], BATCH)
MOMENTS, MOST = 10, 6  # moments of the second try, and states at each


@dataclass(frozen=True)
class First:
    """The first fault: an injection at a call."""

    point: Point
    fault: str

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{PREFIX}{self.point.label}:{self.fault}"


def firsts(scenario: Scenario) -> list[First]:
    """Return every failed fsync and every kill of some steps."""
    where = points.mutating(scenario, STEPS)
    failed = [First(point, "error=EIO") for point in where if point.call in SYNCS]
    return [*failed, *(First(point, "signal=SIGKILL") for point in where)]


class Compound:
    """Carries out a step twice, the first time with a fault, and looks what a cut then leaves."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario

    def attempt(self, first: First) -> Found:
        """Try one first fault."""
        point = first.point
        workspace = os.path.join(self._scenario.base, f"compound-{os.getpid()}")
        self._scenario.restore(point.step, workspace)
        recorder = Recorder(workspace)
        recorder.adopt()
        recorder.operations.append(Began(point.step.name))
        inject = f"inject={point.call}:{first.fault}:when={point.ordinal}"
        self._step(recorder, point, workspace, ("-e", inject))
        second = len(recorder.operations)
        self._step(recorder, point, workspace)
        explorer = explore.Explorer(
            self._scenario, recorder.operations, MOST, rerun_every=MOMENTS * MOST
        )
        explorer.prepare()
        later = [moment for moment in explorer.moments if moment.prefix > second]
        states = 0
        for moment in later[:: -(-len(later) // MOMENTS)] + later[-1:]:
            found = explorer.explore(moment)
            states += found.tags.count("state")
            if found.problem:
                return Found(first.label, found.problem, ("bad",))
        return Found(first.label, "", ("compound",) * states)

    def _step(
        self, recorder: Recorder, point: Point, workspace: str, fault: Sequence[str] = ()
    ) -> None:
        log = workspace + ".log"
        trace = strace.recording(log, longest=1 << 24)
        ended = self._scenario.run(point.step, workspace, *trace, *fault)
        if ended.code not in ((15, -signal.SIGKILL) if fault else (0,)):
            raise RuntimeError(f"{point.label}: {ended.summary}")
        recorder.process(strace.parse(log))
