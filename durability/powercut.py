"""Power cuts on real file systems, before every system call that changes something.

The process is killed, then the file system stops writing at once (FS_IOC_SHUTDOWN), is unmounted
and mounted again, which plays back its journal. What the command printed lies outside of it.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import dataclass

from durability import checker, mounts, points, strace
from durability.checker import Wrong
from durability.mounts import BOLD, EXT4, FLUSH_JOURNAL, FLUSH_NOTHING, KINDS, XFS, Kind, Volume
from durability.points import Point
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.scenario import ALONE, BATCH, CREATE, EXPORT, STEPS, UPDATES, Scenario

# At every call; the others in turn.
ALWAYS = ((EXT4, FLUSH_NOTHING), (XFS, FLUSH_NOTHING))
IN_TURN = ((EXT4, FLUSH_JOURNAL), (BOLD, FLUSH_NOTHING), (XFS, FLUSH_JOURNAL))
VARIANTS = (*ALWAYS, *IN_TURN)
_USUAL_STEPS = (CREATE, UPDATES[0], BATCH, EXPORT)


@dataclass(frozen=True)
class Cut:
    """A power cut before one system call, on one kind of file system."""

    kind: str
    flag: int
    point: Point

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{self.kind}:{self.flag}:{self.point.label}"


def run(wanted: Wanted) -> Report:
    """Cut the power everywhere."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        steps = (ALONE, *STEPS) if wanted.full or wanted.only else _USUAL_STEPS
        where = points.mutating(scenario, steps)
        cuts = [
            Cut(kind.name, flag, point)
            for k, point in enumerate(where)
            for kind, flag in (VARIANTS if wanted.full or wanted.only else _usual(k))
        ]
        chosen = wanted.choose(cuts, lambda cut: cut.label, len(cuts))
        harness = _PowerCut(scenario)
        return gather("powercut", Pool(harness.cut, harness.prepare).each(chosen), _line)


def _usual(number: int) -> tuple[tuple[Kind, int], ...]:
    return (*ALWAYS, IN_TURN[number % len(IN_TURN)])


def _line(count: int, tags: Counter[str]) -> str:
    kinds = ", ".join(f"{kind} {tags[kind]}" for kind in KINDS if tags[kind])
    return f"{count} cuts ({kinds}), {tags['wrong']} failures"


class _PowerCut:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._volumes: dict[str, Volume] = {}

    def prepare(self) -> None:
        mounts.isolate()
        self._volumes = {}

    def _volume(self, kind: str) -> Volume:
        if kind not in self._volumes:
            self._volumes[kind] = Volume(KINDS[kind], self._scenario.base)
        return self._volumes[kind]

    def cut(self, cut: Cut) -> Found:
        """Cut the power once."""
        volume, point = self._volume(cut.kind), cut.point
        workspace = os.path.join(volume.path, "work")
        self._scenario.restore(point.step, workspace)
        volume.settle()
        trace = strace.injecting(point.call, "signal=SIGKILL", str(point.ordinal))
        ended = self._scenario.run(point.step, workspace, *trace)
        if ended.code != -signal.SIGKILL:
            return Found(cut.label, f"not killed: {ended.summary}")
        volume.cut_power(cut.flag)
        try:
            checker.check_everything(self._scenario, point.step, workspace, ended)
        except Wrong as error:
            return Found(cut.label, str(error), (cut.kind, "wrong"))
        return Found(cut.label, "", (cut.kind,))
