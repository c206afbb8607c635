"""How two checkpoints differ, tensor by tensor, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ema_cli import spilling
from ema_cli.kernel import Array
from ema_cli.reading import TensorReader
from ema_cli.tensors import Checkpoint, Extent, Tensor, describe

_BLOCK_ELEMENTS = 1 << 18


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
    """

    tensor: str
    kind: str
    a: str = ""
    b: str = ""
    count: int = 0
    total: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0


def compare(a: Checkpoint, b: Checkpoint, atol: float, rtol: float) -> list[Difference]:
    """Return the differences in the order of A's tensors, then those only B has."""
    both = a.index.by_name.keys() & b.index.by_name.keys()
    with spilling.readable(a, both) as left, spilling.readable(b, both) as right:
        return _compare(left, right, atol, rtol)


def _compare(a: Checkpoint, b: Checkpoint, atol: float, rtol: float) -> list[Difference]:
    verified: tuple[set[Extent], set[Extent]] = (set(), set())
    found: list[Difference] = []
    for tensor in a.index.tensors:
        other = b.index.by_name.get(tensor.name)
        if other is None:
            shown = describe(tensor.dtype, tensor.shape)
            found.append(Difference(tensor.name, "only in A", a=shown))
        else:
            opened = (TensorReader(a, tensor, verified[0]), TensorReader(b, other, verified[1]))
            difference = _tensor(tensor, other, *opened, atol, rtol)
            if difference is not None:
                found.append(difference)
    for tensor in b.index.tensors:
        if tensor.name not in a.index.by_name:
            shown = describe(tensor.dtype, tensor.shape)
            found.append(Difference(tensor.name, "only in B", b=shown))
    return found


def _tensor(
    mine: Tensor, other: Tensor, a: TensorReader, b: TensorReader, atol: float, rtol: float
) -> Difference | None:
    shown = describe(mine.dtype, mine.shape), describe(other.dtype, other.shape)
    if mine.shape != other.shape:
        return Difference(mine.name, "shape", *shown)
    exact = atol == rtol == 0
    numeric = mine.dtype.bits >= 8 and other.dtype.bits >= 8
    if mine.dtype != other.dtype and (exact or not numeric):
        return Difference(mine.name, "dtype", *shown)
    with a as left, b as right:
        return _values(mine.name, left, right, atol, rtol)


def _values(
    name: str, a: TensorReader, b: TensorReader, atol: float, rtol: float
) -> Difference | None:
    count, max_abs, max_rel = 0, 0.0, 0.0
    for start in range(0, a.elements, _BLOCK_ELEMENTS):
        n = min(_BLOCK_ELEMENTS, a.elements - start)
        x, y = a.block(start, n), b.block(start, n)
        if x.dtype == y.dtype and x.tobytes() == y.tobytes():
            continue
        differing, largest_abs, largest_rel = _block(x, y, atol, rtol)
        count += differing
        if differing:
            max_abs = float(np.maximum(max_abs, largest_abs))
            max_rel = float(np.maximum(max_rel, largest_rel))
    if not count:
        return None
    return Difference(name, "values", "", "", count, a.elements, max_abs, max_rel)


def _block(x: Array, y: Array, atol: float, rtol: float) -> tuple[int, float, float]:
    """Return how many elements differ, and the largest absolute and relative difference."""
    wide = np.dtype(np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        p, q = x.astype(wide), y.astype(wide)
        gap = np.where(p == q, 0.0, np.abs(p - q))
        if atol == rtol == 0:
            left, right = (array.view(np.uint8).reshape(len(array), -1) for array in (x, y))
            differs = (left != right).any(axis=1)
        else:
            near = np.isfinite(p) & np.isfinite(q) & (gap <= atol + rtol * np.abs(q))
            differs = ~(near | (p == q) | (np.isnan(p) & np.isnan(q)))
        if not differs.any():
            return 0, 0.0, 0.0
        gaps, sizes = gap[differs], np.abs(q[differs])
        relative = np.where(gaps == 0, 0.0, gaps / sizes)
        return int(differs.sum()), float(gaps.max()), float(relative.max())
