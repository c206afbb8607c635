"""Elements that are read and written by their strides, held against NumPy's `as_strided`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ema_cli import gathering, regions
from ema_cli.regions import Grid
from ema_cli.tensors import DTYPES, Extent, Tensor

Array = np.ndarray[Any, Any]
SENTINEL = 0xEE


class Stored(NamedTuple):
    """A tensor with strides in a file: the file's bytes are all different numbers."""

    content: Array
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def grid(self) -> Grid:
        """Its rows, as the engine is told of them."""
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        width = self.content.itemsize
        tensor = Tensor(
            "t",
            DTYPES[self.content.dtype.name],
            self.shape,
            Extent(0, self.offset, span * width),
            (),
            self.strides,
        )
        region = regions.whole(tensor, width)
        assert region.offset == self.offset
        return region.grid or Grid(tensor.elements, ())

    @property
    def values(self) -> Array:
        """What NumPy shows of it, flat."""
        width = self.content.itemsize
        base = self.content[self.offset // width :]
        strides = [s * width for s in self.strides]
        return np.lib.stride_tricks.as_strided(base, self.shape, strides).reshape(-1).copy()

    @property
    def places(self) -> Array:
        """The ordinal in the file of each of its elements, flat."""
        steps = np.indices(self.shape).reshape(len(self.shape), -1)
        reach = (steps * np.array(self.strides, int).reshape(-1, 1)).sum(axis=0)
        return reach + self.offset // self.content.itemsize


class Reads:
    """A file that is read; remembers how."""

    def __init__(self, content: Array) -> None:
        self.raw = content.tobytes()
        self.calls: list[tuple[int, int]] = []

    def __call__(self, part: memoryview, offset: int) -> None:
        assert 0 <= offset <= offset + len(part) <= len(self.raw)
        self.calls.append((offset, len(part)))
        part[:] = self.raw[offset : offset + len(part)]


class Writes:
    """A file that is written; bytes that were not written are `SENTINEL`."""

    def __init__(self, n_bytes: int) -> None:
        self.raw = bytearray([SENTINEL]) * n_bytes
        self.calls: list[tuple[int, int]] = []

    def __call__(self, part: memoryview, offset: int) -> None:
        assert 0 <= offset <= offset + len(part) <= len(self.raw)
        self.calls.append((offset, len(part)))
        self.raw[offset : offset + len(part)] = part


def stored(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, dtype: str = "float32"
) -> Stored:
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    content = np.arange(1, offset + span + 3).astype(dtype)
    return Stored(content, offset * content.itemsize, shape, strides)


def fetched(one: Stored, start: int, count: int) -> tuple[Array, Reads]:
    reads = Reads(one.content)
    block = np.zeros(count, one.content.dtype)
    gathering.fetch(one.grid, one.offset, start, block, reads)
    return block, reads


@st.composite
def tensors(draw: st.DrawFn) -> Stored:
    """Any strides: none, gaps, overlaps, dimensions in any order, of length 1."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    kinds = st.one_of(st.just(0), st.just(1), st.integers(0, 12), st.integers(0, 60))
    strides = tuple(draw(kinds) for _ in shape)
    if draw(st.booleans()):  # a permutation of what is contiguous, as transposing makes it
        order = draw(st.permutations(range(len(shape))))
        made = [0] * len(shape)
        step = 1
        for axis in order:
            made[axis] = step
            step *= shape[axis]
        strides = tuple(made)
    dtype = draw(st.sampled_from(["float32", "float64", "float16"]))
    return stored(shape, strides, draw(st.integers(0, 5)), dtype)


@st.composite
def stretches(draw: st.DrawFn) -> tuple[Stored, int, int]:
    """A tensor and any stretch of its elements."""
    one = draw(tensors())
    elements = math.prod(one.shape)
    start = draw(st.integers(0, elements - 1))
    return one, start, draw(st.integers(1, elements - start))


# ---------------------------------------------------------------------------- values


@given(stretches())
@example((stored((3, 4), (1, 3)), 0, 12))
@example((stored((3, 4), (0, 0)), 1, 9))
@example((stored((2, 3, 4), (12, 0, 3)), 5, 17))
def test_any_stretch_is_fetched(case: tuple[Stored, int, int]) -> None:
    """The elements NumPy shows, in C order; nothing outside of the tensor is read."""
    one, start, count = case
    block, reads = fetched(one, start, count)
    assert block.tobytes() == one.values[start : start + count].tobytes()
    first, last = one.places[start : start + count].min(), one.places[start : start + count].max()
    width = one.content.itemsize
    assert min(at for at, _ in reads.calls) == first * width
    assert max(at + n for at, n in reads.calls) == (last + 1) * width


@given(stretches())
@example((stored((3, 4), (1, 3)), 0, 12))
@example((stored((3, 4), (0, 0)), 1, 9))
def test_any_stretch_is_put(case: tuple[Stored, int, int]) -> None:
    """Each element where NumPy has it, and not a byte elsewhere."""
    one, start, count = case
    width = one.content.itemsize
    writes = Writes(one.content.nbytes)
    block = one.values[start : start + count]
    gathering.put(one.grid, one.offset, start, block, writes)
    expected = bytearray([SENTINEL]) * one.content.nbytes
    raw = one.content.tobytes()
    for place in one.places[start : start + count]:
        expected[place * width : (place + 1) * width] = raw[place * width : (place + 1) * width]
    assert writes.raw == expected


@given(one=tensors(), size=st.integers(1, 7))
def test_blocks_one_after_the_other_are_the_whole(one: Stored, size: int) -> None:
    """However the elements are cut into blocks."""
    elements = math.prod(one.shape)
    made = [fetched(one, at, min(size, elements - at))[0] for at in range(0, elements, size)]
    assert np.concatenate(made).tobytes() == one.values.tobytes()


@given(one=tensors(), size=st.integers(1, 7))
def test_what_was_put_is_fetched(one: Stored, size: int) -> None:
    """Written in blocks of one size and read in another."""
    writes = Writes(one.content.nbytes)
    elements = math.prod(one.shape)
    for at in range(0, elements, size):
        gathering.put(one.grid, one.offset, at, one.values[at : at + size], writes)
    block = np.zeros(elements, one.content.dtype)
    reads = Reads(np.frombuffer(bytes(writes.raw), one.content.dtype))
    gathering.fetch(one.grid, one.offset, 0, block, reads)
    assert block.tobytes() == one.values.tobytes()


# ---------------------------------------------------------------------------- how often


CHANNELS_LAST = ((64, 32, 3, 3), (288, 1, 96, 32))
# A tensor, with the reads it may take and the writes it needs: what lies between its elements may
# be read, but never written.
WHOLE = {
    "transposed": (stored((300, 200), (1, 300)), 1, 1),
    "channels last": (stored(*CHANNELS_LAST), 1, 1),
    "every other element": (stored((500,), (2,)), 1, 500),
    "every other row": (stored((40, 100), (200, 1)), 1, 40),
    "rows far apart": (stored((40, 100), (20_000, 1)), 40, 40),
    "a transposed half": (stored((100, 200), (1, 300)), 1, 200),
    "one element shown often": (stored((100, 200), (0, 0)), 1, 1),
    "a row shown often": (stored((100, 200), (0, 1)), 1, 1),
    "a column shown often": (stored((100, 200), (1, 0)), 1, 1),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_tensor_takes_few_reads_and_writes(case: str) -> None:
    """One write for each run of bytes in the file, and no more reads."""
    one, most_reads, needed = WHOLE[case]
    elements = math.prod(one.shape)
    block, reads = fetched(one, 0, elements)
    assert block.tobytes() == one.values.tobytes()
    assert len(reads.calls) <= most_reads
    writes = Writes(one.content.nbytes)
    gathering.put(one.grid, one.offset, 0, block, writes)
    assert len(writes.calls) == needed


@pytest.mark.parametrize("case", ["transposed", "channels last"])
def test_blocks_of_a_tensor_take_few_reads(case: str) -> None:
    """Far fewer than elements: a block of whole rows has a stretch for each column."""
    one = WHOLE[case][0]
    elements, calls = math.prod(one.shape), 0
    for at in range(0, elements, 20_000):
        calls += len(fetched(one, at, min(20_000, elements - at))[1].calls)
    assert calls < elements / 40


def test_a_wide_transposed_tensor_is_not_read_element_by_element() -> None:
    """Rows as long as an embedding's: a block holds few of them, and cuts two more."""
    rows, columns = 40, 5000
    one = stored((rows, columns), (1, rows))
    calls = 0
    for at in range(0, rows * columns, 4 * columns + 7):
        calls += len(fetched(one, at, min(4 * columns + 7, rows * columns - at))[1].calls)
    assert calls < rows * columns / 10


# ---------------------------------------------------------------------------- which way


@pytest.mark.parametrize(
    ("grid", "scattered"),
    [
        (None, False),
        (Grid(1, ((10, 8),)), True),
        (Grid(1023, ((10, 8192),)), True),
        (Grid(1024, ((10, 8192),)), False),
    ],
)
def test_short_rows_are_gathered(grid: Grid | None, scattered: bool) -> None:
    """Rows of 4 KiB and more are read one by one."""
    assert gathering.is_scattered(grid, 4) is scattered
