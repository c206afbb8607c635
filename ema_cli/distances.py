"""How far the checkpoints of a run lie from an average on its way, as frozen data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_GROUPS = 1000
_LONGEST_NAME = 1 << 16


@dataclass(frozen=True)
class Distances:
    """The distance of each checkpoint from an average just before it was mixed in.

    Distances are Euclidean and right to about 1e-6 of their value. There is none where there was
    no update: of the first checkpoint, which is copied, and of one that is skipped; nor where it
    is not finite. A group is a part of the model, such as ``model.layers.0``.

    Attributes:
        average: the label of the average.
        steps: of the checkpoints.
        groups: names of the groups of averaged tensors.
        norms: for each group, the norm of the finished average.
        gaps: for each group and checkpoint, the distance, or None.
    """

    average: str
    steps: tuple[int | None, ...]
    groups: tuple[str, ...]
    norms: tuple[float, ...]
    gaps: tuple[tuple[float | None, ...], ...]

    def relative(self, group: int, k: int) -> float | None:
        """Return the distance of checkpoint `k` in a group, in norms of the finished average."""
        return _share(self.gaps[group][k], self.norms[group])

    def gap(self, k: int) -> float | None:
        """Return the distance of checkpoint `k` over all groups."""
        return _root(gaps[k] for gaps in self.gaps)

    def total(self, k: int) -> float | None:
        """Return the distance of checkpoint `k` over all groups, in norms of the average."""
        return _share(self.gap(k), _root(self.norms))

    def worst(self, k: int) -> int | None:
        """Return the group in which checkpoint `k` is relatively farthest, or None."""
        found = [(self.relative(g, k), g) for g in range(len(self.groups))]
        known = [(-share, g) for share, g in found if share is not None]
        return min(known)[1] if known else None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data; what the run knows besides is left out."""
        norms = [norm if math.isfinite(norm) else None for norm in self.norms]
        return {"groups": list(self.groups), "norms": norms, "gaps": [list(g) for g in self.gaps]}


def from_json(found: Any, average: str, steps: Sequence[int | None]) -> Distances | None:
    """Return what `to_json` made for these steps, or None for anything else."""
    if not isinstance(found, dict):
        return None
    parts: list[Any] = [found.get(key) for key in ("groups", "norms", "gaps")]
    groups, norms, gaps = parts
    if not (_is_list(groups) and len(groups) <= _MOST_GROUPS and all(map(_is_name, groups))):
        return None
    if not (_are_lengths(norms, len(groups)) and _is_list(gaps) and len(gaps) == len(groups)):
        return None
    if not all(_are_lengths(row, len(steps)) for row in gaps):
        return None
    return Distances(
        average,
        tuple(steps),
        tuple(groups),
        tuple(math.nan if norm is None else float(norm) for norm in norms),
        tuple(tuple(None if gap is None else float(gap) for gap in row) for row in gaps),
    )


def _is_list(found: Any) -> bool:
    return type(found) is list


def _is_name(found: Any) -> bool:
    return type(found) is str and len(found) <= _LONGEST_NAME


def _are_lengths(found: Any, count: int) -> bool:
    return _is_list(found) and len(found) == count and all(map(_is_length, found))


def _is_length(found: Any) -> bool:
    return found is None or (type(found) in (int, float) and 0 <= found <= 1e300)


def _share(gap: float | None, norm: float | None) -> float | None:
    if gap is None or norm is None or not math.isfinite(norm):
        return None
    return gap / norm if norm else None


def _root(parts: Iterable[float | None]) -> float | None:
    every = list(parts)
    known = [part for part in every if part is not None]
    return math.hypot(*known) if len(known) == len(every) else None
