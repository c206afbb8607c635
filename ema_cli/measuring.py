"""How far each checkpoint lies from an average before it is mixed in: sums of squares on the way.

An update forms ``shadow - value`` anyway; its squares are summed where it lies, in cache. Sums of
`kernel.CHUNK` elements are taken in the dtype of the shadow (half types widened), sums of these in
float64, those of tasks exactly: a distance is right to about 1e-6, whoever carried out what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from ema_cli import kernel
from ema_cli.distances import Distances
from ema_cli.schedules import counting
from ema_cli.tasks import Accumulator, Piece, Sum
from ema_cli.tensors import NumpyDType
from ema_cli.work import Work

FINISHED = -1
Reused = Callable[[str, NumpyDType, int], kernel.Array]


class Sums:
    """What a task contributes, as `made`; `reused` gives it an array for a difference."""

    def __init__(self, reused: Reused) -> None:
        self.made: dict[Sum, float] = {}
        self._reused = reused
        self._parts: list[tuple[slice, int, int]] = []
        self._schedule = self._source = 0

    def begin(self, piece: Piece, start: int, count: int) -> None:
        """Go to a block of a piece: `count` elements from `start` on."""
        first, stop = piece.start + start, piece.start + start + count
        self._parts, at = [], first
        for end, group in piece.segments:
            if end > at:
                part = slice(at - first, min(end, stop) - first)
                self._parts.append((part, at, group))
                at = min(end, stop)
            if at == stop:
                break

    def turn(self, schedule: int, source: int) -> None:
        """Go to what `add` is of from now on."""
        self._schedule, self._source = schedule, source

    def add(self, values: kernel.Array, divisor: float | None = None) -> None:
        """Add the squares of a float32 or float64 block, divided by the square of a divisor."""
        scale = 1.0 if divisor is None else divisor * divisor
        for part, at, group in self._parts:
            key = Sum(self._schedule, self._source, group)
            total = kernel.sum_of_squares(values[part], at)
            total = total / scale if scale else math.inf
            self.made[key] = self.made.get(key, 0.0) + total

    def add_difference(self, shadow: kernel.Array, value: kernel.Array) -> None:
        """Add the squares of ``shadow - value``, which are left alone."""
        wide = self._wide(shadow)
        np.subtract(wide, value, out=wide)
        self.add(wide)

    def finish(self, accumulator: Accumulator, shadow: kernel.Array) -> None:
        """Add the squares of a block of a finished average."""
        self.turn(accumulator.schedule, FINISHED)
        self.add(self._wide(shadow) if shadow.itemsize == 2 else shadow, accumulator.divisor)

    def _wide(self, shadow: kernel.Array) -> kernel.Array:
        dtype = np.dtype(np.float32) if shadow.itemsize == 2 else shadow.dtype
        out = self._reused("difference", dtype, len(shadow))
        kernel.widen(shadow, out)
        return out


class Measured:
    """The sums of all tasks, added exactly, so that their order does not matter."""

    def __init__(self) -> None:
        self._sums: dict[Sum, list[float]] = {}

    def add(self, made: Mapping[Sum, float]) -> None:
        """Add what one task contributed."""
        for key, value in made.items():
            _add(self._sums.setdefault(key, []), value)

    def distances(self, work: Work, schedule: int, label: str) -> Distances:
        """Return the distances from one average, which has the coefficients of a `schedule`."""
        steps = tuple(checkpoint.step for checkpoint in work.checkpoints)
        source_of = {k: source for source, k in enumerate(counting(work.schedules))}
        # One whose tensors are all stored under another group's names has nothing of its own.
        groups = [g for g in range(len(work.groups)) if Sum(schedule, FINISHED, g) in self._sums]
        norms = [self._root(schedule, FINISHED, group) for group in groups]
        return Distances(
            label,
            steps,
            tuple(work.groups[group] for group in groups),
            tuple(math.nan if norm is None else norm for norm in norms),
            tuple(
                tuple(
                    self._root(schedule, source_of[k], group) if k in source_of else None
                    for k in range(len(steps))
                )
                for group in groups
            ),
        )

    def _root(self, schedule: int, source: int, group: int) -> float | None:
        parts = self._sums.get(Sum(schedule, source, group))
        total = math.nan if parts is None else math.fsum(parts)
        # Digits beyond what is right are none that another block or machine would have.
        return float(f"{math.sqrt(total):.9g}") if math.isfinite(total) else None


def _add(parts: list[float], value: float) -> None:
    """Add a number to a sum kept as parts that do not overlap: Shewchuk's, exact."""
    kept = 0
    for part in parts:
        large, small = (value, part) if abs(value) >= abs(part) else (part, value)
        value = large + small
        rest = small - (value - large)
        if rest:
            parts[kept] = rest
            kept += 1
    if not math.isfinite(value):
        kept = 0
    parts[kept:] = [value]
