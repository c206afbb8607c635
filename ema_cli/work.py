"""What the engine carries out: from which bytes of which files which bytes are made.

A plan leads to one, so does the update of a state, an export and a renamed copy.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ema_cli import copies as copying
from ema_cli import grouping, ranges, spilling
from ema_cli.coverage import cover
from ema_cli.ranges import Copy, Destination, Range
from ema_cli.schedules import Schedule, counting
from ema_cli.tensors import DTYPES, Checkpoint, Index, Stamp, Tensor


@dataclass(frozen=True, slots=True)
class Manner:
    """How the averages are computed; the options of `ema_cli.average_run`.

    `check` is whether the first non-finite value ends the work, `summed` whether every byte that
    is written has to be seen, so that the kernel may not copy by itself, `measured` whether the
    distance of each checkpoint from the averages is measured, per group of tensors.
    """

    shadow_dtype: str = "auto"
    like: str = "tensorflow"
    check: bool = True
    workers: int = 1
    summed: bool = False
    measured: bool = False


@dataclass(frozen=True, eq=False)
class Work:
    """Frozen: reads, arithmetic and writes, to be cut into tasks.

    Attributes:
        checkpoints: what may be read, in the order in which it is mixed in.
        schedules: the distinct coefficient lists over `checkpoints`; equal ones are computed once.
        manner: how.
        inputs: every file that is read, as it was when this was prepared.
        first_input: for each checkpoint, the ordinal in `inputs` of its first file, or -1.
        index_of: for each checkpoint, the ordinal of its index among those mixed, or -1.
        averaged: ranges to average.
        copies: bytes to copy.
        spilled: for each checkpoint, the tensors that have to be unpacked first.
        groups: of the averaged tensors, where they are measured.
    """

    checkpoints: tuple[Checkpoint, ...]
    schedules: tuple[Schedule, ...]
    manner: Manner
    inputs: tuple[Stamp, ...]
    first_input: tuple[int, ...]
    index_of: tuple[int, ...]
    averaged: tuple[Range, ...]
    copies: tuple[Copy, ...]
    spilled: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...] = ()
    _firsts: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        firsts = [(first, k) for k, first in enumerate(self.first_input) if first >= 0]
        object.__setattr__(self, "_firsts", sorted(firsts))

    def of_file(self, file: int) -> tuple[int, int]:
        """Return the checkpoint that an input file belongs to, and its ordinal there."""
        place = bisect.bisect_right(self._firsts, (file, len(self.checkpoints)))
        first, k = self._firsts[place - 1]
        return k, file - first

    @property
    def read(self) -> int:
        """Bytes of tensor data that are read."""
        mixed = [self.index_of[k] for k in counting(self.schedules)]
        averaged = sum(
            one.elements * DTYPES[one.places[index].dtype].bits // 8
            for one in self.averaged
            for index in mixed
        )
        return averaged + sum(copy.nbytes for copy in self.copies)

    @property
    def spill(self) -> int:
        """Bytes that have to be unpacked to a temporary file first."""
        return sum(map(spilling.spilled_bytes, self.checkpoints, self.spilled))


def prepare(
    checkpoints: Sequence[Checkpoint],
    schedules: Sequence[Schedule],
    tensors: Iterable[Tensor],
    destinations: Sequence[Destination],
    manner: Manner,
) -> Work:
    """Return the work that fills the `destinations`.

    Args:
        checkpoints: in the order of the coefficients.
        schedules: distinct coefficient lists; may be empty where nothing is averaged.
        tensors: to average, in the order of their bytes.
        destinations: the outputs.
        manner: how.
    """
    tensors = tuple(tensors)
    mixed = counting(schedules)
    used = [k for k, c in enumerate(checkpoints) if k in set(mixed) or _copied(c, destinations)]
    indexes, index_of = _distinct(checkpoints, mixed)
    inputs, first_input = _inputs(checkpoints, used)
    ranges.check_shared(indexes, destinations)
    groups, group_of = _groups(tensors) if manner.measured else ((), None)
    averaged = ranges.averaged_ranges(tensors, indexes, destinations, len(schedules), group_of)
    copies = [
        copy
        for k in used
        for copy in copying.copied_ranges(checkpoints[k], destinations, first_input[k])
    ]
    whole = list(copying.file_copies(destinations, inputs))
    averaged, copies = cover(
        averaged, copies, whole, checkpoints, indexes, index_of, first_input, mixed
    )
    return Work(
        tuple(checkpoints),
        tuple(schedules),
        manner,
        tuple(inputs),
        tuple(first_input),
        tuple(index_of),
        tuple(averaged),
        tuple(copies),
        _spilled(checkpoints, used, mixed, [t.name for t in tensors], destinations),
        groups,
    )


def _groups(tensors: Iterable[Tensor]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of the groups of tensors, and the ordinal of each tensor's."""
    names = grouping.grouped([tensor.name for tensor in tensors if tensor.nbytes])
    ordinals = {group: k for k, group in enumerate(dict.fromkeys(names.values()))}
    return tuple(ordinals), {name: ordinals[group] for name, group in names.items()}


def _copied(checkpoint: Checkpoint, destinations: Iterable[Destination]) -> bool:
    """Whether something is copied from a checkpoint, be it the structure of its files."""
    return any(checkpoint in (d.layout.last, d.held) for d in destinations)


def _distinct(
    checkpoints: Sequence[Checkpoint], mixed: Iterable[int]
) -> tuple[list[Index], list[int]]:
    indexes: list[Index] = []
    index_of = [-1] * len(checkpoints)
    ordinal_of: dict[int, int] = {}
    for k in mixed:
        index = checkpoints[k].index
        if id(index) not in ordinal_of:
            ordinal_of[id(index)] = len(indexes)
            indexes.append(index)
        index_of[k] = ordinal_of[id(index)]
    return indexes, index_of


def _inputs(
    checkpoints: Sequence[Checkpoint], used: Sequence[int]
) -> tuple[list[Stamp], list[int]]:
    inputs: list[Stamp] = []
    first = [-1] * len(checkpoints)
    for k in used:
        first[k] = len(inputs)
        inputs.extend(checkpoints[k].files)
    return inputs, first


def _spilled(
    checkpoints: Sequence[Checkpoint],
    used: Iterable[int],
    mixed: Collection[int],
    averaged: Sequence[str],
    destinations: Sequence[Destination],
) -> tuple[tuple[str, ...], ...]:
    """Return for each checkpoint the tensors that are read and have to be unpacked before."""
    found: list[tuple[str, ...]] = [()] * len(checkpoints)
    for k in used:
        checkpoint = checkpoints[k]
        wanted = set(averaged) if k in mixed else set()
        for destination in destinations:
            wanted |= {e.source for e in copying.copied_entries(destination, checkpoint)}
        found[k] = tuple(spilling.spilled(checkpoint, wanted))
    return tuple(found)
