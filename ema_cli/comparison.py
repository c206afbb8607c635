"""How two checkpoints differ, tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ema_cli import spilling
from ema_cli.kernel import Array
from ema_cli.reading import TensorReader
from ema_cli.tensors import Checkpoint, Extent, Tensor, describe

# Small enough that what is computed with a block stays in cache.
_BLOCK_ELEMENTS = 1 << 14
# Bounds of the bins of relative change; before the first are the elements that did not change.
DECADES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_BINS = len(DECADES) + 2


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that differs.

    Attributes:
        tensor: its name.
        kind: ``only in A``, ``only in B``, ``shape``, ``dtype`` or ``values``.
        a: what A holds, for all kinds but ``values``.
        b: what B holds.
        count: elements that differ, for ``values``.
        total: elements in all.
        max_abs: largest absolute difference; NaN when a NaN meets a number.
        max_rel: largest difference relative to B.
        rel_norm: Euclidean norm of the difference relative to that of B.
    """

    tensor: str
    kind: str
    a: str = ""
    b: str = ""
    count: int = 0
    total: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    rel_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class Bin:
    """How many elements changed how much.

    Attributes:
        below: bound of the relative change ``|a - b| / |b|``, which is at least that of the bin
            before; 0 for elements that are equal, None for a change of 1 and more, or from or to
            what is not finite.
        count: the elements.
    """

    below: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Change:
    """How much one tensor changed that both checkpoints hold as numbers of one shape.

    Attributes:
        tensor: its name.
        elements: how many it has.
        rel_norm: Euclidean norm of the difference relative to that of B; NaN where a NaN meets a
            number.
        counts: elements in each bin of `Comparison.histogram`.
    """

    tensor: str
    elements: int
    rel_norm: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two checkpoints differ; false when they do not.

    Attributes:
        differences: what differs, in the order of A's tensors, then those only B has.
        histogram: the elements of `tensors` by relative change, whatever the tolerance.
        tensors: how much each tensor changed that was compared number by number.
    """

    differences: tuple[Difference, ...]
    histogram: tuple[Bin, ...]
    tensors: tuple[Change, ...]

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.differences)

    def most_changed(self, count: int = 10) -> list[Change]:
        """Return the tensors with the largest relative norm of the difference, largest first."""

        def key(change: Change) -> float:
            return math.inf if math.isnan(change.rel_norm) else change.rel_norm

        changed = [change for change in self.tensors if change.rel_norm != 0]
        return sorted(changed, key=key, reverse=True)[:count]


def compare(a: Checkpoint, b: Checkpoint, atol: float, rtol: float) -> Comparison:
    """Return the differences in the order of A's tensors, then those only B has."""
    both = a.index.by_name.keys() & b.index.by_name.keys()
    with spilling.readable(a, both) as left, spilling.readable(b, both) as right:
        return _compare(left, right, atol, rtol)


def _compare(a: Checkpoint, b: Checkpoint, atol: float, rtol: float) -> Comparison:
    verified: tuple[set[Extent], set[Extent]] = (set(), set())
    found: list[Difference] = []
    changes: list[Change] = []
    for tensor in a.index.tensors:
        other = b.index.by_name.get(tensor.name)
        if other is None:
            shown = describe(tensor.dtype, tensor.shape)
            found.append(Difference(tensor.name, "only in A", a=shown))
            continue
        difference = _unlike(tensor, other, exact=atol == rtol == 0)
        if difference is None:
            opened = (TensorReader(a, tensor, verified[0]), TensorReader(b, other, verified[1]))
            difference, change = _values(tensor, *opened, atol, rtol)
            if tensor.dtype.bits >= 8:
                changes.append(change)
        if difference is not None:
            found.append(difference)
    for tensor in b.index.tensors:
        if tensor.name not in a.index.by_name:
            shown = describe(tensor.dtype, tensor.shape)
            found.append(Difference(tensor.name, "only in B", b=shown))
    counts = [sum(change.counts[k] for change in changes) for k in range(_BINS)]
    bounds: list[float | None] = [0.0, *DECADES, None]
    histogram = tuple(Bin(*pair) for pair in zip(bounds, counts, strict=True))
    return Comparison(tuple(found), histogram, tuple(changes))


def _unlike(mine: Tensor, other: Tensor, *, exact: bool) -> Difference | None:
    """Return why the values cannot be compared, if they cannot."""
    shown = describe(mine.dtype, mine.shape), describe(other.dtype, other.shape)
    if mine.shape != other.shape:
        return Difference(mine.name, "shape", *shown)
    numeric = mine.dtype.bits >= 8 and other.dtype.bits >= 8
    if mine.dtype != other.dtype and (exact or not numeric):
        return Difference(mine.name, "dtype", *shown)
    return None


class _Tally:
    """What is known of one tensor after some of its blocks."""

    def __init__(self) -> None:
        self.count = 0
        self.max_abs = self.max_rel = 0.0
        self.gap = self.norm = 0.0
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, x: Array, y: Array, atol: float, rtol: float) -> None:
        """Take in one block of both."""
        wide = np.dtype(np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            q = y.astype(wide)
            if x.dtype == y.dtype and x.tobytes() == y.tobytes():
                self.counts[0] += len(x)
                self.norm = _joined(self.norm, _norm_of_finite(q))
                return
            p = x.astype(wide)
            gap, size = np.abs(p - q), np.abs(q)
            known = size
            if np.isfinite(gap).all():
                equal = gap == 0
            else:  # equal infinities and NaNs are no difference, and no part of a norm
                equal = (p == q) | (np.isnan(p) & np.isnan(q))
                gap[equal] = 0.0
                known = np.where(equal & ~np.isfinite(q), 0.0, size)
            relative = np.zeros(len(gap))
            np.divide(gap, size, out=relative, where=~equal)
            self._spread(relative, gap, known)
            if atol == rtol == 0:
                left, right = (array.view(np.uint8).reshape(len(array), -1) for array in (x, y))
                differs = (left != right).any(axis=1)
            else:
                near = np.isfinite(p) & np.isfinite(q) & (gap <= atol + rtol * size)
                differs = ~(near | equal)
        if differs.any():
            self.count += int(differs.sum())
            self.max_abs = float(np.maximum(self.max_abs, gap[differs].max()))
            self.max_rel = float(np.maximum(self.max_rel, relative[differs].max()))

    def _spread(self, relative: Array, gap: Array, size: Array) -> None:
        """Count the relative changes by decade, and add to both norms."""
        below = [int(np.count_nonzero(relative == 0))]
        below += [int(np.count_nonzero(relative < bound)) for bound in DECADES]
        self.counts += np.diff([0, *below, len(relative)])
        self.gap = _joined(self.gap, _norm(gap))
        self.norm = _joined(self.norm, _norm(size))

    def rel_norm(self) -> float:
        """Return the norm of the difference relative to that of B."""
        if self.gap == 0:
            return 0.0
        return self.gap / self.norm if self.norm else self.gap * math.inf


def _joined(one: float, other: float) -> float:
    """Return the norm of two parts; NaN in one is NaN, an infinite other part or not."""
    return math.nan if math.isnan(one + other) else math.hypot(one, other)


def _norm(sizes: Array) -> float:
    """Return the Euclidean norm of absolute values, whose squares may be too large."""
    largest = float(sizes.max(initial=0.0))
    if not 1e-150 < largest < 1e150:
        if largest == 0 or not math.isfinite(largest):
            return largest
        return largest * _norm(sizes / largest)
    return math.sqrt(_square(sizes))


def _square(values: Array) -> float:
    """Return the sum of squares; not by the BLAS, whose threads cost more than they save here."""
    return float(np.einsum("i,i->", values, values.conj()).real)


def _norm_of_finite(values: Array) -> float:
    """Return the Euclidean norm of the values that are finite."""
    square = _square(values)
    if 1e-300 < square < math.inf:
        return math.sqrt(square)
    return _norm(np.abs(values[np.isfinite(values)]))


def _values(
    tensor: Tensor, a: TensorReader, b: TensorReader, atol: float, rtol: float
) -> tuple[Difference | None, Change]:
    tally, name = _Tally(), tensor.name
    with a, b:
        for start in range(0, a.elements, _BLOCK_ELEMENTS):
            n = min(_BLOCK_ELEMENTS, a.elements - start)
            tally.add(a.block(start, n), b.block(start, n), atol, rtol)
    relative = tally.rel_norm()
    change = Change(name, a.elements, relative, tuple(tally.counts.tolist()))
    if not tally.count:
        return None, change
    largest = (tally.max_abs, tally.max_rel, relative)
    return Difference(name, "values", "", "", tally.count, a.elements, *largest), change
