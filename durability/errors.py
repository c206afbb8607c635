"""Errors of the operating system at every call, once and from then on."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from durability import checker, points, strace
from durability.checker import Wrong
from durability.points import Point
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.process import Ended
from durability.scenario import ALONE, STATE, STEPS, Scenario, Step

USUAL = 1200
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EINTR")
# Errors that reading never has would only repeat EIO.
READING_ERRORS = ("EIO", "EINTR")
# 3 and 10 to 15 as documented; a repeated EINTR may also be waited out.
ALLOWED = {0, 3, 10, 11, 12, 15}
PARTLY = 3
CONTINUED_EVERY = 5
SYNCS = ("fsync", "fdatasync")


@dataclass(frozen=True)
class Fault:
    """One error at one call, once or at all later calls of that name too."""

    point: Point
    error: str
    sticky: bool

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{self.point.label}:{self.error}{'+' * self.sticky}"

    @property
    def when(self) -> str:
        """Which calls fail; no kernel interrupts for ever, and Python tries again until then."""
        k = self.point.ordinal
        if self.error == "EINTR":
            return f"{k}..{k + 20}" if self.sticky else str(k)
        return f"{k}+" if self.sticky else str(k)


def run(wanted: Wanted) -> Report:
    """Let every call fail in every way."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        calls = (*strace.MUTATING, *strace.OPENING, *strace.READING, *strace.LOOKING)
        where = [
            point
            for step in (ALONE, *STEPS)
            for point in points.of_step(scenario, step, lambda call: True, calls)
        ]
        chosen = wanted.choose(_all(where), lambda fault: fault.label, 1 << 30)
        if not wanted.only and not wanted.full:
            chosen = _usual(where, wanted.points or USUAL)
        harness = _Errors(scenario)
        found = Pool(harness.inject, harness.prepare).each(chosen)
        return gather("errors", found, lambda count, tags: _line(count, len(_all(where)), tags))


def _all(where: Sequence[Point]) -> list[Fault]:
    return [
        Fault(point, error, sticky)
        for point in where
        for error in (ERRORS if point.call in strace.MUTATING else READING_ERRORS)
        for sticky in (False, True)
    ]


def _usual(where: Sequence[Point], count: int) -> list[Fault]:
    """Return faults at all calls that change something, errors in turn, and at some that look."""
    writing = [point for point in where if point.call in strace.MUTATING]
    faults = [
        Fault(point, ERRORS[(k + sticky) % len(ERRORS)], sticky)
        for k, point in enumerate(writing)
        for sticky in (False, True)
    ]
    others = _all([point for point in where if point.call not in strace.MUTATING])
    for group in (faults, others):
        most = count // 2
        if len(group) > most:
            group[:] = [group[k * len(group) // most] for k in range(most)]
    return [*faults, *others]


def _line(count: int, possible: int, tags: Counter[str]) -> str:
    codes = ", ".join(f"exit {c}: {tags[str(c)]}" for c in sorted(ALLOWED) if tags[str(c)])
    return f"{count} of {possible} faults ({codes}), {tags['wrong']} failures"


class _Errors:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._workspace = self._log = ""
        self._count = 0

    def prepare(self) -> None:
        self._workspace = os.path.join(self._scenario.base, f"work-{os.getpid()}")
        self._log = self._workspace + ".log"

    def inject(self, fault: Fault) -> Found:
        """Inject one fault."""
        step = fault.point.step
        self._scenario.restore(step, self._workspace)
        what = f"error={fault.error}"
        trace = ["-y", *strace.injecting(fault.point.call, what, fault.when, self._log)]
        ended = self._scenario.run(step, self._workspace, *trace)
        tags: Sequence[str] = (str(ended.code),)
        try:
            self._check(fault, ended)
        except Wrong as error:
            return Found(fault.label, f"{error} (at {fault.point.about})", (*tags, "wrong"))
        return Found(fault.label, "", tuple(tags))

    def _check(self, fault: Fault, ended: Ended) -> None:
        step = fault.point.step
        if fault.point.call == "write" and fault.sticky:  # nothing can be said any more
            if ended.code not in (0, 15):
                raise Wrong(ended.summary)
        else:
            checker.check_error(ended, ALLOWED)
        if fault.point.call in SYNCS and fault.error != "EINTR":
            if ended.code != 15:
                raise Wrong(f"a failed {fault.point.call} and {ended.summary}")
            self._check_no_second_sync()
        partly = ended.code == PARTLY
        if STATE in self._scenario.argv(step):
            checker.check_state(self._scenario, step, self._workspace, ended.out, partly=partly)
        if partly and step.output:
            self._remove_output(step)  # it is whole, but of fewer checkpoints
        else:
            checker.check_output(self._scenario, step, self._workspace, ended.out)
        self._count += 1
        continued = self._count % CONTINUED_EVERY == 0
        checker.check_rerun(self._scenario, step, self._workspace, continued=continued)

    def _remove_output(self, step: Step) -> None:
        path = os.path.join(self._workspace, step.output)
        for name in (path, path + ".ema.json"):
            if os.path.exists(name):
                os.unlink(name)

    def _check_no_second_sync(self) -> None:
        """After a failed fsync the pages may be dropped: a second one proves nothing."""
        with open(self._log) as file:
            lines = file.read().splitlines()
        failed: set[str] = set()
        for line in lines:
            found = re.search(r"sync\(\d+<([^>]*)>\) += (-?\d+)", line)
            if found is None:
                continue
            if found[1] in failed:
                raise Wrong(f"a second fsync of {found[1]} after one that failed")
            if found[2] != "0":
                failed.add(found[1])
