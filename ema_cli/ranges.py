"""Runs of bytes that are worked on as one: adjacent tensors that lie alike in every file.

Twenty thousand small tensors saved in one order become one range; nothing is gained by knowing
where one ends and the next begins. A partitioned variable becomes one range for each box that all
its checkpoints and outputs have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ema_cli import regions
from ema_cli.blueprint import AVERAGE, BIASED, COPY, Layout
from ema_cli.files import stamp_of
from ema_cli.regions import Grid, Regions
from ema_cli.tensors import DTYPES, Checkpoint, Index, Stamp, Tensor, swap_width


class Place(NamedTuple):
    """Where a range lies in a checkpoint.

    Attributes:
        file: ordinal in the checkpoint, or in the plan for copies.
        offset: of its first element, in bytes.
        grid: its rows, or None when its elements follow each other.
        unit: first and last offset of the bytes whose checksum is known; None for the range's own.
    """

    file: int
    offset: int
    grid: Grid | None = None
    unit: tuple[int, int] | None = None


class Target(NamedTuple):
    """Where a range is written: the ordinal of an output file, and how.

    Attributes:
        file: among all output files of the plan.
        offset: of its first element, in bytes.
        part: what of the result.
        dtype: its elements, or ``copy`` for bytes.
        swap: bytes that change places together on their way there; 0 for none.
        grid: its rows, or None.
    """

    file: int
    offset: int
    part: str
    dtype: str
    swap: int = 0
    grid: Grid | None = None


class Range(NamedTuple):
    """Elements that are averaged together.

    Attributes:
        dtype: of the variables.
        elements: how many.
        places: for each distinct index of the run.
        targets: for each distinct schedule, where its result goes.
        group: what its checksums are kept apart by: ranges of one tensor share it.
    """

    dtype: str
    elements: int
    places: tuple[Place, ...]
    targets: tuple[tuple[Target, ...], ...]
    group: int


class Copy(NamedTuple):
    """Bytes that are copied: from an input file (by ordinal in the plan) to output files.

    `group` keeps their checksums apart from others', where they are `checked` at all.
    """

    nbytes: int
    place: Place
    targets: tuple[Target, ...]
    group: int = 0
    checked: bool = False


class Destination(NamedTuple):
    """An output's layout, the schedule whose result it takes, and its first file's ordinal."""

    layout: Layout
    schedule: int
    first_file: int


# A tensor of an output: the schedule it belongs to, its destination, what of it, and as what.
_Wanted = tuple[int, Destination, str, Tensor]


def averaged_ranges(
    tensors: Iterable[Tensor],
    indexes: Sequence[Index],
    destinations: Sequence[Destination],
    schedules: int,
) -> list[Range]:
    """Return the ranges of the averaged `tensors`, given in the order of their bytes."""
    wanted = _wanted(destinations, (AVERAGE, BIASED))
    found: list[Range] = []
    elements: list[int] = []  # of each, with those of the tensors that follow it
    for group, tensor in enumerate(tensors):
        if not tensor.extent.nbytes:
            continue
        stored = [index.by_name[tensor.name] for index in indexes]
        asked = wanted.get(tensor.name, ())
        if any(t.slices for t in stored) or any(t.slices for *_, t in asked):
            sliced = list(_sliced(tensor, stored, asked, schedules, group))
            found.extend(sliced)
            elements.extend(one.elements for one in sliced)
            continue
        places = tuple([Place(t.extent.file, t.extent.offset) for t in stored])
        targets: list[list[Target]] = [[] for _ in range(schedules)]
        for schedule, destination, part, made in asked:
            targets[schedule].append(_target(destination, part, made))
        new = Range(tensor.dtype.name, tensor.elements, places, tuple(map(tuple, targets)), group)
        if found and _follows(found[-1], elements[-1], new):
            elements[-1] += new.elements
        else:
            found.append(new)
            elements.append(new.elements)
    return [one._replace(elements=n) for one, n in zip(found, elements, strict=True)]


def _wanted(
    destinations: Sequence[Destination], parts: tuple[str, ...]
) -> dict[str, list[_Wanted]]:
    """Return for each input tensor what is made of it."""
    wanted: dict[str, list[_Wanted]] = {}
    for destination in destinations:
        layout = destination.layout
        for entry in layout.entries:
            if entry.part in parts:
                made = (destination.schedule, destination, entry.part, layout.places[entry.name])
                wanted.setdefault(entry.source, []).append(made)
    return wanted


def _target(destination: Destination, part: str, made: Tensor) -> Target:
    file, offset, _ = made.extent
    return Target(destination.first_file + file, offset, part, *_form(destination, made))


def _form(destination: Destination, made: Tensor) -> tuple[str, int]:
    """Return the dtype of what is written, and how its bytes are swapped."""
    dtype = made.dtype.name
    return dtype, swap_width(dtype) if destination.layout.big_endian else 0


def _sliced(
    tensor: Tensor,
    stored: Sequence[Tensor],
    asked: Sequence[_Wanted],
    schedules: int,
    group: int,
) -> Iterator[Range]:
    """Yield one range for each box that the stored tensors and the outputs have in common."""
    width = tensor.dtype.bits // 8
    sources = [Regions(t, width) for t in stored]
    made_of = [Regions(made, made.dtype.bits // 8) for *_, made in asked]
    for box in regions.common_boxes([*stored, *(made for *_, made in asked)]):
        targets: list[list[Target]] = [[] for _ in range(schedules)]
        for (schedule, destination, part, made), where in zip(asked, made_of, strict=True):
            to = where.find(box)
            file = destination.first_file + to.extent.file
            form = _form(destination, made)
            targets[schedule].append(Target(file, to.offset, part, *form, to.grid))
        places = tuple(_place(where.find(box)) for where in sources)
        yield Range(tensor.dtype.name, box.elements, places, tuple(map(tuple, targets)), group)


def _place(region: regions.Region) -> Place:
    extent, offset, grid = region
    return Place(extent.file, offset, grid, (extent.offset, extent.offset + extent.nbytes))


def _follows(first: Range, elements: int, after: Range) -> bool:
    """Whether `after` lies `elements` after the start of `first` in every input and output."""
    if first.dtype != after.dtype:
        return False
    nbytes = elements * DTYPES[first.dtype].bits // 8
    for mine, place in zip(first.places, after.places, strict=True):
        if mine.unit or (mine.file, mine.offset + nbytes) != place[:2]:
            return False
    for targets, others in zip(first.targets, after.targets, strict=True):
        if not _continue(targets, elements, others):
            return False
    return True


def _continue(first: Sequence[Target], elements: int, after: Sequence[Target]) -> bool:
    """Whether the targets `after` lie `elements` (bytes of a copy) after those of `first`."""
    if len(first) != len(after):
        return False
    for (file, offset, part, dtype, swap, grid), target in zip(first, after, strict=True):
        nbytes = elements if dtype == COPY else elements * DTYPES[dtype].bits // 8
        if grid or (file, offset + nbytes, part, dtype, swap, None) != target:
            return False
    return True


# ---------------------------------------------------------------------------- copies


def copied_ranges(
    checkpoint: Checkpoint, destinations: Sequence[Destination], first_input: int
) -> Iterator[Copy]:
    """Yield what the outputs copy from a checkpoint, whose files start at `first_input`.

    Files that are copied whole bring their tensors along.
    """
    apart = [d for d in destinations if not _copies_files(d.layout)]
    wanted = _wanted(apart, (COPY,))
    index, checked = checkpoint.index, checkpoint.checksums is not None
    pending: Copy | None = None
    for group, tensor in enumerate(index.tensors):
        for new in _copies(tensor, wanted.get(tensor.name, ()), index, first_input):
            new = new._replace(group=group, checked=checked)
            if pending is not None and _copy_follows(pending, new):
                pending = pending._replace(nbytes=pending.nbytes + new.nbytes)
                continue
            if pending is not None:
                yield pending
            pending = new
    if pending is not None:
        yield pending


def _copies_files(layout: Layout) -> bool:
    """Whether the data of a layout is that of the input's files, as they are."""
    return any(file.copy_of in [s.path for s in layout.last.files] for file in layout.files)


def _copies(
    tensor: Tensor, asked: Sequence[_Wanted], index: Index, first_input: int
) -> Iterator[Copy]:
    """Yield the copies of one tensor: one for each box where it or an output is sliced."""
    if not asked or not tensor.extent.nbytes:
        return
    swaps = [_copy_swap(index, destination, tensor) for _, destination, _, _ in asked]
    sliced = tensor.slices or any(made.slices for *_, made in asked)
    width = max(tensor.dtype.bits // 8, 1)
    made_of = [Regions(made, width) for *_, made in asked]
    source = Regions(tensor, width)
    for box in regions.common_boxes([tensor, *(t for *_, t in asked)]) if sliced else [None]:
        targets = []
        for (_, destination, _, made), swap, to in zip(asked, swaps, made_of, strict=True):
            extent, offset, grid = _bytes_of(made, to, box, width)
            file = destination.first_file + extent.file
            targets.append(Target(file, offset, COPY, COPY, swap, grid))
        extent, offset, grid = _bytes_of(tensor, source, box, width)
        unit = (extent.offset, extent.offset + extent.nbytes) if sliced else None
        n_bytes = extent.nbytes if box is None else box.elements * width
        place = Place(first_input + extent.file, offset, grid, unit)
        yield Copy(n_bytes, place, tuple(targets))


def _copy_swap(index: Index, destination: Destination, tensor: Tensor) -> int:
    differs = index.big_endian != destination.layout.big_endian
    return swap_width(tensor.dtype.name) if differs else 0


def _bytes_of(
    tensor: Tensor, where: Regions, box: regions.Box | None, width: int
) -> regions.Region:
    """Return where a box, or the whole tensor, lies, with rows counted in bytes."""
    if box is None:
        return regions.Region(tensor.extent, tensor.extent.offset, None)
    extent, offset, grid = where.find(box)
    return regions.Region(extent, offset, grid and grid._replace(run=grid.run * width))


def _copy_follows(before: Copy, after: Copy) -> bool:
    return (
        not before.place.unit
        and not after.place.unit
        and before.place.file == after.place.file
        and before.place.offset + before.nbytes == after.place.offset
        and _continue(before.targets, before.nbytes, after.targets)
    )


def side_copies(destinations: Sequence[Destination], inputs: list[Stamp]) -> Iterator[Copy]:
    """Yield the files the outputs copy whole; stamps of new ones are appended to `inputs`."""
    ordinals = {stamp.path: ordinal for ordinal, stamp in enumerate(inputs)}
    for layout, _, first_file in destinations:
        for ordinal, file in enumerate(layout.files):
            if not file.copy_of or not file.nbytes:
                continue
            if file.copy_of not in ordinals:
                ordinals[file.copy_of] = len(inputs)
                inputs.append(stamp_of(file.copy_of))
            target = Target(first_file + ordinal, 0, COPY, COPY)
            place = Place(ordinals[file.copy_of], 0)
            yield Copy(file.nbytes, place, (target,))
