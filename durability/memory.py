"""Memory runs out: one allocation of the interpreter after the other fails."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass

from durability import checker, process
from durability.checker import Wrong
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.scenario import BATCH, CREATE, EXPORT, STATE, UPDATES, Scenario, Step

USUAL = 320
# Those before belong to our own call, and to what precedes anything that could be reported.
FIRST = 30
STEPS = (CREATE, UPDATES[0], BATCH, EXPORT)
# Out of memory can be noticed anywhere: as an internal error, or as whatever it kept from working.
ALLOWED = {0, 1, 2, 3, 10, 11, 12, 13, 15}
PROBES = 8


@dataclass(frozen=True)
class Refusal:
    """The allocation that fails, counted from the beginning of a command."""

    step: Step
    ordinal: int

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{self.step.name}:{self.ordinal}"


def run(wanted: Wanted) -> Report:
    """Let allocations fail."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        harness = _Memory(scenario)
        harness.prepare()
        each = max((20_000 if wanted.full else wanted.points or USUAL) // len(STEPS), 1)
        refusals = []
        for step in STEPS:
            count = harness.allocations(step)
            ordinals = range(FIRST, count + 1) if wanted.only else _spread(count, each)
            refusals += [Refusal(step, ordinal) for ordinal in ordinals]
        chosen = wanted.choose(refusals, lambda refusal: refusal.label, len(refusals))
        return gather("memory", Pool(harness.refuse, harness.prepare).each(chosen), _line)


def _spread(count: int, each: int) -> list[int]:
    """Return every one of the first allocations, and some of all others."""
    dense = FIRST + each // 4
    step = max((count - dense) // max(each - each // 4, 1), 1)
    return [*range(FIRST, dense), *range(dense, count + 1, step)][:each]


def _line(count: int, tags: Counter[str]) -> str:
    codes = ", ".join(f"exit {c}: {tags[str(c)]}" for c in sorted(ALLOWED) if tags[str(c)])
    return f"{count} refused allocations ({codes}), {tags['wrong']} signals or damaged states"


class _Memory:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._workspace = ""

    def prepare(self) -> None:
        self._workspace = os.path.join(self._scenario.base, f"work-{os.getpid()}")

    def _run(self, step: Step, start: int, stop: int) -> process.Ended:
        import _testcapi  # type: ignore[import-not-found]

        self._scenario.restore(step, self._workspace)
        return process.run(
            self._scenario.argv(step),
            self._workspace,
            before=lambda: _testcapi.set_nomemory(start, stop),
        )

    def allocations(self, step: Step) -> int:
        """Return about how many allocations a command makes: refusing later ones changes nothing.

        (Refusing all from one on would tell exactly, but Python without any memory never ends.)
        """
        rng = random.Random(step.name)
        most = 1 << 12
        while any(
            self._run(step, k, k + 1).code != 0
            for k in (rng.randrange(most, 2 * most) for _ in range(PROBES))
        ):
            most *= 2
        return most

    def refuse(self, refusal: Refusal) -> Found:
        """Refuse one allocation."""
        step = refusal.step
        ended = self._run(step, refusal.ordinal, refusal.ordinal + 1)
        tags = (str(ended.code),)
        try:
            panic = (
                "PanicException" in ended.err
            )  # the safetensors library's, which is none of ours
            if ended.code not in ALLOWED and not panic:
                raise Wrong(ended.summary)
            if STATE in self._scenario.argv(step):
                checker.check_state(self._scenario, step, self._workspace, ended.out)
            checker.check_output(self._scenario, step, self._workspace, ended.out)
            checker.check_rerun(self._scenario, step, self._workspace)
        except Wrong as error:
            return Found(refusal.label, str(error), (*tags, "wrong"))
        return Found(refusal.label, "", tags)
