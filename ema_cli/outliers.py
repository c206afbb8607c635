"""Which checkpoints do not belong to a run, told from their distances alone. Pure data in and out.

Two signs are known. A checkpoint saved *twice* lies exactly (1 - c) times as far from the average
as the one before it, which was mixed in with c, and so it does in every group of tensors. And one
that is *far*, several times as far as its neighbours over all or in most groups of tensors, or many
times in one: a loss spike, or a file of another run.

What an outlier leaves in the average, c times its distance, shrinks by (1 - c) with every update
after it, and is taken off the distances of those, at a right angle. A training that slows down or
gathers speed has distances that shrink or grow from one checkpoint to the next: its neighbours on
the worse side are what a checkpoint is held against, so that a trend is no outlier.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ema_cli.distances import Distances

FAR, DUPLICATE = "far", "duplicate"
# How many times as far as its neighbours: over all groups; in half of the groups, of which there
# are several; in one of them alone.
FACTOR, TOGETHER, ALONE, SEVERAL = 4.0, 2.2, 8.0, 3
# Below as many distances nothing is far; neighbours that are looked at, on either side.
FEWEST, AROUND = 5, 5
# How much farther than elsewhere a first or last one may be.
_AT_AN_END = 1.25
# A group that moves by less than this share of its norm is none that an average suffers from.
_SMALLEST_SHARE = 1e-3
# The relative accuracy of a distance where it is this share of the norm, and more.
_ACCURACY, _ACCURATE_SHARE = 1e-5, 1e-5
# How improbable it has to be that two distances agree so well by chance, by groups that tell.
_CHANCE = (1e-4, 1e-8)
# What distances of an ordinary run differ by, where nothing tells; and those that are equal.
_ORDINARY, _EXACT = 1e-2, 1e-9

Series = Sequence[float | None]


class Outlier(NamedTuple):
    """A checkpoint that does not belong.

    Attributes:
        checkpoint: its ordinal in the run.
        kind: ``far`` or ``duplicate``.
        group: in which it is farthest; of a duplicate, empty.
        ratio: how many times as far as its neighbours; of a duplicate, 1 - c.
        everywhere: whether that is over all or most groups, not in `group` alone.
    """

    checkpoint: int
    kind: str
    group: str
    ratio: float
    everywhere: bool = True


def find(distances: Distances, coefficients: Sequence[float]) -> list[Outlier]:
    """Return the outliers of an average with these coefficients, in the order of the run."""
    found = {one.checkpoint: one for one in _far(distances, coefficients)}
    found |= {one.checkpoint: one for one in _duplicates(distances, coefficients)}
    return [found[k] for k in sorted(found)]


# ---------------------------------------------------------------------------- saved twice


def _duplicates(distances: Distances, coefficients: Sequence[float]) -> list[Outlier]:
    """Return the checkpoints that hold the values of the one before."""
    used = [k for k, c in enumerate(coefficients) if c]
    found, pairs = [], []
    same = False  # whether the average holds the values of the last checkpoint exactly
    for before, k in itertools.pairwise(used):
        same = coefficients[before] == 1 or (same and distances.gap(before) == 0)
        if same:
            same = distances.gap(k) == 0
            if same:
                found.append(Outlier(k, DUPLICATE, "", 0.0))
        elif coefficients[before] < 1:
            pairs.append((k, 1 - coefficients[before], _misses(distances, before, k, coefficients)))
    ordinary: dict[int, float] = {}  # by how much the last pair that is none differs
    for k, ratio, misses in pairs:
        if _by_no_chance(misses, ordinary):
            found.append(Outlier(k, DUPLICATE, "", ratio))
        else:
            ordinary = misses
    return found


def _by_no_chance(misses: Mapping[int, float], ordinary: Mapping[int, float]) -> bool:
    """Whether distances agree in every group, and far better than those of the pair before.

    A training that hardly moves any more has distances that agree better and better.
    """
    if not misses or max(misses.values()) > _ACCURACY:
        return False
    chances = [
        min(1.0, max(miss, _EXACT) / (ordinary.get(group) or _ORDINARY))
        for group, miss in misses.items()
    ]
    return math.prod(chances) <= _CHANCE[min(len(chances), 2) - 1]


def _misses(
    distances: Distances, before: int, k: int, coefficients: Sequence[float]
) -> dict[int, float]:
    """Return by how much each group's distance is not (1 - c) times the one before."""
    found = {}
    for group, gaps in enumerate(distances.gaps):
        old, new = gaps[before], gaps[k]
        if old is None or new is None:
            return {}
        share = distances.relative(group, before)
        if old and (share is None or share > _ACCURATE_SHARE):
            found[group] = abs(new / old / (1 - coefficients[before]) - 1)
        elif not old and new:
            return {}
    return found


# ---------------------------------------------------------------------------- far away


def _far(distances: Distances, coefficients: Sequence[float]) -> list[Outlier]:
    """Return the checkpoints that are far from the average, over all groups or in one.

    One after the other, the earliest first, since each changes what later ones are held against.
    """
    count = len(coefficients)
    steps = [step or 0 for step in distances.steps]
    gaps = [[distances.gap(k) for k in range(count)], *distances.gaps]
    norms = [math.hypot(*distances.norms), *distances.norms]
    total, *groups = (
        _Series(_settled(row, norm, coefficients), coefficients, steps)
        for row, norm in zip(gaps, norms, strict=True)
    )
    found: dict[int, Outlier] = {}
    k = 0
    while k < count:
        one = None if k in found else _verdict(k, total, groups, distances)
        if one is None:
            k += 1
            continue
        found[k] = one
        for series in (total, *groups):
            series.leave_out(k)
        k = max(0, k - AROUND)
    return list(found.values())


def _verdict(
    k: int, total: _Series, groups: Sequence[_Series], distances: Distances
) -> Outlier | None:
    whole = total.ratio(k)
    ratios = [series.ratio(k) for series in groups]
    largest = max(range(len(ratios)), key=ratios.__getitem__, default=None)
    if largest is None:
        return None
    judged = [ratio for ratio in ratios if ratio]
    most = statistics.median(judged) if len(judged) >= SEVERAL else 0.0
    if whole > FACTOR or most > TOGETHER:
        return Outlier(k, FAR, distances.groups[largest], max(whole, most))
    share = distances.relative(largest, k)
    if ratios[largest] > ALONE and (share is None or share > _SMALLEST_SHARE):
        return Outlier(k, FAR, distances.groups[largest], ratios[largest], everywhere=False)
    return None


def _settled(gaps: Series, norm: float, coefficients: Sequence[float]) -> list[float | None]:
    """Return the distances, without those that an average has because it starts from zeros."""
    first = next((c for c in coefficients if c), 1.0)
    if first == 1:
        return list(gaps)
    end = math.prod(1 - c for c in coefficients)
    whole = norm / (1 - end) if end < 1 else math.inf
    kept, left = 1.0, []
    for gap, c in zip(gaps, coefficients, strict=True):
        left.append(None if gap is None or kept * whole > gap / 2 else gap)
        kept *= 1 - c
    return left


class _Distance(NamedTuple):
    """A distance without what outliers left in the average: `left`, which makes it uncertain."""

    gap: float
    left: float

    @property
    def certain(self) -> bool:
        return self.gap >= self.left / 2

    def without(self, left: float) -> _Distance:
        """Return it without something else that was left."""
        rest = math.sqrt(max(self.gap**2 - left**2, 0.0))
        return _Distance(rest, math.hypot(self.left, left))


class _Series:
    """The distances in one group, or over all, and the outliers that are known among them."""

    def __init__(self, gaps: Series, coefficients: Sequence[float], steps: Sequence[int]) -> None:
        self._gaps = gaps
        self._coefficients = coefficients
        self._steps = steps
        self._found: set[int] = set()
        self._cleaned: list[_Distance | None] = []
        self._clean()

    def leave_out(self, k: int) -> None:
        """Take a checkpoint for an outlier from now on."""
        self._found.add(k)
        self._clean()

    def _clean(self) -> None:
        self._cleaned, left = [], 0.0  # in the average, of outliers; squared
        for k, (gap, c) in enumerate(zip(self._gaps, self._coefficients, strict=True)):
            known = None if gap is None else _Distance(gap, 0.0).without(math.sqrt(left))
            self._cleaned.append(None if k in self._found else known)
            left *= (1 - c) ** 2
            if k in self._found and gap is not None:
                left += (c * gap) ** 2

    def ratio(self, k: int) -> float:
        """Return how many times as far as its neighbours one is; 0 where nothing tells."""
        one = self._cleaned[k]
        if one is None or not one.certain:
            return 0.0
        near = (self._before(k), self._after(k, one.gap))
        sides = [[other.gap for other in side if other.certain] for side in near]
        if sum(map(len, sides)) < FEWEST - 1:
            sides = [[max(other.gap, other.left / 2) for other in side] for side in near]
        if sum(map(len, sides)) < FEWEST - 1:
            return 0.0
        known = [side for side in sides if side]
        if len(known) > 1:
            usual = max(map(statistics.median, known))
        else:  # at an end of the run, where a trend does not show in the median
            usual = max(known[0][:3]) * _AT_AN_END
        return one.gap / usual / self._spacing(k) if usual else 0.0

    def _before(self, k: int) -> list[_Distance]:
        known = (self._cleaned[j] for j in range(k - 1, -1, -1))
        return list(itertools.islice((one for one in known if one is not None), AROUND))

    def _after(self, k: int, gap: float) -> list[_Distance]:
        """Return the neighbours after one, without what it would leave if it is an outlier."""
        found: list[_Distance] = []
        left = self._coefficients[k] * gap
        for j in range(k + 1, len(self._gaps)):
            one = self._cleaned[j]
            if one is not None:
                found.append(one.without(left))
            if len(found) == AROUND:
                break
            left *= 1 - self._coefficients[j]
        return found

    def _spacing(self, k: int) -> float:
        """Return how many times as many steps as usual lie before a checkpoint, at least 1."""
        first = max(1, k - AROUND)
        around = range(first, min(len(self._steps), k + AROUND + 1))
        usual = statistics.median(abs(self._steps[j] - self._steps[j - 1]) for j in around)
        mine = abs(self._steps[k] - self._steps[k - 1]) if k else 0
        return max(1.0, mine / usual) if usual else 1.0
