"""Oracles in exact arithmetic: what coefficients and weights are, without the code under test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Number = Fraction | float


def shares(coefficients: Sequence[float]) -> list[Fraction]:
    """Return the exact weight of each checkpoint: c_k times all (1 - c_j) that follow."""
    found, rest = [], Fraction(1)
    for c in reversed(coefficients):
        found.append(Fraction(c) * rest)
        rest *= 1 - Fraction(c)
    return found[::-1]


def close(a: Number, b: Number, relative: float = 1e-12) -> bool:
    """Whether two numbers differ by at most `relative` of the larger one."""
    a, b = Fraction(a), Fraction(b)
    return abs(a - b) <= Fraction(relative) * max(abs(a), abs(b))


def single(x: Number) -> Fraction:
    """Round to 24 significant bits, ties to even: float32 without its limited range."""
    x = Fraction(x)
    if not x:
        return x
    ulp = Fraction(2) ** (math.floor(math.log2(abs(x))) - 23)
    while abs(x) / ulp >= 1 << 24:
        ulp *= 2
    while abs(x) / ulp < 1 << 23:
        ulp /= 2
    return round(x / ulp) * ulp


def tensorflow_coefficient(decay: float, n: int | None) -> Fraction:
    """Return 1 - min(decay, (1 + n)/(10 + n)), every operation rounded to float32."""
    used = single(decay)
    if n is not None:
        used = min(used, single(single(1 + single(n)) / single(10 + single(n))))
    return single(1 - used)
