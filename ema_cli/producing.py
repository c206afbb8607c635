"""From work to published outputs: create or go on, compute, seal, check, publish."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

from ema_cli import engine, files, flaws, machine, provenance, record
from ema_cli.announcing import announce
from ema_cli.blueprint import CHUNK_BYTES, Layout
from ema_cli.checksums import crc32c
from ema_cli.engine import Progress
from ema_cli.executing import executor_of, spilled
from ema_cli.measuring import Measured
from ema_cli.output import Unpublished
from ema_cli.progress import Log
from ema_cli.tasks import Done, Task
from ema_cli.text import plural
from ema_cli.verifying import Verifier
from ema_cli.work import Work

OnEvent = Callable[[Progress], None]
# Provenance as far as the plan knows it, and the digest by which an equal output is recognised.
Document = tuple[dict[str, Any], str]
Judge = Callable[[Measured], Sequence[dict[str, Any]]]

# Seconds that a signal waits for the last finished tasks to be recorded.
PATIENCE = 5.0
CONTINUES, RESTARTS = "the same command continues", "--restart starts over"
NOTHING_RECORDED = "the interrupted run had recorded nothing"


def produce(
    work: Work,
    layouts: Sequence[Layout],
    documents: Sequence[Document],
    executor: Executor | None,
    on_event: OnEvent | None = None,
    *,
    overwrite: bool,
    resumable: bool = False,
    restart: bool | None = None,
    stale: str = "",
    judge: Judge | None = None,
) -> list[str]:
    """Carry out work and publish its outputs; returns what could not be promised.

    Args:
        work: what to compute.
        layouts: of the outputs, in the order of its targets.
        documents: their provenance without what only the finished output knows, and plan digests.
        executor: given, or None for threads.
        on_event: told of progress.
        overwrite: replace existing outputs.
        resumable: continue what a killed process left of this very work, and leave what is done
            to another process when a signal ends this one.
        restart: continue nothing; None where nobody can ask for that.
        stale: why a killed process' work is not continued, where its log does not tell.
        judge: told what was measured before anything is published; returns what the provenance of
            each output says of it.
    """
    tell = on_event or _ignore
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(executor_of(executor, work.manner.workers))
        made = [stack.enter_context(Unpublished(layout, overwrite=overwrite)) for layout in layouts]
        paths = [path for one in made for path in one.paths]
        log: Log | None = None
        if resumable:
            log = Log(made[0].log, _key(work, layouts, documents), paths)
            if not restart:
                log.resume()
        try:
            work = stack.enter_context(spilled(work, layouts[0].path))
            why = "--restart" if restart else stale
            note = _open(made, log, engine.tasks(work, paths), why)
            if note:
                tell(Progress(0, work.read, note))
            notes = _fill(work, made, documents, pool, tell, log, judge)
        except BaseException as error:
            keep = left_to_another(error, log, restart)
            for one in made:
                one.kept = keep
            raise
        return notes + [note for layout in layouts for note in announce(layout)]


def _open(made: Sequence[Unpublished], log: Log | None, tasks: Iterable[Task], why: str) -> str:
    """Begin the outputs, or go on with what a killed process left; returns which, to be told.

    `why` is the reason to begin anew if one was given.
    """
    if log is not None and log.done:
        for one in made:
            one.go_on()
        count = log.check(tasks)
        if log.done:
            return f"resuming: {len(log.done):,} of {plural(count, 'range')} done"
    for one in made:
        one.begin()
    if log is None or not any(one.left for one in made):
        return ""
    return f"starting over: {why or log.stale or NOTHING_RECORDED}"


def _fill(
    work: Work,
    made: Sequence[Unpublished],
    documents: Sequence[Document],
    pool: Executor,
    tell: OnEvent,
    log: Log | None,
    judge: Judge | None = None,
) -> list[str]:
    """Compute, seal and publish the outputs; returns what could not be promised."""
    verifier, measured = Verifier(work), Measured()

    def verified(done: Done) -> None:
        measured.add(done.measured)
        for unit, part in done.parts.items():
            verifier.add(unit, part)

    paths = [path for one in made for path in one.paths]
    flaw = engine.carry_out(work, paths, pool, tell, verified, log)
    if flaw is not None:
        raise flaws.explain(work, flaw)
    verifier.finish()
    told = judge(measured) if judge is not None else [{} for _ in made]
    sealed_files = [one.seal(pool) for one in made]
    files.check_all_unchanged(work.inputs)
    if log is not None:
        log.close()
    for one, finished, (document, digest), more in zip(
        made, sealed_files, documents, told, strict=True
    ):
        sealed = record.sealed({**document, **more}, digest, one.fingerprint(), finished)
        one.publish(sealed)
    if log is not None:
        log.remove()
    return [note for one in made for note in one.notes]


def _key(work: Work, layouts: Sequence[Layout], documents: Sequence[Document]) -> str:
    """Return the digest of what decides the bytes of the outputs, and which task writes which."""
    described = [
        [layout.format, layout.kind, file.name, file.nbytes]
        + [[offset, crc32c(data)] for offset, data in file.literals]
        for layout in layouts
        for file in layout.files
    ]
    versions = machine.versions()
    return provenance.digest_of(
        {
            "versions": [versions[name] for name in ("ema-avg", "python", "numpy")],
            "cuts": [engine.TASK_ELEMENTS, CHUNK_BYTES],
            "plans": [digest for _, digest in documents],
            "inputs": [stamp[1:] for stamp in work.inputs],
            "files": described,
            "groups": work.groups,
        }
    )


def left_to_another(error: BaseException, log: Log | None, restart: bool | None) -> bool:
    """Return whether what is done is kept: a signal ended this process, and something is logged."""
    if log is None:
        return False
    signal: BaseException | None = error
    while isinstance(signal, Exception):  # raised while a signal unwound
        signal = signal.__context__
    if signal is not None:
        with contextlib.suppress(BaseException):  # a second signal, too: the first one is told
            log.close(PATIENCE)
        if log.recorded:
            signal.add_note(CONTINUES if restart is None else f"{CONTINUES}; {RESTARTS}")
            return True
    log.remove()
    return False


def _ignore(event: Progress) -> None:
    del event
