"""Averages as lists of coefficients. Pure: numbers in, numbers out.

The coefficient ``c_k`` is what checkpoint k is mixed in with::

    shadow = shadow - (shadow - variable) * c_k

``c_k = 1`` copies the value and ``c_k = 0`` skips the checkpoint; neither is arithmetic. Target
weights w become ``c_k = w_k / (w_1 + … + w_k)``, and the weight of checkpoint k in the result is
``c_k · Π_{j>k} (1 - c_j)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from ema_cli.averages import Average, Ema, HalfLife, LearningRate, Mean, Power, Weights
from ema_cli.errors import Disagreement, UsageError
from ema_cli.hints import did_you_mean
from ema_cli.tensors import NumpyDType
from ema_cli.text import shorten


@dataclass(frozen=True, slots=True)
class Schedule:
    """The coefficients of one average over the checkpoints of a run.

    Attributes:
        coefficients: one per checkpoint, in order; exact float32 values for a TensorFlow EMA.
        zero_debias: whether the result is divided by `debias_factor`.
        updates: how many updates the average saw (TensorFlow's ``local_step``).
        last: ordinal of the last checkpoint of the window; copies come from there.
        decay: of an `Ema`, else None.
    """

    coefficients: tuple[float, ...]
    zero_debias: bool
    updates: int
    last: int
    decay: float | None = None

    def weights(self) -> tuple[float, ...]:
        """Return the weight of each checkpoint, c_k · Π_{j>k} (1 - c_j), divided as the result."""
        weights: list[float] = []
        rest = 1.0
        for c in reversed(self.coefficients):
            weights.append(c * rest)
            rest *= 1.0 - c
        factor = self.debias_factor(np.dtype(np.float64))
        return tuple(w / factor if factor else math.inf for w in reversed(weights))

    def debias_factor(self, dtype: NumpyDType) -> float:
        """Return the divisor of the result in `dtype`; 1 without zero_debias.

        TensorFlow's ``1 - pow(1 - omd, local_step)``, each operation rounded to the tensor's
        dtype, pow in double and rounded once. Its own scalar float32 pow is glibc's ``powf``,
        which is not correctly rounded: the power can differ by one float32 ulp, and the factor
        by more where it cancels: in 56 of 180,178 (decay, step) pairs measured, up to a relative
        2e-6 at decay .99999, never at decays up to .99. The other dtypes agree everywhere.
        Source: `assign_moving_average` in tensorflow/python/training/moving_averages.py.
        """
        if not self.zero_debias:
            return 1.0
        return debias_factor(self.coefficients[self.last], self.updates, dtype)


def one_minus_decay(decay: float, num_updates: float | None = None) -> np.float32:
    """Return the coefficient of one TensorFlow update, formed in float32 for every dtype.

    ``d = float32(decay)``, with num_updates ``d = min(d, (1 + n) / (10 + n))``, result
    ``float32(1) - d``: tf.train.ExponentialMovingAverage.apply.
    """
    one, ten = np.float32(1), np.float32(10)
    d = np.float32(decay)
    if num_updates is not None:
        n = np.float32(num_updates)
        d = min(d, (one + n) / (ten + n))
    return np.float32(one - d)


def local_step(updates: int, dtype: NumpyDType) -> float:
    """Return TensorFlow's counter after `updates`, kept in the tensor's dtype.

    Adding 1 stops having an effect at 2^p for p bits of significand: 256 in bfloat16, 2048 in
    float16, 2^24 in float32.
    """
    significand = {"bfloat16": 8, "float16": 11, "float32": 24}.get(dtype.name, 53)
    return float(min(updates, 1 << significand))


def debias_factor(
    coefficient: float,
    updates: int,
    dtype: NumpyDType,
) -> float:
    """Return TensorFlow's bias factor in `dtype`; see `Schedule.debias_factor`."""
    scalar = dtype.type
    omd = scalar(coefficient)
    base = scalar(scalar(1) - omd)
    power = scalar(math.pow(float(base), local_step(updates, dtype)))
    return float(scalar(scalar(1) - power))


# ---------------------------------------------------------------------------- coefficients


def schedule(
    average: Average, steps: Sequence[int], names: Sequence[str], like: str = "tensorflow"
) -> Schedule:
    """Return the coefficients of `average` over checkpoints at `steps` called `names`.

    PyTorch forms 1 - decay in float64, TensorFlow in float32. Keras, which forms it in the dtype
    of the variable, is given the decay itself and these only tell where it copies.

    A window gives exactly what a run of only its checkpoints would give. Raises `Disagreement`
    when the steps do not fit the average, `UsageError` when the window is empty.
    """
    inside = average.window.selects(steps) if average.window else [True] * len(steps)
    chosen = [k for k, taken in enumerate(inside) if taken]
    if not chosen:
        raise UsageError(
            f"average '{shorten(average.spec)}': its window holds no checkpoint; "
            f"the run has steps {steps[0]:,} to {steps[-1]:,}",
            f"a window of the last 5 checkpoints is @last=5, one of these steps "
            f"@{steps[0]}:{steps[-1]}",
        )
    if like != "tensorflow" and isinstance(average.family, Ema):
        values = [1.0] + [1 - average.family.decay] * (len(chosen) - 1)
    else:
        values = _coefficients(average, [steps[k] for k in chosen], [names[k] for k in chosen])
    values = drop_overwritten(values)
    if not any(values):
        raise Disagreement(
            f"average '{shorten(average.spec)}': every checkpoint has weight zero",
            "give one of those that are averaged a weight above 0, or widen the window",
        )
    coefficients = [0.0] * len(steps)
    for k, value in zip(chosen, values, strict=True):
        coefficients[k] = value
    decay = average.family.decay if isinstance(average.family, Ema) else None
    return Schedule(tuple(coefficients), average.zero_debias, len(chosen), chosen[-1], decay)


def drop_overwritten(values: list[float]) -> list[float]:
    """Return `values` with zeros before the last 1: what a copy overwrites is never read."""
    copies = [k for k, value in enumerate(values) if value == 1.0]
    start = copies[-1] if copies else 0
    return [0.0] * start + values[start:]


def _coefficients(average: Average, steps: list[int], names: list[str]) -> list[float]:
    match average.family:
        case Ema(decay, per_step):
            if not per_step:
                return _tensorflow(average, decay, steps)
            return _per_step(average, math.log(decay) if decay else -math.inf, steps)
        case HalfLife(half_life):
            return _per_step(average, -math.log(2) / half_life, steps)
        case Mean():
            return [1 / (k + 1) for k in range(len(steps))]
        case LearningRate(shape):
            return from_weights(learning_rate_weights(shape, len(steps)))
        case Power(sigma_rel):
            return _power(sigma_rel, steps)
        case Weights(table):
            return from_weights(_listed(table, steps, names))
        case _:
            assert_never(average.family)


def from_weights(weights: Sequence[float]) -> list[float]:
    """Return c_k = w_k / (w_1 + … + w_k) in float64; 0 while the sum is 0."""
    coefficients = []
    total = 0.0
    for weight in weights:
        total += weight
        coefficients.append(weight / total if weight else 0.0)
    return coefficients


def _tensorflow(average: Average, decay: float, steps: list[int]) -> list[float]:
    """Return TensorFlow's coefficients: with init=first the first checkpoint is no update."""
    first = [1.0] if average.init == "first" else []
    values = []
    for k, step in enumerate(steps[len(first) :], start=1):
        n = {"none": None, "count": k, "step": step}[average.num_updates]
        values.append(float(one_minus_decay(decay, n)))
    return first + values


def _per_step(average: Average, log_decay: float, steps: list[int]) -> list[float]:
    """Return 1 - decay^gap in float64, gap in training steps since the checkpoint before.

    The first checkpoint of an average that starts from zeros has its gap from step 0. With
    num_updates=step the decay of a gap is Π_{s=a+1..b} min(D, (1+s)/(10+s)), with count it is
    min(D^gap, (1+k)/(10+k)).
    """
    previous = 0
    first: list[float] = []
    if average.init == "first":
        previous, first = steps[0], [1.0]
    values = []
    for k, step in enumerate(steps[len(first) :], start=1):
        gap = step - previous
        if gap < 0:
            raise Disagreement(
                f"average '{shorten(average.spec)}': step {step} comes after step {previous}, "
                "but a decay per training step needs increasing steps",
                "leave out --order given",
            )
        if average.num_updates == "step":
            log_kept = _log_ramp(log_decay, previous, step)
        else:
            log_kept = log_decay * gap if gap else 0.0
            if average.num_updates == "count":
                log_kept = min(log_kept, math.log((1 + k) / (10 + k)))
        values.append(0.0 - math.expm1(log_kept))
        previous = step
    return first + values


def _log_ramp(log_decay: float, start: int, stop: int) -> float:
    """Return log Π_{s=start+1..stop} min(D, (1+s)/(10+s)) in closed form.

    The ramp rules up to the last s with (1+s)/(10+s) <= D, i.e. s <= (10 D - 1)/(1 - D). There the
    product telescopes to Π_{j=2..10} (start+j)/(m+j).
    """
    decay = math.exp(log_decay)
    meeting = math.floor((10 * decay - 1) / (1 - decay)) if decay < 1 else stop
    m = min(stop, max(start, meeting))
    ramp = math.fsum(math.log((start + j) / (m + j)) for j in range(2, 11))
    return ramp + (log_decay * (stop - m) if stop > m else 0.0)


def learning_rate_weights(shape: str, count: int) -> list[float]:
    """Return w_k = f((k-1)/N) - f(k/N) for the learning-rate `shape`; all equal for linear."""
    if shape == "linear":
        return [1.0] * count

    def f(x: float) -> float:
        return (1 + math.cos(math.pi * x)) / 2 if shape == "cosine" else 1 - math.sqrt(x)

    return [f(k / count) - f((k + 1) / count) for k in range(count)]


def gamma_of(sigma_rel: float) -> float:
    """Return γ > 0 with sigma_rel = √(γ+1) / ((γ+2) √(γ+3)), by bisection in float64.

    The right side falls from 12^-½ at γ = 0 to 0; arXiv 2312.02696, equation 126.
    """

    def width(gamma: float) -> float:
        return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))

    low, high = 0.0, 1.0
    while width(high) > sigma_rel:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return middle


def _power(sigma_rel: float, steps: list[int]) -> list[float]:
    """Return w_k / (w_1 + … + w_k) = 1 - (t_{k-1}/t_k)^(γ+1), which cannot overflow."""
    exponent = gamma_of(sigma_rel) + 1
    values = []
    previous = 0
    for step in steps:
        if step < previous:
            raise Disagreement(
                f"step {step} comes after step {previous}, but a power average needs "
                "increasing steps",
                "leave out --order given",
            )
        if step == previous:
            values.append(0.0)
        elif previous == 0:
            values.append(1.0)
        else:
            values.append(-math.expm1(exponent * math.log(previous / step)))
        previous = step
    return values


def _listed(
    table: tuple[tuple[str, float], ...], steps: list[int], names: list[str]
) -> list[float]:
    """Return the weight of each checkpoint; a key that matches none is an error."""
    weights = [0.0] * len(steps)
    listed: dict[int, str] = {}
    for key, weight in table:
        matches = [k for k, name in enumerate(names) if key == name]
        if not matches:
            matches = [k for k, step in enumerate(steps) if str(step) == (key.lstrip("0") or "0")]
        if not matches:
            known = ", ".join(str(step) for step in steps[:20])
            raise Disagreement(
                f"weights: no checkpoint has the step or name '{shorten(key)}'; steps: {known}",
                did_you_mean(key, [*names, *map(str, steps)], "remove that line from the file"),
            )
        for k in matches:
            if k in listed:
                raise Disagreement(
                    f"weights: '{shorten(key)}' and '{shorten(listed[k])}' are one checkpoint",
                    "remove one of the two lines from the file",
                )
            weights[k], listed[k] = weight, key
    return weights


def counting(schedules: Sequence[Schedule]) -> list[int]:
    """Return the ordinals of the checkpoints that any of the schedules mixes in."""
    together = zip(*(schedule.coefficients for schedule in schedules), strict=True)
    return [k for k, coefficients in enumerate(together) if any(coefficients)]


def effective_count(weights: Sequence[float]) -> float:
    """Return the effective number of checkpoints, (Σw)² / Σw²."""
    squares = math.fsum(w * w for w in weights)
    return math.fsum(weights) ** 2 / squares if squares else 0.0


def mean_age(weights: Sequence[float], steps: Sequence[int]) -> float:
    """Return the weighted mean distance, in training steps, from the last checkpoint."""
    total = math.fsum(weights)
    pairs = zip(weights, steps, strict=True)
    return math.fsum(w * (steps[-1] - step) for w, step in pairs) / total if total else 0.0
