"""From a plan to published outputs: create, compute, seal, check, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ema_cli import durable, engine, files, flaws, provenance, record, spilling
from ema_cli import plan as planning
from ema_cli.announcing import announce
from ema_cli.blueprint import Layout
from ema_cli.destination import check_destination, repair
from ema_cli.engine import Progress
from ema_cli.errors import InputError, UsageError, storage_errors
from ema_cli.output import Unpublished
from ema_cli.plan import Outcome, Plan
from ema_cli.runs import Run
from ema_cli.search import PassedOver
from ema_cli.tensors import Stamp
from ema_cli.text import shorten
from ema_cli.verifying import Verifier
from ema_cli.warnings import PlanWarning, warnings
from ema_cli.work import Work

OnEvent = Callable[[Progress], None]
# Provenance as far as the plan knows it, and the digest by which an equal output is recognised.
Document = tuple[dict[str, Any], str]


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
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Carry out a plan made by `plan_run`; see `average_run`."""
    started = time.monotonic()
    if plan.request.output is None:
        raise UsageError("no output: expected -o OUT")
    found = tuple(warnings(plan))
    documents = [_document(plan, outcome) for outcome in plan.outcomes]
    for outcome in plan.outcomes:
        repair(outcome.layout)
        provenance.recover(outcome.layout.path)
    same = [
        not overwrite and _unchanged(outcome.layout.path, digest)
        for outcome, (_, digest) in zip(plan.outcomes, documents, strict=True)
    ]
    notes: list[str] = []
    read = 0 if all(same) else plan.costs.read
    if any(same) and not all(same):
        averages = [o.average for o, done in zip(plan.outcomes, same, strict=True) if not done]
        rest = planning.make(dataclasses.replace(plan.request, averages=tuple(averages)))
        documents = [_document(rest, outcome) for outcome in rest.outcomes]
        read = rest.costs.read
        notes = _write(rest, documents, overwrite, executor, on_event)
    elif not all(same):
        notes = _write(plan, documents, overwrite, executor, on_event)
    for outcome, done in zip(plan.outcomes, same, strict=True):
        if done:  # also by a process that was killed before it said so
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


def _ignore(event: Progress) -> None:
    del event


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
    executor: Executor | None,
    on_event: OnEvent | None,
) -> list[str]:
    """Compute and publish all outputs of a plan; returns notes."""
    layouts = [outcome.layout for outcome in plan.outcomes]
    if len({layout.path.rstrip("/") for layout in layouts}) < len(layouts):
        raise UsageError(f"-o {shorten(layouts[0].path)}: two averages have the same output")
    inputs = all_inputs(plan)
    for layout in layouts:
        check_destination(layout, inputs, overwrite=overwrite)
    return produce(plan.work, layouts, documents, executor, on_event, overwrite=overwrite)


def produce(
    work: Work,
    layouts: Sequence[Layout],
    documents: Sequence[Document],
    executor: Executor | None,
    on_event: OnEvent | None = None,
    *,
    overwrite: bool,
) -> list[str]:
    """Carry out work and publish its outputs; returns what could not be promised.

    Args:
        work: what to compute.
        layouts: of the outputs, in the order of its targets.
        documents: their provenance without what only the finished output knows, and plan digests.
        executor: given, or None for threads.
        on_event: told of progress.
        overwrite: replace existing outputs.
    """
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(_executor(executor, work.manner.workers))
        work = stack.enter_context(_spilled(work, layouts))
        made = [stack.enter_context(Unpublished(layout, overwrite=overwrite)) for layout in layouts]
        paths = [path for one in made for path in one.paths]
        verifier = Verifier(work)
        flaw = engine.carry_out(work, paths, pool, on_event or _ignore, verifier.add)
        if flaw is not None:
            raise flaws.explain(work, flaw)
        verifier.finish()
        sealed_files = [one.seal(pool) for one in made]
        files.check_all_unchanged(work.inputs)
        for one, finished, (document, digest) in zip(made, sealed_files, documents, strict=True):
            sealed = record.sealed(document, digest, one.fingerprint(), finished)
            one.publish(sealed)
        notes = [note for one in made for note in one.notes]
        return notes + [note for layout in layouts for note in announce(layout)]


@contextlib.contextmanager
def _spilled(work: Work, layouts: Sequence[Layout]) -> Iterator[Work]:
    """Yield the work with a file for what cannot be read in place, beside the first output."""
    if not work.spill:
        yield work
        return
    root = durable.beside(layouts[0].path.rstrip("/"), durable.SPILL_SUFFIX)
    with storage_errors(os.path.dirname(root) or ".", "cannot create"):
        made = durable.make_directories(os.path.dirname(root) or ".")
    lock = durable.create_locked_directory(root)
    try:
        inputs = list(work.inputs)
        for k, first in enumerate(work.first_input):
            if first >= 0:
                path = os.path.join(root, str(k))
                checkpoint = work.checkpoints[k]
                files = spilling.spill(checkpoint, work.spilled[k], path).files
                inputs[first : first + len(files)] = files
        yield dataclasses.replace(work, inputs=tuple(inputs))
    finally:
        durable.remove(root)
        durable.remove_empty(made)
        os.close(lock)


@contextlib.contextmanager
def _executor(given: Executor | None, workers: int) -> Iterator[Executor]:
    """Yield the executor that was given, or threads that end with the context."""
    if given is not None:
        yield given
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="ema-avg") as pool:
        yield pool
