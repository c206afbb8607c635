"""What a plan warns about: stable codes, each with the finished command that helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ema_cli import kernel
from ema_cli.averages import Average, Ema, HalfLife, Power
from ema_cli.errors import EmaError
from ema_cli.formats import FORMATS
from ema_cli.formats.hdf5.names import NAME as HDF5
from ema_cli.formats.hdf5.names import keras_layout
from ema_cli.invocation import run_words
from ema_cli.naming import OBJECT_GRAPH
from ema_cli.plan import Outcome, Plan, Request
from ema_cli.schedules import one_minus_decay, schedule
from ema_cli.tensors import DTYPES
from ema_cli.text import command, percent, plural, shorten, size, with_article

# With init=zeros or zero_debias and num_updates the weights miss 1 by far more than rounding.
_SUM_TOLERANCE = 1e-3
# The shares from which the first or the last checkpoint dominates.
_FIRST = 0.5
_LAST = 0.9
_SIGNIFICAND = {"float16": 11, "bfloat16": 8}


class PlanWarning(NamedTuple):
    """Something that is probably not meant.

    Attributes:
        code: a stable word for it, such as ``first-dominates``.
        message: what it is, one line.
        hint: the commands that were probably meant, or empty.
    """

    code: str
    message: str
    hint: str = ""


class _Way(NamedTuple):
    """How a command in a hint goes on from the one that is warned of; see `warnings`."""

    again: bool
    state: str
    word: str


def warnings(
    plan: Plan, *, again: bool = False, state: str = "", word: str = "run"
) -> list[PlanWarning]:
    """Return the warnings of a plan, in the order of its averages.

    `again`: the commands in the hints are meant to follow this very run, whose output they replace.
    `state` is the directory of its state: it is bound to its settings, so they begin another.
    `word` is the command, of `ema-avg`.
    """
    found: list[PlanWarning] = []
    way = _Way(again, state, word)
    for outcome in plan.outcomes:
        found.extend(_dominance(plan, outcome, way))
        found.extend(_ramp(plan, outcome))
        found.extend(_sum(outcome))
        found.extend(_frozen(plan, outcome))
        found.extend(_names(plan.request, outcome))
        found.extend(_suffix(outcome))
        found.extend(PlanWarning(*caution) for caution in outcome.last.index.cautions)
    found = list(dict.fromkeys(found))
    if len(plan.run.checkpoints) == 1:
        path = shorten(plan.run.checkpoints[0].path, 1000)
        message = f"one checkpoint: the result is {path} itself"
        found.insert(0, PlanWarning("one-checkpoint", message))
    if plan.costs.write > plan.costs.free:
        needed, free = size(plan.costs.write), size(plan.costs.free)
        found.append(
            PlanWarning("disk-space", f"the output needs {needed}, the disk has {free} free")
        )
    return found


def _active(outcome: Outcome, plan: Plan) -> list[int]:
    coefficients = plan.schedules[outcome.schedule].coefficients
    return [k for k, c in enumerate(coefficients) if c]


def _dominance(plan: Plan, outcome: Outcome, way: _Way) -> Iterator[PlanWarning]:
    """The field's classic: a decay meant per training step, applied once per checkpoint."""
    active = _active(outcome, plan)
    inside = _inside(outcome.average, plan)
    if len(inside) < 2 or not active:
        return
    family = outcome.average.family
    first, last = outcome.weights[active[0]], outcome.weights[inside[-1]]
    if isinstance(family, Ema | HalfLife | Power) and active[0] == inside[0] and first > _FIRST:
        yield PlanWarning(
            "first-dominates",
            f"average '{outcome.average.label}': the first checkpoint keeps {percent(first)} of "
            f"the weight, {_others(len(inside) - 1)} the rest",
            _first_hint(plan, outcome.average, active[0], way),
        )
    if last > _LAST:
        yield PlanWarning(
            "last-dominates",
            f"average '{outcome.average.label}': the last checkpoint has {percent(last)} of the "
            "weight: the result is nearly that checkpoint",
            "a larger decay, half-life or width averages over more of them",
        )


def _others(count: int) -> str:
    return "the other one has" if count == 1 else f"the other {count} share"


def _inside(average: Average, plan: Plan) -> list[int]:
    steps = plan.run.steps
    taken = average.window.selects(steps) if average.window else [True] * len(steps)
    return [k for k, inside in enumerate(taken) if inside]


def _first_hint(plan: Plan, average: Average, first: int, way: _Way) -> str:
    """Return the finished commands that were probably meant, with the share each would leave."""
    if plan.request.like != "tensorflow":
        return "a smaller decay forgets the first checkpoint"
    if not isinstance(average.family, Ema):
        return "a shorter half-life or a smaller width forgets the first checkpoint"
    options = []
    if not average.family.per_step:
        options.append(replace(average, family=Ema(average.family.decay, per_step=True)))
    if average.num_updates == "none":
        options.append(replace(average, num_updates="count"))
    names = [checkpoint.name for checkpoint in plan.run.checkpoints]
    lines = []
    for meant in options:
        try:
            weights = schedule(meant, plan.run.steps, names).weights()
        except EmaError:
            continue  # these steps do not allow it
        if weights[first] > _FIRST or max(weights) > _LAST:
            continue  # no better
        averages = tuple(
            meant if other is average else replace(other, num_updates=meant.num_updates)
            for other in plan.request.averages
        )
        line = command(*run_words(plan.request, averages, way.state, way.word))
        more = " --overwrite" if way.again and plan.request.output is not None else ""
        lines.append(f"{line}{more}  # leaves {percent(weights[first])} on the first")
    return "\n".join(lines) or "a smaller decay forgets the first checkpoint"


def _ramp(plan: Plan, outcome: Outcome) -> Iterator[PlanWarning]:
    """Tell when num_updates, not the decay that was given, decides every update."""
    average = outcome.average
    if plan.request.implicit or average.num_updates == "none":
        return
    if not isinstance(average.family, Ema) or average.family.per_step:
        return
    coefficients = plan.schedules[outcome.schedule].coefficients
    full = float(one_minus_decay(average.family.decay))
    updates = [c for c in coefficients[1:] if c]
    if updates and min(updates) > full:
        yield PlanWarning(
            "decay-never-reached",
            f"average '{average.label}': the ramp (1 + n)/(10 + n) stays below the decay "
            f"{average.family.decay:g} at every update, so it decides alone",
        )


def _sum(outcome: Outcome) -> Iterator[PlanWarning]:
    total = float(np.sum(outcome.weights))
    if outcome.average.init == "zeros" and not abs(total - 1) <= _SUM_TOLERANCE:
        hint = "--zero-debias divides by what is missing"
        if outcome.average.zero_debias:
            hint = "TensorFlow's zero-debias assumes one constant decay; this is its result too"
        yield PlanWarning(
            "weights-do-not-sum",
            f"average '{outcome.average.label}': the weights sum to {total:.6g}, not to 1",
            hint,
        )


def _frozen(plan: Plan, outcome: Outcome) -> Iterator[PlanWarning]:
    """A shadow of p significant bits does not move when c is below 2^(2-p).

    For a difference of a quarter of the shadow the step c/4 is then under half an ulp.
    """
    if plan.request.shadow_dtype != "same":
        return
    coefficients = [c for c in plan.schedules[outcome.schedule].coefficients if c]
    names = {t.dtype.name for t in outcome.selection.averaged if DTYPES[t.dtype.name].bits == 16}
    for name in sorted(names):
        if min(coefficients) < 2.0 ** (2 - _SIGNIFICAND[name]):
            yield PlanWarning(
                "frozen-shadow",
                f"average '{outcome.average.label}': a {name} shadow hardly moves with a "
                f"coefficient of {min(coefficients):.3g}",
                f"--shadow-dtype {kernel.SHADOW_DTYPES[0]} accumulates in float32"
                + ("" if plan.request.like == "tensorflow" else ", without --like"),
            )


def _suffix(outcome: Outcome) -> Iterator[PlanWarning]:
    """Keras tells its layouts by what a file is called: `.weights.h5` is that of Keras 3."""
    layout = outcome.layout
    if layout.format != HDF5 or not layout.path:
        return
    found = keras_layout(layout.places, "keras_version" in outcome.last.index.metadata)
    named = layout.path.endswith(".weights.h5")
    if named and found != "keras 3":
        message = "Keras looks for its own paths in a .weights.h5 file, layers/NAME/vars/0"
        yield PlanWarning("keras-suffix", f"{message}: it will not load this one", "-o NAME.h5")
    elif found == "keras 3" and not named:
        message = "Keras takes a .h5 file for its older layout: it will not load this one"
        yield PlanWarning("keras-suffix", message, "-o NAME.weights.h5")


def _names(request: Request, outcome: Outcome) -> Iterator[PlanWarning]:
    lost = [name for name, reason in outcome.layout.left_out if reason == "optimizer state"]
    if lost and OBJECT_GRAPH in outcome.layout.places:
        yield PlanWarning(
            "object-graph",
            f"the object graph names {plural(len(lost), 'tensor')} that are left out: "
            "tf.train.Checkpoint(...).restore finds them missing where an optimizer asks for them",
            "leave out --optimizer drop",
        )
    if request.wishes.names != "shadow":
        return
    found = f"will not find {plural(len(outcome.selection.averaged), 'tensor')}"
    if FORMATS[outcome.layout.format].plain_names:
        title = FORMATS[outcome.layout.format].title
        yield PlanWarning(
            "shadow-names",
            f"{with_article(title)} with shadow names: its loaders {found}",
            "leave out --names shadow",
        )
    elif OBJECT_GRAPH in outcome.layout.places:
        yield PlanWarning(
            "shadow-names",
            f"an object graph names variables only: tf.train.Checkpoint(...).restore {found}",
            "leave out --names shadow",
        )
