"""Boxes of tensors that are stored in slices: where their elements lie, held against NumPy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_bundles import Extents, inside
from tensorflow_strategies import Shape, shapes, tilings

from ema_cli import regions
from ema_cli.errors import UnsupportedInput
from ema_cli.regions import (
    Box,
    Grid,
    Region,
    Regions,
    common_boxes,
    pieces,
    stored_boxes,
    stretches,
)
from ema_cli.tensors import DTYPES, NO_FILE, Extent, Slice, Tensor

Array = np.ndarray[Any, Any]
INT = DTYPES["int32"]
WIDTH = 4


def values(shape: Shape) -> Array:
    """Elements that all differ."""
    return np.arange(int(np.prod(shape)), dtype="<i4").reshape(shape)


def stored(shape: Shape, slices: list[Extents] | None, start: int = 0) -> tuple[Tensor, bytes]:
    """A tensor whole, or in slices one after the other from `start` on; and the file's bytes."""
    array = values(shape)
    data = b"\xee" * start
    if slices is None:
        tensor = Tensor("t", INT, shape, Extent(0, start, array.nbytes))
        return tensor, data + array.tobytes()
    made = []
    for extents in slices:
        part = array[inside(extents, shape)]
        place = Extent(0, len(data), part.nbytes)
        whole = tuple(n < 0 for _, n in extents)
        made.append(Slice(tuple(s for s, _ in extents), part.shape, whole, place))
        data += part.tobytes() + b"\xee" * 3
    return Tensor("t", INT, shape, Extent(NO_FILE, 0, array.nbytes), tuple(made)), data


def read(data: bytes, offset: int, elements: int) -> list[int]:
    return np.frombuffer(data[offset : offset + elements * WIDTH], "<i4").tolist()


def region(tensor: Tensor, box: Box, width: int) -> Region:
    return Regions(tensor, width).find(box)


def place_of(box: Box) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(box.starts, box.lengths, strict=True))


@st.composite
def tensors(draw: st.DrawFn, shape: Shape) -> tuple[Tensor, bytes]:
    """A tensor of a shape, whole or in any slices, somewhere in a file."""
    slices = draw(st.none() | tilings(shape))
    return stored(shape, slices, draw(st.integers(0, 9)))


# ---------------------------------------------------------------------------- boxes


@given(data=st.data(), shape=shapes)
def test_common_boxes_cover_each_element_once(data: st.DataObject, shape: Shape) -> None:
    """Each lies inside one stored piece of every tensor, and no larger ones would."""
    made = [data.draw(tensors(shape))[0] for _ in range(data.draw(st.integers(1, 4)))]
    boxes = common_boxes(made)
    covered = np.zeros(shape, int)
    for box in boxes:
        assert box.elements > 0
        covered[place_of(box)] += 1
        for tensor in made:
            Regions(tensor, WIDTH).find(box)
    assert (covered == 1).all()
    cuts = {tuple(map(tuple, (box for box, _ in stored_boxes(tensor)))) for tensor in made}
    if len(cuts) == 1:
        assert boxes == [box for box, _ in stored_boxes(made[0]) if box.elements]


@given(data=st.data(), shape=shapes)
def test_a_region_holds_the_elements_of_its_box(data: st.DataObject, shape: Shape) -> None:
    """In C order of the box, at offsets that only grow, in as few stretches as there are."""
    made = [data.draw(tensors(shape)) for _ in range(3)]
    for box in common_boxes([tensor for tensor, _ in made]):
        expected = values(shape)[place_of(box)].ravel().tolist()
        for tensor, content in made:
            extent, offset, grid = Regions(tensor, WIDTH).find(box)
            found: list[int] = []
            places = list(stretches(offset, grid, WIDTH, 0, box.elements))
            for at, n in places:
                assert extent.offset <= at <= at + n * WIDTH <= extent.offset + extent.nbytes
                found += read(content, at, n)
            assert found == expected
            for (first, n), (second, _) in pairwise(places):
                assert first + n * WIDTH < second
            assert (grid is None) == (len(places) == 1)


@given(data=st.data(), shape=shapes.filter(lambda shape: np.prod(shape) > 0))
def test_any_stretch_of_a_region_is_found(data: st.DataObject, shape: Shape) -> None:
    """From any element on, any number of them: the middle of rows, many rows at once."""
    one, other = (data.draw(tensors(shape)) for _ in range(2))
    box = data.draw(st.sampled_from(common_boxes([one[0], other[0]])))
    start = data.draw(st.integers(0, box.elements - 1))
    count = data.draw(st.integers(1, box.elements - start))
    _, offset, grid = Regions(one[0], WIDTH).find(box)
    found: list[int] = []
    for at, n in stretches(offset, grid, WIDTH, start, count):
        found += read(one[1], at, n)
    assert found == values(shape)[place_of(box)].ravel()[start : start + count].tolist()


def test_a_box_that_no_piece_holds_is_an_error() -> None:
    """It would have to be read from two of them."""
    tensor, _ = stored((4, 2), [((0, 2), (0, -1)), ((2, 2), (0, -1))])
    assert Regions(tensor, WIDTH).find(Box((2, 0), (2, 2))).grid is None
    with pytest.raises(ValueError, match="no part of a piece"):
        Regions(tensor, WIDTH).find(Box((1, 0), (2, 2)))


def test_cuts_that_multiply_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows against columns: as many boxes as rows times columns, up to a limit."""
    rows, _ = stored((6, 6), [((k, 1), (0, -1)) for k in range(6)])
    columns, _ = stored((6, 6), [((0, -1), (k, 1)) for k in range(6)])
    monkeypatch.setattr(regions, "BOX_LIMIT", 36)
    assert len(common_boxes([rows, columns])) == 36
    monkeypatch.setattr(regions, "BOX_LIMIT", 35)
    with pytest.raises(UnsupportedInput, match="tensor 't'"):
        common_boxes([rows, columns])
    assert len(common_boxes([rows, rows])) == 6


GRIDS: dict[str, tuple[Box, Grid | None]] = {
    "everything": (Box((0, 0, 0), (4, 3, 2)), None),
    "some planes": (Box((1, 0, 0), (2, 3, 2)), None),
    "some rows of one plane": (Box((1, 1, 0), (1, 2, 2)), None),
    "one element": (Box((3, 2, 1), (1, 1, 1)), None),
    "rows of each plane": (Box((0, 1, 0), (4, 2, 2)), Grid(4, ((4, 24),))),
    "a column of a plane": (Box((2, 0, 1), (1, 3, 1)), Grid(1, ((3, 8),))),
    "a column of each plane": (Box((0, 0, 1), (4, 3, 1)), Grid(1, ((4, 24), (3, 8)))),
}


@pytest.mark.parametrize("case", GRIDS)
def test_full_inner_dimensions_are_one_row(case: str) -> None:
    """Rows are as long as they can be, and dimensions of one row are left out."""
    box, grid = GRIDS[case]
    tensor, _ = stored((4, 3, 2), None, 8)
    assert Regions(tensor, WIDTH).find(box).grid == grid


# ---------------------------------------------------------------------------- whole tensors


@given(data=st.data(), shape=shapes)
def test_any_stretch_of_a_whole_tensor_is_found(data: st.DataObject, shape: Shape) -> None:
    """In C order of the whole, whatever pieces it is stored in."""
    tensor, content = data.draw(tensors(shape))
    if not tensor.slices:
        tensor, content = stored(shape, [tuple((0, n) for n in shape)])
    elements = int(np.prod(shape))
    start = data.draw(st.integers(0, elements))
    count = data.draw(st.integers(0, elements - start))
    found: list[int] = []
    last: dict[Extent, int] = {}
    for extent, at, n in pieces(tensor, WIDTH, start, count):
        assert last.get(extent, -1) < at  # upwards in each piece
        last[extent] = at
        assert extent.offset <= at <= at + n * WIDTH <= extent.offset + extent.nbytes
        found += read(content, at, n)
    assert found == values(shape).ravel()[start : start + count].tolist()


def test_an_element_that_is_stored_nowhere_is_an_error() -> None:
    """Slices that do not cover their tensor are refused before; here nothing is made up."""
    tensor, _ = stored((4,), [((0, 3),)])
    assert [n for _, _, n in pieces(tensor, WIDTH, 0, 3)] == [3]
    with pytest.raises(ValueError, match="stored nowhere"):
        list(pieces(tensor, WIDTH, 0, 4))


def test_a_scalar_in_one_slice() -> None:
    """No dimension, one element."""
    tensor, content = stored((), [()], 5)
    [box] = common_boxes([tensor])
    extent, offset, grid = Regions(tensor, WIDTH).find(box)
    assert (extent, offset, grid) == (Extent(0, 5, 4), 5, None)
    assert list(pieces(tensor, WIDTH, 0, 1)) == [(extent, 5, 1)]
    assert read(content, offset, 1) == [0]
