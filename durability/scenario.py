"""The scenario all faults happen to: a tiny run, a state that follows it, and what must come out.

create (over one checkpoint), three updates, a batch of five with an output, an export; at last one
more checkpoint, to show that whatever happened before, the state goes on as if nothing had.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from durability import process, reader
from durability.process import Ended

CHECKPOINTS = 10
STEP = 100  # between checkpoints
STATE = "state"
DECAY = ("--decay", "0.9")


@dataclass(frozen=True)
class Step:
    """One command of the scenario.

    Attributes:
        name: how it is called.
        argv: the arguments, with ``{stages}`` for where the runs are.
        before: how many checkpoints the state has consumed before it, 0 without a state.
        after: and afterwards.
        output: the file it publishes, if any.
        equals: the number of checkpoints that are in the output.
    """

    name: str
    argv: tuple[str, ...]
    before: int = 0
    after: int = 0
    output: str = ""
    equals: int = 0


def follow(name: str, before: int, after: int, *more: str, output: str = "") -> Step:
    """Return the command that brings a state from `before` to `after` checkpoints."""
    out = ("-o", output) if output else ()
    argv = ("run", f"{{stages}}/{after}", "--state", STATE, *DECAY, *out, *more)
    return Step(name, argv, before, after, output, after if output else 0)


# Without a state: the output's publication, and what a killed run leaves for the next.
ALONE = Step(
    "alone", ("run", "{stages}/9", "-o", "alone.safetensors", *DECAY), 0, 0, "alone.safetensors", 9
)
CREATE = follow("create", 0, 1)
UPDATES = tuple(follow(f"update{n}", n, n + 1) for n in (1, 2, 3))
BATCH = follow("batch", 4, 9, output="batch.safetensors")
EXPORT = Step(
    "export", ("export", STATE, "-o", "export.safetensors"), 9, 9, "export.safetensors", 9
)
# The same as the batch, by a process that pins the checkpoints and stays until it has them all.
WATCH = Step(
    "watch",
    ("watch", "{stages}/9", "--state", STATE, *DECAY, "--interval", "0.001", "--until-step", "900"),
    4,
    9,
)
LAST = follow("last", 9, CHECKPOINTS)
STEPS = (CREATE, *UPDATES, BATCH, EXPORT)


@dataclass
class Reference:
    """What an undisturbed run gives.

    Attributes:
        contents: the digest of every tensor of the state that consumed so many checkpoints.
        outputs: the SHA-256 of an output that holds so many checkpoints.
    """

    contents: dict[int, Mapping[str, str]] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)


class Scenario:
    """The runs on disk, what an undisturbed run gives, and copies of what precedes each step.

    Attributes:
        base: the directory all of it is in.
        stages: the runs: ``stages/N`` holds the first N checkpoints.
        reference: what an undisturbed run gives.
    """

    def __init__(self, base: str, rows: int = 100) -> None:
        self.base = base
        self.stages = os.path.join(base, "stages")
        self.reference = Reference()
        write_run(self.stages, rows)

    def argv(self, step: Step) -> list[str]:
        """Return the arguments of a step."""
        return [word.format(stages=self.stages) for word in step.argv] + (
            ["--workers", "1"] if step.argv[0] in ("run", "export", "watch") else []
        )

    def run(self, step: Step, cwd: str, *trace: str) -> Ended:
        """Carry out a step in the directory `cwd`."""
        return process.run(self.argv(step), cwd, trace=trace)

    def must(self, step: Step, cwd: str) -> Ended:
        """Carry out a step that cannot fail."""
        ended = self.run(step, cwd)
        if ended.code != 0:
            raise RuntimeError(f"{step.name} without any fault: {ended.summary}")
        return ended

    def before(self, step: Step) -> str:
        """Return the directory that holds what precedes a step."""
        return os.path.join(self.base, "before", step.name)

    def prepare(self, *, states: bool = True) -> None:
        """Make the reference, one checkpoint at a time, and the copies before each step."""
        steps = (ALONE, *STEPS, LAST) if states else (ALONE,)
        here = os.path.join(self.base, "rehearsal")
        os.makedirs(here)
        for step in steps:
            process.rehearse(self.argv(step), here)
        if states:
            self._one_by_one()
        here = os.path.join(self.base, "undisturbed")
        os.makedirs(here)
        for step in steps:
            copy_tree(here, self.before(step))
            if step is BATCH:
                self._prepare_watch()
            ended = self.must(step, here)
            self._check_undisturbed(step, here, ended)

    def _prepare_watch(self) -> None:
        copy_tree(self.before(BATCH), self.before(WATCH))
        here = os.path.join(self.base, "rehearsed-watch")
        copy_tree(self.before(BATCH), here)
        process.rehearse(self.argv(WATCH), here)

    def _one_by_one(self) -> None:
        here = os.path.join(self.base, "one-by-one")
        os.makedirs(here)
        for n in range(1, CHECKPOINTS + 1):
            self.must(follow("one", n - 1, n), here)
            self.reference.contents[n] = reader.contents(os.path.join(here, STATE))

    def _check_undisturbed(self, step: Step, here: str, ended: Ended) -> None:
        if step.after > step.before:
            if acknowledged(ended.out) != step.after:
                raise RuntimeError(f"{step.name} acknowledged nothing: {ended.out!r}")
            found = reader.contents(os.path.join(here, STATE))
            if found != self.reference.contents[step.after]:
                raise RuntimeError(f"{step.name}: a batch gives other bits than one by one")
        if step.output:
            found_digest = digest(os.path.join(here, step.output))
            if self.reference.outputs.setdefault(step.equals, found_digest) != found_digest:
                raise RuntimeError(f"{step.name}: another output than before")

    def restore(self, step: Step, into: str) -> None:
        """Make the directory `into` what it was before a step."""
        self.restore_from(self.before(step), into)

    def restore_from(self, source: str, into: str) -> None:
        """Make the directory `into` a copy of another."""
        for entry in os.listdir(into) if os.path.isdir(into) else ():
            path = os.path.join(into, entry)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        copy_tree(source, into)


_APPLIED = re.compile(r"^(?:applied|unchanged) .*\bsteps? (?:[\d,]+ to )?([\d,]+)\b", re.MULTILINE)


def acknowledged(out: str) -> int:
    """Return how many checkpoints a command has said to be in the state; 0 if it said nothing."""
    found = _APPLIED.findall(out)
    return int(found[-1].replace(",", "")) // STEP if found else 0


def write_run(stages: str, rows: int = 100) -> None:
    """Write the checkpoints, and a directory for each number of them; they share the files."""
    files = os.path.join(stages, "all")
    os.makedirs(files)
    for n in range(1, CHECKPOINTS + 1):
        save_file(tensors(n, rows), os.path.join(files, f"model-step={n * STEP}.safetensors"))
    for n in range(1, CHECKPOINTS + 1):
        folder = os.path.join(stages, str(n))
        os.makedirs(folder)
        for k in range(1, n + 1):
            name = f"model-step={k * STEP}.safetensors"
            os.link(os.path.join(files, name), os.path.join(folder, name))


def tensors(n: int, rows: int) -> dict[str, np.ndarray]:
    """Return checkpoint `n`: single and half precision, integers that are copied, a scalar."""
    rng = np.random.default_rng(n)
    half = rng.standard_normal((rows, 120)).astype(ml_dtypes.bfloat16)
    return {
        "block.0.weight": rng.standard_normal((rows, 60)).astype(np.float32),
        "block.1.weight": half,
        "head.bias": rng.standard_normal(301).astype(np.float32),
        "seen": rng.integers(0, 1 << 40, (rows, 30), np.int64),
        "step": np.array(n * STEP, np.int64),
    }


def copy_tree(source: str, target: str) -> None:
    """Copy a directory with the times and modes of its files."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)


def digest(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
