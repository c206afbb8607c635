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
from durability.pool import BASE, Found, Pool, Report, Wanted, gather, scratch
from durability.process import Ended
from durability.scenario import ALONE, BATCH, CREATE, STATE, STEPS, UPDATES, Scenario, Step

USUAL = 100_000  # all of them
AT_RANDOM = 24


def run(wanted: Wanted) -> Report:
    """Kill the scenario everywhere."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        chosen = wanted.choose(points.mutating(scenario, (ALONE, *STEPS)), points.label, USUAL)
        harness = _Kill(scenario)
        report = gather("kill", harness.found(chosen, wanted), _line)
    return report


def _line(count: int, tags: Counter[str]) -> str:
    return (
        f"{count} points, {tags['lost']} acknowledged updates lost, {tags['other']} other hashes, "
        f"{tags['killed']} killed, {tags['random']} of them at random moments with two threads"
    )


class _Kill:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._workspace = ""

    def found(self, chosen: list[Point], wanted: Wanted) -> Iterator[Found]:
        yield from Pool(self.at_call, self.prepare).each(chosen)
        if not wanted.only:
            count = 1000 if wanted.full else AT_RANDOM if wanted.points is None else 4
            seeds = range(wanted.seed, wanted.seed + count)
            yield from Pool(self.at_random, self.prepare).each(seeds)

    def prepare(self) -> None:
        self._workspace = os.path.join(self._scenario.base, f"work-{os.getpid()}")

    def at_call(self, point: Point) -> Found:
        self._scenario.restore(point.step, self._workspace)
        trace = strace.injecting(point.call, "signal=SIGKILL", str(point.ordinal))
        ended = self._scenario.run(point.step, self._workspace, *trace)
        if ended.code != -signal.SIGKILL:
            return Found(point.label, f"not killed: {ended.summary}")
        return self._judged(point.label, point.step, ended, ("killed",))

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
            env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(BASE))},
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
            checker.check_everything(self._scenario, step, self._workspace, ended)
        except Wrong as error:
            kind = "lost" if str(error).startswith("lost") else "other"
            return Found(label, str(error), (*tags, kind))
        return Found(label, "", tags)


def _names(workspace: str) -> set[str]:
    state = os.path.join(workspace, STATE)
    return {*os.listdir(workspace), *(os.listdir(state) if os.path.isdir(state) else ())}
