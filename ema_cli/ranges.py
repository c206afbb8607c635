"""Runs of bytes that are worked on as one: adjacent tensors that lie alike in every file.

Twenty thousand small tensors saved in one order become one range; nothing is gained by knowing
where one ends and the next begins. A partitioned variable becomes one range for each box that all
its checkpoints and outputs have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ema_cli import regions
from ema_cli.blueprint import AVERAGE, BIASED, COPY, Entry, Layout
from ema_cli.errors import Disagreement, UnsupportedInput
from ema_cli.files import stamp_of
from ema_cli.regions import Grid, Regions
from ema_cli.tensors import DTYPES, Checkpoint, Extent, Index, Stamp, Tensor, swap_width
from ema_cli.text import shorten

# Pieces of one tensor with other bytes between them, in a copy of the file they lie in.
ROW_LIMIT = 1 << 16


class Span(NamedTuple):
    """Bytes from `start` to `end` that are verified together, when a `group` has read them all."""

    group: int
    start: int
    end: int


class Place(NamedTuple):
    """Where a range lies in a checkpoint.

    Attributes:
        file: ordinal in the checkpoint, or in the plan for copies.
        offset: of its first element, in bytes.
        grid: its rows, or None when its elements follow each other.
        unit: the bytes it is verified with, or None when it is not.
    """

    file: int
    offset: int
    grid: Grid | None = None
    unit: Span | None = None


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
    """

    dtype: str
    elements: int
    places: tuple[Place, ...]
    targets: tuple[tuple[Target, ...], ...]


class Copy(NamedTuple):
    """Bytes that are copied: from an input file (by ordinal in the plan) to output files.

    Without any target they are read to be verified only.
    """

    nbytes: int
    place: Place
    targets: tuple[Target, ...]


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
    """Return the ranges of the averaged `tensors`, given in the order of their bytes.

    Tensors that are stored once in every checkpoint are averaged once.
    """
    wanted = _wanted(destinations, (AVERAGE, BIASED))
    found: list[Range] = []
    elements: list[int] = []  # of each, with those of the tensors that follow it
    for group, (tensor, stored, names) in enumerate(_stored_once(tensors, indexes)):
        asked = [one for name in names for one in wanted.get(name, ())]
        asked = list({(one[0], id(one[1]), one[2], one[3][1:]): one for one in asked}.values())
        if not regions.alike([*stored, *(made for *_, made in asked)]):
            scattered = list(_scattered(tensor, stored, asked, schedules, group))
            found.extend(scattered)
            elements.extend(one.elements for one in scattered)
            continue
        count = min(tensor.elements, tensor.extent.nbytes * 8 // tensor.dtype.bits)
        places = tuple([Place(t.extent.file, t.extent.offset) for t in stored])
        targets: list[list[Target]] = [[] for _ in range(schedules)]
        for schedule, destination, part, made in asked:
            targets[schedule].append(_target(destination, part, made))
        new = Range(tensor.dtype.name, count, places, tuple(map(tuple, targets)))
        if found and _follows(found[-1], elements[-1], new):
            elements[-1] += new.elements
        else:
            found.append(new)
            elements.append(new.elements)
    return [one._replace(elements=n) for one, n in zip(found, elements, strict=True)]


def check_shared(indexes: Sequence[Index], destinations: Sequence[Destination]) -> None:
    """Raise `Disagreement` where an output has one place for what has several averages.

    What shares bytes in an output must share them in every checkpoint, in the same way.
    """
    for layout in (destination.layout for destination in destinations):
        made = [
            (layout.places[entry.name], entry.source)
            for entry in layout.entries
            if entry.part in (AVERAGE, BIASED)
        ]
        made = [one for one in made if one[0].nbytes and not one[0].slices]
        made.sort(key=lambda one: one[0].extent)
        last = layout.last.index.by_name
        for tensor, source in made:
            shown_often = tensor.extent.nbytes < tensor.nbytes
            if shown_often and any(i.by_name[source].strides != tensor.strides for i in indexes):
                raise _two_averages(f"the elements of tensor '{shorten(source)}'")
        for (first, mine), (second, other) in _overlapping(made):
            apart = second.extent.offset - first.extent.offset
            pairs = ((index.by_name[mine], index.by_name[other]) for index in indexes)
            alike = (_alike(*pair, apart, (last[mine], last[other])) for pair in pairs)
            if mine != other and not all(alike):
                raise _two_averages(f"tensors '{shorten(mine)}' and '{shorten(other)}'")


def _two_averages(what: str) -> Disagreement:
    return Disagreement(
        f"{what} share bytes in the last checkpoint but not in all others: two averages would have "
        "one place",
        "leave those checkpoints out, or write another format: -o NAME.safetensors",
    )


def _alike(a: Tensor, b: Tensor, apart: int, as_in: tuple[Tensor, Tensor]) -> bool:
    """Whether two tensors lie `apart` in one file, and each element where it does `as_in`."""
    if (a.extent.file, a.extent.offset + apart) != b.extent[:2]:
        return False
    same = (a.shape, a.strides, a.extent) == (b.shape, b.strides, b.extent)
    return same or (a.strides, b.strides) == tuple(t.strides for t in as_in)


_Made = tuple[Tensor, str]


def _overlapping(made: Iterable[_Made]) -> Iterator[tuple[_Made, _Made]]:
    """Yield each tensor, in the order of their bytes, with one before that reaches into it."""
    widest: _Made | None = None
    reached = (-1, 0)
    for one in made:
        file, offset, n_bytes = one[0].extent
        if widest is not None and reached > (file, offset):
            yield widest, one
        if (file, offset + n_bytes) > reached:
            widest, reached = one, (file, offset + n_bytes)


def _stored_once(
    tensors: Iterable[Tensor], indexes: Sequence[Index]
) -> Iterable[tuple[Tensor, list[Tensor], list[str]]]:
    """Return (tensor, how it is stored in each index, all names of these very bytes)."""
    found: dict[Any, tuple[Tensor, list[Tensor], list[str]]] = {}
    for tensor in tensors:
        if tensor.nbytes:
            stored = [index.by_name[tensor.name] for index in indexes]
            key = (tensor.dtype.name, *[t[2:] for t in stored])
            found.setdefault(key, (tensor, stored, []))[2].append(tensor.name)
    return found.values()


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


def _scattered(
    tensor: Tensor,
    stored: Sequence[Tensor],
    asked: Sequence[_Wanted],
    schedules: int,
    group: int,
) -> Iterator[Range]:
    """Yield one range for each box that the stored tensors and the outputs have in common.

    The `group` keeps what is read of this tensor apart.
    """
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
        places = tuple(
            _place(where.find(box), t, group) for where, t in zip(sources, stored, strict=True)
        )
        yield Range(tensor.dtype.name, box.elements, places, tuple(map(tuple, targets)))


def _place(region: regions.Region, tensor: Tensor, group: int) -> Place:
    """Return a place whose bytes the ranges of one tensor read once, unless it has strides."""
    extent, offset, grid = region
    unit = None if tensor.strides else Span(group, *_ends(extent))
    return Place(extent.file, offset, grid, unit)


def _ends(extent: Extent) -> tuple[int, int]:
    return extent.offset, extent.offset + extent.nbytes


def _follows(first: Range, elements: int, after: Range) -> bool:
    """Whether `after` lies `elements` after the start of `first` in every input and output."""
    if first.dtype != after.dtype:
        return False
    nbytes = elements * DTYPES[first.dtype].bits // 8
    for mine, place in zip(first.places, after.places, strict=True):
        scattered = mine.grid or place.grid or mine.unit
        if scattered or (mine.file, mine.offset + nbytes) != place[:2]:
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
    apart = [d for d in destinations if copied_entries(d.layout)]
    wanted = _wanted(apart, (COPY,))
    index = checkpoint.index
    pending: Copy | None = None
    for group, tensor in enumerate(index.tensors):
        # Ranges to average count their groups upwards from 0.
        for new in _copies(tensor, wanted.get(tensor.name, ()), index, first_input, -1 - group):
            if pending is not None and _copy_follows(pending, new):
                pending = pending._replace(nbytes=pending.nbytes + new.nbytes)
                continue
            if pending is not None:
                yield pending
            pending = new
    if pending is not None:
        yield pending


def copied_entries(layout: Layout) -> list[Entry]:
    """Return the entries whose bytes are copied one by one: none where their files are."""
    data = {stamp.path for stamp in layout.last.files if stamp.path}
    if any(file.copy_of in data for file in layout.files):
        return []
    return [entry for entry in layout.entries if entry.part == COPY]


def _copies(
    tensor: Tensor, asked: Sequence[_Wanted], index: Index, first_input: int, group: int
) -> Iterator[Copy]:
    """Yield the copies of one tensor: one for each box where it or an output is scattered."""
    if not asked or not tensor.nbytes:
        return
    swaps = [_copy_swap(index, destination, tensor) for _, destination, _, _ in asked]
    together = not tensor.dtype.bits or regions.alike([tensor, *(t for *_, t in asked)])
    width = max(tensor.dtype.bits // 8, 1)
    made_of = [Regions(made, width) for *_, made in asked]
    source = Regions(tensor, width)
    for box in [None] if together else regions.common_boxes([tensor, *(t for *_, t in asked)]):
        targets = []
        for (_, destination, _, made), swap, to in zip(asked, swaps, made_of, strict=True):
            extent, offset, grid = _bytes_of(made, to, box, width)
            file = destination.first_file + extent.file
            targets.append(Target(file, offset, COPY, COPY, swap, grid))
        extent, offset, grid = _bytes_of(tensor, source, box, width)
        unit = None if together or tensor.strides else Span(group, *_ends(extent))
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
        not (before.place.unit or before.place.grid)
        and not (after.place.unit or after.place.grid)
        and before.place.file == after.place.file
        and before.place.offset + before.nbytes == after.place.offset
        and _continue(before.targets, before.nbytes, after.targets)
    )


def file_copies(destinations: Sequence[Destination], inputs: list[Stamp]) -> Iterator[Copy]:
    """Yield what is left of the files the outputs copy, without what is averaged there.

    Stamps of new ones are appended to `inputs`.
    """
    ordinals = {stamp.path: ordinal for ordinal, stamp in enumerate(inputs)}
    for layout, _, first_file in destinations:
        if not any(file.copy_of for file in layout.files):
            continue
        replaced = _replaced(layout)
        for ordinal, file in enumerate(layout.files):
            if not file.copy_of or not file.nbytes:
                continue
            if file.copy_of not in ordinals:
                ordinals[file.copy_of] = len(inputs)
                inputs.append(stamp_of(file.copy_of))
            start = 0
            for first, end in [*sorted(replaced[ordinal]), (file.nbytes, file.nbytes)]:
                if start < first:
                    target = Target(first_file + ordinal, start, COPY, COPY)
                    yield Copy(first - start, Place(ordinals[file.copy_of], start), (target,))
                start = max(start, end)


def _replaced(layout: Layout) -> list[list[tuple[int, int]]]:
    """Return for each file of a layout where it holds something else than what it is a copy of."""
    replaced: list[list[tuple[int, int]]] = [
        [(offset, offset + len(data)) for offset, data in file.literals] for file in layout.files
    ]
    for entry in layout.entries:
        if entry.part != COPY:
            made = layout.places[entry.name]
            width = made.dtype.bits // 8
            for box, extent in regions.stored_boxes(made) if made.nbytes else []:
                _, offset, grid = Regions(made, width).find(box)
                rows = [(offset, extent.nbytes // width)]
                if grid is not None and extent.nbytes > made.nbytes:  # with gaps between
                    rows = _rows(made, regions.stretches(offset, grid, width, 0, box.elements))
                replaced[extent.file].extend((at, at + n * width) for at, n in rows)
    return replaced


def _rows(made: Tensor, rows: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the rows of a tensor between which there is something else."""
    found = list(itertools.islice(rows, ROW_LIMIT + 1))
    if len(found) > ROW_LIMIT:
        raise UnsupportedInput(
            f"tensor '{shorten(made.name)}' lies in more than {ROW_LIMIT:,} pieces with other "
            "bytes between them",
            "write another format, e.g. -o NAME.safetensors, or save the tensor contiguous",
        )
    return found
