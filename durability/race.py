"""Races: four processes on one state, one of them killed; the lock removed, or not to be had."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass

from durability import checker, process, strace
from durability.checker import Wrong
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.process import Ended
from durability.scenario import CREATE, STATE, UPDATES, Scenario, Step, acknowledged, follow

USUAL = 120
RACERS = 4
LOCKED = 11
# In turn: nothing else; the lock is removed meanwhile; the file system has no locks.
WAYS = ("kill", "unlink", "ENOLCK", "EOPNOTSUPP")
# Who lost to another process may also notice that its files are gone; without locks nobody writes.
ALLOWED = {"kill": {0, LOCKED}, "unlink": {0, LOCKED, 15}}


@dataclass(frozen=True)
class Race:
    """One race."""

    way: str
    seed: int

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{self.way}:{self.seed}"


def run(wanted: Wanted) -> Report:
    """Race."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        count = 1000 if wanted.full or wanted.only else USUAL
        races = [Race(WAYS[k % len(WAYS)], wanted.seed + k) for k in range(count)]
        chosen = wanted.choose(races, lambda race: race.label, count)
        harness = _Races(scenario)
        return gather("race", Pool(harness.race, harness.prepare).each(chosen), _line)


def _line(count: int, tags: Counter[str]) -> str:
    return (
        f"{count} races of {RACERS}, {tags['won']} commits, {tags['locked']} times exit {LOCKED}, "
        f"{tags['killed']} killed, {tags['wrong']} bad"
    )


class _Races:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._workspace = ""

    def prepare(self) -> None:
        self._workspace = os.path.join(self._scenario.base, f"work-{os.getpid()}")

    def race(self, race: Race) -> Found:
        """Let four processes loose."""
        rng = random.Random(race.seed)
        start = rng.choice((CREATE, *UPDATES))
        self._scenario.restore(start, self._workspace)
        # They see different checkpoints, so that they would write different bytes.
        steps = [follow(f"racer{k}", start.before, start.after + k % 2) for k in range(RACERS)]
        ended = self._let_loose(race.way, steps, rng)
        tags = [self._tag(one) for one in ended]
        try:
            self._check(start, ended, ALLOWED.get(race.way, {0, LOCKED, 15}))
        except Wrong as error:
            return Found(race.label, f"{error}; {[one.summary for one in ended]}", (*tags, "wrong"))
        return Found(race.label, "", tuple(tags))

    def _let_loose(self, way: str, steps: list[Step], rng: random.Random) -> list[Ended]:
        trace: list[str] = []
        if way in ("ENOLCK", "EOPNOTSUPP"):
            trace = strace.injecting("flock", f"error={way}", "1+")
        racers = []
        for step in steps:
            racers.append(process.start(self._scenario.argv(step), self._workspace, trace))
            time.sleep(rng.random() * 0.01)
        time.sleep(rng.random() * 0.05)
        if way == "unlink":
            _unlink(os.path.join(self._workspace, STATE, "LOCK"))
        else:
            os.kill(rng.choice(racers).pid, signal.SIGKILL)
        return [racer.wait() for racer in racers]

    def _tag(self, ended: Ended) -> str:
        if ended.code == -signal.SIGKILL:
            return "killed"
        return "locked" if ended.code == LOCKED else "won" if "applied" in ended.out else "late"

    def _check(self, start: Step, ended: list[Ended], allowed: set[int]) -> None:
        for one in ended:
            if one.code != -signal.SIGKILL:
                checker.check_error(one, allowed)
        state = os.path.join(self._workspace, STATE)
        n = checker.consumed(self._scenario, state)
        promised = max(start.before, *(acknowledged(one.out) for one in ended))
        if n < promised:
            raise Wrong(f"lost: {promised} checkpoints were acknowledged, the state holds {n}")
        if n > start.after + 1:
            raise Wrong(f"{n} checkpoints, more than anybody had")
        checker.check_rerun(
            self._scenario, follow("after", n, max(n, start.after)), self._workspace
        )


def _unlink(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)
