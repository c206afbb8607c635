"""Elements that lie in rows too short to be read or written one by one.

A transposed tensor has rows of one element in C order, but long ones in the order of its bytes. So
a stretch of elements is taken apart into boxes, each box is read or written in the order in which
it is stored, and its elements change places in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ema_cli.regions import Grid

Array = np.ndarray[Any, Any]
# Bytes of a row from which reading it alone costs no more than the call.
SHORT_ROW = 4096
# Bytes that are read by one call, with gaps.
_SPAN = 1 << 20


class _Part(NamedTuple):
    """A box of a stretch: its lengths, the byte offset of its first element, and its strides."""

    lengths: list[int]
    offset: int
    strides: list[int]

    @property
    def elements(self) -> int:
        return math.prod(self.lengths)


def is_scattered(grid: Grid | None, width: int) -> bool:
    """Whether elements of `width` bytes that lie so are better gathered."""
    return grid is not None and grid.run * width < SHORT_ROW


def fetch(
    grid: Grid, offset: int, start: int, block: Array, read: Callable[[memoryview, int], None]
) -> None:
    """Fill `block` with elements from `start` on; `read` fills a buffer with those at an offset.

    `offset` is that of element 0, in bytes, as are the strides of the grid.
    """
    done = 0
    for part in _parts(grid, offset, block.itemsize, start, len(block)):
        axes = _stored_order(part)
        stored = np.empty([_stored_length(part, axis) for axis in axes], block.dtype)
        for at, rows, stride in _groups(part, axes, stored.reshape(-1)):
            if len(rows) == 1:
                read(rows[0].data, at)
                continue
            span = np.empty((len(rows) - 1) * stride + rows.shape[1], np.uint8)
            read(span.data, at)
            rows[...] = np.lib.stride_tricks.as_strided(span, rows.shape, (stride, 1))
        into = block[done : done + part.elements].reshape(part.lengths)
        into[...] = stored.transpose(np.argsort(axes))
        done += part.elements


def put(
    grid: Grid, offset: int, start: int, block: Array, write: Callable[[memoryview, int], None]
) -> None:
    """Write the elements of `block` from `start` on; the counterpart of `fetch`."""
    done = 0
    for part in _parts(grid, offset, block.itemsize, start, len(block)):
        axes = _stored_order(part)
        values = block[done : done + part.elements].reshape(part.lengths).transpose(axes)
        shown = tuple(slice(_stored_length(part, axis)) for axis in axes)
        flat = np.ascontiguousarray(values[shown]).reshape(-1).view(np.uint8).data
        for at, place, n_bytes in _rows(part, axes, block.itemsize):
            write(flat[place : place + n_bytes], at)
        done += part.elements


def _stored_order(part: _Part) -> list[int]:
    """Return the axes of a part in the order of its bytes, the innermost last."""
    axes = range(len(part.lengths))
    return sorted(axes, key=lambda axis: (-part.strides[axis], axis))


def _stored_length(part: _Part, axis: int) -> int:
    """Return how many different elements lie along an axis: one where it has no stride."""
    return part.lengths[axis] if part.strides[axis] else 1


def _rows(part: _Part, axes: Sequence[int], width: int) -> Iterator[tuple[int, int, int]]:
    """Yield (byte offset in the file, place in the buffer, bytes) of the rows of a part."""
    lengths, strides, run = _outer(part, axes, width)
    for row, place in enumerate(np.ndindex(*lengths)):
        skipped = sum(p * stride for p, stride in zip(place, strides, strict=True))
        yield part.offset + skipped, row * run * width, run * width


def _outer(part: _Part, axes: Sequence[int], width: int) -> tuple[list[int], list[int], int]:
    """Return the lengths and strides of the axes that rows differ in, and a row's elements."""
    lengths = [_stored_length(part, axis) for axis in axes]
    strides = [part.strides[axis] for axis in axes]
    run, k = 1, len(axes)
    while k and (lengths[k - 1] == 1 or strides[k - 1] == run * width):
        k -= 1
        run *= lengths[k]
    return lengths[:k], strides[:k], run


def _groups(part: _Part, axes: Sequence[int], stored: Array) -> Iterator[tuple[int, Array, int]]:
    """Yield (byte offset, rows as bytes, their distance) of rows that are read by one call.

    Where the gaps between them are short, reading these too costs less than calls without them.
    """
    width = stored.itemsize
    lengths, strides, run = _outer(part, axes, width)
    rows = stored.view(np.uint8).reshape(-1, run * width)
    near = bool(lengths) and run * width < strides[-1] <= SHORT_ROW
    together = max(1, _SPAN // strides[-1]) if near else 1
    inner = lengths[-1] if near else 1
    row = 0
    for place in np.ndindex(*(lengths[:-1] if near else lengths)):
        skipped = sum(p * stride for p, stride in zip(place, strides, strict=False))
        for first in range(0, inner, together):
            count = min(together, inner - first)
            at = part.offset + skipped + (first * strides[-1] if near else 0)
            yield at, rows[row : row + count], strides[-1] if near else 0
            row += count


def _parts(grid: Grid, offset: int, width: int, start: int, count: int) -> Iterator[_Part]:
    """Yield the boxes, in C order, of which `count` elements from `start` on are made."""
    lengths = [n for n, _ in grid.steps] + [grid.run]
    strides = [stride for _, stride in grid.steps] + [width]
    below = [math.prod(lengths[k + 1 :]) for k in range(len(lengths))]
    while count:
        # The outermost dimension of which whole entries can be taken from here.
        axis = next(k for k, n in enumerate(below) if start % n == 0 and count >= n)
        place = [start // n % length for n, length in zip(below, lengths, strict=True)]
        taken = min(count // below[axis], lengths[axis] - place[axis])
        at = offset + sum(p * stride for p, stride in zip(place, strides, strict=True))
        yield _Part([taken, *lengths[axis + 1 :]], at, strides[axis:])
        start, count = start + taken * below[axis], count - taken * below[axis]
