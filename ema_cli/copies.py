"""What outputs copy: tensors, bit for bit, and all of a file but what is averaged there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from ema_cli import regions
from ema_cli.blueprint import COPY, Entry
from ema_cli.errors import UnsupportedInput
from ema_cli.files import stamp_of
from ema_cli.ranges import (
    Copy,
    Destination,
    Place,
    Span,
    Target,
    Wanted,
    continues,
    ends_of,
    wanted_of,
)
from ema_cli.regions import Regions
from ema_cli.tensors import Checkpoint, Index, Stamp, Tensor, swap_width
from ema_cli.text import shorten

# Pieces of one tensor with other bytes between them, in a copy of the file they lie in.
ROW_LIMIT = 1 << 16


def copied_ranges(
    checkpoint: Checkpoint, destinations: Sequence[Destination], first_input: int
) -> Iterator[Copy]:
    """Yield what the outputs copy from a checkpoint, whose files start at `first_input`.

    Files that are copied whole bring their tensors along.
    """
    wanted = wanted_of((d, copied_entries(d, checkpoint)) for d in destinations)
    index = checkpoint.index
    pending: Copy | None = None
    for group, tensor in enumerate(index.tensors if wanted else ()):
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


def copied_entries(destination: Destination, checkpoint: Checkpoint) -> list[Entry]:
    """Return the entries whose bytes are copied one by one from a checkpoint.

    None where its files are copied whole, which brings their tensors along.
    """
    layout, held = destination.layout, destination.held
    copies = [entry for entry in layout.entries if entry.part == COPY]
    inside = held.index.by_name if held is not None else {}
    if checkpoint is held:
        return [entry for entry in copies if entry.source in inside]
    data = {stamp.path for stamp in layout.last.files if stamp.path}
    if checkpoint is not layout.last or any(file.copy_of in data for file in layout.files):
        return []
    return [entry for entry in copies if entry.source not in inside]


def _copies(
    tensor: Tensor, asked: Sequence[Wanted], index: Index, first_input: int, group: int
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
        unit = None if together or tensor.strides else Span(group, *ends_of(extent))
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
        and continues(before.targets, before.nbytes, after.targets)
    )


def file_copies(destinations: Sequence[Destination], inputs: list[Stamp]) -> Iterator[Copy]:
    """Yield what is left of the files the outputs copy, without what is averaged there.

    Stamps of new ones are appended to `inputs`.
    """
    ordinals = {stamp.path: ordinal for ordinal, stamp in enumerate(inputs)}
    for destination in destinations:
        layout, first_file = destination.layout, destination.first_file
        if not any(file.copy_of for file in layout.files):
            continue
        replaced = _replaced(destination)
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


def _replaced(destination: Destination) -> list[list[tuple[int, int]]]:
    """Return for each file of a layout where it holds something else than what it is a copy of."""
    layout, held = destination.layout, destination.held
    inside = held.index.by_name if held is not None else {}
    replaced: list[list[tuple[int, int]]] = [
        [(offset, offset + len(data)) for offset, data in file.literals] for file in layout.files
    ]
    for entry in layout.entries:
        if entry.part != COPY or entry.source in inside:
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
