"""Carries out a plan, unless its outputs are there already, and tells what was done."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ema_cli import durable, hints, provenance, record
from ema_cli import plan as planning
from ema_cli.announcing import announce
from ema_cli.destination import check_destination, repair
from ema_cli.distances import Distances
from ema_cli.engine import about
from ema_cli.errors import InputError, UsageError
from ema_cli.output import forget, is_interrupted
from ema_cli.plan import Outcome, Plan
from ema_cli.producing import Document, produce
from ema_cli.producing import OnEvent as OnEvent
from ema_cli.runs import Run
from ema_cli.search import PassedOver
from ema_cli.tensors import Stamp
from ema_cli.text import checkpoints, shorten
from ema_cli.warnings import PlanWarning, warnings

if TYPE_CHECKING:
    from ema_cli.judging import Judge, Suspect


@dataclass(frozen=True, slots=True)
class Written:
    """One output of a run.

    Attributes:
        path: where it is.
        status: ``written``, or ``unchanged`` when an equal output was there already.
        nbytes: its size.
    """

    path: str
    status: str
    nbytes: int


@dataclass(frozen=True, eq=False)
class RunResult:
    """What `average_run` did.

    Attributes:
        plan: what was carried out.
        outputs: one per average, in order.
        warnings: those of the plan, then one for each outlier.
        read: bytes of tensor data read.
        seconds: wall clock time, planning included.
        notes: what could not be promised, e.g. reserved space.
        distances: of the checkpoints from each average, with ``stats``.
        outliers: the checkpoints that do not seem to belong; each is warned of, too.
    """

    plan: Plan
    outputs: tuple[Written, ...]
    warnings: tuple[PlanWarning, ...]
    read: int
    seconds: float
    notes: tuple[str, ...] = ()
    distances: tuple[Distances, ...] = ()
    outliers: tuple[Suspect, ...] = ()

    @property
    def unusable(self) -> tuple[PassedOver, ...]:
        """Entries that look like checkpoints and could not be used (exit code 3)."""
        return unusable(self.plan.run)


def unusable(run: Run) -> tuple[PassedOver, ...]:
    """Return the entries of a run that look like checkpoints and could not be used."""
    return tuple(entry for entry in run.passed_over if entry.unusable)


def run_plan(
    plan: Plan,
    *,
    overwrite: bool = False,
    restart: bool | None = None,
    stats: bool = False,
    outliers: str | None = None,
    strict: bool = False,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Carry out a plan made by `plan_run`; see `average_run`.

    `restart` is None where nobody can ask for it; `strict` makes errors of outliers.
    """
    started = time.monotonic()
    if plan.request.output is None:
        raise UsageError("no output: expected -o OUT", hints.OUTPUT)
    found = tuple(warnings(plan))
    documents = [_document(plan, outcome) for outcome in plan.outcomes]
    keep = is_interrupted(plan.outcomes[0].layout)
    for outcome in plan.outcomes:
        repair(outcome.layout, keep=keep)
        provenance.recover(outcome.layout.path)
    same = [
        not overwrite and _unchanged(outcome.layout.path, digest)
        for outcome, (_, digest) in zip(plan.outcomes, documents, strict=True)
    ]
    stale = ""
    if keep and same[0]:
        forget(plan.outcomes[0].layout)
        stale = "some of the outputs were published"
    judge = _judge(plan, stats, outliers, strict)
    if judge is not None:
        judge.look_up([o for o, done in zip(plan.outcomes, same, strict=True) if done])
        judge.check()
    notes: list[str] = []
    read = 0 if all(same) else plan.costs.read
    if any(same) and not all(same):
        averages = [o.average for o, done in zip(plan.outcomes, same, strict=True) if not done]
        rest = planning.make(dataclasses.replace(plan.request, averages=tuple(averages)))
        documents = [_document(rest, outcome) for outcome in rest.outcomes]
        read = rest.costs.read
        notes = _write(rest, documents, overwrite, restart, executor, on_event, stale, judge)
    elif not all(same):
        notes = _write(plan, documents, overwrite, restart, executor, on_event, judge=judge)
    for outcome, done in zip(plan.outcomes, same, strict=True):
        if done:  # also by a process that was killed before it said so, or made its name durable
            durable.sync_directory(os.path.dirname(outcome.layout.path.rstrip("/")))
            notes.extend(announce(outcome.layout, written=False))
    outputs = tuple(
        Written(o.layout.path, "unchanged" if done else "written", o.layout.nbytes)
        for o, done in zip(plan.outcomes, same, strict=True)
    )
    result = RunResult(plan, outputs, found, read, 0.0, tuple(notes))
    if judge is not None:
        result = _judged(result, judge)
    return dataclasses.replace(result, seconds=time.monotonic() - started)


def _judge(plan: Plan, stats: bool, outliers: str | None, strict: bool) -> Judge | None:
    """Return who tells of the checkpoints' distances, if anybody asked for them."""
    if not stats and outliers is None:
        return None
    from ema_cli import judging

    if outliers not in (None, *judging.CHOICES):
        words = " or ".join(judging.CHOICES)
        raise UsageError(
            f"outliers: expected {words}, found '{shorten(str(outliers))}'", "leave out outliers"
        )
    return judging.Judge(plan, refuse=strict or outliers == "error")


def _judged(result: RunResult, judge: Judge) -> RunResult:
    """Return a result with the distances and outliers that are known now."""
    outcomes = result.plan.outcomes
    known = [judge.distances.get(outcome.layout.path) for outcome in outcomes]
    return dataclasses.replace(
        result,
        warnings=(*result.warnings, *judge.warnings(again=True)),
        notes=(*result.notes, *judge.notes),
        distances=tuple(one for one in known if one is not None),
        outliers=tuple(judge.suspects()),
    )


def _unchanged(path: str, digest: str) -> bool:
    """Whether an equal plan made this output and not a byte of it has changed since."""
    document = provenance.load(path)
    return (
        document is not None
        and document.get("plan") == digest
        and provenance.proves(document, path)
    )


def all_inputs(plan: Plan) -> list[Stamp]:
    """Return every file of the run, of checkpoints that are not used too."""
    known = (*plan.run.checkpoints, *plan.run.unchosen)
    stamps = (stamp for checkpoint in known for stamp in checkpoint.files)
    return list(dict.fromkeys((*plan.work.inputs, *stamps)))


def _document(plan: Plan, outcome: Outcome) -> Document:
    document = record.describe(plan, outcome)
    return document, record.plan_digest(document, outcome)


def refuse_measuring(*, stats: bool, outliers: str | None) -> None:
    """Raise `UsageError` where distances are asked for that cannot be measured: with a state."""
    if stats or outliers is not None:
        given = "--stats" if outliers is None else "--outliers"
        raise UsageError(
            f"{given} and --state: a state keeps no distances of what it has averaged",
            "measure with a run of its own, without --state",
        )


def refuse_warnings(found: Sequence[PlanWarning], run: Run) -> None:
    """Raise the first warning or unusable entry as an error, as ``strict`` asks."""
    for warning in found:
        raise UsageError(f"--strict: {warning.code}: {warning.message}", warning.hint)
    for entry in unusable(run):
        raise InputError(
            f"--strict: {shorten(entry.path, 1000)}: {entry.reason}",
            "leave it out with --glob, or leave out --strict",
        )


def _write(
    plan: Plan,
    documents: Sequence[Document],
    overwrite: bool,
    restart: bool | None,
    executor: Executor | None,
    on_event: OnEvent | None,
    stale: str = "",
    judge: Judge | None = None,
) -> list[str]:
    """Compute and publish all outputs of a plan; returns notes.

    `stale` is why an interrupted run of a plan with more outputs is not continued.
    """
    layouts = [outcome.layout for outcome in plan.outcomes]
    if len({layout.path.rstrip("/") for layout in layouts}) < len(layouts):
        raise UsageError(
            f"-o {shorten(layouts[0].path)}: two averages have the same output",
            "put {average} into it, which becomes the label of each",
        )
    inputs = all_inputs(plan)
    for layout in layouts:
        check_destination(layout, inputs, overwrite=overwrite)
    what = checkpoints([checkpoint.step for checkpoint in plan.run.checkpoints])
    if judge is not None:
        plan = planning.measured(plan)
    return produce(
        plan.work,
        layouts,
        documents,
        executor,
        about(what, on_event),
        overwrite=overwrite,
        resumable=True,
        restart=restart,
        stale=stale,
        judge=None if judge is None else functools.partial(judge.judge, plan),
    )
