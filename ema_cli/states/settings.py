"""What a state is bound to: which averages of what, told as the options that ask for them."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ema_cli import asked, hints
from ema_cli.averages import Average, Ema, LearningRate, Weights
from ema_cli.errors import DamagedState, EmaError, OtherSettings, UsageError
from ema_cli.invocation import choice_words, setting_words
from ema_cli.layout import Wishes
from ema_cli.plan import Request
from ema_cli.schedules import Schedule, schedule
from ema_cli.states.binding import CLASS, Binding
from ema_cli.states.records import Fields, Row
from ema_cli.text import command, shorten

# The one average of `ExponentialMovingAverage`.
CLASS_LABEL = "ema"
_SELECT = ("--include", "--exclude")
_FLAGS = ("--zero-debias",)


def check_possible(request: Request) -> None:
    """Raise `UsageError` for averages whose later checkpoints revise the weights of earlier ones.

    A state has forgotten the checkpoints: c_k must depend on checkpoints 1 to k only.
    """
    for average in request.averages:
        family = average.family
        if average.window is not None:
            what = "a window moves on"
        elif isinstance(family, LearningRate):
            what = "the weights of a learning-rate shape depend on how many checkpoints there are"
        elif isinstance(family, Weights):
            what = "given weights are shares of their sum"
        else:
            continue
        raise UsageError(
            f"--state: average '{shorten(average.spec)}': {what}, so that later checkpoints "
            "change the weights of those that are averaged already",
            "use ema, half-life, mean or power without a window, or leave out --state",
        )
    for option, given in (
        ("--last", request.choice.last is not None),
        ("--order given", request.choice.order == "given"),
        ("--keep-variables", request.wishes.keep_variables),
    ):
        if given:
            raise UsageError(
                f"{option}: a state takes every new checkpoint in the order of their steps, and "
                "keeps no other values of a variable than its average",
                f"leave out {option.split()[0]}, or --state",
            )


def check_same(binding: Binding, request: Request, path: str, word: str = "run") -> None:
    """Raise `OtherSettings` unless `request` asks for what the state at `path` is bound to.

    The hint is the `ema-avg` command called `word`.
    """
    words = binding.settings
    if not isinstance(words, tuple):
        raise OtherSettings(
            f"{shorten(path, 1000)}: made by ExponentialMovingAverage, which alone continues it",
            hints.STATE,
        )
    wanted = setting_words(request)
    mine, given = _grouped(words), _grouped(wanted)
    differences = [
        f"{option}: the state has {mine.get(option, 'none')}, asked for {given.get(option, 'none')}"
        for option in dict.fromkeys((*mine, *given))
        if mine.get(option) != given.get(option)
    ]
    chosen = choice_words(dataclasses.replace(request.choice, key=None, step_from=None))
    output = [] if request.output is None else ["-o", request.output]
    if not differences and list(words) != wanted:  # values that look like options
        differences = [f"the state has {command(*words)}, asked for {command(*wanted)}"]
    if differences:
        raise OtherSettings(
            f"{shorten(path, 1000)}: the state belongs to other settings: "
            + "; ".join(shorten(line, 500) for line in differences),
            command("ema-avg", word, *request.paths, "--state", path, *chosen, *words, *output),
        )


def _grouped(words: Sequence[str]) -> dict[str, str]:
    """Return the values of each option; those that choose tensors count in their order."""
    grouped: dict[str, list[str]] = defaultdict(list)
    option = ""
    for word in words:
        if word.startswith("--") and (not option or grouped[option]):
            option = "--include and --exclude" if word in _SELECT else word
            grouped[option] += [word] if word in _SELECT else []
            if word in _FLAGS:
                grouped[option].append("given")
        else:
            grouped[option].append(word)
    return {option: " ".join(values) for option, values in grouped.items()}


def bound(binding: Binding, where: str) -> Request:
    """Return the request that a state answers, from its binding in the file `where`."""
    if isinstance(binding.settings, tuple):
        request = request_of(binding.settings, where)
    else:
        request = _of_class(binding.settings, where)
    if [average.label for average in request.averages] != list(binding.labels):
        raise DamagedState(where, "expected the averages of its settings")
    return request


def _of_class(settings: Mapping[str, Any], where: str) -> Request:
    take = Fields(settings, where)
    decay, zero_debias, name = take.any("decay"), take.any("zero_debias"), take.text("name")
    if not isinstance(decay, float):  # a function's: the ledger has its values
        decay = math.nan
    spec = "ema" if math.isnan(decay) else f"ema:{decay:g}"
    average = Average(CLASS_LABEL, spec, Ema(decay), zero_debias=bool(zero_debias))
    wishes = Wishes(name=name)
    return Request((), None, (average,), statistics="copy", shadow_dtype="same", wishes=wishes)


def schedule_of(binding: Binding, request: Request, label: str, rows: Sequence[Row]) -> Schedule:
    """Return the coefficients of an average over the applied checkpoints of a ledger.

    The class chooses them as it goes; those of a run follow from its settings.
    """
    average = next(a for a in request.averages if a.label == label)
    if binding.by == CLASS:
        coefficients = tuple(row.coefficients[0] if row.coefficients else 0.0 for row in rows)
        return Schedule(coefficients, average.zero_debias, len(rows), len(rows) - 1)
    steps, names = [row.step or 0 for row in rows], [row.name for row in rows]
    return schedule(average, steps, names, request.like)


def request_of(words: Sequence[str], where: str) -> Request:
    """Return the request whose `setting_words` these are."""
    given: dict[str, Any] = {"average": [], "select": []}
    rest = iter(words)
    try:
        for word in rest:
            keyword = word.removeprefix("--").replace("-", "_")
            if word in _FLAGS:
                given[keyword] = True
            elif word in _SELECT:
                given["select"].append((keyword, next(rest)))
            elif keyword == "average":
                given["average"].append(next(rest))
            else:
                given[keyword] = next(rest)
        if any("weights:" in spec for spec in given["average"]):
            raise UsageError("weights")
        made = asked.request(**given)
        check_possible(made)
    except (StopIteration, TypeError, ValueError, EmaError) as error:
        raise DamagedState(where, "expected the settings of `ema-avg run`") from error
    if setting_words(made) != list(words):
        raise DamagedState(where, "expected settings that mean what they say")
    return made
