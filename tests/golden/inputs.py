"""The numbers the golden averages were made from, rebuilt bit for bit on any machine.

Only the raw 64-bit stream of PCG64, integer operations, and float64 sums and products are used:
no distribution, no library function whose last bit could differ. Every value is a normal number of
its dtype, with a magnitude from 2**-13 up to 5, and so is every non-zero intermediate result of a
moving average over them, except in float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FRACTION_BITS = 52  # stored bits of a float64's fraction
LARGEST_EXPONENT = 1
EXPONENTS = 14  # initial magnitudes from 2**-12 up to 2**2
SIGNIFICAND_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}

# What an update does to an element, by four random bits: 0 draws it anew, of any size and sign;
# 1 leaves it at its initial value; the others change that by at most 1/2, 1/4, ... 2**-14 of its
# power of two.
REDRAWN = 0
CHANGES = np.array([0.0, 0.0] + [2.0**-k for k in range(1, 15)])


def variable(seed: int, update: int, count: int, dtype: np.dtype[Any]) -> Array:
    """The variable's ``count`` elements at checkpoint ``update``; 0 is the initial value."""
    exact, scale = drawn(stream(seed, 0, count))
    if update:
        raw = stream(seed, update, count)
        kind = raw & np.uint64(15)
        changed = exact + symmetric(raw) * (scale * CHANGES[kind])
        exact = np.where(kind == REDRAWN, drawn(raw)[0], changed)
    return rounded(exact, dtype)


def drawn(raw: npt.NDArray[np.uint64]) -> tuple[Array, Array]:
    """One float64 for each word, and a power of two its magnitude is one to two times of."""
    scales = np.array([2.0 ** (LARGEST_EXPONENT - k) for k in range(EXPONENTS)])
    scale = scales[(raw >> np.uint64(4) & np.uint64(127)) % np.uint64(EXPONENTS)]
    spread = symmetric(raw)
    return np.copysign((1.0 + np.abs(spread)) * scale, spread), scale


def stream(seed: int, update: int, count: int) -> npt.NDArray[np.uint64]:
    """Raw random words, a stream of its own for every update."""
    return np.random.PCG64([seed, update]).random_raw(count)


def symmetric(raw: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """The upper 53 bits of each word as an exact float64 in [-1, 1)."""
    top = (raw >> np.uint64(64 - FRACTION_BITS - 1)).astype(np.int64)
    return (top - (1 << FRACTION_BITS)).astype(np.float64) * 2.0**-FRACTION_BITS


def rounded(values: npt.NDArray[np.float64], dtype: np.dtype[Any]) -> Array:
    """Round once to ``dtype``, to nearest, ties to even.

    The rounding is done on the bits, because a cast from float64 to bfloat16 may pass through
    float32 and round twice. The cast that follows is exact.
    """
    dropped = FRACTION_BITS + 1 - SIGNIFICAND_BITS[dtype.name]
    if dropped == 0:
        return values.astype(dtype)
    bits = values.view(np.uint64)
    last_kept = (bits >> np.uint64(dropped)) & np.uint64(1)
    bits = bits + (np.uint64(2 ** (dropped - 1) - 1) + last_kept)
    kept = bits >> np.uint64(dropped) << np.uint64(dropped)
    return kept.view(np.float64).astype(dtype)
