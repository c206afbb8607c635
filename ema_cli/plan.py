"""The plan: everything that will be read, computed and written, decided before data moves."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from ema_cli import kernel, runs, search
from ema_cli.averages import Average
from ema_cli.blueprint import Layout
from ema_cli.durable import free_bytes, left_bytes
from ema_cli.errors import UsageError
from ema_cli.formats import Known
from ema_cli.formats.sidefiles import refuse_quantized
from ema_cli.layout import Wishes, lay_out
from ema_cli.naming import Rule
from ema_cli.ranges import Destination
from ema_cli.schedules import Schedule, counting, schedule
from ema_cli.selection import Selection, check_agreement, check_rules_of, select
from ema_cli.tensors import Checkpoint, numpy_dtype
from ema_cli.text import shorten
from ema_cli.work import Manner, Work, prepare

# Elements of one block; half of it when several accumulators share the cache. Measured on 2 cores
# with 1 MiB of second level cache each: half as many took 4 % longer (bfloat16: 15 %), because
# threads meet more often; four times as many twice as long, because they spill to memory.
BLOCK_ELEMENTS = 1 << 18
# What the buffers of all workers together may take; many workers get smaller blocks.
_BUFFER_BYTES = 40 << 20
# Elements of one task: enough to forget what opening its files costs.
TASK_ELEMENTS = 1 << 21
# The interpreter with NumPy, click and the reference reader, before any plan.
BASE_BYTES = 48 << 20
# What one tensor of an index takes from header to plan, measured with 20,000 tensors.
TENSOR_BYTES = 2400


@dataclass(frozen=True)
class Request:
    """What the user asked for: the arguments of `ema_cli.average_run`, parsed."""

    paths: tuple[str, ...]
    output: str | None
    averages: tuple[Average, ...]
    implicit: bool = False
    choice: search.Choice = field(default_factory=search.Choice)
    rules: tuple[Rule, ...] = ()
    statistics: str = "average"
    shadow_dtype: str = "auto"
    like: str = "tensorflow"
    non_finite: str = "error"
    wishes: Wishes = field(default_factory=Wishes)
    workers: int = 1

    @property
    def manner(self) -> Manner:
        """How the averages are computed."""
        return Manner(self.shadow_dtype, self.like, self.non_finite == "error", self.workers)


@dataclass(frozen=True, eq=False)
class Outcome:
    """One average of a plan.

    Attributes:
        average: what was asked for.
        schedule: ordinal of its coefficients in `Plan.schedules`.
        weights: of each checkpoint of the run.
        last: the checkpoint whose structure and copies the output has.
        selection: what is averaged and copied.
        layout: the output.
    """

    average: Average
    schedule: int
    weights: tuple[float, ...]
    last: Checkpoint
    selection: Selection
    layout: Layout


@dataclass(frozen=True, slots=True)
class Costs:
    """What carrying out a plan takes, in bytes.

    Attributes:
        read: tensor data of the inputs.
        write: all outputs.
        memory: about what the process will hold.
        free: what the disk has now.
        spill: what has to be unpacked to a temporary file before it can be read.
    """

    read: int
    write: int
    memory: int
    free: int
    spill: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """Frozen: what ``ema-avg plan`` prints and ``ema-avg run`` carries out.

    Attributes:
        request: what it answers.
        run: the checkpoints and what was passed over.
        schedules: the distinct coefficient lists; equal ones are computed once.
        outcomes: one per average, in the order asked for.
        work: what carries it out.
        costs: bytes read, written, held and free.
    """

    request: Request
    run: runs.Run
    schedules: tuple[Schedule, ...]
    outcomes: tuple[Outcome, ...]
    work: Work
    costs: Costs


def make(request: Request, run: runs.Run | None = None) -> Plan:
    """Return the plan for `request`: reads headers and scalar steps, no other tensor data.

    `run` is what to average, where that is known already. Raises every error that can be known
    before: `InputError`, `Disagreement`, `UsageError`, `NothingToAverage`.
    """
    check_output(request)
    if run is None:
        known: Known = {}
        run = runs.find(request.paths, request.choice, known)
    schedules, ordinals = _schedules(request, run)
    used = _used(schedules)
    check_rules_of(request.rules, (run.checkpoints[k].index for k in used))
    outcomes = _outcomes(request, run, schedules, ordinals, used)
    work = _work(run, schedules, outcomes, request.manner)
    costs = _costs(request, outcomes, work)
    return Plan(request, run, tuple(schedules), tuple(outcomes), work, costs)


def _work(
    run: runs.Run, schedules: Sequence[Schedule], outcomes: Sequence[Outcome], manner: Manner
) -> Work:
    last = run.checkpoints[_used(schedules)[-1]]
    averaged = next(outcome.selection for outcome in outcomes if outcome.last is last).averaged
    return prepare(run.checkpoints, schedules, averaged, _destinations(outcomes), manner)


def measured(plan: Plan) -> Plan:
    """Return the plan with work that measures how far the checkpoints lie from the averages."""
    manner = dataclasses.replace(plan.work.manner, measured=True)
    work = _work(plan.run, plan.schedules, plan.outcomes, manner)
    return dataclasses.replace(plan, work=work)


def check_output(request: Request) -> None:
    """Raise `UsageError` when several averages would have one output."""
    several = len(request.averages) > 1
    if request.output is not None and several and "{average}" not in request.output:
        raise UsageError(
            f"-o {shorten(request.output)}: {len(request.averages)} averages need different names",
            f"put {{average}} into it: -o 'average-{{average}}'; it becomes "
            f"{', '.join(average.label for average in request.averages[:3])}",
        )


def _schedules(request: Request, run: runs.Run) -> tuple[list[Schedule], list[int]]:
    """Return the distinct schedules and, for each average, which is its own."""
    names = [checkpoint.name for checkpoint in run.checkpoints]
    distinct: list[Schedule] = []
    ordinals = []
    for average in request.averages:
        new = schedule(average, run.steps, names, request.like)
        if new not in distinct:
            distinct.append(new)
        ordinals.append(distinct.index(new))
    return distinct, ordinals


def _used(schedules: Sequence[Schedule]) -> list[int]:
    """Return the ordinals of the checkpoints that are read at all."""
    return sorted({*counting(schedules), *(s.last for s in schedules)})


def _outcomes(
    request: Request,
    run: runs.Run,
    schedules: Sequence[Schedule],
    ordinals: Sequence[int],
    used: Sequence[int],
) -> list[Outcome]:
    selections: dict[int, Selection] = {}
    name = request.wishes.name
    outcomes = []
    for average, ordinal in zip(request.averages, ordinals, strict=True):
        chosen = schedules[ordinal]
        last = run.checkpoints[chosen.last]
        refuse_quantized(os.path.dirname(last.files[0].path))
        if id(last.index) not in selections:
            where = f"{shorten(last.path, 1000)}: "
            selection = select(last.index, request.rules, request.statistics, name, where)
            others = [run.checkpoints[k] for k in used]
            check_agreement(selection, last, others, request.rules, request.statistics, name)
            selections[id(last.index)] = selection
        selection = selections[id(last.index)]
        path = output_path(request.output or "", average, last)
        updates = chosen.updates if chosen.zero_debias else None
        layout = lay_out(path, last, selection, request.wishes, updates)
        outcomes.append(Outcome(average, ordinal, chosen.weights(), last, selection, layout))
    return outcomes


def output_path(template: str, average: Average, last: Checkpoint) -> str:
    """Return `template` with ``{step}`` and ``{average}`` replaced, literally."""
    return template.replace("{step}", str(last.step)).replace("{average}", average.label)


def _destinations(outcomes: Sequence[Outcome]) -> list[Destination]:
    destinations = []
    first_file = 0
    for outcome in outcomes:
        destinations.append(Destination(outcome.layout, outcome.schedule, first_file))
        first_file += len(outcome.layout.files)
    return destinations


def block_elements(largest: int, workers: int, accumulators: int) -> int:
    """Return the elements of a block: at most `largest`, fewer where more has to share."""
    fair = _BUFFER_BYTES // (workers * (4 + accumulators) * 8)
    return max(1, min(largest // min(accumulators, 2), max(fair, 1 << 14)))


def _free(request: Request, outcomes: Sequence[Outcome]) -> int:
    """Return what there is for the outputs: what a killed run left of them counts, too."""
    free = free_bytes(os.path.dirname((request.output or "").rstrip("/")))
    return free + sum(left_bytes(outcome.layout.path) for outcome in outcomes)


def _costs(request: Request, outcomes: Sequence[Outcome], work: Work) -> Costs:
    widest = max(
        (
            numpy_dtype(kernel.shadow_dtype(t.dtype.name, request.shadow_dtype)).itemsize
            for t in outcomes[0].selection.averaged
        ),
        default=4,
    )
    # Per worker: the bytes read, the widened value, the scratch, one accumulator per schedule
    # and the bytes written.
    accumulators = len(work.schedules)
    block = block_elements(BLOCK_ELEMENTS, request.workers, accumulators)
    buffers = request.workers * (4 + accumulators) * block * widest
    used = [c.index for c, k in zip(work.checkpoints, work.first_input, strict=True) if k >= 0]
    tensors = sum(len(index.tensors) for index in {id(index): index for index in used}.values())
    return Costs(
        read=work.read,
        write=sum(outcome.layout.nbytes for outcome in outcomes),
        memory=BASE_BYTES + buffers + TENSOR_BYTES * tensors,
        free=_free(request, outcomes),
        spill=work.spill,
    )
