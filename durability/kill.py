"""SIGKILL before every system call that changes something, and at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

from durability import checker, points, strace
from durability.checker import Wrong
from durability.points import Point
from durability.pool import PROJECT, Found, Pool, Report, Wanted, gather, scratch
from durability.process import Ended
from durability.scenario import ALONE, BATCH, CREATE, STATE, STEPS, UPDATES, WATCH, Scenario, Step

AT_RANDOM = 24
TWICE = 60


def run(wanted: Wanted) -> Report:
    """Kill the scenario everywhere."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        where = points.mutating(scenario, (ALONE, *STEPS, WATCH))
        return gather("kill", _Kill(scenario).found(where, wanted), _line)


def _line(count: int, tags: Counter[str]) -> str:
    return (
        f"{count} points, {tags['lost']} acknowledged updates lost, {tags['other']} other hashes, "
        f"{tags['killed']} killed: {tags['twice']} of them twice, "
        f"{tags['random']} at random moments with two threads; {tags['resumed']} went on half-way"
    )


class _Kill:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._workspace = ""

    def found(self, where: list[Point], wanted: Wanted) -> Iterator[Found]:
        """Kill at every call; then kill what goes on after a kill, and kill at random moments."""
        scale = 40 if wanted.full else 1
        few = wanted.points is not None
        rng = random.Random(wanted.seed)
        pairs = [self._pair(where, rng) for _ in range(4 if few else TWICE * scale)]
        seeds = [*range(wanted.seed, wanted.seed + (4 if few else AT_RANDOM * scale))]
        if " then " in wanted.only:
            labels = wanted.only.split(" then ")
            pairs = [tuple(next(p for p in where if p.label == one) for one in labels)]
            where, seeds = [], []
        elif wanted.only.startswith("random:"):
            where, pairs, seeds = [], [], [int(wanted.only.split(":")[1])]
        elif wanted.only:
            pairs, seeds = [], []
        if where:
            chosen = wanted.choose(where, points.label, len(where))
            yield from Pool(self.at_call, self.prepare).each(chosen)
        yield from Pool(self.twice, self.prepare).each(pairs)
        yield from Pool(self.at_random, self.prepare).each(seeds)

    def _pair(self, chosen: list[Point], rng: random.Random) -> tuple[Point, ...]:
        first = rng.choice(chosen)
        return first, rng.choice([point for point in chosen if point.step == first.step])

    def prepare(self) -> None:
        self._workspace = os.path.join(self._scenario.base, f"work-{os.getpid()}")

    def at_call(self, point: Point) -> Found:
        self._scenario.restore(point.step, self._workspace)
        trace = strace.injecting(point.call, "signal=SIGKILL", str(point.ordinal))
        ended = self._scenario.run(point.step, self._workspace, *trace)
        if ended.code != -signal.SIGKILL:
            return Found(point.label, f"not killed: {ended.summary}")
        return self._judged(point.label, point.step, ended, ("killed",))

    def twice(self, pair: tuple[Point, ...]) -> Found:
        """Kill a command, and kill it again when it is given again, if it comes that far."""
        step, said = pair[0].step, ""
        self._scenario.restore(step, self._workspace)
        for point in pair:
            trace = strace.injecting(point.call, "signal=SIGKILL", str(point.ordinal))
            ended = self._scenario.run(step, self._workspace, *trace)
            said += ended.out
        label = f"{pair[0].label} then {pair[1].label}"
        return self._judged(label, step, Ended(ended.code, said, ended.err), ("killed", "twice"))

    def at_random(self, seed: int) -> Found:
        """Kill a process as a user starts it."""
        rng = random.Random(seed)
        step = rng.choice((CREATE, *UPDATES, BATCH, ALONE))
        self._scenario.restore(step, self._workspace)
        argv = [sys.executable, "-m", "ema_cli", *self._scenario.argv(step)[:-1], "2"]
        process = subprocess.Popen(
            argv,
            cwd=self._workspace,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": PROJECT},
        )
        self._wait_for_work(process, rng)
        process.kill()
        out, err = process.communicate()
        ended = Ended(process.returncode, out.decode(), err.decode())
        killed = ended.code == -signal.SIGKILL
        return self._judged(f"random:{seed}", step, ended, ("killed", "random") if killed else ())

    def _wait_for_work(self, process: subprocess.Popen[bytes], rng: random.Random) -> None:
        """Sleep into the few milliseconds in which the process changes files."""
        before = _names(self._workspace)
        while process.poll() is None and _names(self._workspace) == before:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.02)

    def _judged(self, label: str, step: Step, ended: Ended, tags: tuple[str, ...]) -> Found:
        try:
            if checker.check_everything(self._scenario, step, self._workspace, ended):
                tags = (*tags, "resumed")
        except Wrong as error:
            kind = "lost" if str(error).startswith("lost") else "other"
            return Found(label, str(error), (*tags, kind))
        return Found(label, "", tags)


def _names(workspace: str) -> set[str]:
    state = os.path.join(workspace, STATE)
    return {*os.listdir(workspace), *(os.listdir(state) if os.path.isdir(state) else ())}
