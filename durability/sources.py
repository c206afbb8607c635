"""Checkpoints that are written, rewritten, rotated away and cut short while they are read.

What a reader makes of it must be an average of whole checkpoints: every element of the state is
the same number, the one that the checkpoints in the ledger give.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from durability import checker, process, reader, writers
from durability.checker import Wrong
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.process import Ended
from durability.scenario import DECAY, STATE

STEPS = 24
TOGETHER = 4  # they mostly sleep
# A file that is allocated, and that nobody is writing to just then, is complete: only watch waits.
NOT_PROMISED = {("run", "allocate")}
GAP = {"run": 0.02, "watch": 0.25}  # seconds between checkpoints
# For watch: how long nothing may have changed. It is 2 seconds as delivered: only slower.
QUIET = 0.4
SURELY_SEEN = 1.5
# 3: something could not be used; 10: nothing yet; 12: changed while it was read.
ALLOWED = {0, 3, 10, 12}


@dataclass(frozen=True)
class Course:
    """One training that is followed while it saves its checkpoints in some way."""

    reader: str
    way: str
    seed: int

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{self.reader}:{self.way}:{self.seed}"


def run(wanted: Wanted) -> Report:
    """Follow trainings."""
    with scratch() as base:
        rounds = 20 if wanted.full else 1
        courses = [
            Course(reader_, way, k)
            for k in range(rounds)
            for reader_ in GAP
            for way in writers.WAYS
            if (reader_, way) not in NOT_PROMISED
        ]
        chosen = wanted.choose(courses, lambda course: course.label, len(courses))
        harness = _Sources(base)
        return gather(
            "sources", Pool(harness.follow, harness.prepare).each(chosen, TOGETHER), _line
        )


def _line(count: int, tags: Counter[str]) -> str:
    return (
        f"{count} trainings, {tags['written']} checkpoints written, {tags['applied']} averaged, "
        f"{tags['missed']} reported as missed, {tags['refused']} runs refused one that changed, "
        f"{tags['wrong']} mixed, killed or unreported"
    )


class _Sources:
    def __init__(self, base: str) -> None:
        self._base = base
        self._workspace = ""

    def prepare(self) -> None:
        self._workspace = os.path.join(self._base, f"work-{os.getpid()}")

    def follow(self, course: Course) -> Found:
        """Follow one training to its end."""
        os.makedirs(self._workspace, exist_ok=True)
        here = os.path.join(self._workspace, course.label.replace(":", "-"))
        live = os.path.join(here, "live")
        os.makedirs(live)
        trainer = writers.train(course.way, live, STEPS, GAP[course.reader])
        tags = ["written"] * STEPS
        try:
            follow = self._watched if course.reader == "watch" else self._run_again_and_again
            ended = follow(here, trainer, course)
            tags += ["refused"] * sum(one.code == 12 for one in ended)
            tags += self._check(course, here, ended)
        except Wrong as error:
            return Found(course.label, str(error), (*tags, "wrong"))
        return Found(course.label, "", tuple(tags))

    def _run_again_and_again(self, here: str, trainer: int, _: Course) -> list[Ended]:
        argv = ["run", "live", "--state", STATE, *DECAY, "--workers", "1"]
        ended = []
        while True:
            over, status = os.waitpid(trainer, os.WNOHANG)
            ended.append(process.run(argv, here))
            checker.check_error(ended[-1], ALLOWED)
            if over:
                if status:
                    raise RuntimeError("the trainer failed")
                return ended

    def _watched(self, here: str, trainer: int, course: Course) -> list[Ended]:
        from ema_cli.live import readiness

        def hasten() -> None:
            readiness.QUIET_SECONDS = QUIET
            readiness.GRACE_SECONDS = 5 * QUIET

        argv = ["watch", "live", "--state", STATE, *DECAY, "--workers", "1"]
        argv += ["--interval", "0.1", "--idle-timeout", "4"]
        watcher = process.Running(argv, here, before=hasten)
        _, status = os.waitpid(trainer, 0)
        ended = watcher.wait()
        if status:
            raise RuntimeError("the trainer failed")
        checker.check_error(ended, ALLOWED)
        if ended.code not in (0, 3):
            raise Wrong(f"watch ended: {ended.summary}")
        return [ended]

    def _check(self, course: Course, here: str, ended: list[Ended]) -> list[str]:
        facts = reader.check(os.path.join(here, STATE))
        if facts is None:
            raise Wrong(f"nothing was averaged: {ended[-1].summary}")
        values = _values(os.path.join(here, STATE, facts.slot))
        if len(values) != 1:
            raise Wrong(f"mixed: the elements are {sorted(values)[:5]}, of steps {facts.applied}")
        if course.way != "rewrite" and values != {_expected(facts.applied)}:
            raise Wrong(f"{values} instead of the average of the steps {facts.applied}")
        if course.reader == "watch":
            self._check_reported(here, facts, ended[0])
        elif facts.applied[-1] != STEPS and course.way not in ("truncate",):
            raise Wrong(f"the last checkpoint was never averaged: {facts.applied}")
        return ["applied"] * len(facts.applied) + ["missed"] * len(facts.missed)

    def _check_reported(self, here: str, facts: reader.Facts, ended: Ended) -> None:
        """Check that whatever was there for long enough was averaged, or told to be missed."""
        with open(os.path.join(here, "live.present.json")) as file:
            present = {int(step): times for step, times in json.load(file).items()}
        told = set(facts.applied) | set(facts.missed)
        said = ended.err + ended.out
        for step, (came, went) in present.items():
            name = writers.name_of(step)
            if went - came >= SURELY_SEEN and step not in told and name not in said:
                raise Wrong(f"step {step} was there, and is neither averaged nor reported")


def _values(slot: str) -> set[float]:
    """Return the different elements of all averaged tensors of a slot."""
    with open(slot, "rb") as file:
        data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    entries: dict[str, Any] = json.loads(data[8 : 8 + length])
    found: set[float] = set()
    for name in ("a", "b"):
        start, stop = entries[name]["data_offsets"]
        found |= set(np.unique(np.frombuffer(data[8 + length + start : 8 + length + stop], "<f4")))
    return {float(value) for value in found}


def _expected(steps: tuple[int, ...]) -> float:
    """Return the average of some steps, rounded as the tool says it does."""
    shadow = np.float32(steps[0])
    omd = np.float32(1) - np.float32(DECAY[1])
    for step in steps[1:]:
        shadow = shadow - (shadow - np.float32(step)) * omd
    return float(shadow)
