"""Crash states: every directory that a power cut could leave, at every moment of the scenario.

One real run is recorded; the states that a crash could leave are built in memory from the list of
its operations (`simulate`), opened as the tool opens them, and checked byte by byte.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from durability import checker, strace
from durability.checker import Wrong
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.recording import Recorder
from durability.scenario import ALONE, STATE, STEPS, Scenario, Step, acknowledged, digest
from durability.simulate import Began, Disk, New, Operation, Said, Sync, Tree, build, identity

USUAL = 28_000  # different states
FULL = 1_000_000
COMPOUND = 100  # first faults
# How much of what was not synced survives; all and nothing are tried besides.
SHARES = (0.05, 0.2, 0.5, 0.8, 0.95)
RERUN_EVERY = 100
_BY_NAME = {step.name: step for step in (ALONE, *STEPS)}


def record(scenario: Scenario) -> list[Operation]:
    """Return what the scenario does to its directory, operation by operation."""
    workspace = os.path.join(scenario.base, "recorded")
    log = os.path.join(scenario.base, "recorded.log")
    os.makedirs(workspace)
    recorder = Recorder(workspace)
    for step in (*STEPS, ALONE):
        recorder.operations.append(Began(step.name))
        ended = scenario.run(step, workspace, *strace.recording(log, longest=1 << 24))
        if ended.code != 0:
            raise RuntimeError(f"{step.name} under strace: {ended.summary}")
        recorder.process(strace.parse(log))
    check_recording(recorder.operations, workspace)
    return recorder.operations


def check_recording(operations: Iterable[Operation], workspace: str) -> None:
    """Raise when the operations do not give what is really there: the model would prove nothing."""
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    tree = disk.crash(None, 1.0)
    real: dict[str, bytes | None] = {}
    for folder, folders, files in os.walk(workspace):
        below = os.path.relpath(folder, workspace)
        for name in folders:
            real[os.path.normpath(os.path.join(below, name))] = None
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                real[os.path.normpath(os.path.join(below, name))] = file.read()
    wrong = sorted(p for p in tree.keys() | real.keys() if tree.get(p, 0) != real.get(p, 0))
    if wrong:
        raise RuntimeError(f"the recording does not give {wrong}")


@dataclass(frozen=True)
class Moment:
    """A moment of the recording: how many operations were done, and what was promised by then.

    Attributes:
        prefix: operations done.
        step: the command that is at work.
        acknowledged: checkpoints that are promised to be in the state.
        written: outputs that are promised to be there.
    """

    prefix: int
    step: Step
    acknowledged: int
    written: tuple[str, ...]

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{self.step.name}:{self.prefix}"


def moments(operations: Sequence[Operation]) -> list[Moment]:
    """Return the moments at which a crash can leave something new."""
    step, promised = STEPS[0], 0
    written: tuple[str, ...] = ()
    found = []
    for prefix, operation in enumerate(operations, start=1):
        if isinstance(operation, Began):
            step, promised = _BY_NAME[operation.name], max(promised, step.before)
        elif isinstance(operation, Said):
            promised = max(promised, acknowledged(operation.text))
            if step.output and operation.text.endswith(f"  {step.output}"):
                written = (*written, step.output)
        if not isinstance(operation, New | Began):
            found.append(Moment(prefix, step, promised, written))
    return found


class Explorer:
    """Builds and checks the states after a moment, `most` of them; `skip` leaves barriers out.

    Attributes:
        moments: all there are.
    """

    def __init__(
        self,
        scenario: Scenario,
        operations: Sequence[Operation],
        most: int,
        *,
        seed: int = 1,
        skip: Callable[[int], bool] = lambda _: False,
        rerun_every: int = RERUN_EVERY,
    ) -> None:
        self.moments = moments(operations)
        self._scenario = scenario
        self._operations = operations
        self._most = most
        self._seed = seed
        self._skip = skip
        self._rerun_every = rerun_every
        self._disk, self._at = Disk(), 0
        self._where = ""

    def prepare(self) -> None:
        """Choose a directory of this process."""
        self._where = os.path.join(self._scenario.base, f"crashed-{os.getpid()}")
        self._disk, self._at = Disk(), 0

    def states(self, moment: Moment) -> Iterator[tuple[str, Tree]]:
        """Yield the different trees a crash at a moment may leave, and how to name them."""
        if self._at > moment.prefix:
            self._disk, self._at = Disk(), 0
        for index in range(self._at, moment.prefix):
            operation = self._operations[index]
            if not (isinstance(operation, Sync) and self._skip(index)):
                self._disk.apply(operation)
        self._at = moment.prefix
        seen: set[int] = set()
        rng = random.Random(self._seed * 1_000_003 + moment.prefix)
        idle = 0
        for number in range(8 * self._most + 2):
            if number < 2:
                tree = self._disk.crash(None, float(number))
            else:
                tree = self._disk.crash(rng, SHARES[number % len(SHARES)])
            key = identity(tree)
            if key not in seen:
                seen.add(key)
                idle = 0
                yield f"{moment.label} state {number}", tree
            else:
                idle += 1
            if len(seen) >= self._most or idle > 12 + len(seen):
                return  # enough, or few are left that were not seen

    def explore(self, moment: Moment) -> Found:
        """Check all states of a moment."""
        count = reruns = 0
        for name, tree in self.states(moment):
            count += 1
            again = (moment.prefix + count) % self._rerun_every == 0
            reruns += again
            try:
                self.check(moment, tree, rerun=again)
            except Wrong as error:
                tags = ("bad",) + ("state",) * count
                return Found(moment.label, f"{name}: {error}", tags)
        return Found(moment.label, "", ("state",) * count + ("rerun",) * reruns)

    def check(self, moment: Moment, tree: Tree, *, rerun: bool) -> None:
        """Build a tree, open the state in it, and hold it against what was promised."""
        build(tree, self._where)
        n = self._opened(moment)
        if n < moment.acknowledged:
            raise Wrong(f"lost: {moment.acknowledged} checkpoints acknowledged, {n} there")
        if n not in (moment.acknowledged, moment.step.before, moment.step.after):
            raise Wrong(f"half a batch: {n} checkpoints")
        for step in (ALONE, *STEPS):
            self._check_output(step, moment)
        if rerun:
            checker.check_rerun(self._scenario, moment.step, self._where)

    def _opened(self, moment: Moment) -> int:
        """Open the state as the tool does, which repairs it; returns its count of checkpoints."""
        from ema_cli.errors import EmaError
        from ema_cli.states import commit

        state = os.path.join(self._where, STATE)
        if not os.path.isdir(state):
            return 0
        try:
            with commit.writing(state):
                pass
        except EmaError as error:
            raise Wrong(f"cannot be opened: {error}") from error
        return checker.consumed(self._scenario, state)

    def _check_output(self, step: Step, moment: Moment) -> None:
        path = os.path.join(self._where, step.output)
        if not step.output:
            return
        if not os.path.exists(path):
            if step.output in moment.written:
                raise Wrong(f"lost: {step.output} was acknowledged")
            return
        if digest(path) != self._scenario.reference.outputs[step.equals]:
            raise Wrong(f"{step.output} under its final name has other bytes")
        if os.path.exists(path + ".ema.json"):
            with open(path + ".ema.json", "rb") as file:
                try:
                    json.load(file)
                except ValueError as error:
                    raise Wrong(f"{step.output}.ema.json is damaged") from error


def run(wanted: Wanted) -> Report:
    """Explore the crash states of the scenario."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        operations = record(scenario)
        states = FULL if wanted.full else wanted.points or USUAL
        most = 2 * states // len(moments(operations)) + 1
        explorer = Explorer(scenario, operations, most, seed=wanted.seed)
        return gather("explore", _found(scenario, explorer, wanted), _line)


def _found(scenario: Scenario, explorer: Explorer, wanted: Wanted) -> Iterator[Found]:
    from durability import compound

    second = wanted.only.startswith(compound.PREFIX)
    if not second:
        chosen = wanted.choose(explorer.moments, lambda moment: moment.label, 1 << 30)
        yield from Pool(explorer.explore, explorer.prepare).each(chosen)
    if second or not wanted.only:
        firsts = wanted.choose(compound.firsts(scenario), lambda first: first.label, COMPOUND)
        yield from Pool(compound.Compound(scenario).attempt).each(firsts)


def _line(_: int, tags: Counter[str]) -> str:
    return (
        f"{tags['state']} states, {tags['bad']} bad, {tags['rerun']} of them continued to the end; "
        f"{tags['compound']} states after another fault"
    )
