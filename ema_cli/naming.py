"""Names: which tensors are variables, shadows, statistics or slots, and what each is called. Pure.

TensorFlow's convention: the shadow of ``conv/kernel`` is ``conv/kernel/ExponentialMovingAverage``,
a restore asks for the shadow of every averaged variable and for the plain name of the rest.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ema_cli.errors import Disagreement, UsageError
from ema_cli.hints import near_glob
from ema_cli.tensors import Index, Role, Tensor
from ema_cli.text import encodable, shorten

SHADOW_NAME = "ExponentialMovingAverage"
STEP_NAMES = ("global_step", "step", "iterations")
# The object graph of a tf.train.Checkpoint, and how it calls the value of a variable.
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
COUNTER_NAMES = (*STEP_NAMES, "save_counter")

_SEPARATOR = re.compile(r"[/.]")
_STATISTICS = {"moving_mean", "moving_variance", "running_mean", "running_var"}
# `<variable>/<slot>` of TensorFlow's optimizers, made unique as `<slot>_1`.
_SLOT = re.compile(
    r"/(?:Adam|AdamW|AdaMax|Adamax|Nadam|LAMB|Momentum|RMSProp|Adagrad|AdagradDA|Adadelta|Ftrl"
    r"|AMSGrad|Lion)(?:_\d+)?$"
)
_OPTIMIZER_WORDS = re.compile(
    r"(?:^|[/.])(?:optimizer|optimizers|optimizer_state|optimizer_states|opt_state)(?:[/.]|$)"
    r"|(?:^|[/.])beta[12]_power(?:_\d+)?$"
    r"|(?:^|[/._])(?:exp_avg|exp_avg_sq|exp_inf|max_exp_avg_sq|momentum_buffer)(?:[/.]|$)"
)
_ANY_SHADOW = re.compile(r"/ExponentialMovingAverage(?:_\d+)?(?:/biased|/local_step)?$")


def shadow_of(variable: str, name: str) -> str:
    """Return the name under which the shadow of `variable` is saved."""
    return f"{variable}/{name}"


def variable_of(tensor: str, name: str) -> str | None:
    """Return the variable whose shadow `tensor` is by its name, or None."""
    suffix = f"/{name}"
    return tensor.removesuffix(suffix) or None if tensor.endswith(suffix) else None


def variable_behind(shadow: Tensor, name: str, saved: Mapping[str, Tensor]) -> str | None:
    """Return the variable whose shadow this is, or None when it is none by its name.

    TensorFlow puts the scope in which ``apply`` ran before the variable's own name:
    ``scope2/scope1/v0/ema`` is the shadow of ``scope1/v0``.
    """
    variable = variable_of(shadow.name, name)
    if variable is None or variable in saved:
        return variable
    inner = variable
    while "/" in inner:
        inner = inner.partition("/")[2]
        if inner in saved and saved[inner].shape == shadow.shape and shadow.dtype.bits:
            return inner
    return variable


def shadow_names(index: Index) -> list[str]:
    """Return the names that shadows of other names than the usual seem to have, best first.

    What follows a variable's name, is as large as it, and is no slot that an optimizer makes.
    """
    found: Counter[str] = Counter()
    for tensor in index.tensors:
        variable, _, name = tensor.name.rpartition("/")
        behind = index.by_name.get(variable)
        if behind is not None and behind.shape == tensor.shape and tensor.dtype.averaged:
            role = role_in(index, tensor.name, SHADOW_NAME)
            found[name] += role in (Role.VARIABLE, Role.FIXED, Role.OTHER_SHADOW)
    return [name for name, count in found.most_common() if count]


@functools.lru_cache(maxsize=1 << 15)
def role_of(tensor: str, name: str) -> Role:
    """Return what `tensor` is for; `name` is the name of our own shadows."""
    last = _SEPARATOR.split(tensor)[-1]
    own = (f"/{name}", f"/{name}/biased", f"/{name}/local_step")
    if tensor.endswith(own):
        return Role.SHADOW
    if _ANY_SHADOW.search(tensor) or (last in ("biased", "local_step") and "/" in tensor):
        return Role.OTHER_SHADOW
    if tensor in COUNTER_NAMES:
        return Role.COUNTER
    if _SLOT.search(tensor) or _OPTIMIZER_WORDS.search(tensor):
        return Role.OPTIMIZER
    return Role.STATISTICS if last in _STATISTICS else Role.VARIABLE


def plain_name(tensor: str) -> str:
    """Return the name by which an object graph's tensor is told: without the attribute."""
    return tensor.removesuffix(VALUE_SUFFIX)


def role_in(index: Index, tensor: str, name: str) -> Role:
    """Return what a tensor of `index` is for: as the checkpoint records it, else by its name.

    Where a checkpoint records its variables, what looks like one and is not recorded is none.
    """
    recorded = index.roles.get(tensor)
    if recorded is not None:
        return recorded
    role = role_of(plain_name(tensor), name)
    return Role.FIXED if role is Role.VARIABLE and index.roles else role


def lowered(names: Iterable[str]) -> set[str]:
    """Return `names` in lower case, as `unique_name` compares them."""
    return {name.lower() for name in names}


def unique_name(name: str, taken: Collection[str]) -> str:
    """Return `name`, or `name_1`, `name_2` …: the first whose lower case is not in `taken`.

    As in TensorFlow's graphs, names that differ only in case count as equal.
    """
    candidate = name
    number = 0
    while candidate.lower() in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


# ---------------------------------------------------------------------------- selection


class Rule(NamedTuple):
    """One ``--include`` or ``--exclude`` in its place on the command line."""

    include: bool
    pattern: str

    @property
    def option(self) -> str:
        """How the user wrote it."""
        return f"--{'include' if self.include else 'exclude'} '{shorten(self.pattern)}'"


@functools.cache
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def matches(pattern: str, tensor: str) -> bool:
    """Whether the glob matches the whole name; ``*`` matches ``/`` and ``.`` too.

    A pattern equal to the name matches even when it holds ``[``.
    """
    return pattern == tensor or _glob(pattern).match(tensor) is not None


def ruling(rules: Sequence[Rule], tensor: str) -> Rule | None:
    """Return the rule that decides for `tensor`: the last match wins across both kinds."""
    return next((rule for rule in reversed(rules) if matches(rule.pattern, tensor)), None)


def check_rules(rules: Sequence[Rule], tensors: Collection[str]) -> None:
    """Raise `Disagreement` for a rule that matches no tensor, with names that look like it."""
    for rule in rules:
        if not any(matches(rule.pattern, tensor) for tensor in tensors):
            raise Disagreement(
                f"{rule.option} matches no tensor",
                near_glob(rule.pattern, tensors, "ema-avg inspect PATH lists the names there are"),
            )


# ---------------------------------------------------------------------------- renaming


_REGEX = "a regular expression and what takes its place: --rule '^model/' ''"


def compile_rules(rules: Sequence[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    """Return the compiled ``--rule PATTERN REPL`` pairs; raises `UsageError`."""
    compiled = []
    for pattern, replacement in rules:
        try:
            expression = re.compile(pattern)
            re.sub(expression, replacement, "")
        except (re.error, IndexError) as error:
            raise UsageError(
                f"--rule '{shorten(pattern)}' '{shorten(replacement)}': {error}", _REGEX
            ) from None
        compiled.append((expression, replacement))
    return compiled


def apply_rules(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    """Return `name` after each regular expression replaced all its matches, in order."""
    for expression, replacement in rules:
        try:
            name = expression.sub(replacement, name)
        except (re.error, IndexError) as error:
            raise UsageError(f"--rule '{shorten(expression.pattern)}': {error}", _REGEX) from None
    return name


def check_distinct(names: Iterable[tuple[str, str]], possible: Callable[[str], bool]) -> None:
    """Raise `Disagreement` when two tensors would be saved under one name.

    `names` are (name in the output, what it comes from) pairs; `possible` tells whether the
    format can hold a name.
    """
    seen: dict[str, str] = {}
    for name, source in names:
        if not possible(name):
            raise Disagreement(
                f"'{shorten(source)}' would be called '{shorten(name)}', which no checkpoint of "
                "this format can hold",
                "give it another name with --rule PATTERN REPL",
            )
        if name in seen:
            raise Disagreement(
                f"two tensors would be called '{shorten(name)}': '{shorten(seen[name])}' and "
                f"'{shorten(source)}'",
                "choose other names with --rule PATTERN REPL, or another shadow name with --name",
            )
        seen[name] = source


def check_shadow_name(name: str) -> None:
    """Raise `UsageError` for a ``--name`` that gives no usable names."""
    if not name or not encodable(name):
        raise UsageError(
            f"--name: expected a name for the shadows, found '{shorten(name)}'", "leave out --name"
        )


# ---------------------------------------------------------------------------- restore map


class Restored(NamedTuple):
    """One row of a restore map.

    Attributes:
        restore_name: what the restoring program asks the checkpoint for.
        variable: the variable it fills.
        source: ``shadow``, ``plain`` or ``missing``.
        note: what else is worth knowing about the row.
        saved_as: for a missing row, the name under which it is saved instead, or empty.
    """

    restore_name: str
    variable: str
    source: str
    note: str = ""
    saved_as: str = ""


def restore_map(saved: Collection[str], averaged: Mapping[str, bool], name: str) -> list[Restored]:
    """Return what ``variables_to_restore`` asks for, held against what is saved.

    Args:
        saved: the names in the checkpoint.
        averaged: the variables of the program, in order, with whether each is a moving-average
            variable, i.e. asked for under its shadow name.
        name: of the shadows.

    Source: `ExponentialMovingAverage.variables_to_restore`: averaged variables under
    ``average_name``, every other variable under its own name unless that is a key already.
    """
    names = set(saved)
    rows: dict[str, Restored] = {}
    for variable in (v for v, is_averaged in averaged.items() if is_averaged):
        key = shadow_of(variable, name)
        if key in names:
            rows[key] = Restored(key, variable, "shadow")
        elif (other := instead(key, variable, names, name)) == variable:
            rows[key] = Restored(key, variable, "missing", "only the plain name is saved", other)
        elif other:
            rows[key] = Restored(key, variable, "missing", f"saved as '{shorten(other)}'", other)
        else:
            rows[key] = Restored(key, variable, "missing")
    for variable in (v for v, is_averaged in averaged.items() if not is_averaged):
        if variable not in rows:
            rows[variable] = _plain(variable, names, name)
        elif not rows[variable].note:
            note = "so the variable of this name is not restored"
            rows[variable] = rows[variable]._replace(note=note)
    return list(rows.values())


def instead(asked: str, variable: str, saved: Collection[str], name: str) -> str:
    """Return the saved name that is probably meant by one that is not saved, or "".

    A shadow before raw values: made unique with ``_1``, of TensorFlow's usual name, or without the
    scope that is asked for.
    """
    candidates = [f"{asked}_1"]
    if asked != variable:
        candidates.append(shadow_of(variable, SHADOW_NAME))
    else:
        candidates.append(shadow_of(variable, name))
    inner = asked
    while "/" in inner:
        inner = inner.partition("/")[2]
        if asked == variable or variable_of(inner, name) is not None:
            candidates.append(inner)
    candidates.append(variable)
    return next((c for c in candidates if c in saved and c != asked), "")


def _plain(variable: str, names: Collection[str], name: str) -> Restored:
    """Return the row of a variable that is asked for under its own name."""
    if variable in names:
        return Restored(variable, variable, "plain")
    shadow = shadow_of(variable, name)
    if shadow in names:
        return Restored(variable, variable, "missing", "only its shadow is saved", shadow)
    return Restored(variable, variable, "missing")
