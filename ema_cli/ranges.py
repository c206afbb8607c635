"""Runs of bytes that are worked on as one: adjacent tensors that lie alike in every file.

Twenty thousand small tensors saved in one order become one range; nothing is gained by knowing
where one ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ema_cli.files import stamp_of
from ema_cli.layout import AVERAGE, BIASED, COPY, Layout
from ema_cli.tensors import DTYPES, Index, Stamp, Tensor


class Target(NamedTuple):
    """Where a range is written: the ordinal of an output file, and how."""

    file: int
    offset: int
    part: str
    dtype: str


class Range(NamedTuple):
    """Elements that are averaged together.

    Attributes:
        dtype: of the variables.
        elements: how many.
        places: for each distinct index of the run, (file in the checkpoint, byte offset).
        targets: for each distinct schedule, where its result goes.
    """

    dtype: str
    elements: int
    places: tuple[tuple[int, int], ...]
    targets: tuple[tuple[Target, ...], ...]


class Copy(NamedTuple):
    """Bytes that are copied: from an input file (by ordinal in the plan) to output files."""

    nbytes: int
    file: int
    offset: int
    targets: tuple[Target, ...]


class Destination(NamedTuple):
    """An output's layout, the schedule whose result it takes, and its first file's ordinal."""

    layout: Layout
    schedule: int
    first_file: int


def averaged_ranges(
    tensors: Iterable[Tensor],
    indexes: Sequence[Index],
    destinations: Sequence[Destination],
    schedules: int,
) -> list[Range]:
    """Return the ranges of the averaged `tensors`, given in the order of their bytes."""
    wanted = _wanted(destinations, (AVERAGE, BIASED))
    found: list[Range] = []
    elements = 0
    for tensor in tensors:
        name, dtype, _, extent = tensor
        if not extent.nbytes:
            continue
        places = tuple([index.by_name[name].extent[:2] for index in indexes])
        targets: list[list[Target]] = [[] for _ in range(schedules)]
        for schedule, target in wanted.get(name, ()):
            targets[schedule].append(target)
        new = Range(dtype.name, tensor.elements, places, tuple(map(tuple, targets)))
        if found and _follows(found[-1], elements, new):
            elements += new.elements
            continue
        if found:
            found[-1] = found[-1]._replace(elements=elements)
        found.append(new)
        elements = new.elements
    if found:
        found[-1] = found[-1]._replace(elements=elements)
    return found


def _wanted(
    destinations: Sequence[Destination], parts: tuple[str, ...]
) -> dict[str, list[tuple[int, Target]]]:
    """Return for each input tensor the (schedule, target) pairs it is written to."""
    wanted: dict[str, list[tuple[int, Target]]] = {}
    for layout, schedule, first_file in destinations:
        for entry in layout.entries:
            if entry.part in parts:
                file, offset, _ = layout.places[entry.name]
                target = Target(first_file + file, offset, entry.part, entry.dtype.name)
                wanted.setdefault(entry.source, []).append((schedule, target))
    return wanted


def _follows(first: Range, elements: int, after: Range) -> bool:
    """Whether `after` lies `elements` after the start of `first` in every input and output."""
    if first.dtype != after.dtype:
        return False
    nbytes = elements * DTYPES[first.dtype].bits // 8
    for (file, offset), place in zip(first.places, after.places, strict=True):
        if (file, offset + nbytes) != place:
            return False
    for mine, others in zip(first.targets, after.targets, strict=True):
        if not _continue(mine, elements, others):
            return False
    return True


def _continue(first: Sequence[Target], elements: int, after: Sequence[Target]) -> bool:
    """Whether the targets `after` lie `elements` (bytes of a copy) after those of `first`."""
    if len(first) != len(after):
        return False
    for (file, offset, part, dtype), target in zip(first, after, strict=True):
        nbytes = elements if dtype == COPY else elements * DTYPES[dtype].bits // 8
        if (file, offset + nbytes, part, dtype) != target:
            return False
    return True


def copied_ranges(
    index: Index, destinations: Sequence[Destination], first_input: int
) -> Iterator[Copy]:
    """Yield what the outputs copy from the checkpoint of `index`, whose files start there."""
    wanted = _wanted(destinations, (COPY,))
    pending: Copy | None = None
    for tensor in index.tensors:
        targets = tuple(t._replace(dtype=COPY) for _, t in wanted.get(tensor.name, ()))
        file, offset, nbytes = tensor.extent
        if not targets or not nbytes:
            continue
        new = Copy(nbytes, first_input + file, offset, targets)
        if pending is not None and _copy_follows(pending, new):
            pending = pending._replace(nbytes=pending.nbytes + nbytes)
            continue
        if pending is not None:
            yield pending
        pending = new
    if pending is not None:
        yield pending


def _copy_follows(before: Copy, after: Copy) -> bool:
    return (
        before.file == after.file
        and before.offset + before.nbytes == after.offset
        and _continue(before.targets, before.nbytes, after.targets)
    )


def side_copies(destinations: Sequence[Destination], inputs: list[Stamp]) -> Iterator[Copy]:
    """Yield the side files the outputs copy whole; their stamps are appended to `inputs`."""
    ordinals: dict[str, int] = {}
    for layout, _, first_file in destinations:
        for ordinal, file in enumerate(layout.files):
            if not file.copy_of or not file.nbytes:
                continue
            if file.copy_of not in ordinals:
                ordinals[file.copy_of] = len(inputs)
                inputs.append(stamp_of(file.copy_of))
            target = Target(first_file + ordinal, 0, COPY, COPY)
            yield Copy(file.nbytes, ordinals[file.copy_of], 0, (target,))
