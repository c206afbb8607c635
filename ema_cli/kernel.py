"""The arithmetic of one block: widen, update, finish, narrow. Whole arrays in, no files.

An update is TensorFlow's, three operations each rounded to the shadow's dtype::

    shadow = shadow - (shadow - value) * c          c cast once to the shadow's dtype

bit for bit what `tf.train.ExponentialMovingAverage` computes on a CPU (tensorflow/python/training/
moving_averages.py, `assign_moving_average`), but for two things. TensorFlow's kernels flush
subnormal float32, bfloat16 and float64 numbers to zero and NumPy does not, so results can differ
where an operand or an intermediate is below 1.2e-38 (float64: 2.3e-308). And a coefficient that is
1 in the shadow's dtype copies, one that is 0 leaves alone, where TensorFlow does arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ema_cli.tensors import DTYPES, numpy_dtype

Array = np.ndarray[Any, Any]

SHADOW_DTYPES = ("auto", "same")
LIKE = ("tensorflow", "torch", "keras")
# Elements whose squares are summed in their own dtype; such sums are added in float64. Rows as
# short as this a BLAS multiplies without threads of its own.
CHUNK = 4096


def quiet() -> np.errstate:
    """Return the context to call these functions in: infinities and NaNs are no events here.

    Entered once around many calls, since it costs as much as a small one of them.
    """
    return np.errstate(all="ignore")


def shadow_dtype(variable: str, policy: str) -> str:
    """Return the dtype of the shadow of a variable of dtype `variable`.

    ``auto``: float32 for the half types, whose own bits are too few to move (a bfloat16 shadow
    at decay .99 stays where it is); ``same``: the variable's, as TensorFlow has it.
    """
    if policy == "auto" and DTYPES[variable].bits == 16:
        return "float32"
    return variable


def cast_coefficient(c: float, dtype: str) -> Any:
    """Return the coefficient as a scalar of the shadow's dtype, rounded once."""
    return numpy_dtype(dtype).type(c)


def update(
    shadow: Array,
    value: Array,
    c: Any,
    scratch: Array,
    seen: Callable[[Array], None] | None = None,
) -> None:
    """Mix `value` into `shadow` in place: ``shadow -= (shadow - value) * c``.

    Args:
        shadow: accumulator, any of the averaged dtypes.
        value: same shape and dtype; left alone unless it is `scratch`.
        c: `cast_coefficient` of the same dtype; 1 copies and 0 leaves alone, without arithmetic.
        scratch: same shape and dtype; overwritten, may be `value` itself.
        seen: shown ``shadow - value`` before it is multiplied; must leave it alone.
    """
    if c == 0:
        return
    if c == 1:
        np.copyto(shadow, value)
        return
    np.subtract(shadow, value, out=scratch)
    if seen is not None:
        seen(scratch)
    np.multiply(scratch, c, out=scratch)
    np.subtract(shadow, scratch, out=shadow)


@functools.cache
def _half_table() -> Array:
    """Every float16 as float32: NumPy's own conversion takes twice as long as a look-up."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def widen(value: Array, out: Array) -> None:
    """Convert `value` to the wider or equal dtype of `out`; exact for every bit pattern."""
    if value.dtype == np.float16 and out.dtype == np.float32:
        np.take(_half_table(), value.view(np.uint16), out=out, mode="clip")
        return
    np.copyto(out, value)


def narrow(shadow: Array, out: Array) -> None:
    """Convert `shadow` to the dtype of `out` with one rounding to nearest even."""
    if shadow.dtype == np.float64 and out.dtype.name == "bfloat16":
        shadow = _round_to_odd(shadow)
    np.copyto(out, shadow, casting="unsafe")


def _round_to_odd(value: Array) -> Array:
    """Return float64 as float32 such that rounding once more, to bfloat16, rounds only once.

    ml_dtypes converts float64 by way of float32, which would round twice. Rounding to odd (away
    results one back, then the last bit set when inexact) keeps the discarded bits' verdict.
    """
    with quiet():
        single = value.astype(np.float32)
        back = single.astype(np.float64)
        bits = single.view(np.uint32)
        bits -= (np.abs(back) > np.abs(value)).astype(np.uint32)
        bits |= (back != value).astype(np.uint32)
    return single


def sum_of_squares(values: Array, first: int = 0) -> float:
    """Return the sum of the squares of a flat float32 or float64 array, right to about 1e-7.

    `first` is the place of its first element in something larger, which is cut into chunks from
    its beginning: so the sums of chunks do not depend on the block that they are in.
    """
    head = min(-first % CHUNK, len(values))
    rows = values[head : head + (len(values) - head) // CHUNK * CHUNK].reshape(-1, CHUNK)
    tail = values[head + rows.size :]
    total = float(np.matmul(rows[:, None, :], rows[:, :, None]).sum(dtype=np.float64))
    for rest in (values[:head], tail):
        if len(rest):
            total += float(np.dot(rest, rest))
    return total


def divide(shadow: Array, factor: float, out: Array) -> None:
    """Write ``shadow / factor`` to `out`, same dtype: the end of a zero-debiased average."""
    np.divide(shadow, shadow.dtype.type(factor), out=out)


_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def first_non_finite(array: Array) -> int | None:
    """Return the position of the first NaN or infinity of a flat array, or None."""
    mask = _EXPONENTS.get(array.dtype.name)
    if mask is not None:
        bad = (array.view(np.uint16) & np.uint16(mask)) == mask
        return int(bad.argmax()) if bad.any() else None
    finite = np.isfinite(array)
    return None if finite.all() else int(finite.argmin())
