"""Exponential coefficients, held against fractions, integer powers and brute-force products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from exact import Number, close, single, tensorflow_coefficient
from hypothesis import given
from hypothesis import strategies as st

from ema_cli.averages import Average, Ema, Family, HalfLife, Power
from ema_cli.errors import Disagreement
from ema_cli.schedules import schedule

STEPS = st.lists(st.integers(1, 10**6), min_size=1, max_size=30, unique=True).map(sorted)
DECAYS = st.floats(0.01, 0.99999)


def coefficients(family: Family, steps: Sequence[int], **options: object) -> list[float]:
    average = Average("a", "a", family, **options)  # type: ignore[arg-type]
    return list(schedule(average, steps, [f"c{step}" for step in steps]).coefficients)


def agree(found: Sequence[float], expected: Sequence[Number], relative: float = 1e-12) -> bool:
    """Whether coefficients are as expected, but for zeros before the last copy."""
    start = max((k for k, c in enumerate(found) if c == 1.0), default=0)
    assert not any(found[:start])
    pairs = zip(found[start:], expected[start:], strict=True)
    return all(close(a, b, relative) for a, b in pairs)


# ---------------------------------------------------------------------------- ema


@given(
    decay=st.floats(0, 1, exclude_max=True),
    steps=STEPS,
    num_updates=st.sampled_from(["none", "count", "step"]),
)
def test_ema_coefficients_are_tensorflows(decay: float, steps: list[int], num_updates: str) -> None:
    """Per checkpoint: the first is copied, update k uses n = k or the checkpoint's step."""
    n = {"none": lambda k: None, "count": lambda k: k, "step": lambda k: steps[k]}[num_updates]
    expected = [Fraction(1)] + [tensorflow_coefficient(decay, n(k)) for k in range(1, len(steps))]
    found = coefficients(Ema(decay), steps, num_updates=num_updates)
    last_copy = max(k for k, c in enumerate(expected) if c == 1)
    assert found[:last_copy] == [0.0] * last_copy
    assert found[last_copy:] == [float(c) for c in expected[last_copy:]]


@pytest.mark.parametrize("num_updates", ["none", "count", "step"])
def test_from_zeros_the_first_checkpoint_is_update_one(num_updates: str) -> None:
    """With init=zeros every checkpoint is an update, the first one with n = 1 or its step."""
    steps = [100, 200, 400]
    n = {"none": [None] * 3, "count": [1, 2, 3], "step": steps}[num_updates]
    found = coefficients(Ema(0.9), steps, num_updates=num_updates, init="zeros")
    assert found == [float(tensorflow_coefficient(0.9, k)) for k in n]


def test_ramp_ends_where_float32_ends_it() -> None:
    """The decay .9999 takes over at n = 89949, where float32 quotients reach it, not at 89990."""
    assert float(single(0.9999)) == np.float32(0.9999)
    found = coefficients(Ema(0.9999), [1, 89_948, 89_949, 10**6], num_updates="step")
    assert found[1] > found[2] == found[3] == float(single(1 - single(0.9999)))


def test_decay_zero_takes_the_last_and_reads_nothing_else() -> None:
    """Decay 0 copies every checkpoint, so only the last one counts."""
    assert coefficients(Ema(0.0), [1, 2, 3]) == [0.0, 0.0, 1.0]
    assert coefficients(Ema(0.0, per_step=True), [1, 2, 3]) == [0.0, 0.0, 1.0]


def test_decay_one_keeps_the_first() -> None:
    """Decay 1 leaves the first checkpoint alone; started from zeros there is nothing to take."""
    for per_step in (False, True):
        assert coefficients(Ema(1.0, per_step), [1, 2, 3]) == [1.0, 0.0, 0.0]
        with pytest.raises(Disagreement, match="weight zero"):
            coefficients(Ema(1.0, per_step), [1, 2, 3], init="zeros")


@given(decay=DECAYS, steps=STEPS, init=st.sampled_from(["first", "zeros"]))
def test_decay_per_step_is_raised_to_the_gap(decay: float, steps: list[int], init: str) -> None:
    """Each update keeps decay^gap; from zeros the first gap is counted from step 0."""
    steps = [step % 3000 + 3000 * k + 1 for k, step in enumerate(steps[:5])]
    found = coefficients(Ema(decay, per_step=True), steps, init=init)
    expected = [1.0 if init == "first" else 1 - Fraction(decay) ** steps[0]]
    expected += [1 - Fraction(decay) ** (b - a) for a, b in pairwise(steps)]
    assert agree(found, expected)


def test_tiny_decay_per_step_keeps_its_digits() -> None:
    """A decay next to 1 is not lost in 1 - decay: 1e-12 per step over 10 steps is 1e-11."""
    decay = 1 - 2.0**-40
    found = coefficients(Ema(decay, per_step=True), [10, 20])
    assert close(found[1], 1 - Fraction(decay) ** 10, 1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.1, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("init", ["first", "zeros"])
def test_per_step_ramp_is_the_product_over_the_gap(decay: float, init: str) -> None:
    """With num_updates=step a gap a..b keeps the product of min(D, (1+s)/(10+s)), s = a+1..b."""
    steps = [1, 2, 79, 80, 81, 200, 889, 891, 1500, 8989, 8990, 8991, 9500]

    def kept(a: int, b: int) -> float:
        return math.prod(min(decay, (1 + s) / (10 + s)) for s in range(a + 1, b + 1))

    first = 1.0 if init == "first" else 1 - kept(0, steps[0])
    expected = [first] + [1 - kept(a, b) for a, b in pairwise(steps)]
    found = coefficients(Ema(decay, per_step=True), steps, num_updates="step", init=init)
    assert agree(found, expected, 1e-11)


@given(
    decay=st.floats(0.001, 0.999999),
    start=st.integers(0, 500),
    gap=st.integers(1, 300),
)
def test_per_step_ramp_exactly(decay: float, start: int, gap: int) -> None:
    """The closed form of the ramp agrees with the exact product of fractions."""
    product = Fraction(1)
    for s in range(start + 1, start + gap + 1):
        product *= min(Fraction(decay), Fraction(1 + s, 10 + s))
    family = Ema(decay, per_step=True)
    found = coefficients(family, [start, start + gap], num_updates="step")
    assert close(found[1], 1 - product, 1e-12)


@given(decay=DECAYS, gaps=st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_per_step_count_takes_the_smaller(decay: float, gaps: list[int]) -> None:
    """With num_updates=count update k keeps min(D^gap, (1+k)/(10+k))."""
    steps = [1 + sum(gaps[:k]) for k in range(len(gaps) + 1)]
    found = coefficients(Ema(decay, per_step=True), steps, num_updates="count")
    expected = [
        1 - min(Fraction(decay) ** gap, Fraction(1 + k, 10 + k))
        for k, gap in enumerate(gaps, start=1)
    ]
    assert agree(found, [1.0, *expected])


@given(half_life=st.integers(1, 60), gaps=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_half_life_halves(half_life: int, gaps: list[int]) -> None:
    """What a gap keeps, to the power of the half-life, is 2^-gap."""
    steps = [7 + sum(gaps[:k]) for k in range(len(gaps) + 1)]
    found = coefficients(HalfLife(half_life), steps)
    start = max(k for k, c in enumerate(found) if c == 1.0)
    assert start == 0 or gaps[start - 1] > 52 * half_life
    for c, gap in list(zip(found[1:], gaps, strict=True))[start:]:
        absolute = Fraction(1, 2**52)
        below, above = (max(1 - Fraction(c) + e, Fraction(0)) for e in (-absolute, absolute))
        assert below**half_life <= Fraction(1, 2**gap) <= above**half_life


def test_half_life_of_one_gap() -> None:
    """Checkpoints one half-life apart weigh 1/4, 1/4, 1/2; fractions of a step are fine."""
    for half_life, steps in ((100, [100, 200, 300]), (0.5, [1, 1, 1]), (2.5, [5, 10, 15])):
        gap = (steps[1] - steps[0]) / half_life
        found = coefficients(HalfLife(half_life), steps)
        assert found == pytest.approx([1, 1 - 0.5**gap, 1 - 0.5**gap], rel=1e-15)


@pytest.mark.parametrize("family", [Ema(0.9, per_step=True), HalfLife(10), Power(0.1)])
def test_steps_that_fall_are_refused(family: Family) -> None:
    """What depends on training steps refuses an order in which they decrease, with exit code 13."""
    with pytest.raises(Disagreement, match="increasing steps") as caught:
        coefficients(family, [100, 300, 200])
    assert caught.value.exit_code == 13
    assert "--order given" in caught.value.hint
