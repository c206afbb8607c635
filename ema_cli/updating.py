"""New checkpoints mixed into the shadows of a state: one pass, one commit.

The slot that counts is read as one more checkpoint, with coefficient 1 before all others, and the
other slot is the output. So a batch is the same work as `ema-avg run`, and rounds as single
updates do, since the accumulators have the dtype of the shadows.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from ema_cli import durable, engine, files, flaws, provenance
from ema_cli.blueprint import CHUNK_BYTES
from ema_cli.engine import Progress
from ema_cli.errors import Disagreement, EmaError, StorageError
from ema_cli.executing import executor_of, spilled
from ema_cli.formats.sidefiles import refuse_quantized
from ema_cli.invocation import setting_words
from ema_cli.layout import is_whole
from ema_cli.plan import Request
from ema_cli.producing import left_to_another
from ema_cli.progress import Log
from ema_cli.ranges import Destination
from ema_cli.runs import Run
from ema_cli.schedules import Schedule, drop_overwritten, schedule
from ema_cli.search import PassedOver, told_step
from ema_cli.selection import Selection, check_agreement, check_rules_of, select
from ema_cli.states import directory, holding, locks, skeleton, slots
from ema_cli.states.binding import RUN, Binding, difference
from ema_cli.states.commit import ClaimedSlot, OpenState, checksums_of
from ema_cli.states.records import AVERAGE, BIASED, Manifest, Row, files_of, row_of
from ema_cli.states.slots import Slot
from ema_cli.states.store import State
from ema_cli.tasks import Done
from ema_cli.tensors import Checkpoint
from ema_cli.text import checkpoints, plural, shorten
from ema_cli.verifying import Verifier
from ema_cli.work import Work, prepare

OnEvent = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class Update:
    """What an update will do, decided before it does anything.

    Attributes:
        request: with the averages.
        run: what was found, in order.
        new: the checkpoints that are not averaged yet.
        schedules: for each average, its coefficients over all checkpoints, the new ones last.
        binding: what the state is bound to.
        holding: what the slot holds.
        selection: of the last checkpoint.
        complete: whether optimizer state is held too.
        missed: entries that cannot be used, of steps before the last new one.
        told: the new checkpoints as the user calls them, where they are read from elsewhere.
    """

    request: Request
    run: Run
    new: tuple[Checkpoint, ...]
    schedules: tuple[Schedule, ...]
    binding: Binding
    holding: holding.Holding
    selection: Selection
    complete: bool
    missed: tuple[tuple[int, PassedOver], ...] = ()
    told: tuple[Checkpoint, ...] = ()

    def coefficients(self, average: int) -> tuple[float, ...]:
        """Return what an average mixes the new checkpoints in with."""
        return self.schedules[average].coefficients[-len(self.new) :]


@dataclass(frozen=True, eq=False)
class News:
    """The checkpoints of a run as a state sees them: new, or not newer than its last one.

    Of the `late` ones, each with its step, those after the state's first one count as unusable.
    """

    new: tuple[Checkpoint, ...]
    late: tuple[tuple[int, PassedOver], ...]
    notes: tuple[str, ...]


def news(state: State, run: Run) -> News:
    """Return which checkpoints of a run are newer than the last one in the ledger."""
    rows = {row.step: row for row in state.current.rows} if state.current else {}
    steps = [step for step in rows if step is not None]
    first, last = min(steps, default=0), max(steps, default=None)
    new = [c for c in run.checkpoints if last is None or (c.step or 0) > last]
    late, notes = [], []
    for checkpoint in run.checkpoints:
        row = rows.get(checkpoint.step)
        if last is None or (checkpoint.step or 0) > last:
            continue
        if row is None or row.missed:
            reason = f"not newer than step {last:,}, the last one in the state"
            reason += f"; missed then: {row.missed}" if row else ""
            step = checkpoint.step or 0
            late.append((step, PassedOver(checkpoint.path, reason, unusable=step > first)))
        elif _named(row.files) != _named(files_of(checkpoint)):
            notes.append(
                f"{shorten(checkpoint.path, 1000)}: step {checkpoint.step:,} is averaged already, "
                "but was another file then: has the training begun anew?"
            )
    return News(tuple(new), tuple(late), tuple(notes))


def missed(
    state: State, run: Run, request: Request, new: Sequence[Checkpoint]
) -> list[tuple[int, PassedOver]]:
    """Return what cannot be used, with its step: it could not come in after the `new` ones.

    Only a name can tell the step of what cannot be read.
    """
    known = {row.step for row in state.current.rows} if state.current else set()
    known |= {checkpoint.step for checkpoint in run.checkpoints}
    first = max((row.step or 0 for row in state.current.rows), default=-1) if state.current else -1
    found = []
    root, choice = request.paths[0], request.choice
    for entry in run.passed_over:
        step = told_step(entry.path, root, choice) if entry.unusable else None
        if step is not None and step not in known and first < step < (new[-1].step or 0):
            found.append((step, entry))
    return sorted(found)


def prepare_update(state: State, request: Request, run: Run, new: Sequence[Checkpoint]) -> Update:
    """Return the update of a state with `new` checkpoints of a run, in order of their steps.

    Raises `Disagreement` for other tensors than those of the state.
    """
    current = state.current
    last = new[-1]
    refuse_quantized(os.path.dirname(last.files[0].path))
    if current is None:  # a rule that matched once is right
        check_rules_of(request.rules, (checkpoint.index for checkpoint in new))
    wishes = request.wishes
    where = f"{shorten(last.path, 1000)}: "
    selection = select(last.index, request.rules, request.statistics, wishes.name, where)
    check_agreement(selection, last, new, request.rules, request.statistics, wishes.name)
    averaged = {t.name: (t.dtype, t.shape) for t in selection.averaged}
    labels = tuple(average.label for average in request.averages)
    bound = Binding(RUN, tuple(setting_words(request)), labels, averaged)
    if current is not None and (found := difference(current.binding, bound)):
        raise Disagreement(
            f"{shorten(last.path, 1000)}: {found}",
            "average the checkpoints of another training in a state of their own",
        )
    complete = current.manifest.complete if current else is_whole(wishes, last, selection)
    indexes = {id(c.index): c.index for c in new}.values()
    shared: list[Mapping[str, object]] = [
        {name: tensor[2:] for name, tensor in index.by_name.items()} for index in indexes
    ]
    if current is not None:
        shared.append(current.slot.names)
    held = holding.hold(request, selection, shared, complete=complete)
    rows = current.applied if current else []
    steps = [row.step or 0 for row in rows] + [c.step or 0 for c in new]
    names = [row.name for row in rows] + [c.name for c in new]
    schedules = [schedule(average, steps, names, request.like) for average in request.averages]
    gone = tuple(missed(state, run, request, new))
    return Update(
        request, run, tuple(new), tuple(schedules), bound, held, selection, complete, gone
    )


# ---------------------------------------------------------------------------- the work


def _work(state: State, update: Update, claim: ClaimedSlot) -> Work:
    """Return the work that fills a slot from the other one and the new checkpoints."""
    request, current = update.request, state.current
    views: list[Checkpoint] = []
    if current is not None:
        stamp = state.slot_stamp()
        for average, asked in enumerate(request.averages):
            part = BIASED if asked.zero_debias else AVERAGE
            sums = current.manifest.checksums
            views.append(slots.view(current.slot, stamp, sums, average, parts=(part,)))
    schedules = []
    for average, full in enumerate(update.schedules):
        mine = [float(average == other) for other in range(len(views))]
        values = drop_overwritten([*mine, *update.coefficients(average)])
        last = len(values) - 1
        schedules.append(Schedule(tuple(values), full.zero_debias, full.updates, last, full.decay))
    last_one = update.new[-1]
    made = holding.layouts(update.holding.slot, last_one, len(schedules), claim.path)
    return prepare(
        [*views, *update.new],
        schedules,
        update.selection.averaged,
        [Destination(layout, average, 0) for average, layout in enumerate(made)],
        dataclasses.replace(request.manner, summed=True),
    )


def carry_out(
    state: OpenState,
    update: Update,
    executor: Executor | None = None,
    on_event: OnEvent | None = None,
    *,
    restart: bool | None = None,
) -> int:
    """Carry out an update and commit it; returns the bytes of tensor data read.

    It goes on where a killed process stopped with this very update, unless `restart` forbids it.

    Raises `InputChanged` when a checkpoint changed meanwhile: the generation before still counts.
    """
    slot = update.holding.slot
    if state.current is None:
        state.begin(update.binding)
    claim = state.claim(slot)
    try:
        state.reserve(slot)
        work = _work(state, update, claim)
        log = Log(state.place(directory.PROGRESS), _key(state, update), [claim.path])
        try:
            what = checkpoints([checkpoint.step for checkpoint in update.new])
            tell = engine.about(what, on_event) or _ignore
            made = _compute(work, slot, claim, log, executor, tell, state, restart=restart)
            _commit(state, update, claim, made)
        except BaseException as error:
            left_to_another(error, log, restart)
            if isinstance(error, StorageError) and not state.renaming:
                # What the kernel holds of the slot may be lost without a word: a new one is made.
                durable.remove(claim.path)
            raise
        log.remove()
        return work.read
    finally:
        locks.release(claim.fd)


def _ignore(event: Progress) -> None:
    del event


def _compute(
    work: Work,
    slot: Slot,
    claim: ClaimedSlot,
    log: Log,
    executor: Executor | None,
    tell: OnEvent,
    state: OpenState,
    *,
    restart: bool | None,
) -> dict[int, int]:
    """Fill the slot; returns what was written to each chunk, by its checksum."""
    made: dict[int, int] = {}
    verifier = Verifier(work)
    written = 0

    def count_done(done: Done) -> None:
        nonlocal written
        written += done.written
        for unit, part in done.parts.items():
            verifier.add(unit, part)
        for (_, chunk), crc in done.made.items():
            made[chunk] = made.get(chunk, 0) ^ crc

    inside = state.place("update")
    with executor_of(executor, work.manner.workers) as pool, spilled(work, inside) as ready:
        if not restart and log.resume():
            count = log.check(engine.tasks(ready, [claim.path]))
            done = f"resuming: {len(log.done):,} of {plural(count, 'range')} done"
            tell(Progress(0, work.read, done if log.done else ""))
        flaw = engine.carry_out(ready, [claim.path], pool, tell, count_done, log)
        if flaw is not None:
            raise flaws.explain(ready, flaw, state.path if state.current is not None else "")
        verifier.finish()
        files.check_all_unchanged(work.inputs)
    expected = slot.nbytes - len(slot.head)
    if written != expected:  # then the checksums are not those of the bytes
        raise EmaError(
            f"internal error: {written:,} of {expected:,} bytes of the slot were written"
        )
    return made


def _commit(state: OpenState, update: Update, claim: ClaimedSlot, made: Mapping[int, int]) -> None:
    slot, current = update.holding.slot, state.current
    generation = (current.root.generation if current else 0) + 1
    last = update.new[-1]
    kept = skeleton.keep(last, update.holding.removed, state.place(directory.last_name(generation)))
    manifest = Manifest(generation, slot.held, checksums_of(slot, made), kept, update.complete, {})
    mixed = zip(*map(update.coefficients, range(len(update.schedules))), strict=True)
    told = update.told or update.new
    rows = [row_of(c, generation, values) for c, values in zip(told, mixed, strict=True)]
    rows += [
        Row(step, os.path.basename(entry.path), entry.path, (), (), entry.reason, generation)
        for step, entry in update.missed
    ]
    files.check_all_unchanged([s for c in update.new for s in c.files if s.path])
    state.commit(claim, manifest, rows)


def _named(files: Sequence[tuple[str, int, int, str]]) -> list[tuple[str, int, int, str]]:
    """Return files by their names alone: a run may have moved."""
    return [(os.path.basename(path), size, time, digest) for path, size, time, digest in files]


def _key(state: State, update: Update) -> str:
    """Return what two updates share that write the same bytes to the same slot."""
    current = state.current
    return provenance.digest_of(
        {
            "cuts": [engine.TASK_ELEMENTS, CHUNK_BYTES],
            "root": current.root.to_json() if current else None,
            "binding": update.binding.to_json(),
            "new": [[c.step, *[stamp[1:] for stamp in c.files], c.digests] for c in update.new],
            "coefficients": [
                [c.hex() for c in update.coefficients(k)] for k in range(len(update.schedules))
            ],
            "slot": [held.to_json() for held in update.holding.slot.held],
        }
    )
