"""Full disks: real ones, filled so that a command runs out of space at many levels."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from durability import checker, mounts
from durability.checker import Wrong
from durability.mounts import BLOCK, KINDS, SMALL, TMPFS, XFS, Volume
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.process import Ended
from durability.scenario import ALONE, BATCH, CREATE, EXPORT, STATE, UPDATES, Scenario, Step

STEPS = (ALONE, CREATE, UPDATES[0], BATCH, EXPORT)
LEVELS = {TMPFS.name: 50, SMALL.name: 20, XFS.name: 10}
USUAL = 10_000


@dataclass(frozen=True)
class Level:
    """A command on a disk with some bytes free."""

    kind: str
    step: Step
    free: int

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{self.kind}:{self.step.name}:{self.free}"


def run(wanted: Wanted) -> Report:
    """Fill disks to every level."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        levels = []
        for step in STEPS:
            most = _needed(scenario, step)
            for kind, count in LEVELS.items():
                levels += [Level(kind, step, most * k // count) for k in range(count)]
        harness = _Full(scenario)
        chosen = wanted.choose(levels, lambda level: level.label, USUAL)
        return gather("full", Pool(harness.attempt, harness.prepare).each(chosen), _line)


def _line(count: int, tags: Counter[str]) -> str:
    return (
        f"{count} levels of full disks, {tags['15']} times exit 15, {tags['0']} times room enough, "
        f"{tags['wrong']} failures"
    )


def _needed(scenario: Scenario, step: Step) -> int:
    """Return somewhat more than a step needs besides what is there."""
    workspace = os.path.join(scenario.base, "needed")
    scenario.restore(step, workspace)
    before = _blocks(workspace)
    scenario.must(step, workspace)
    added = sum(size for file, size in _blocks(workspace).items() if before.get(file) != size)
    return added + 16 * BLOCK


def _blocks(directory: str) -> dict[tuple[str, int], int]:
    """Return what each file takes on disk, by its name and inode."""
    found = {}
    for folder, folders, names in os.walk(directory):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found[path, status.st_ino] = status.st_blocks * 512
    return found


class _Full:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._volumes: dict[str, Volume] = {}

    def prepare(self) -> None:
        mounts.isolate()
        self._volumes = {}

    def attempt(self, level: Level) -> Found:
        """Carry out a command where too little is free."""
        if level.kind not in self._volumes:
            self._volumes[level.kind] = Volume(KINDS[level.kind], self._scenario.base)
        volume = self._volumes[level.kind]
        volume.empty()
        workspace = os.path.join(volume.path, "work")
        self._scenario.restore(level.step, workspace)
        volume.settle()
        volume.fill(level.free)
        ended = self._scenario.run(level.step, workspace)
        try:
            self._check(level, workspace, volume, ended)
        except Wrong as error:
            return Found(level.label, str(error), (str(ended.code), "wrong"))
        return Found(level.label, "", (str(ended.code),))

    def _check(self, level: Level, workspace: str, volume: Volume, ended: Ended) -> None:
        step = level.step
        checker.check_error(ended, {0, 15})
        if STATE in self._scenario.argv(step):
            checker.check_state(self._scenario, step, workspace, ended.out)
        checker.check_output(self._scenario, step, workspace, ended.out)
        os.unlink(os.path.join(volume.path, "filler"))
        checker.check_rerun(self._scenario, step, workspace)
