"""Weights, windows and zero-debias of averages, held against exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from exact import close, shares
from helpers import dtype_of
from hypothesis import given
from hypothesis import strategies as st

from ema_cli.averages import (
    Average,
    Ema,
    Family,
    HalfLife,
    LearningRate,
    Mean,
    Power,
    Weights,
    Window,
)
from ema_cli.errors import Disagreement, UsageError
from ema_cli.schedules import Schedule, effective_count, gamma_of, mean_age, schedule


def made(family: Family, steps: Sequence[int], **options: object) -> Schedule:
    average = Average("a", "a", family, **options)  # type: ignore[arg-type]
    return schedule(average, steps, [f"c{step}" for step in steps])


def coefficients(family: Family, steps: Sequence[int], **options: object) -> list[float]:
    return list(made(family, steps, **options).coefficients)


# ---------------------------------------------------------------------------- families


@given(count=st.integers(1, 200))
def test_mean_weighs_all_the_same(count: int) -> None:
    """The mean has c_k = 1/k, and linear learning-rate decay is the same average."""
    steps = list(range(count))
    assert coefficients(Mean(), steps) == [1 / k for k in range(1, count + 1)]
    for family in (Mean(), LearningRate("linear")):
        assert all(close(w, Fraction(1, count)) for w in shares(coefficients(family, steps)))


@given(count=st.integers(1, 60))
def test_square_root_decay(count: int) -> None:
    """For 1-sqrt the first k checkpoints of N together weigh √(k/N)."""
    weights = shares(coefficients(LearningRate("1-sqrt"), range(count)))
    for k in range(1, count + 1):
        assert close(sum(weights[:k]) ** 2, Fraction(k, count))


@given(count=st.integers(1, 60))
def test_cosine_decay(count: int) -> None:
    """For cosine the first k checkpoints of N together weigh (1 - cos πk/N)/2, ends alike."""
    weights = shares(coefficients(LearningRate("cosine"), range(count)))
    for k in range(1, count + 1):
        assert close(sum(weights[:k]), (1 - math.cos(math.pi * k / count)) / 2)
    assert all(close(a, b, 1e-9) for a, b in zip(weights, weights[::-1], strict=True))


def test_cosine_of_three_is_exact() -> None:
    """Three checkpoints under a cosine weigh 1/4, 1/2, 1/4, since cos π/3 is 1/2."""
    weights = shares(coefficients(LearningRate("cosine"), [1, 2, 3]))
    assert [float(w) for w in weights] == pytest.approx([0.25, 0.5, 0.25], rel=1e-15)


@given(sigma=st.floats(1e-4, 12**-0.5 - 1e-9))
def test_gamma_solves_its_equation(sigma: float) -> None:
    """σ² (γ+2)² (γ+3) = γ+1 holds for the γ found, which is positive."""
    gamma = Fraction(gamma_of(sigma))
    assert gamma > 0
    assert close(Fraction(sigma) ** 2 * (gamma + 2) ** 2 * (gamma + 3), gamma + 1, 1e-13)


def test_gamma_of_the_paper() -> None:
    """Widths .05 and .10 have the exponents the paper prints: 16.97 and 6.94."""
    assert round(gamma_of(0.05), 2) == 16.97
    assert round(gamma_of(0.10), 2) == 6.94


@pytest.mark.parametrize("gamma", [1, 2, 7, 17])
@pytest.mark.parametrize("steps", [[1, 2, 3], [100, 250, 1000, 1001], [0, 10, 20], [5]])
def test_power_weights(gamma: int, steps: list[int]) -> None:
    """A checkpoint weighs t_k^(γ+1) - t_{k-1}^(γ+1), with t the training step and t_0 = 0."""
    sigma = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
    before = [0, *steps[:-1]]
    exact = [b ** (gamma + 1) - a ** (gamma + 1) for a, b in zip(before, steps, strict=True)]
    found = shares(coefficients(Power(sigma), steps))
    expected = [Fraction(w, sum(exact)) for w in exact]
    assert all(abs(a - b) < 1e-14 for a, b in zip(found, expected, strict=True))


def test_power_of_huge_steps_does_not_overflow() -> None:
    """Steps whose power exceeds any float still give weights that sum to 1."""
    found = shares(coefficients(Power(0.001), [10**9, 2 * 10**9, 10**12]))
    assert close(sum(found), 1)
    assert found[2] > 0.99


def test_power_at_step_zero_alone_is_refused() -> None:
    """The only checkpoint being at step 0, every weight is zero: exit code 13."""
    with pytest.raises(Disagreement, match="weight zero"):
        coefficients(Power(0.1), [0])


@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(any))
def test_target_weights_are_reproduced(weights: list[float]) -> None:
    """c_k = w_k / (w_1 + … + w_k) gives each checkpoint its share; 0 skips, the first copies."""
    table = tuple((f"c{k}", w) for k, w in enumerate(weights))
    found = coefficients(Weights(table), range(len(weights)))
    total = sum(map(Fraction, weights))
    for share, c, weight in zip(shares(found), found, weights, strict=True):
        assert abs(share - Fraction(weight) / total) < 1e-14
        assert weight or c == 0
    assert next(c for c in found if c) == 1.0


# ---------------------------------------------------------------------------- any family

FAMILIES = st.one_of(
    st.builds(Ema, st.floats(0, 0.99999), st.booleans()),
    st.builds(HalfLife, st.floats(0.1, 1e6)),
    st.just(Mean()),
    st.builds(LearningRate, st.sampled_from(["linear", "cosine", "1-sqrt"])),
    st.builds(Power, st.floats(0.01, 0.288)),
)
RUNS = st.lists(st.integers(1, 10**7), min_size=1, max_size=25, unique=True).map(sorted)
RAMPS = st.sampled_from(["none", "count", "step"])


@given(family=FAMILIES, steps=RUNS, num_updates=RAMPS)
def test_weights_sum_to_one(family: Family, steps: list[int], num_updates: str) -> None:
    """With init=first every average is an average: its weights sum to 1 and none is negative."""
    result = made(family, steps, num_updates=num_updates)
    assert sum(shares(result.coefficients)) == 1
    assert all(0 <= c <= 1 for c in result.coefficients)
    assert math.fsum(result.weights()) == pytest.approx(1, abs=1e-12)


@given(family=FAMILIES, steps=RUNS, num_updates=RAMPS)
def test_weights_are_what_coefficients_leave(
    family: Family, steps: list[int], num_updates: str
) -> None:
    """The reported weight of a checkpoint is c_k · Π_{j>k} (1 - c_j)."""
    result = made(family, steps, num_updates=num_updates)
    expected = shares(result.coefficients)
    assert all(abs(a - b) < 1e-13 for a, b in zip(result.weights(), expected, strict=True))


@given(
    family=FAMILIES,
    steps=RUNS,
    num_updates=RAMPS,
    init=st.sampled_from(["first", "zeros"]),
    data=st.data(),
)
def test_window_is_a_run_of_its_checkpoints(
    family: Family, steps: list[int], num_updates: str, init: str, data: st.DataObject
) -> None:
    """A window gives the coefficients of a run without the others, which get zero."""
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(steps) - 1)] * 2)))
    if data.draw(st.booleans()):
        window, last = Window(last=len(steps) - first), len(steps) - 1
    else:
        window = Window(start=steps[first], stop=steps[last])
    options = {"num_updates": num_updates, "init": init}
    whole = made(family, steps, window=window, **options)
    part = made(family, steps[first : last + 1], **options)
    expected = [0.0] * len(steps)
    expected[first : last + 1] = part.coefficients
    assert list(whole.coefficients) == expected
    assert whole.last == last
    assert whole.updates == last + 1 - first


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(last=2), [False, False, True, True]),
        (Window(last=9), [True] * 4),
        (Window(start=20), [False, True, True, True]),
        (Window(stop=30), [True, True, True, False]),
        (Window(start=20, stop=30), [False, True, True, False]),
        (Window(start=11, stop=19), [False] * 4),
        (Window(), [True] * 4),
    ],
)
def test_window_selects(window: Window, expected: list[bool]) -> None:
    """Both ends are included, ends may be open, and `last` counts checkpoints, not steps."""
    assert window.selects([10, 20, 30, 40]) == expected


def test_empty_window_is_refused() -> None:
    """A window without checkpoints is a usage error that tells which steps there are."""
    with pytest.raises(UsageError, match="10 to 1,000") as caught:
        made(Mean(), [10, 1000], window=Window(start=11, stop=999))
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------------------- weights files


def test_weights_by_name_or_step() -> None:
    """A key is the name of a checkpoint or else its step; who is not listed weighs nothing."""
    table = (("c100", 1.0), ("300", 3.0))
    assert coefficients(Weights(table), [100, 200, 300]) == [1.0, 0.0, 0.75]


def test_name_wins_over_step() -> None:
    """A checkpoint called like the step of another is meant by that name."""
    average = Average("a", "a", Weights((("200", 1.0),)))
    assert schedule(average, [100, 200], ["200", "x"]).coefficients == (1.0, 0.0)


def test_unknown_key_is_refused() -> None:
    """A key that matches no checkpoint is an error, with the steps there are."""
    with pytest.raises(Disagreement, match=r"'400'.*steps: 100, 200") as caught:
        coefficients(Weights((("100", 1.0), ("400", 1.0))), [100, 200])
    assert caught.value.exit_code == 13


def test_checkpoint_listed_by_name_and_by_step_is_refused() -> None:
    """Two weights for one checkpoint contradict each other, however it is called."""
    with pytest.raises((Disagreement, UsageError)):
        coefficients(Weights((("100", 1.0), ("c100", 3.0), ("200", 1.0))), [100, 200])


# ---------------------------------------------------------------------------- zero-debias


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_zero_debias_makes_weights_sum_to_one(decay: float) -> None:
    """With a constant decay the bias factor is what the weights lack."""
    result = made(Ema(decay), range(20), init="zeros", zero_debias=True)
    raw = sum(shares(result.coefficients))
    assert close(result.debias_factor(np.dtype(np.float64)), raw, 1e-9)
    assert math.fsum(result.weights()) == pytest.approx(1, rel=1e-9)


def test_zero_debias_takes_the_current_decay() -> None:
    """With num_updates the base is the last decay to the number of updates, as in TensorFlow."""
    result = made(Ema(0.999), range(3), init="zeros", zero_debias=True, num_updates="count")
    base = 1 - Fraction(result.coefficients[-1])
    assert close(result.debias_factor(np.dtype(np.float64)), 1 - base**3, 1e-14)
    assert abs(math.fsum(result.weights()) - 1) > 0.01


def test_without_zero_debias_nothing_is_divided() -> None:
    """The divisor is 1, so weights from zeros keep their sum below 1."""
    result = made(Ema(0.9), range(3), init="zeros")
    assert result.debias_factor(np.dtype(np.float32)) == 1.0
    assert math.fsum(result.weights()) == pytest.approx(1 - 0.9**3, rel=1e-6)


@pytest.mark.parametrize(("name", "decay"), [("bfloat16", 0.999), ("float16", 0.9999)])
def test_bias_factor_vanishes_where_tensorflows_does(name: str, decay: float) -> None:
    """A decay that rounds to 1 in the tensor's dtype leaves the factor 0."""
    result = made(Ema(decay), range(5), init="zeros", zero_debias=True)
    assert result.debias_factor(dtype_of(name)) == 0.0


# ---------------------------------------------------------------------------- summaries


def test_effective_count_and_mean_age() -> None:
    """Equal weights count fully, (Σw)²/Σw²; the age is the weighted distance from the end."""
    assert effective_count([0.25] * 4) == 4
    assert effective_count([1.0, 0.0, 0.0]) == 1
    assert effective_count([0.75, 0.25]) == pytest.approx(1.6)
    assert effective_count([0.0]) == 0
    assert mean_age([0.5, 0.5], [100, 300]) == 100
    assert mean_age([1.0, 3.0], [0, 40]) == 10
    assert mean_age([0.0, 0.0], [0, 40]) == 0
