"""Where faults are injected: every system call of a step that matters, by name and number."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from durability import strace
from durability.scenario import Scenario, Step
from durability.strace import Call


@dataclass(frozen=True)
class Point:
    """One system call of one step: the `ordinal`-th of its name.

    Attributes:
        step: the command.
        call: the name of the system call.
        ordinal: which one of that name.
        about: the last component of what it is about, for people.
    """

    step: Step
    call: str
    ordinal: int
    about: str

    @property
    def label(self) -> str:
        """What names the point on the command line."""
        return f"{self.step.name}:{self.call}:{self.ordinal}"


def label(point: Point) -> str:
    """Return the label of a point."""
    return point.label


def of_step(
    scenario: Scenario, step: Step, wanted: Callable[[Call], bool], calls: Sequence[str]
) -> list[Point]:
    """Return the calls of an undisturbed step that are `wanted`, in order.

    They are about the state, the outputs, the checkpoints, or what the command prints.
    """
    workspace = os.path.join(scenario.base, "looked-at")
    log = os.path.join(scenario.base, "looked-at.log")
    scenario.restore(step, workspace)
    ended = scenario.run(step, workspace, *strace.recording(log, calls))
    if ended.code != 0:
        raise RuntimeError(f"{step.name} under strace: {ended.summary}")
    roots = [workspace, scenario.stages, "/memfd:out"]
    return [
        Point(step, call.name, call.ordinal, os.path.basename((call.paths or ("",))[-1]))
        for call in strace.parse(log)
        if wanted(call) and strace.within(call, roots, workspace)
    ]


def mutating(scenario: Scenario, steps: Sequence[Step]) -> list[Point]:
    """Return every call of the steps that may change something."""
    calls = (*strace.MUTATING, *strace.OPENING)
    return [p for step in steps for p in of_step(scenario, step, lambda c: c.mutates, calls)]
