"""The checkpoints of a run over its steps: what is there, what seems to be missing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ema_cli.steps import step_from_name
from ema_cli.text import plural

if TYPE_CHECKING:
    from ema_cli.runs import Run
    from ema_cli.views import Screen

# A distance of this many usual ones is a gap: between them saves were missed.
_FACTOR = 1.5
# Characters of the line, and so of marks in a gap that could be told apart.
_MOST = 100
_CHECKPOINT, _PASSED_OVER, _UNUSABLE, _MISSING, _NOTHING = "#", "o", "x", ".", " "
_LEGEND = {
    _CHECKPOINT: "checkpoint",
    _PASSED_OVER: "passed over",
    _UNUSABLE: "unusable",
    _MISSING: "missing",
}
_BLOCKS = {_CHECKPOINT: "█", _PASSED_OVER: "o", _UNUSABLE: "x", _MISSING: "·"}
_RANK = (_NOTHING, _MISSING, _PASSED_OVER, _CHECKPOINT, _UNUSABLE)  # what hides what


class Gap(NamedTuple):
    """A stretch of steps without checkpoints where the usual distance suggests some.

    Attributes:
        after: the step before the gap.
        before: the step after it.
        missing: how many checkpoints the usual distance suggests.
        apart: the usual distance.
    """

    after: int
    before: int
    missing: int
    apart: int

    def told(self) -> str:
        """Return the gap in words."""
        return (
            f"gap: steps {self.after:,} to {self.before:,} "
            f"({self.missing:,} missing at {self.apart:,} apart)"
        )


def gaps(steps: Sequence[int]) -> list[Gap]:
    """Return the gaps of a run; none where no distance between its checkpoints is usual.

    Usual is the median distance, if more than half of all distances are about that: a run of which
    only every tenth checkpoint was kept, but for the newest, has none.
    """
    distances = [b - a for a, b in itertools.pairwise(steps)]
    if len(distances) < 2 or min(distances) <= 0:
        return []
    apart = sorted(distances)[(len(distances) - 1) // 2]
    usual = [distance for distance in distances if apart / _FACTOR <= distance <= apart * _FACTOR]
    if 2 * len(usual) <= len(distances):
        return []
    return [
        Gap(a, b, round((b - a) / apart) - 1, apart)
        for a, b in itertools.pairwise(steps)
        if b - a > _FACTOR * apart
    ]


def documents(found: Sequence[Gap]) -> list[dict[str, Any]]:
    """Return gaps as JSON data."""
    return [
        {"after": g.after, "before": g.before, "missing_count": g.missing, "apart": g.apart}
        for g in found
    ]


def draw(screen: Screen, run: Run) -> None:
    """Draw a run over its steps."""
    screen.lines(["", *lines(run, screen.width, blocks=screen.blocks)])


def _marks(run: Run) -> list[tuple[int, str]]:
    """Return steps and what is there; entries that tell no step have no place."""
    marks = [(step, _CHECKPOINT) for step in run.steps]
    # An odd number far away would squeeze the run itself into one mark.
    reach = max(run.steps) - min(run.steps) or 1
    near = range(min(run.steps) - reach, max(run.steps) + reach + 1)
    for entry in run.passed_over:
        step = step_from_name(os.path.basename(entry.path))
        if step is not None and step in near:
            marks.append((step, _UNUSABLE if entry.unusable else _PASSED_OVER))
    for gap in gaps(run.steps):
        marks += [
            (gap.after + (gap.before - gap.after) * k // (min(gap.missing, _MOST) + 1), _MISSING)
            for k in range(1, min(gap.missing, _MOST) + 1)
        ]
    return marks


def lines(run: Run, width: int, *, blocks: bool) -> list[str]:
    """Return the timeline: a line of marks, the steps below it, a legend of what occurs."""
    marks = _marks(run)
    first, last = min(step for step, _ in marks), max(step for step, _ in marks)
    room = max(min(width, _MOST), 1)
    cells = [_NOTHING] * room
    for step, mark in marks:
        at = (step - first) * (room - 1) // max(last - first, 1)
        cells[at] = max(cells[at], mark, key=_RANK.index)
    shown = {_NOTHING: " ", **{mark: _BLOCKS[mark] if blocks else mark for mark in _LEGEND}}
    line = "".join(shown[cell] for cell in cells).rstrip()
    ends = f"{first:,}", f"{last:,}"
    between = " " * max(room - sum(map(len, ends)), 1)
    axis = ends[0] if first == last else f"{ends[0]}{between}{ends[1]}"
    legend = [f"{shown[mark]} {word}" for mark, word in _LEGEND.items() if mark in cells]
    crowded = len({step for step, _ in marks}) > sum(cell != _NOTHING for cell in cells)
    apart = plural(max((last - first) // room, 1), "step")
    note = [f"one character is about {apart}"] if crowded else []
    return [line, axis, *_folded(legend, width), *note]


def _folded(words: Sequence[str], width: int) -> list[str]:
    """Return words in as many lines as they need."""
    found: list[str] = []
    for word in words:
        if found and len(found[-1]) + 3 + len(word) <= width:
            found[-1] += f"   {word}"
        else:
            found.append(word)
    return found
