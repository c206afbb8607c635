"""Checkpoints that are ready become an update of a state; or are found to be damaged or changed.

Each is read again and pinned first. An update about which anything is wrong is dropped: the state
stays what it was.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from ema_cli import continuing, formats, updating
from ema_cli.errors import DamagedState, EmaError, InputChanged, InputError, UnsupportedInput
from ema_cli.formats.sidefiles import refuse_quantized
from ema_cli.live.pinning import Pins
from ema_cli.live.reports import Applied, Dropped
from ema_cli.plan import Request
from ema_cli.running import OnEvent
from ema_cli.runs import Run
from ema_cli.states.commit import OpenState
from ema_cli.tensors import Checkpoint
from ema_cli.text import shorten
from ema_cli.warnings import PlanWarning, warnings

Refuse = Callable[[Checkpoint, str], None]
# What is to be said of the weights of so few checkpoints passes as more come.
_PASSING = ("one-checkpoint", "first-dominates", "last-dominates")
_FEW = 10


class Mixer:
    """Mixes checkpoints into a state that is open for writing.

    Args:
        state: the state.
        request: with its averages.
        executor: given, or None for threads.
        on_event: told of progress.
        refuse: told of each checkpoint that is damaged, and why.
    """

    def __init__(
        self,
        state: OpenState,
        request: Request,
        executor: Executor | None,
        on_event: OnEvent | None,
        refuse: Refuse,
    ) -> None:
        self._state, self._request, self._refuse = state, request, refuse
        self._executor, self._on_event = executor, on_event
        self._pins = Pins(state.path)
        self._warned: set[str] = set()
        self._pins.release()  # what a killed process left

    def mix(self, ready: Sequence[Checkpoint]) -> list[Applied | Dropped]:
        """Mix checkpoints in as one batch, in their order; returns what became of them.

        Of those from the first that is damaged or changed on, none is. Raises what is no matter of
        one checkpoint.
        """
        fresh, told = self._read_again(ready)
        if not fresh:
            return told
        started = time.monotonic()
        held: list[Checkpoint] = []
        try:
            for checkpoint in fresh:
                held.append(self._pins.hold(checkpoint))
            found, read = self._update(held, fresh)
        except (InputError, FileNotFoundError) as error:
            return [*told, self._dropped(error, fresh, held)]
        except EmaError as error:
            raise self._pins.named(error) from error
        finally:
            self._pins.release()
        assert self._state.current is not None  # noqa: S101  # it was committed
        rows = tuple(self._state.current.applied[-len(fresh) :])
        return [*told, Applied(self._state.path, rows, found, read, time.monotonic() - started)]

    def _read_again(
        self, ready: Sequence[Checkpoint]
    ) -> tuple[list[Checkpoint], list[Applied | Dropped]]:
        """Return checkpoints as their headers are now that nobody writes them any more."""
        known: formats.Known = {}
        fresh: list[Checkpoint] = []
        for checkpoint in ready:
            name, path = checkpoint.index.format, checkpoint.path
            try:
                read = formats.read_as(name, path, known, checkpoint.key)
                refuse_quantized(os.path.dirname(read.files[0].path))
            except UnsupportedInput:
                raise
            except InputError as error:
                return fresh, [self._blamed(checkpoint, error)]
            if read.files != checkpoint.files:
                break  # it is looked at again, and those after it come after it
            within, step = checkpoint.within, checkpoint.step
            fresh.append(dataclasses.replace(read, within=within, step=step))
        return fresh, []

    def _update(
        self, held: Sequence[Checkpoint], fresh: Sequence[Checkpoint]
    ) -> tuple[tuple[PlanWarning, ...], int]:
        run = Run(tuple(held), searched=True)
        update = updating.prepare_update(self._state, self._request, run, held)
        update = dataclasses.replace(update, told=tuple(fresh))
        plan = continuing.describe(self._state, update)
        few = len(plan.run.checkpoints) < _FEW
        new = tuple(
            warning
            for warning in warnings(plan, state=self._state.path, word="watch")
            if warning.code not in self._warned and not (few and warning.code in _PASSING)
        )
        read = updating.carry_out(self._state, update, self._executor, self._on_event)
        self._warned.update(warning.code for warning in new)
        return new, read

    def _dropped(
        self,
        error: InputError | FileNotFoundError,
        fresh: Sequence[Checkpoint],
        held: Sequence[Checkpoint],
    ) -> Dropped:
        """Return what is told of an update that failed since one checkpoint is not what it was.

        Raises the error where it is about anything else.
        """
        if isinstance(error, FileNotFoundError):
            paths = (stamp.path for checkpoint in fresh for stamp in checkpoint.files)
            if all(os.path.lexists(path) for path in paths if path):
                raise error
            return Dropped(f"{shorten(os.fsdecode(error.filename or ''), 1000)}: rotated away")
        named = self._pins.named(error)
        if not isinstance(error, DamagedState | UnsupportedInput):
            for k, checkpoint in enumerate(fresh):
                if any(_is_about(error, one) for one in (checkpoint, *held[k : k + 1])):
                    return self._blamed(checkpoint, named)
        raise named from error

    def _blamed(self, checkpoint: Checkpoint, error: EmaError) -> Dropped:
        """Refuse a checkpoint that is damaged; one that changed is looked at again."""
        if not isinstance(error, InputChanged):
            start = f"{shorten(checkpoint.path, 1000)}: "
            self._refuse(checkpoint, error.message.removeprefix(start))
        return Dropped(error.message)


def _is_about(error: InputError, checkpoint: Checkpoint) -> bool:
    """Whether an error names a checkpoint, or a file of it."""
    paths = {stamp.path for stamp in checkpoint.files if stamp.path}
    starts = [f"{path}: " for path in (*paths, checkpoint.path, checkpoint.index_file) if path]
    if os.path.dirname(next(iter(paths))) == checkpoint.path.rstrip("/"):
        starts.append(f"{checkpoint.path}/")  # a file beside the weights
    return error.message.startswith(tuple(shorten(start, 1000) for start in starts))
