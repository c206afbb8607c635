"""Barrier mutation: every fsync has a reason, and the suite notices when it is left out.

Each kind of barrier is left out of the recorded run in turn; the explorer must then find a lost or
damaged state where the barrier is necessary, and must find nothing where it is not. A few are left
out of real runs on real file systems as well, by telling the process that the call succeeded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from durability import barriers, checker, explore, mounts, points, strace
from durability.checker import Wrong
from durability.mounts import BOLD, FLUSH_NOTHING, KINDS, XFS, Volume
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.scenario import UPDATES, Scenario
from durability.simulate import Operation, Sync

MOST = 12  # states of each moment
# On real file systems: those whose absence one power cut after the command shows.
REAL = ("slot.data", "ledger.data", "last.file", "manifest.file", "ROOT.file", "ROOT.dir")
NOTHING = "none left out"


def run(wanted: Wanted) -> Report:
    """Leave out each barrier in turn."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        operations = explore.record(scenario)
        harness = _Mutation(scenario, operations)
        everything = [NOTHING, *harness.present, *harness.real_points()]
        chosen = wanted.choose(everything, str, len(everything))
        found = [*Pool(harness.mutant, mounts.isolate).each(chosen)]
        if not wanted.only and len(chosen) == len(everything):
            found += harness.unknown()
        return gather("mutate", found, _line)


def _line(_: int, tags: Counter[str]) -> str:
    return (
        f"{tags['necessary']} necessary barriers left out, {tags['red']} noticed; "
        f"{tags['optional']} optional ones, {tags['green']} harmless; "
        f"{tags['real']} left out on real file systems, {tags['real red']} noticed"
    )


class _Mutation:
    """Mutants of one recording.

    Attributes:
        present: the names of the barriers in it.
    """

    def __init__(self, scenario: Scenario, operations: Sequence[Operation]) -> None:
        self._scenario = scenario
        self._operations = operations
        self._named = barriers.named(operations)
        self.present = sorted(set(self._named.values()))

    def unknown(self) -> list[Found]:
        """Report what the table and the recording do not agree about."""
        known = barriers.NECESSARY.keys() | barriers.OPTIONAL.keys()
        paths = {n: self._path(i) for i, n in self._named.items()}
        return [
            *(
                Found(n, f"a barrier that no table names: {paths[n]}")
                for n in paths
                if n not in known
            ),
            *(
                Found(n, "necessary, but no run has it")
                for n in barriers.NECESSARY
                if n not in paths
            ),
        ]

    def _path(self, position: int) -> str:
        operation = self._operations[position]
        return operation.path if isinstance(operation, Sync) else ""

    def mutant(self, name: str) -> Found:
        """Leave one barrier out, or none, and look whether anyone notices."""
        if name.startswith("real:"):
            return self._real(name)
        left_out = {position for position, known in self._named.items() if known == name}
        problem = self._explored(left_out)
        if name in barriers.NECESSARY:
            missing = "" if problem else "left out, and nothing was noticed"
            return Found(name, missing, ("necessary",) + ("red",) * bool(problem))
        tags = ("optional",) * (name != NOTHING) + ("green",) * (name != NOTHING and not problem)
        return Found(name, problem, tags)

    def _explored(self, left_out: set[int]) -> str:
        explorer = explore.Explorer(
            self._scenario, self._operations, MOST, skip=left_out.__contains__, rerun_every=100
        )
        explorer.prepare()
        first = min(left_out, default=0)
        for moment in explorer.moments:
            if moment.prefix > first and (found := explorer.explore(moment)).problem:
                return found.problem
        return ""

    # Real file systems

    def real_points(self) -> list[str]:
        """Return what is left out of real runs: the file system, the barrier, its call."""
        found = []
        for step in (UPDATES[0],):
            calls = points.of_step(
                self._scenario, step, lambda c: c.name in ("fsync", "fdatasync"), strace.FOLLOWING
            )
            latest = [name for name in REAL for call in calls if _is(name, call.about)]
            for name in dict.fromkeys(latest):
                about = [call for call in calls if _is(name, call.about)]
                call = about[-1]
                for kind in (BOLD, XFS):
                    found.append(f"real:{kind.name}:{name}:{step.name}:{call.call}:{call.ordinal}")
        return found

    def _real(self, name: str) -> Found:
        _, kind, _, step_name, call, ordinal = name.split(":")
        step = next(step for step in (UPDATES[0],) if step.name == step_name)
        volume = Volume(KINDS[kind], self._scenario.base)
        workspace = os.path.join(volume.path, "work")
        self._scenario.restore(step, workspace)
        volume.settle()
        trace = strace.injecting(call, "retval=0", ordinal)
        ended = self._scenario.run(step, workspace, *trace)
        if ended.code != 0:
            return Found(name, f"a lying {call}: {ended.summary}")
        volume.cut_power(FLUSH_NOTHING)
        try:
            checker.check_everything(self._scenario, step, workspace, ended)
        except Wrong:
            return Found(name, "", ("real", "real red"))
        finally:
            volume.unmount()
        return Found(name, "left out, and nothing was noticed", ("real",))


def _is(name: str, about: str) -> bool:
    """Whether a barrier of this name is about a file or directory called `about`."""
    if name == "ROOT.dir":
        return about == "state"
    if name == "last.file":
        return about.endswith(".safetensors")
    stem = name.split(".")[0]
    return about.removesuffix(".tmp").split("-")[0] == stem
