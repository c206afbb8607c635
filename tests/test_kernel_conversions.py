"""Conversions between dtypes and the search for non-finite values, held against integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from helpers import BF16, bits_equal, dtype_of
from hypothesis import given
from hypothesis import strategies as st

from ema_cli import kernel


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """The kernel's functions are called as the engine calls them."""
    with kernel.quiet():
        yield


AVERAGED = ("float16", "bfloat16", "float32", "float64")

FORMATS = {"float16": (5, 10), "bfloat16": (8, 7), "float32": (8, 23)}  # exponent, fraction bits
CONVERSIONS = [
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float64", "float16"),
    ("float64", "bfloat16"),
    ("float64", "float32"),
]


def value_of(bits: int, name: str) -> float:
    """Decode a finite pattern by the definition of the format; infinity is the next power of 2."""
    exponent_bits, fraction_bits = FORMATS[name]
    sign = -1.0 if bits >> (exponent_bits + fraction_bits) else 1.0
    exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = bits & ((1 << fraction_bits) - 1)
    leading = 1 if exponent else 0
    power = max(exponent, 1) - ((1 << (exponent_bits - 1)) - 1) - fraction_bits
    return sign * math.ldexp((leading << fraction_bits) + fraction, power)


def nearest(value: float, name: str) -> int:
    """Encode with one rounding to nearest even, in integers."""
    exponent_bits, fraction_bits = FORMATS[name]
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    sign = (math.copysign(1, value) < 0) << (exponent_bits + fraction_bits)
    if math.isinf(value):
        return sign | infinity
    lowest = 2 - (1 << (exponent_bits - 1))
    exponent = max(math.frexp(value)[1] - 1, lowest) if value else lowest
    units = round(abs(Fraction(value)) / Fraction(2) ** (exponent - fraction_bits))
    return sign | min(((exponent - lowest) << fraction_bits) + units, infinity)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_widen_is_exact_for_every_pattern(name: str, wide: str) -> None:
    """All half precision numbers become the number they stand for, and narrow back."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    patterns = patterns[(patterns & 0x7FFF) <= nearest(math.inf, name)]
    out = np.full(len(patterns), 7, wide)
    kernel.widen(patterns.view(dtype_of(name)), out)
    finite = np.isfinite(out)
    assert (patterns[~finite] & 0x7FFF).tolist() == [nearest(math.inf, name)] * 2
    assert out[~finite].tolist() == [math.inf, -math.inf]
    expected = np.array([value_of(int(bits), name) for bits in patterns[finite]]).astype(wide)
    assert bits_equal(out[finite], expected)
    back = np.zeros(len(patterns), dtype_of(name))
    kernel.narrow(out, back)
    assert bits_equal(back.view(np.uint16), patterns)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_widen_keeps_every_nan(name: str, wide: str) -> None:
    """Every half precision NaN, signalling ones too, is a NaN when widened and narrowed back."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    patterns = patterns[(patterns & 0x7FFF) > nearest(math.inf, name)]
    out = np.zeros(len(patterns), wide)
    kernel.widen(patterns.view(dtype_of(name)), out)
    assert np.isnan(out).all()
    back = np.zeros(len(patterns), dtype_of(name))
    kernel.narrow(out, back)
    assert ((back.view(np.uint16) & 0x7FFF) > nearest(math.inf, name)).all()


@pytest.mark.parametrize(("wide", "name"), CONVERSIONS[:4])
def test_narrow_at_every_halfway_point(wide: str, name: str) -> None:
    """Ties between neighbours go to the even one, and one bit beside a tie decides it."""
    patterns = np.arange(nearest(math.inf, name), dtype=np.uint16)
    ends = np.array([value_of(int(bits), name) for bits in [*patterns, patterns[-1] + 1]])
    middle = ((ends[:-1] + ends[1:]) / 2).astype(wide)
    assert ((middle.astype(np.float64) - ends[:-1]) * 2 == np.diff(ends)).all()
    cases = [
        (middle, patterns + (patterns & 1)),
        (np.nextafter(middle, middle.dtype.type(0)), patterns),
        (np.nextafter(middle, middle.dtype.type(np.inf)), patterns + np.uint16(1)),
    ]
    for values, expected in cases:
        for signed, sign in ((values, 0), (-values, 0x8000)):
            out = np.zeros(len(values), dtype_of(name))
            kernel.narrow(signed, out)
            assert bits_equal(out.view(np.uint16), expected | np.uint16(sign))


@pytest.mark.parametrize(("wide", "name"), CONVERSIONS)
@given(data=st.data())
def test_narrow_rounds_once(wide: str, name: str, data: st.DataObject) -> None:
    """Any number, however large or small, becomes the nearest one of the narrow type."""
    width = 64 if wide == "float64" else 32
    numbers = st.floats(allow_nan=False, width=width)
    moderate = st.floats(-1e5, 1e5, width=width)
    values = data.draw(st.lists(st.one_of(numbers, moderate), min_size=1, max_size=20))
    out = np.zeros(len(values), dtype_of(name))
    kernel.narrow(np.array(values, wide), out)
    found = out.view(f"u{out.itemsize}").tolist()
    assert found == [nearest(value, name) for value in values]


def test_narrow_does_not_round_twice() -> None:
    """A float64 just above a bfloat16 tie goes up, though float32 cannot tell it from the tie."""
    value = 1 + 2.0**-8 + 2.0**-40
    out = np.zeros(2, BF16)
    kernel.narrow(np.array([value, -value]), out)
    assert np.float32(value) == 1 + 2.0**-8
    assert out.astype(np.float64).tolist() == [1 + 2.0**-7, -1 - 2.0**-7]


@pytest.mark.parametrize(("wide", "name"), CONVERSIONS)
def test_narrow_keeps_nan(wide: str, name: str) -> None:
    """A NaN of any sign and payload stays one."""
    bits = {
        "float32": [0x7FC00000, 0xFFC00001, 0x7FFFFFFF],
        "float64": [0x7FF8 << 48, 0xFFFF << 48],
    }
    values = np.array(bits[wide], f"u{dtype_of(wide).itemsize}").view(wide)
    out = np.zeros(len(values), dtype_of(name))
    kernel.narrow(values, out)
    infinity = nearest(math.inf, name)
    sign = 1 << (out.itemsize * 8 - 1)
    assert ((out.view(f"u{out.itemsize}") & (sign - 1)) > infinity).all()


# ---------------------------------------------------------------------------- non-finite values


@pytest.mark.parametrize("name", AVERAGED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_non_finite(name: str, bad: float) -> None:
    """The position of the first NaN or infinity is found, and None when there is none."""
    dtype = dtype_of(name)
    array = np.linspace(-4, 4, 100).astype(dtype)
    array[0] = np.finfo(np.float16).max if name == "float16" else 3e38
    assert kernel.first_non_finite(array) is None
    assert kernel.first_non_finite(array[:0]) is None
    for position in (99, 57, 0):
        array[position] = bad
        assert kernel.first_non_finite(array) == position
    array[:] = bad
    assert kernel.first_non_finite(array) == 0


def test_divide_by_a_vanished_factor_is_silent() -> None:
    """A bias factor that rounds to 0 gives inf and nan, as in TensorFlow, and no warning."""
    out = np.empty(3, np.float32)
    kernel.divide(np.array([1, -1, 0], np.float32), 0.0, out)
    assert out[0] == np.inf
    assert out[1] == -np.inf
    assert np.isnan(out[2])


@pytest.mark.parametrize("name", AVERAGED)
def test_update_of_non_finite_values_is_silent(name: str) -> None:
    """Infinities, NaN and overflow follow IEEE arithmetic without a RuntimeWarning."""
    dtype = dtype_of(name)
    top = 65504.0 if name == "float16" else float(np.finfo(np.float32).max)
    top = float(np.finfo(np.float64).max) if name == "float64" else top
    top = 3e38 if name == "bfloat16" else top
    shadow = np.array([np.inf, np.inf, 1, top, np.nan], dtype)
    value = np.array([np.inf, 1, -np.inf, -top, 1], dtype)
    kernel.update(shadow, value, kernel.cast_coefficient(0.75, name), np.empty_like(value))
    assert np.isnan(shadow[[0, 1, 4]]).all()
    assert (shadow[[2, 3]] == -np.inf).all()
