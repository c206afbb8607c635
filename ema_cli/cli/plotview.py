"""How weights and coefficients are drawn in a terminal: bars beside numbers, or plots."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ema_cli.text import percent, printable
from ema_cli.views import Cell, Out, Screen, bars

if TYPE_CHECKING:
    from ema_cli.plan import Plan
    from ema_cli.states.summary import StateSummary

# Beyond this many checkpoints a plot says more than a bar for each.
MANY = 40
_BETWEEN = 3  # characters between two columns of a table
_WIDEST_BAR, _WIDEST_OF_SEVERAL, _NARROWEST_BAR, _COEFFICIENT_BAR = 32, 20, 6, 4
_NARROWEST_NAME = 8
_NARROWEST_PANEL, _WIDEST_PANEL = 34, 100
_WEIGHT_ROWS, _COEFFICIENT_ROWS = 8, 4


class Curve(NamedTuple):
    """One average over the checkpoints."""

    label: str
    spec: str
    weights: Sequence[float]
    coefficients: Sequence[float]

    def numbers(self, k: int) -> list[Cell]:
        """Return coefficient and weight of a checkpoint as they are shown."""
        return [f"{self.coefficients[k]:.9g}", percent(self.weights[k])]


class Course(NamedTuple):
    """The checkpoints of a run, and what averages make of them."""

    names: Sequence[str]
    steps: Sequence[int]
    curves: Sequence[Curve]


def of_plan(plan: Plan) -> Course:
    """Return what a plan has to show."""
    names = [c.name if plan.run.searched else c.path for c in plan.run.checkpoints]
    curves = [
        Curve(
            outcome.average.label,
            outcome.average.spec,
            outcome.weights,
            plan.schedules[outcome.schedule].coefficients,
        )
        for outcome in plan.outcomes
    ]
    return Course(names, plan.run.steps, curves)


def of_state(state: StateSummary) -> Course:
    """Return what a state has to show."""
    rows = state.applied
    curves = [
        Curve(average.label, average.spec, weights, [row.coefficients[k] for row in rows])
        for k, (average, weights) in enumerate(zip(state.averages, state.weights, strict=True))
    ]
    return Course([row.name for row in rows], [row.step or 0 for row in rows], curves)


def extent(weights: Sequence[float], steps: Sequence[int]) -> str:
    """Return how many checkpoints an average is worth, and how far back it reaches."""
    from ema_cli.schedules import effective_count, mean_age

    return (
        f"effective number of checkpoints {effective_count(weights):.1f}, "
        f"mean age {mean_age(weights, steps):,.0f} steps"
    )


def show(out: Out, course: Course) -> None:
    """Print coefficients and weights: data in a pipe, drawn on a terminal."""
    screen = out.screen()
    if screen is not None:
        draw(screen, course, verbose=out.verbose)
    else:
        _table(out, course)


def _table(out: Out, course: Course) -> None:
    """One row per checkpoint: its coefficient and weight in each average."""
    single = len(course.curves) == 1
    columns = ["checkpoint", "step"]
    for curve in course.curves:
        suffix = "" if single else f" {curve.label}"
        columns += [f"coefficient{suffix}", f"weight{suffix}"]
    rows: list[list[Cell]] = []
    for k, (name, step) in enumerate(zip(course.names, course.steps, strict=True)):
        rows.append([name, step, *(cell for curve in course.curves for cell in curve.numbers(k))])
    out.table(columns, rows)


def beside_data(out: Out, course: Course) -> None:
    """Draw the same on stderr, where that is a terminal."""
    screen = out.screen(talk=True)
    if screen is not None:
        draw(screen, course, verbose=out.verbose)
        screen.lines([""])


def draw(screen: Screen, course: Course, *, verbose: bool = False) -> None:
    """Draw a bar for each checkpoint, or plots of many."""
    many = len(course.steps) > MANY
    if many:
        screen.lines(plots(course, screen.width, blocks=screen.blocks))
    if not many or verbose:
        _with_bars(screen, course)


# ---------------------------------------------------------------------------- bars beside numbers


class _Widths(NamedTuple):
    """How wide the parts of a table are, and of how many averages it tells."""

    name: int
    weight: int
    coefficient: int
    together: int


def _widths(course: Course, screen: Screen) -> _Widths:
    """Return what fits: first the numbers, then bars of the weights, then of the coefficients."""
    curves, name = course.curves, max(map(len, course.names))
    cells = [curve.numbers(k) for curve in curves for k in range(len(course.steps))]
    # The titles are wider than most numbers.
    numbers = sum(
        max(len(title), *(len(str(row[column])) for row in cells))
        for column, title in enumerate(("coefficient", "weight"))
    )
    numbers += 2 * _BETWEEN
    wanted = numbers + _BETWEEN + _NARROWEST_BAR
    step = max(len("step"), *(len(str(step)) for step in course.steps)) + _BETWEEN
    name = min(name, max(screen.width - step - wanted, screen.width // 4, _NARROWEST_NAME))
    name = max(name, min(len("checkpoint"), screen.width // 4))
    room = screen.width - name - step
    together = min(max(room // wanted, 1), len(curves))
    left = room // together - numbers - _BETWEEN
    small = _COEFFICIENT_BAR if left >= _NARROWEST_BAR + _BETWEEN + _COEFFICIENT_BAR else 0
    left -= small + _BETWEEN if small else 0
    wide = min(left, _WIDEST_BAR if together == 1 else _WIDEST_OF_SEVERAL)
    return _Widths(name, wide if wide > _BETWEEN else 0, small, together)


def _with_bars(screen: Screen, course: Course) -> None:
    widths = _widths(course, screen)
    for start in range(0, len(course.curves), widths.together):
        screen.lines([""] if start else [])
        chosen = course.curves[start : start + widths.together]
        columns = ["checkpoint", "step"]
        for curve in chosen:
            label = textwrap.wrap(printable(curve.label), len("coefficient"))
            above = "\n".join([*label, ""]) if len(course.curves) > 1 else ""
            columns += [f"{above}coefficient", *[""] * bool(widths.coefficient)]
            columns += ["weight", *[""] * bool(widths.weight)]
        rows: list[list[Cell]] = [
            [name, step, *(cell for c in chosen for cell in _cells(c, k, widths, screen.blocks))]
            for k, (name, step) in enumerate(zip(course.names, course.steps, strict=True))
        ]
        screen.table(columns, rows, widths.name)


def _cells(curve: Curve, k: int, widths: _Widths, blocks: bool) -> list[Cell]:
    """Return the cells of one checkpoint in one average: each number, then its bar."""
    coefficient, weight = curve.numbers(k)
    largest = bars.largest_of(curve.weights)
    cells = [coefficient]
    if widths.coefficient:
        cells.append(bars.bar(curve.coefficients[k], 1.0, widths.coefficient, blocks=blocks))
    cells.append(weight)
    if widths.weight:
        cells.append(bars.bar(curve.weights[k], largest, widths.weight, blocks=blocks))
    return cells


# ---------------------------------------------------------------------------- plots of many


def plots(course: Course, width: int, *, blocks: bool) -> list[str]:
    """Return a panel for each average, side by side as far as they go."""
    fit = max((width + _BETWEEN) // (_NARROWEST_PANEL + _BETWEEN), 1)
    together = min(fit, len(course.curves))
    room = min((width - _BETWEEN * (together - 1)) // together, _WIDEST_PANEL)
    lines: list[str] = []
    for start in range(0, len(course.curves), together):
        chosen = course.curves[start : start + together]
        lines += [""] if start else []
        lines += bars.beside([_panel(curve, course.steps, room, blocks) for curve in chosen])
    return lines


def _panel(curve: Curve, steps: Sequence[int], width: int, blocks: bool) -> list[str]:
    title = f"{printable(curve.label)}: {printable(curve.spec)}"
    # Equal margins: the columns of both plots stand above each other.
    margin = max(len(percent(bars.largest_of(curve.weights))), len(percent(0.0)))
    weights = bars.plot(
        curve.weights, steps, width, _WEIGHT_ROWS, shown=percent, margin=margin, blocks=blocks
    )
    coefficients = bars.plot(
        curve.coefficients, steps, width, _COEFFICIENT_ROWS, margin=margin, blocks=blocks
    )
    return [
        *textwrap.wrap(title, width, break_on_hyphens=False),
        f"weight of {len(steps):,} checkpoints",
        *weights,
        "coefficient",
        *coefficients,
    ]
