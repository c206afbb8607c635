"""Elements that lie in rows: how a box of a tensor is found inside the bytes that store it.

Partitioned variables are stored as boxes, each in C order. Where two checkpoints, or a checkpoint
and an output, cut a tensor differently, their common boxes lie in each of them as rows of elements
with gaps between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ema_cli.errors import UnsupportedInput
from ema_cli.tensors import Extent, Tensor
from ema_cli.text import shorten

# Boxes of one tensor: cut by rows in one checkpoint and by columns in another they multiply.
BOX_LIMIT = 1 << 16
# Pairs of boxes that are compared to find them.
PAIR_LIMIT = 1 << 21


class Grid(NamedTuple):
    """Rows of `run` elements; `steps` are (count, stride in bytes) from the outermost inwards."""

    run: int
    steps: tuple[tuple[int, int], ...]


class Box(NamedTuple):
    """A part of a tensor: first index and number of indices along each dimension."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it holds."""
        return math.prod(self.lengths)


class Region(NamedTuple):
    """Where the elements of a box lie, in C order of the box.

    Attributes:
        extent: the stored piece that holds the box.
        offset: of its first element, in bytes.
        grid: its rows, or None when the elements follow each other.
    """

    extent: Extent
    offset: int
    grid: Grid | None


def stored_boxes(tensor: Tensor) -> list[tuple[Box, Extent]]:
    """Return the boxes a tensor is stored as, with where each lies."""
    if not tensor.slices:
        return [(Box((0,) * len(tensor.shape), tensor.shape), tensor.extent)]
    return [(Box(piece.starts, piece.lengths), piece.extent) for piece in tensor.slices]


def common_boxes(tensors: Sequence[Tensor]) -> list[Box]:
    """Return the boxes of which every stored piece of each of the tensors is made."""
    boxes = [box for box, _ in stored_boxes(tensors[0])]
    seen = {_cut(tensors[0])}
    for tensor in tensors[1:]:
        if _cut(tensor) not in seen:
            seen.add(_cut(tensor))
            cut = [box for box, _ in stored_boxes(tensor)]
            if len(boxes) * len(cut) > PAIR_LIMIT:
                raise _too_different(tensor)
            pairs = (_intersection(a, b) for a in boxes for b in cut)
            boxes = list(itertools.islice((b for b in pairs if b is not None), BOX_LIMIT + 1))
            if len(boxes) > BOX_LIMIT:
                raise _too_different(tensor)
    return [box for box in boxes if box.elements]


def _too_different(tensor: Tensor) -> UnsupportedInput:
    return UnsupportedInput(
        f"tensor '{shorten(tensor.name)}': its checkpoints or outputs slice it so differently that "
        f"they have more than {BOX_LIMIT:,} boxes in common, or too many to compare",
        "average those sliced alike, and convert the result with ema-avg rename",
    )


def alike(tensors: Sequence[Tensor]) -> bool:
    """Whether one element after the other, as they lie, is the same element of each tensor.

    So it is where all are in C order, and where all have the same strides and nothing between
    their elements. A view that shows elements more than once is taken for the bytes it shows.
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor.slices or tensor.strides != first.strides:
            return False
    return not first.strides or first.extent.nbytes <= first.nbytes


def _cut(tensor: Tensor) -> tuple[Box, ...]:
    return tuple(box for box, _ in stored_boxes(tensor))


def _intersection(a: Box, b: Box) -> Box | None:
    starts = tuple(map(max, a.starts, b.starts))
    ends = (
        min(s + n, t + m)
        for s, n, t, m in zip(a.starts, a.lengths, b.starts, b.lengths, strict=True)
    )
    lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return None if any(n <= 0 for n in lengths) else Box(starts, lengths)


class Regions:
    """Finds boxes in the stored bytes of a tensor; many of them are stored just so.

    Args:
        tensor: where to look.
        width: bytes of an element.
    """

    def __init__(self, tensor: Tensor, width: int) -> None:
        self._tensor = tensor
        self._width = width
        self._stored = stored_boxes(tensor)
        self._exact = {} if tensor.strides else dict(self._stored)

    def find(self, box: Box) -> Region:
        """Return where a box lies that is inside one stored piece, as `common_boxes` are."""
        extent = self._exact.get(box)
        if extent is not None:
            return Region(extent, extent.offset, None)
        for stored, extent in self._stored:
            if _inside(box, stored):
                strides = byte_strides(self._tensor, stored, self._width)
                skipped = zip(box.starts, stored.starts, strides, strict=True)
                offset = extent.offset + sum((b - s) * stride for b, s, stride in skipped)
                return Region(extent, offset, _grid(box.lengths, strides, self._width))
        raise ValueError(f"{box} is no part of a piece of {self._tensor.name}")


def whole(tensor: Tensor, width: int) -> Region:
    """Return where the elements of a tensor lie that is stored as one piece."""
    return Regions(tensor, width).find(Box((0,) * len(tensor.shape), tensor.shape))


def _inside(box: Box, stored: Box) -> bool:
    return all(
        t <= s and s + n <= t + m
        for s, n, t, m in zip(box.starts, box.lengths, stored.starts, stored.lengths, strict=True)
    )


def byte_strides(tensor: Tensor, stored: Box, width: int) -> list[int]:
    """Return the distance in bytes of neighbours along each dimension of a stored box."""
    if tensor.strides:
        return [stride * width for stride in tensor.strides]
    strides = [width] * len(stored.lengths)
    for k in range(len(strides) - 2, -1, -1):
        strides[k] = strides[k + 1] * stored.lengths[k + 1]
    return strides


def _grid(box: Sequence[int], strides: Sequence[int], width: int) -> Grid | None:
    """Return the rows of a box: what follows each other in its innermost dimensions is one row."""
    run, k = 1, len(box)
    while k and (box[k - 1] == 1 or strides[k - 1] == run * width):
        k -= 1
        run *= box[k]
    steps = tuple((n, stride) for n, stride in zip(box[:k], strides[:k], strict=True) if n > 1)
    return Grid(run, steps) if steps else None


def stretches(
    offset: int, grid: Grid | None, width: int, start: int, count: int
) -> Iterator[tuple[int, int]]:
    """Yield (byte offset, elements) of the stretches that hold `count` elements from `start` on.

    `offset` is that of element 0; elements have `width` bytes.
    """
    if grid is None:
        yield offset + start * width, count
        return
    row, column = divmod(start, grid.run)
    while count:
        n = min(grid.run - column, count)
        position, rest = offset + column * width, row
        for length, stride in reversed(grid.steps):
            rest, digit = divmod(rest, length)
            position += digit * stride
        yield position, n
        count, row, column = count - n, row + 1, 0


def pieces(tensor: Tensor, width: int, start: int, count: int) -> Iterator[tuple[Extent, int, int]]:
    """Yield (extent, byte offset, elements) of the stretches that hold elements of a tensor.

    `count` elements from `start` on, in C order of the whole tensor.
    """
    boxes = [
        (box, extent, byte_strides(tensor, box, width), _row(box.lengths, tensor.shape))
        for box, extent in stored_boxes(tensor)
    ]
    while count:
        place = _unravelled(start, tensor.shape)
        for box, extent, strides, run in boxes:
            inside = [p - s for p, s in zip(place, box.starts, strict=True)]
            if all(0 <= i < n for i, n in zip(inside, box.lengths, strict=True)):
                skipped = sum(i * stride for i, stride in zip(inside, strides, strict=True))
                n = min(run - skipped // width % run, count)
                yield extent, extent.offset + skipped, n
                start, count = start + n, count - n
                break
        else:
            raise ValueError(f"element {start} of {tensor.name} is stored nowhere")


def _row(box: Sequence[int], shape: Sequence[int]) -> int:
    """Return how many elements of a box follow each other in the whole tensor too."""
    run = 1
    for n, full in zip(reversed(box), reversed(shape), strict=True):
        run *= n
        if n != full:
            break
    return run


def _unravelled(position: int, shape: Sequence[int]) -> list[int]:
    place = []
    for n in reversed(shape):
        position, digit = divmod(position, n)
        place.append(digit)
    return place[::-1]
