"""Runs of bytes that are worked on as one: adjacent tensors that lie alike in every file.

Twenty thousand small tensors saved in one order become one range; nothing is gained by knowing
where one ends and the next begins. A partitioned variable becomes one range for each box that all
its checkpoints and outputs have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ema_cli import regions
from ema_cli.blueprint import AVERAGE, BIASED, COPY, Entry, Layout
from ema_cli.errors import Disagreement
from ema_cli.regions import Grid, Regions
from ema_cli.tensors import DTYPES, Checkpoint, Extent, Index, Tensor, swap_width
from ema_cli.text import shorten


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
        dtype: of its elements, or ``copy`` for bytes.
    """

    file: int
    offset: int
    grid: Grid | None = None
    unit: Span | None = None
    dtype: str = COPY


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
        segments: for neighbours of one group, where they end and its ordinal; see `work.Manner`.
    """

    dtype: str
    elements: int
    places: tuple[Place, ...]
    targets: tuple[tuple[Target, ...], ...]
    segments: tuple[tuple[int, int], ...] = ()


class Copy(NamedTuple):
    """Bytes that are copied: from an input file (by ordinal in the plan) to output files.

    Without any target they are read to be verified only.
    """

    nbytes: int
    place: Place
    targets: tuple[Target, ...]


class Destination(NamedTuple):
    """An output's layout, the schedule whose result it takes, and its first file's ordinal.

    What `held` holds is copied from there, the rest from the layout's last checkpoint.
    """

    layout: Layout
    schedule: int
    first_file: int
    held: Checkpoint | None = None


# A tensor of an output: the schedule it belongs to, its destination, what of it, and as what.
Wanted = tuple[int, Destination, str, Tensor]


def averaged_ranges(
    tensors: Iterable[Tensor],
    indexes: Sequence[Index],
    destinations: Sequence[Destination],
    schedules: int,
    group_of: Mapping[str, int] | None = None,
) -> list[Range]:
    """Return the ranges of the averaged `tensors`, given in the order of their bytes.

    Tensors that are stored once in every checkpoint are averaged once, and belong to the group of
    the first name: `group_of` tells each, unless none is asked for.
    """
    parts = (AVERAGE, BIASED)
    wanted = wanted_of((d, [e for e in d.layout.entries if e.part in parts]) for d in destinations)
    found: list[Range] = []
    elements: list[int] = []  # of each, with those of the tensors that follow it
    segments: list[list[tuple[int, int]]] = []
    for group, (tensor, stored, names) in enumerate(_stored_once(tensors, indexes)):
        asked = _asked(wanted, names)
        if not regions.alike([*stored, *(made for *_, made in asked)]):
            scattered = list(_scattered(tensor, stored, asked, schedules, group))
            found.extend(scattered)
            elements.extend(one.elements for one in scattered)
            segments.extend(_segments(group_of, tensor, one.elements) for one in scattered)
            continue
        count = min(tensor.elements, tensor.extent.nbytes * 8 // tensor.dtype.bits)
        places = tuple([_start(t) for t in stored])
        targets: list[list[Target]] = [[] for _ in range(schedules)]
        for schedule, destination, part, made in asked:
            targets[schedule].append(_target(destination, part, made))
        new = Range(tensor.dtype.name, count, places, tuple(map(tuple, targets)))
        if found and _follows(found[-1], elements[-1], new):
            elements[-1] += new.elements
            _extend(segments[-1], _segments(group_of, tensor, elements[-1]))
        else:
            found.append(new)
            elements.append(new.elements)
            segments.append(_segments(group_of, tensor, new.elements))
    return [
        one._replace(elements=n, segments=tuple(groups))
        for one, n, groups in zip(found, elements, segments, strict=True)
    ]


def _asked(wanted: Mapping[str, list[Wanted]], names: Sequence[str]) -> list[Wanted]:
    """Return what is made of the tensor that has these names, each place once."""
    asked = [one for name in names for one in wanted.get(name, ())]
    if len(asked) < 2:
        return asked
    return list({(one[0], id(one[1]), one[2], one[3][1:]): one for one in asked}.values())


def _segments(
    group_of: Mapping[str, int] | None, tensor: Tensor, end: int
) -> list[tuple[int, int]]:
    return [] if group_of is None else [(end, group_of[tensor.name])]


def _extend(segments: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
    """Append what follows; neighbours of one group become one."""
    if segments and more and segments[-1][1] == more[0][1]:
        segments.pop()
    segments.extend(more)


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


def wanted_of(
    asked: Iterable[tuple[Destination, Iterable[Entry]]],
) -> dict[str, list[Wanted]]:
    """Return for each input tensor what is made of it, of the entries asked for."""
    wanted: dict[str, list[Wanted]] = {}
    for destination, entries in asked:
        places = destination.layout.places
        for entry in entries:
            made = (destination.schedule, destination, entry.part, places[entry.name])
            wanted.setdefault(entry.source, []).append(made)
    return wanted


def _start(tensor: Tensor) -> Place:
    return Place(tensor.extent.file, tensor.extent.offset, dtype=tensor.dtype.name)


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
    asked: Sequence[Wanted],
    schedules: int,
    group: int,
) -> Iterator[Range]:
    """Yield one range for each box that the stored tensors and the outputs have in common.

    The `group` keeps what is read of this tensor apart.
    """
    sources = [Regions(t, t.dtype.bits // 8) for t in stored]
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
    unit = None if tensor.strides else Span(group, *ends_of(extent))
    return Place(extent.file, offset, grid, unit, tensor.dtype.name)


def ends_of(extent: Extent) -> tuple[int, int]:
    """Return where the bytes of an extent begin and end."""
    return extent.offset, extent.offset + extent.nbytes


def _follows(first: Range, elements: int, after: Range) -> bool:
    """Whether `after` lies `elements` after the start of `first` in every input and output."""
    if first.dtype != after.dtype:
        return False
    for mine, place in zip(first.places, after.places, strict=True):
        nbytes = elements * DTYPES[mine.dtype].bits // 8
        scattered = mine.grid or place.grid or mine.unit
        if scattered or (mine.file, mine.offset + nbytes) != place[:2]:
            return False
    for targets, others in zip(first.targets, after.targets, strict=True):
        if not continues(targets, elements, others):
            return False
    return True


def continues(first: Sequence[Target], elements: int, after: Sequence[Target]) -> bool:
    """Whether the targets `after` lie `elements` (bytes of a copy) after those of `first`."""
    if len(first) != len(after):
        return False
    for (file, offset, part, dtype, swap, grid), target in zip(first, after, strict=True):
        nbytes = elements if dtype == COPY else elements * DTYPES[dtype].bits // 8
        if grid or (file, offset + nbytes, part, dtype, swap, None) != target:
            return False
    return True
