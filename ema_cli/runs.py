"""The checkpoints of a run: found or named, in order of their steps, and chosen among."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ema_cli import formats
from ema_cli.errors import Disagreement, InputError, NothingToAverage, UsageError
from ema_cli.formats import Known, folders, tensorflow
from ema_cli.hints import near_glob, near_path
from ema_cli.search import (
    NUMBERED_FOLDER,
    UNMATCHED,
    Choice,
    PassedOver,
    is_prefix,
    search,
    with_step,
)
from ema_cli.states.directory import is_state
from ema_cli.steps import step_from_name
from ema_cli.tensors import Checkpoint
from ema_cli.text import command, plural, shorten

ORDERS = ("step", "given")


@dataclass(frozen=True, slots=True)
class Run:
    """The successive checkpoints of one training, in order, every step known and distinct.

    Attributes:
        checkpoints: in the order in which they are averaged.
        passed_over: entries that were not taken, with reasons.
        notes: what was odd.
        searched: whether they were found in a directory rather than named one by one.
        unchosen: the checkpoints that the selection left out.
        counted: whether nothing tells their steps, so that they were numbered as given.
    """

    checkpoints: tuple[Checkpoint, ...]
    passed_over: tuple[PassedOver, ...] = ()
    notes: tuple[str, ...] = ()
    searched: bool = False
    unchosen: tuple[Checkpoint, ...] = ()
    counted: bool = False

    @property
    def steps(self) -> list[int]:
        """The step of each checkpoint."""
        return [checkpoint.step or 0 for checkpoint in self.checkpoints]


def find(paths: Sequence[str], choice: Choice, known: Known | None = None) -> Run:
    """Return the run in a directory, or the one made of several checkpoints.

    Raises `InputError` for a checkpoint that was named and cannot be used, `Disagreement` for
    steps that are missing or equal, `NothingToAverage` when nothing is left.
    """
    if choice.last is not None and choice.last < 1:
        raise UsageError(f"--last: expected at least 1, found {choice.last}", "leave out --last")
    known = {} if known is None else known
    searching = len(paths) == 1 and os.path.isdir(paths[0]) and is_run(paths[0], choice)
    if searching and choice.order == "given":
        raise UsageError(
            "--order given: the checkpoints of a directory have no given order",
            "name the checkpoints in their order, or leave out --order",
        )
    if not searching and choice.glob is not None:
        raise UsageError(
            "--glob chooses entries of one directory; name that directory alone",
            "leave out --glob when every checkpoint is named",
        )
    for path in paths:
        if not os.path.lexists(path) and tensorflow.prefix_of(path) is None:
            raise InputError(f"{shorten(path, 1000)}: no such file or directory", near_path(path))
        if is_state(path):
            raise InputError(
                f"{shorten(path, 1000)}: expected a run, found a state",
                f"write what it holds with {command('ema-avg', 'export', path, '-o', 'OUT')}",
            )
    found = _searched(paths[0], choice, known) if searching else _named(paths, choice, known)
    found = _filtered(_ordered(found, choice, explicit=not found.searched), choice)
    if not found.checkpoints:
        raise _nothing(paths, found, choice)
    return found


def find_one(path: str, key: str | None = None) -> Checkpoint:
    """Return the checkpoint at `path` with its step, if anything tells one; `key` as of a run."""
    return with_step(formats.read(path, {}, key or ""), Choice())


def is_run(path: str, choice: Choice) -> bool:
    """Whether a directory holds checkpoints rather than being one itself."""
    if choice.glob is not None:
        return True
    if tensorflow.saved_model_in(path) is not None:
        return False
    if is_prefix(path) and not os.listdir(path):
        return False  # a checkpoint, beside an empty directory of its name
    weights = folders.weights_in(path)
    alone = len(weights) == 1 and step_from_name(weights[0]) is not None
    if not folders.is_checkpoint(path) or alone:
        return True
    with os.scandir(path) as entries:
        numbered = [e.path for e in entries if e.is_dir() and NUMBERED_FOLDER.search(e.name)]
    return any(folders.is_checkpoint(folder) for folder in numbered)


def _nothing(paths: Sequence[str], run: Run, choice: Choice) -> NothingToAverage:
    where = ", ".join(shorten(path, 1000) for path in paths[:3])
    passed_over = run.passed_over
    if run.unchosen and choice.steps is not None:
        steps = [checkpoint.step or 0 for checkpoint in run.unchosen]
        first, last = min(steps), max(steps)
        return NothingToAverage(
            f"{where}: --steps takes none of {plural(len(steps), 'checkpoint')}, which have the "
            f"steps {first:,} to {last:,}",
            f"all of them: --steps {first}:{last}; the last 5: --last 5",
        )
    if choice.glob is not None and all(p.reason == UNMATCHED for p in passed_over):
        names = [os.path.basename(p.path) for p in passed_over]
        return NothingToAverage(
            f"{where}: --glob '{shorten(choice.glob)}' matches none of {len(names):,} entries",
            near_glob(choice.glob, names, f"see them with {command('ema-avg', 'inspect', *paths)}"),
        )
    reasons = [f"{shorten(p.path, 1000)}: {p.reason}" for p in passed_over[:5]]
    if len(passed_over) > 5:
        reasons.append(f"and {len(passed_over) - 5:,} more")
    return NothingToAverage(
        f"{where}: no usable checkpoint" + (f" ({'; '.join(reasons)})" if reasons else ""),
        f"look at the directory with {command('ema-avg', 'inspect', *paths[:1])}",
    )


def _searched(root: str, choice: Choice, known: Known) -> Run:
    checkpoints, passed_over = search(root, choice, known)
    return Run(tuple(checkpoints), tuple(passed_over), searched=True)


def _named(paths: Sequence[str], choice: Choice, known: Known) -> Run:
    checkpoints = [with_step(formats.read(path, known, choice.key or ""), choice) for path in paths]
    if all(checkpoint.step is None for checkpoint in checkpoints):
        note = "no steps found: the given order counts, one step each"
        numbered = [dataclasses.replace(c, step=k) for k, c in enumerate(checkpoints, start=1)]
        notes = (note,) if len(numbered) > 1 else ()
        return Run(tuple(numbered), notes=notes, counted=True)
    return Run(tuple(checkpoints))


# ---------------------------------------------------------------------------- order and selection


def _ordered(run: Run, choice: Choice, *, explicit: bool) -> Run:
    _check_steps(run.checkpoints)
    notes = [*run.notes, *(note for checkpoint in run.checkpoints for note in checkpoint.notes)]
    checkpoints = run.checkpoints
    if choice.order == "step":
        checkpoints = tuple(sorted(checkpoints, key=lambda c: c.step or 0))
        if explicit and checkpoints != run.checkpoints:
            notes.append("sorted by step, which is not the given order (--order given keeps it)")
    return dataclasses.replace(run, checkpoints=checkpoints, notes=tuple(dict.fromkeys(notes)))


def _check_steps(checkpoints: Sequence[Checkpoint]) -> None:
    by_step: dict[int, Checkpoint] = {}
    for checkpoint in checkpoints:
        shown = shorten(checkpoint.path, 1000)
        if checkpoint.step is None:
            raise Disagreement(
                f"{shown}: no step: none is stored inside and its name tells none",
                "give --step-from 'REGEX' whose first group is the step, or leave the file out "
                "with --glob",
            )
        other = by_step.setdefault(checkpoint.step, checkpoint)
        if other is not checkpoint:
            raise Disagreement(
                f"step {checkpoint.step:,} twice: {shorten(other.path, 1000)} and {shown}",
                "choose one of them with --glob",
            )


def _filtered(run: Run, choice: Choice) -> Run:
    """Apply ``--steps`` (both ends included, every C-th from A) and then ``--last``."""
    kept = list(run.checkpoints)
    dropped: list[PassedOver] = []
    unchosen: list[Checkpoint] = []

    def keep(test: Callable[[Checkpoint], bool], reason: str) -> None:
        dropped.extend(PassedOver(c.path, reason) for c in kept if not test(c))
        unchosen.extend(c for c in kept if not test(c))
        kept[:] = [c for c in kept if test(c)]

    if choice.steps is not None:
        start, stop, stride = choice.steps
        low = start or 0

        def inside(checkpoint: Checkpoint) -> bool:
            step = checkpoint.step or 0
            in_range = low <= step and (stop is None or step <= stop)
            return in_range and (step - low) % (stride or 1) == 0

        keep(inside, "outside --steps")
    if choice.last is not None:
        newest = {id(c) for c in kept[-choice.last :]}
        keep(lambda c: id(c) in newest, f"older than the last {choice.last}")
    return dataclasses.replace(
        run,
        checkpoints=tuple(kept),
        passed_over=(*run.passed_over, *dropped),
        unchosen=tuple(unchosen),
    )
