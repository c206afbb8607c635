"""The arithmetic of other frameworks' averages: one update of one block, in place, bit for bit.

PyTorch, `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(d)`: `lerp_` with
``w = 1 - d``, formed in float64 and rounded once to the type of the arithmetic, which is float32
for the half types (aten/src/ATen/native/Lerp.h)::

    shadow + w * (value - shadow)                 where |w| < 0.5
    value - (1 - w) * (value - shadow)            elsewhere

The difference is rounded, product and sum are one fused multiply-add, and a half type is rounded
once more, from float32. The first update copies.

Keras 3, an optimizer with ``use_ema=True``, TensorFlow backend and ``jit_compile=False``::

    m * shadow + (1 - m) * value                  each operation rounded to the variable's dtype

with m rounded to that dtype first. The first update has m = 0 and a shadow of zeros.

Both hold to the last bit, subnormals and infinities included, but for this: NaNs are NaNs, whatever
their bits; a w of exactly 1 (d = 0) may give a zero the other sign in PyTorch, where the last
elements of a tensor take another path; PyTorch fuses nothing on x86 CPUs without AVX2; TensorFlow
flushes subnormal float32, bfloat16 and float64 numbers to zero; and under XLA, which Keras chooses
unless told not to, TensorFlow fuses the sum of float32 and float64 with its first product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Elements worked on at a time: ten rows of float64 fit a core's caches, and calls stay few.
_CHUNK = 1 << 15
_ROWS = 10
SCRATCH = _ROWS * _CHUNK

# The last bits of a float64 halfway between two float32 are zero, all but the first of 29.
_BELOW_HALFWAY = np.uint64((1 << 28) - 1)
# A float64 with its last 27 bits cleared: what is left and what was cut off multiply exactly.
_UPPER_HALF = np.int64(-1 << 27)
_SPLITTER = float((1 << 27) + 1)
# A product below this has bits below the smallest float64.
_SMALLEST_EXACT = 2.0**-960


def update_torch(shadow: Array, value: Array, weight: float, scratch: Array) -> None:
    """Mix `value` into `shadow` as PyTorch's `lerp_` on a CPU does.

    Args:
        shadow: flat; float16, bfloat16, float32 or float64, the variable's own dtype.
        value: same length and dtype; left alone.
        weight: ``1 - decay``, in float64.
        scratch: flat float64, `SCRATCH` elements or more; overwritten.
    """
    rows = scratch[:SCRATCH].reshape(_ROWS, _CHUNK)
    lerp = {8: _lerp_double, 4: _lerp_single, 2: _lerp_half}[shadow.itemsize]
    for start in range(0, len(shadow), _CHUNK):
        part = slice(start, start + _CHUNK)
        lerp(shadow[part], value[part], weight, rows)


def update_torch_mean(shadow: Array, value: Array, count: int, scratch: Array) -> None:
    """Mix in value number `count` as `AveragedModel` without an averaging function on a CPU does.

    ``shadow + (value - shadow) / count``, each operation rounded to the variable's dtype; a half
    type is divided in float32. Arguments as for `update_torch`.
    """
    wide = np.dtype(np.float32) if shadow.itemsize == 2 else shadow.dtype
    divisor = wide.type(count)
    rows = scratch[:SCRATCH].reshape(_ROWS, _CHUNK)
    for start in range(0, len(shadow), _CHUNK):
        old, new = shadow[start : start + _CHUNK], value[start : start + _CHUNK]
        change, quotient = _row(rows, 0, shadow.dtype, len(old)), _row(rows, 1, wide, len(old))
        np.subtract(new, old, out=change)
        np.copyto(quotient, change)
        np.divide(quotient, divisor, out=quotient)
        np.copyto(change, quotient, casting="unsafe")
        np.add(old, change, out=old)


def update_keras(shadow: Array, value: Array, momentum: float, scratch: Array) -> None:
    """Mix `value` into `shadow` as a Keras optimizer with ``use_ema=True`` does.

    Args:
        shadow: flat; float16, bfloat16, float32 or float64, the variable's own dtype.
        value: same length and dtype; left alone.
        momentum: the optimizer's ``ema_momentum``; 0 in the first update, on a shadow of zeros.
        scratch: flat float64, `SCRATCH` elements or more; overwritten.
    """
    m = shadow.dtype.type(momentum)
    rest = shadow.dtype.type(1) - m
    for start in range(0, len(shadow), SCRATCH):
        old, new = shadow[start : start + SCRATCH], value[start : start + SCRATCH]
        product = scratch.view(shadow.dtype)[: len(old)]
        np.multiply(old, m, out=old)
        np.multiply(new, rest, out=product)
        np.add(old, product, out=old)


# ---------------------------------------------------------------------------- float32, half types


def _row(rows: Array, k: int, dtype: Any, count: int) -> Array:
    row: Array = rows[k].view(dtype)[:count]
    return row


def _lerp_half(shadow: Array, value: Array, weight: float, rows: Array) -> None:
    """Work in float32 and round the result once more, as PyTorch does."""
    wide = [_row(rows, k, np.float32, len(shadow)) for k in (8, 9)]
    np.copyto(wide[0], shadow)
    np.copyto(wide[1], value)
    _lerp_single(wide[0], wide[1], weight, rows)
    np.copyto(shadow, wide[0], casting="unsafe")


def _lerp_single(shadow: Array, value: Array, weight: float, rows: Array) -> None:
    """Work in float64, where products of float32 are exact and their sums nearly are."""
    w = np.float32(weight)
    small = abs(w) < np.float32(0.5)
    factor = float(w if small else w - np.float32(1))
    base = shadow if small else value
    count = len(shadow)
    change, result = (_row(rows, k, np.float32, count) for k in (0, 1))
    product, total, spare = rows[2, :count], rows[3, :count], rows[4, :count]
    np.subtract(value, shadow, out=change)
    np.multiply(change, factor, out=product, dtype=np.float64)
    np.add(product, base, out=total)
    np.copyto(result, total, casting="same_kind")
    _settle_ties(base, product, total, result, spare)
    np.copyto(shadow, result)


def _settle_ties(base: Array, product: Array, total: Array, result: Array, spare: Array) -> None:
    """Correct `result`, which is `total` in float32, where it was rounded twice.

    ``base + product`` was rounded to `total` first. That hides on which side of the point halfway
    between two float32 it lies if, and only if, `total` is that point.
    """
    low = np.bitwise_and(total.view(np.uint64), _BELOW_HALFWAY, out=spare.view(np.uint64))
    if low.all():
        return
    at = np.flatnonzero(low == 0)
    at = at[(total[at] != result[at]) & np.isfinite(total[at])]
    if not len(at):
        return
    sums, errors, base = total[at], np.empty(len(at)), base[at].astype(np.float64)
    _two_sum(base, product[at], sums, errors, np.empty(len(at)))
    _make_odd(sums, errors)
    result[at] = sums


# ---------------------------------------------------------------------------- float64


def _lerp_double(shadow: Array, value: Array, weight: float, rows: Array) -> None:
    """Work with pairs of float64, since there is nothing wider."""
    small = abs(weight) < 0.5
    factor = weight if small else weight - 1.0
    base = shadow if small else value
    change = rows[0, : len(shadow)]
    np.subtract(value, shadow, out=change)
    if factor:
        np.copyto(shadow, _fused(factor, change, base, rows[1:, : len(shadow)]))
    else:
        np.add(base, change * 0, out=shadow)


def _fused(factor: float, change: Array, base: Array, rows: Array) -> Array:
    """Return ``factor * change + base``, rounded once; `factor` is from -1 to 1.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using
    rounding to odd", IEEE Transactions on Computers 57(4), 2008.
    """
    product, low, middle, rest, error, spare, plain = rows[:7]
    total: Array = rows[7]
    np.multiply(change, factor, out=product)
    _product_error(factor, change, product, low, (middle, rest, spare))
    _two_sum(base, low, middle, rest, spare)
    _two_sum(product, middle, total, error, spare)
    _two_sum(rest, error, low, middle, spare)
    _make_odd(low, middle)
    np.add(total, low, out=total)
    np.add(product, base, out=plain)
    # The sum next to the largest number may overflow on the way: no error is known then.
    hard = np.isnan(total) & np.isfinite(plain)
    hard |= (np.abs(product, out=spare) < _SMALLEST_EXACT) & (change != 0)
    # Zeros get their sign, infinities and NaNs their value, from the operation itself.
    np.copyto(total, plain, where=(total == 0) | ~np.isfinite(total))
    for k in np.flatnonzero(hard):
        total[k] = _exactly(factor, float(change[k]), float(base[k]))
    return total


def _product_error(
    factor: float, change: Array, product: Array, out: Array, spare: tuple[Array, ...]
) -> None:
    """Write ``factor * change - product`` to `out`: exact, by Dekker's multiplication."""
    upper, lower, partial = spare
    scaled = factor * _SPLITTER
    factor_upper = scaled - (scaled - factor)
    factor_lower = factor - factor_upper
    np.bitwise_and(change.view(np.int64), _UPPER_HALF, out=upper.view(np.int64))
    np.subtract(change, upper, out=lower)
    np.multiply(upper, factor_upper, out=out)
    np.subtract(out, product, out=out)
    for half, by in ((upper, factor_lower), (lower, factor_upper), (lower, factor_lower)):
        np.multiply(half, by, out=partial)
        np.add(out, partial, out=out)


def _exactly(factor: float, change: float, base: float) -> float:
    """Return ``factor * change + base`` by integers: some microseconds, any magnitude."""
    (fn, fd), (cn, cd), (bn, bd) = (x.as_integer_ratio() for x in (factor, change, base))
    numerator = fn * cn * bd + bn * fd * cd
    return numerator / (fd * cd * bd) if numerator else factor * change + base


# ---------------------------------------------------------------------------- both


def _two_sum(a: Array, b: Array, total: Array, error: Array, spare: Array) -> None:
    """Write ``a + b`` to `total` and what rounding took from it to `error` (Knuth's TwoSum)."""
    np.add(a, b, out=total)
    np.subtract(total, a, out=spare)
    np.subtract(total, spare, out=error)
    np.subtract(a, error, out=error)
    np.subtract(b, spare, out=spare)
    np.add(error, spare, out=error)


def _make_odd(total: Array, error: Array) -> None:
    """Turn sums rounded to nearest into sums rounded to odd, in place.

    An inexact one whose last bit is 0 moves to its neighbour on the side of the error, so that
    rounding it again to at least two bits less rounds as if only once.
    """
    bits = total.view(np.int64)
    step = ((bits ^ error.view(np.int64)) >> 63) | 1
    step *= (error != 0) & (bits & 1 == 0)
    bits += step
