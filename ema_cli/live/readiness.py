"""Which checkpoints of a run may be read while it goes on: complete, quiet, and in their order.

Complete is what the format's reader accepts. That is no proof: a file may be allocated before it
is filled, and few formats have checksums. So a checkpoint is also left alone until nothing about
its files has changed for a while, by their own times and by ours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ema_cli import runs
from ema_cli.errors import Disagreement, EmaError, InputError, NothingToAverage
from ema_cli.formats import folders, tensorflow
from ema_cli.live.listing import Files, Signature, list_files
from ema_cli.runs import Run
from ema_cli.search import NUMBERED_FOLDER, Choice, PassedOver, search, told_step
from ema_cli.states.directory import is_state
from ema_cli.steps import compile_step_from
from ema_cli.tensors import Checkpoint
from ema_cli.text import shorten

# What is told of a run whose directory is not made yet.
NOT_THERE = "not there yet"
# How long nothing about a checkpoint's files has changed before it is read.
QUIET_SECONDS = 2.0
# How long a damaged one is waited for although newer ones are complete; and how long a run may
# make no sense as a whole, since that passes while files are moved.
GRACE_SECONDS = 30.0
GONE = "rotated away"
NEVER = float("inf")


class Lost(NamedTuple):
    """A checkpoint that will never be averaged: its step, what it is called, and why."""

    step: int
    path: str
    reason: str
    checkpoint: Checkpoint | None = None


class Candidate(NamedTuple):
    """A checkpoint newer than what is averaged, or what may become one.

    Attributes:
        step: of it, by its name where it cannot be read.
        path: of it.
        within: its path within the run.
        checkpoint: None where it cannot be read, or not yet.
        reason: why it cannot be read.
        firm: it looks like a checkpoint; else it only may become one.
    """

    step: int
    path: str
    within: str
    checkpoint: Checkpoint | None
    reason: str = ""
    firm: bool = True


@dataclass(frozen=True)
class Sight:
    """What one look at a run showed.

    Attributes:
        ready: checkpoints to be averaged now, in order.
        lost: those that will never be.
        waiting: why others are not ready, a line each.
        expected: the first step that is still waited for, or None.
        run: what a search found, where one was made.
        soon: seconds until something may be ready that is not.
    """

    ready: tuple[Checkpoint, ...] = ()
    lost: tuple[Lost, ...] = ()
    waiting: tuple[str, ...] = ()
    expected: int | None = None
    run: Run | None = None
    soon: float = NEVER


class Lookout:
    """Looks at the directory of a run again and again.

    Args:
        root: the directory, which may not be there yet.
        choice: which of its checkpoints count.
        state: the directory of the state, which may lie in it.
    """

    def __init__(self, root: str, choice: Choice, state: str) -> None:
        self.run = Run(())
        compile_step_from(choice.step_from)  # refused now, not when a name is met
        self._root, self._choice, self._state = root, choice, state
        self._depth = (choice.glob or "").count("/")
        self._files = Files({})
        self._searched: Mapping[str, Signature] | None = None
        self._quiet = _Quiet()
        self._seen: dict[int, Candidate] = {}
        self._refused: dict[str, tuple[Signature, str]] = {}
        self._over: set[int] = set()  # steps that were told as lost, or are not waited for
        self._trouble: tuple[str, float] = ("", 0.0)

    def look(self, last: int | None) -> Sight:
        """Look at the run; `last` is the newest step that is averaged or lost already."""
        files = list_files(self._root, self._depth, self._state)
        if files is None:
            return Sight(waiting=(f"{shorten(self._root, 1000)}: {NOT_THERE}",))
        found = None
        if self._is_due(files):
            try:
                found = self.run = self._find()
            except (Disagreement, InputError, OSError) as error:
                return self._troubled(error)
            self._trouble = ("", 0.0)
            self._searched = files.entries
        candidates = self._candidates(last)
        self._quiet.see({c.within: files.under(c.within) for c in candidates})
        lost = self._vanished(last, candidates)
        return self._judged(candidates, lost, found)

    def refuse(self, checkpoint: Checkpoint, reason: str) -> None:
        """Count a checkpoint as damaged for as long as its files stay what they are."""
        self._refused[checkpoint.within] = (self._files.under(checkpoint.within), reason)

    def expect(self, seen: Mapping[int, str]) -> None:
        """Miss these steps if they are gone: an earlier watch saw them under these names."""
        for step, name in seen.items():
            path = os.path.join(self._root, name)
            self._seen[step] = Candidate(step, path, name, None)

    def unusable(self, until: int | None) -> tuple[PassedOver, ...]:
        """Return what looks like a checkpoint and could not be used, up to a step."""
        named = [(e, self._pending(e)) for e in self.run.passed_over if e.unusable]
        found = [(entry, c.step if c else None) for entry, c in named]
        for checkpoint in self.run.checkpoints:
            reason = self._refusal(checkpoint)
            if reason:
                found.append((PassedOver(checkpoint.path, reason, True), checkpoint.step))
        return tuple(e for e, step in found if until is None or step is None or step <= until)

    # ------------------------------------------------------------------ searching

    def _is_due(self, files: Files) -> bool:
        """Whether to read headers: something came or went, or has settled since the last time."""
        before, self._files = self._files, files
        if self._searched is None or self._searched.keys() != files.entries.keys():
            return True
        return any(
            signature != self._searched[name] and signature == before.entries.get(name)
            for name, signature in files.entries.items()
        )

    def _find(self) -> Run:
        if not runs.is_run(self._root, self._choice):
            return Run((), notes=(f"{shorten(self._root, 1000)}: is a checkpoint itself, no run",))
        try:
            return runs.find([self._root], self._choice, {})
        except NothingToAverage:
            return Run((), tuple(search(self._root, self._choice, {})[1]), searched=True)

    def _troubled(self, error: Disagreement | InputError | OSError) -> Sight:
        """Wait for a run to make sense again, for a while: its files may just be moved about."""
        text = error.message if isinstance(error, EmaError) else os.strerror(error.errno or 0)
        now = time.monotonic()
        if text != self._trouble[0]:
            self._trouble = (text, now)
        left = GRACE_SECONDS - (now - self._trouble[1])
        if left <= 0:
            raise error
        return Sight(waiting=(text,), expected=0, soon=left)

    # ------------------------------------------------------------------ candidates

    def _candidates(self, last: int | None) -> list[Candidate]:
        """Return what is newer than `last`, in order of steps, each step once."""
        found: dict[int, Candidate] = {}
        for entry in self.run.passed_over:
            candidate = self._pending(entry)
            if candidate is not None:
                found.setdefault(candidate.step, candidate)
        for checkpoint in self.run.checkpoints:
            step = checkpoint.step or 0
            found[step] = self._readable(step, checkpoint)
        newer = (step for step in sorted(found) if last is None or step > last)
        return [found[step] for step in newer if step not in self._over]

    def _readable(self, step: int, checkpoint: Checkpoint) -> Candidate:
        reason = self._refusal(checkpoint)
        found = None if reason else checkpoint
        return Candidate(step, checkpoint.path, checkpoint.within, found, reason)

    def _refusal(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint was refused, unless its files have changed since."""
        signature, reason = self._refused.get(checkpoint.within, ((), ""))
        return reason if signature == self._files.under(checkpoint.within) else ""

    def _pending(self, entry: PassedOver) -> Candidate | None:
        """Return what may become a checkpoint, told by its name; None for anything else."""
        within = os.path.relpath(entry.path, self._root)
        soft = not entry.unusable and _may_come(entry.path)
        if not (entry.unusable or soft):
            return None
        within = tensorflow.stem_of(within) or within
        step = told_step(entry.path, self._root, self._choice)
        if step is None:
            return None
        return Candidate(step, entry.path, within, None, entry.reason, not soft)

    def _vanished(self, last: int | None, candidates: list[Candidate]) -> list[Lost]:
        """Return what an earlier look showed and this one does not: it was never averaged."""
        here = {c.step for c in candidates} | {c.step for c in self.run.unchosen}
        old = [step for step in self._seen if last is not None and step <= last]
        for step in old:
            del self._seen[step]
        gone = [self._seen.pop(step) for step in sorted(self._seen.keys() - here)]
        self._seen.update((c.step, c) for c in candidates if c.firm)
        self._over.update(c.step for c in gone)
        return [Lost(c.step, c.path, GONE, c.checkpoint) for c in gone]

    # ------------------------------------------------------------------ judging

    def _judged(self, candidates: list[Candidate], lost: list[Lost], run: Run | None) -> Sight:
        """Take candidates in their order, up to the first that is worth waiting for."""
        ready: list[Checkpoint] = []
        given_up: list[Candidate] = []
        left = [self._quiet.left(c.within, QUIET_SECONDS) for c in candidates]
        complete = [
            c.step
            for c, seconds in zip(candidates, left, strict=True)
            if c.checkpoint is not None and seconds <= 0
        ]
        for c, seconds in zip(candidates, left, strict=True):
            if c.checkpoint is not None and seconds <= 0:
                ready.append(c.checkpoint)
                continue
            if c.checkpoint is None:
                later = bool(complete) and complete[-1] > c.step
                seconds = self._quiet.left(c.within, GRACE_SECONDS) if later else NEVER
                if seconds <= 0:
                    given_up.append(c)
                    continue
            why = c.reason or "not quiet yet"
            line = f"step {c.step:,}  {shorten(c.path, 1000)}: {why}"
            return Sight(
                tuple(ready), (*lost, *self._lost(given_up)), (line,), c.step, run, seconds
            )
        return Sight(tuple(ready), (*lost, *self._lost(given_up)), run=run)

    def _lost(self, given_up: list[Candidate]) -> list[Lost]:
        for candidate in given_up:
            self._seen.pop(candidate.step, None)
            self._over.add(candidate.step)
        return [Lost(c.step, c.path, c.reason) for c in given_up if c.firm]


def _may_come(path: str) -> bool:
    """Whether what is no checkpoint may become one: a numbered folder, or data without index."""
    name = os.path.basename(path)
    if os.path.isdir(path):
        numbered = NUMBERED_FOLDER.search(name) is not None
        return numbered and not folders.is_checkpoint(path) and not is_state(path)
    stem = tensorflow.stem_of(path)
    data = stem is not None and not name.endswith((tensorflow.SUFFIX, tensorflow.META_SUFFIX))
    return data and not os.path.lexists(f"{stem}{tensorflow.SUFFIX}")


# ---------------------------------------------------------------------------- quiet


class _Quiet:
    """How long the files of each candidate have been what they are."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Signature, float, int]] = {}

    def see(self, found: Mapping[str, Signature]) -> None:
        """Compare with the look before; what is not there any more is forgotten."""
        now = time.monotonic()
        known = {}
        for name, signature in found.items():
            before, since, looks = self._known.get(name, ((), now, 0))
            same = signature == before and bool(signature)
            known[name] = (signature, since, looks + 1) if same else (signature, now, 1)
        self._known = known

    def left(self, name: str, seconds: float) -> float:
        """Return how long to wait until a candidate has been quiet for so long; 0 when it has.

        At least two looks a moment apart must show the same, whatever the times say. One that
        lies in the future is that of another clock: then ours alone counts.
        """
        signature, since, looks = self._known[name]
        if not signature:
            return NEVER
        watched = time.monotonic() - since
        newest = max(time_ns for _, _, time_ns, _ in signature) / 1e9
        age = time.time() - newest
        left = max(QUIET_SECONDS - watched, seconds - (age if age >= 0 else watched))
        return max(left, 0.0) if looks > 1 else max(left, 0.01)
