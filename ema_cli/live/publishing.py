"""Outputs of a watch: which updates are followed by one, and under which name."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from ema_cli import exporting, provenance
from ema_cli.destination import exists
from ema_cli.errors import OutputExists, UsageError
from ema_cli.formats import FORMATS, foreign, safetensors
from ema_cli.layout import output_format
from ema_cli.live.reports import Published
from ema_cli.plan import Plan, Request
from ema_cli.running import OnEvent, RunResult, run_plan
from ema_cli.states.records import Row
from ema_cli.states.store import State
from ema_cli.tensors import Checkpoint, Index
from ema_cli.text import shorten


class Publisher:
    """Writes the outputs of a state, each generation at most once.

    Args:
        state: open for writing.
        request: with the output, or without one.
        every: how many checkpoints are applied from one output to the next.
        overwrite: replace what others wrote.
        executor: given, or None for threads.
        on_event: told of progress.
    """

    def __init__(
        self,
        state: State,
        request: Request,
        every: int,
        *,
        overwrite: bool,
        executor: Executor | None,
        on_event: OnEvent | None,
    ) -> None:
        self._state, self._request, self._every = state, request, every
        self._overwrite, self._executor, self._on_event = overwrite, executor, on_event
        self._checked = False
        self._done = -1  # the generation that stands as an output

    def check(self, known: str | None = None) -> None:
        """Raise unless every output can have the name asked for; `known`: what is averaged."""
        current = self._state.current
        if current is not None and current.manifest.skeleton is not None:
            known = current.manifest.skeleton.format
        if not self._checked:
            check_output(self._request, known, overwrite=self._overwrite)
            self._checked = known is not None

    def publish(self, tell: Callable[[Published], None], *, end: bool = False) -> None:
        """Write the outputs that are due; at the `end`, those of the last generation anyway."""
        current = self._state.current
        if current is None or self._request.output is None:
            return
        generation = current.root.generation
        if generation == self._done or not (end or is_due(current.rows, self._every)):
            return
        for average in self._request.averages:
            plan = exporting.make(self._state, self._request, average)
            result = self._run(plan)
            step = current.applied[-1].step or 0
            tell(Published(plan, result.outputs[0], step, result.notes))
        self._done = generation

    def _run(self, plan: Plan) -> RunResult:
        """Write one output; a file is replaced where its name stays and it is one of ours."""
        layout = plan.outcomes[0].layout
        tell = exporting.told_of(plan, self._on_event)
        run = functools.partial(run_plan, plan, executor=self._executor, on_event=tell)
        stays = layout.kind == "file" and "{step}" not in (self._request.output or "")
        if self._overwrite or not stays:
            return run(overwrite=self._overwrite)
        try:
            return run()
        except OutputExists:
            if provenance.load(layout.path) is None:
                raise
            return run(overwrite=True)


def is_due(rows: Sequence[Row], every: int) -> bool:
    """Whether an output follows the last commit.

    It does where that applied the N-th checkpoint of all, the 2 N-th and so on: told by the ledger
    alone, so that it is the same in every process.
    """
    applied = [row for row in rows if not row.missed]
    last = sum(row.generation == applied[-1].generation for row in applied) if applied else 0
    return len(applied) // every > (len(applied) - last) // every


def check_output(request: Request, known: str | None, *, overwrite: bool) -> None:
    """Raise unless every output of a watch can have the name that is asked for.

    Args:
        request: with the output.
        known: the format of the checkpoints, or None as long as that is not known.
        overwrite: replace what others wrote.
    """
    output = request.output
    if output is None or "{step}" in output:
        return
    if known is not None or request.wishes.format is not None or _tells(output):
        last = Checkpoint("", (), Index(known or safetensors.NAME, (), ()), ())
        row = FORMATS[output_format(output, request.wishes, last)]
        if row.kind == "prefix" and output.endswith("/"):
            return  # which gets a name with the step there
        if row.kind != "file":
            raise UsageError(
                f"-o {shorten(output)}: expected {{step}} in it: whoever reads a {row.title} while "
                "another takes its place would read both",
                f"-o '{shorten(output.rstrip('/'))}-{{step}}'",
            )
    for average in request.averages:
        path = output.replace("{average}", average.label)
        stands = os.path.lexists(path) and not os.path.isdir(path)
        if stands and not overwrite and provenance.load(path) is None:
            raise exists(shorten(path, 1000))


def _tells(output: str) -> bool:
    """Whether the name of an output tells its format."""
    suffix = os.path.splitext(output.rstrip("/"))[1]
    known = {suffix for row in FORMATS.values() for suffix in (row.suffix, *row.also)}
    return suffix != "" and (suffix in known or suffix in foreign.SUFFIXES)
