"""What a watch tells while it goes on, and when it ends. Plain frozen data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ema_cli.plan import Plan
from ema_cli.running import Written
from ema_cli.runs import Run
from ema_cli.search import PassedOver
from ema_cli.states.records import Row
from ema_cli.warnings import PlanWarning


@dataclass(frozen=True, eq=False)
class Looked:
    """Something about the run that was not told before.

    Attributes:
        run: notes, and entries that are passed over.
        waiting: what is waited for, a line each.
    """

    run: Run
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Applied:
    """Checkpoints were mixed into the state, durably.

    Attributes:
        state: its directory.
        rows: their lines of the ledger.
        warnings: those that were not told before.
        read: bytes of tensor data read from checkpoints and the slot.
        seconds: wall clock time.
    """

    state: str
    rows: tuple[Row, ...]
    warnings: tuple[PlanWarning, ...]
    read: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Published:
    """An output stands.

    Attributes:
        plan: of it.
        written: what became of it.
        step: the last one in it.
        notes: what could not be promised.
    """

    plan: Plan
    written: Written
    step: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Missed:
    """A checkpoint that will not be averaged.

    Attributes:
        step: its training step.
        path: where it was.
        reason: why.
    """

    step: int
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Dropped:
    """An update was dropped; the state is what it was before.

    Attributes:
        reason: why.
    """

    reason: str


Report = Looked | Applied | Published | Missed | Dropped
OnReport = Callable[[Report], None]


@dataclass(frozen=True, eq=False)
class WatchResult:
    """What `watch` did until it ended.

    Attributes:
        state: its directory.
        ended: why: ``idle``, ``until-step`` or ``stopped``.
        applied: the lines of the ledger for what was mixed in.
        missed: what was not.
        outputs: what was published, in order.
        step: the last step that is averaged; None where nothing is.
        checkpoints: how many are averaged in all.
        unusable: entries that look like checkpoints and could not be used (exit code 3).
        seconds: wall clock time.
    """

    state: str
    ended: str
    applied: tuple[Row, ...]
    missed: tuple[Missed, ...]
    outputs: tuple[Written, ...]
    step: int | None
    checkpoints: int
    unusable: tuple[PassedOver, ...]
    seconds: float
