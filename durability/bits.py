"""Bit rot: every single bit of the small files of a state, and a thousand in its slots.

Each flip must be an error, or change nothing that anybody can see. What a small file says is
compared as it is parsed, for every bit; what the commands make of a flip is looked at for some.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from durability import checker, points, reader, strace
from durability.checker import Wrong
from durability.pool import Found, Pool, Report, Wanted, gather, scratch
from durability.scenario import STATE, UPDATES, Scenario, Step, digest

# The state whose bits are flipped holds two checkpoints: more lines in its ledger say no more.
NEXT = UPDATES[1]
OUT = "flipped.safetensors"
EXPORT = Step("export", ("export", STATE, "-o", OUT), output=OUT)
IN_SLOTS, BY_COMMAND, IN_PROGRESS = 1000, 300, 200
GROUP = 512  # bits tried in one go
DAMAGED = 12
REFUSED = {DAMAGED, 14}  # a directory whose FORMAT is gone is not taken for a state


@dataclass(frozen=True)
class Flips:
    """Some bits of one file: `commands` are given besides reading what it says.

    Attributes:
        kind: ``read``, or ``commands``; or ``resume``, after a kill.
        name: of the file inside the state.
        first: the first bit.
        count: how many.
    """

    kind: str
    name: str
    first: int
    count: int

    @property
    def label(self) -> str:
        """What names it on the command line."""
        return f"{self.kind}:{self.name}:{self.first}:{self.count}"


def run(wanted: Wanted) -> Report:
    """Flip bits."""
    with scratch() as base:
        scenario = Scenario(base)
        scenario.prepare()
        harness = _Bits(scenario)
        killed = harness.kill()
        flips = _all_flips(scenario, killed, wanted)
        chosen = wanted.choose(flips, lambda one: one.label, len(flips))
        return gather("bits", Pool(harness.flip, harness.prepare).each(chosen), _line)


def _line(_: int, tags: Counter[str]) -> str:
    return (
        f"{tags['read']} flips in small files, every bit of them, {tags['slot']} in slots, "
        f"{tags['progress']} while an update is resumed; {tags['noticed']} noticed, "
        f"{tags['harmless']} harmless, {tags['wrong']} silently wrong"
    )


def _all_flips(scenario: Scenario, killed: str, wanted: Wanted) -> list[Flips]:
    state = os.path.join(scenario.before(NEXT), STATE)
    rng = random.Random(wanted.seed)
    scale = 10 if wanted.full else 1
    sizes = {name: os.path.getsize(os.path.join(state, name)) for name in _files(state)}
    slots = [(name, 8 * size) for name, size in sizes.items() if name.startswith("slot.")]
    small = [(name, 8 * size) for name, size in sizes.items() if not name.startswith("slot.")]
    kept = _kept(state)
    flips = [
        Flips("read", name, first, min(GROUP, 8 * (offset + length) - first))
        for name, bits in small
        for offset, length in kept.get(name, [(0, bits // 8)])
        for first in range(8 * offset, 8 * (offset + length), GROUP)
    ]
    for kind, where, count in (
        ("commands", slots, IN_SLOTS),
        ("commands", small, BY_COMMAND),
        ("resume", _progress(killed), IN_PROGRESS),
    ):
        for _ in range(count * scale):
            name, bits = rng.choice(where)
            flips.append(Flips(kind, name, rng.randrange(bits), 1))
    return flips


def _files(state: str) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(folder, name), state)
        for folder, _, names in os.walk(state)
        for name in names
    )


def _kept(state: str) -> dict[str, list[tuple[int, int]]]:
    """Return the (offset, length) of what counts in the files of the last checkpoint."""
    [name] = [name for name in os.listdir(state) if name.startswith("manifest-")]
    with open(os.path.join(state, name), "rb") as file:
        manifest = reader.sealed(file.read(), name)
    folder = f"last-{manifest['generation']}"
    files = manifest["skeleton"]["files"]
    return {f"{folder}/{file['name']}": [tuple(p) for p in file["pieces"]] for file in files}


def _progress(killed: str) -> list[tuple[str, int]]:
    """Return the files that an interrupted update is continued from."""
    with open(os.path.join(killed, STATE, "ROOT"), "rb") as file:
        live = f"slot.{reader.sealed(file.read(), 'ROOT')['slot']}"
    sizes = {n: os.path.getsize(os.path.join(killed, STATE, n)) for n in ("slot.0", "slot.1")}
    sizes.pop(live)
    sizes["progress"] = os.path.getsize(os.path.join(killed, STATE, "progress"))
    return [(name, 8 * size) for name, size in sizes.items()]


class _Bits:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._workspace = ""
        self._killed = os.path.join(scenario.base, "killed")
        self._read: Any = None
        self._exported = ""

    def prepare(self) -> None:
        self._workspace = os.path.join(self._scenario.base, f"work-{os.getpid()}")
        self._scenario.restore(NEXT, self._workspace)
        self._read = self._meaning()
        self._scenario.must(EXPORT, self._workspace)
        self._exported = digest(os.path.join(self._workspace, OUT))
        self._scenario.restore(NEXT, self._workspace)

    def kill(self) -> str:
        """Leave an update half done, its log whole; returns where."""
        step = UPDATES[0]
        last = [
            p for p in points.mutating(self._scenario, [step]) if p.about.startswith("manifest")
        ]
        self._scenario.restore(step, self._killed)
        trace = strace.injecting(last[0].call, "signal=SIGKILL", str(last[0].ordinal))
        self._scenario.run(step, self._killed, *trace)
        return self._killed

    def flip(self, flips: Flips) -> Found:
        """Flip some bits, one after the other."""
        if flips.kind == "read":
            return self._flip_and_read(flips)
        if flips.kind == "resume":
            return self._flip_and_resume(flips)
        return self._flip_and_command(flips)

    # What a small file says

    def _meaning(self, *, skeletons: bool = True) -> Any:
        """Return everything the small files of the state say, as the tool reads them."""
        from ema_cli.states import directory, skeleton, store

        place = os.path.join(self._workspace, STATE)
        directory.check_format(place, create=False)
        state = store.State(place)
        state.load()
        current = state.current
        if current is None or not skeletons or current.manifest.skeleton is None:
            return current, None
        index = skeleton.read(current.manifest.skeleton, state.skeleton_directory()).index
        return current, (index.tensors, index.metadata)

    def _flip_and_read(self, flips: Flips) -> Found:
        from ema_cli.errors import EmaError

        path = os.path.join(self._workspace, STATE, flips.name)
        tags = []
        inside = "/" in flips.name
        expected = self._read if inside else (self._read[0], None)
        with open(path, "r+b", buffering=0) as file:
            for bit in range(flips.first, flips.first + flips.count):
                before = _flip(file, bit)
                try:
                    same = self._meaning(skeletons=inside) == expected
                    tags += ["read", "harmless" if same else "wrong"]
                except EmaError as error:
                    tags += ["read", "noticed" if error.exit_code in REFUSED else "wrong"]
                finally:
                    _put_back(file, bit, before)
                if tags[-1] == "wrong":
                    name = Flips("read", flips.name, bit, 1).label
                    return Found(
                        flips.label, f"{name} silently wrong, or another error", tuple(tags)
                    )
        return Found(flips.label, "", tuple(tags))

    # What the commands make of it

    def _flip_and_command(self, flips: Flips) -> Found:
        rng = random.Random(f"{flips.label}")
        step: Step = rng.choice((EXPORT, NEXT))
        self._scenario.restore(NEXT, self._workspace)
        with open(os.path.join(self._workspace, STATE, flips.name), "r+b", buffering=0) as file:
            _flip(file, flips.first)
        ended = self._scenario.run(step, self._workspace)
        kind = ("slot",) if flips.name.startswith("slot.") else ("command",)
        try:
            checker.check_error(ended, {0, *REFUSED})
            if ended.code == 0:
                self._check_same(step)
        except Wrong as error:
            return Found(flips.label, f"{step.name}: {error}", (*kind, "wrong"))
        finally:
            self._scenario.restore(NEXT, self._workspace)
        return Found(flips.label, "", (*kind, "noticed" if ended.code else "harmless"))

    def _check_same(self, step: Step) -> None:
        if step is EXPORT:
            if digest(os.path.join(self._workspace, OUT)) != self._exported:
                raise Wrong("exit 0, and other bytes")
        elif checker.consumed(self._scenario, os.path.join(self._workspace, STATE)) != NEXT.after:
            raise Wrong("exit 0, and nothing was mixed in")

    def _flip_and_resume(self, flips: Flips) -> Found:
        self._scenario.restore(NEXT, self._workspace)  # whatever was there
        self._scenario.restore_from(self._killed, self._workspace)
        with open(os.path.join(self._workspace, STATE, flips.name), "r+b", buffering=0) as file:
            _flip(file, flips.first)
        try:
            checker.check_rerun(self._scenario, UPDATES[0], self._workspace)
        except Wrong as error:
            return Found(flips.label, str(error), ("progress", "wrong"))
        finally:
            self._scenario.restore(NEXT, self._workspace)
        return Found(flips.label, "", ("progress", "harmless"))


def _flip(file: Any, bit: int) -> bytes:
    """Flip a bit of a file; returns the byte as it was."""
    before: bytes = os.pread(file.fileno(), 1, bit // 8)
    os.pwrite(file.fileno(), bytes([before[0] ^ 1 << bit % 8]), bit // 8)
    return before


def _put_back(file: Any, bit: int, before: bytes) -> None:
    os.pwrite(file.fileno(), before, bit // 8)
