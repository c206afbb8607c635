"""Carries out a plan, unless its outputs are there already, and tells what was done."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from ema_cli import durable, provenance, record
from ema_cli import plan as planning
from ema_cli.announcing import announce
from ema_cli.destination import check_destination, repair
from ema_cli.errors import InputError, UsageError
from ema_cli.output import forget, is_interrupted
from ema_cli.plan import Outcome, Plan
from ema_cli.producing import Document, produce
from ema_cli.producing import OnEvent as OnEvent
from ema_cli.runs import Run
from ema_cli.search import PassedOver
from ema_cli.tensors import Stamp
from ema_cli.text import shorten
from ema_cli.warnings import PlanWarning, warnings


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
        warnings: those of the plan.
        read: bytes of tensor data read.
        seconds: wall clock time, planning included.
        notes: what could not be promised, e.g. reserved space.
    """

    plan: Plan
    outputs: tuple[Written, ...]
    warnings: tuple[PlanWarning, ...]
    read: int
    seconds: float
    notes: tuple[str, ...] = ()

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
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Carry out a plan made by `plan_run`; see `average_run`.

    `restart` is None where nobody can ask for it.
    """
    started = time.monotonic()
    if plan.request.output is None:
        raise UsageError("no output: expected -o OUT")
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
    notes: list[str] = []
    read = 0 if all(same) else plan.costs.read
    if any(same) and not all(same):
        averages = [o.average for o, done in zip(plan.outcomes, same, strict=True) if not done]
        rest = planning.make(dataclasses.replace(plan.request, averages=tuple(averages)))
        documents = [_document(rest, outcome) for outcome in rest.outcomes]
        read = rest.costs.read
        notes = _write(rest, documents, overwrite, restart, executor, on_event, stale)
    elif not all(same):
        notes = _write(plan, documents, overwrite, restart, executor, on_event)
    for outcome, done in zip(plan.outcomes, same, strict=True):
        if done:  # also by a process that was killed before it said so, or made its name durable
            durable.sync_directory(os.path.dirname(outcome.layout.path.rstrip("/")))
            notes.extend(announce(outcome.layout, written=False))
    outputs = tuple(
        Written(o.layout.path, "unchanged" if done else "written", o.layout.nbytes)
        for o, done in zip(plan.outcomes, same, strict=True)
    )
    seconds = time.monotonic() - started
    return RunResult(plan, outputs, found, read, seconds, tuple(notes))


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


def refuse_warnings(found: Sequence[PlanWarning], run: Run) -> None:
    """Raise the first warning or unusable entry as an error, as ``strict`` asks."""
    for warning in found:
        raise UsageError(f"--strict: {warning.code}: {warning.message}", warning.hint)
    for entry in unusable(run):
        raise InputError(f"--strict: {shorten(entry.path, 1000)}: {entry.reason}")


def _write(
    plan: Plan,
    documents: Sequence[Document],
    overwrite: bool,
    restart: bool | None,
    executor: Executor | None,
    on_event: OnEvent | None,
    stale: str = "",
) -> list[str]:
    """Compute and publish all outputs of a plan; returns notes.

    `stale` is why an interrupted run of a plan with more outputs is not continued.
    """
    layouts = [outcome.layout for outcome in plan.outcomes]
    if len({layout.path.rstrip("/") for layout in layouts}) < len(layouts):
        raise UsageError(f"-o {shorten(layouts[0].path)}: two averages have the same output")
    inputs = all_inputs(plan)
    for layout in layouts:
        check_destination(layout, inputs, overwrite=overwrite)
    return produce(
        plan.work,
        layouts,
        documents,
        executor,
        on_event,
        overwrite=overwrite,
        resumable=True,
        restart=restart,
        stale=stale,
    )
