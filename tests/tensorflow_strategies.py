"""Drawing tensors of TensorFlow checkpoints: shapes, values, and slices that cover them."""

from __future__ import annotations

import numpy as np
from helpers import dtype_of
from hypothesis import strategies as st
from tensorflow_bundles import ALL, Extents

Shape = tuple[int, ...]
AVERAGED = ["float16", "bfloat16", "float32", "float64"]

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def filled(dtype: str, shape: Shape, seed: int) -> np.ndarray:
    """Finite values of a dtype that all differ, as far as it can tell them apart."""
    count = int(np.prod(shape))
    values = np.random.default_rng(seed).permutation(count) + 1
    if dtype in AVERAGED:
        return (values / 8).astype(dtype_of(dtype)).reshape(shape)
    return (values % 7).astype(dtype_of(dtype)).reshape(shape)


@st.composite
def tilings(draw: st.DrawFn, shape: Shape, cuts: int = 6) -> list[Extents]:
    """Boxes that cover a shape: cut again and again, along any dimension, in any order."""
    boxes = [tuple((0, n) for n in shape)]
    for _ in range(draw(st.integers(0, cuts))):
        place = draw(st.integers(0, len(boxes) - 1))
        wide = [axis for axis, (_, n) in enumerate(boxes[place]) if n > 1]
        if not wide:
            continue
        axis = draw(st.sampled_from(wide))
        start, n = boxes[place][axis]
        at = draw(st.integers(1, n - 1))
        left, right = (
            tuple(new if k == axis else old for k, old in enumerate(boxes[place]))
            for new in ((start, at), (start + at, n - at))
        )
        boxes[place : place + 1] = [left, right]
    whole = draw(st.booleans())
    return draw(
        st.permutations(
            [
                tuple(
                    ALL if whole and one == (0, n) else one
                    for one, n in zip(box, shape, strict=True)
                )
                for box in boxes
            ]
        )
    )
