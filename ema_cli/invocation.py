"""A request as the command line that would make it: for hints that can be run as they stand."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re

from ema_cli.averages import Average, Ema
from ema_cli.layout import Wishes
from ema_cli.plan import Request
from ema_cli.search import Choice
from ema_cli.specs import default_label


def run_words(
    request: Request, averages: tuple[Average, ...], state: str = "", word: str = "run"
) -> list[str]:
    """Return the words of ``ema-avg run`` for `request`, but with these averages.

    With the directory of a `state`, which is bound to other averages, they begin another state.
    `word` is the command instead of ``run``.
    """
    words = ["ema-avg", word, *request.paths, *_settings(request, averages, exact=False)]
    if state:
        words += ["--state", another(state)]
    output = request.output or ("" if state else "OUT")
    return [*words, *_wishes(request.wishes), *(["-o", output] if output else [])]


def another(path: str) -> str:
    """Return the name of a state that is not there yet: `path` itself, or numbered from 2 on."""
    path = path.rstrip("/") or path
    numbered = (f"{path}-{k}" for k in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def setting_words(request: Request) -> list[str]:
    """Return the options of a request that a state is bound to: what is averaged, and how.

    Which of the new checkpoints are taken may change from one update to the next, but not how a
    step is told: the same file would be new under another one.
    """
    choice = Choice(key=request.choice.key, step_from=request.choice.step_from)
    request = dataclasses.replace(request, choice=choice)
    words = _settings(request, request.averages, exact=True)
    for option in ("name", "optimizer"):
        words += _option(option, getattr(request.wishes, option), getattr(Wishes(), option))
    return words


def _settings(request: Request, averages: tuple[Average, ...], *, exact: bool) -> list[str]:
    words = [*choice_words(request.choice), *_averages(averages, exact=exact)]
    for rule in request.rules:
        words += ["--include" if rule.include else "--exclude", rule.pattern]
    ours = request.like == Request((), None, ()).like
    plain = Request((), None, (), statistics="average" if ours else "copy")
    for option in ("statistics", "shadow_dtype", "like", "non_finite"):
        words += _option(option, getattr(request, option), getattr(plain, option))
    return words


def _option(name: str, value: object, default: object) -> list[str]:
    return [] if value == default else [f"--{name.replace('_', '-')}", str(value)]


def choice_words(choice: Choice) -> list[str]:
    """Return the options that choose checkpoints."""
    words: list[str] = []
    if choice.steps is not None:
        start, stop, stride = ("" if n is None else str(n) for n in choice.steps)
        words += ["--steps", f"{start}:{stop}" + (f":{stride}" if stride else "")]
    for option in ("glob", "last", "step_from", "order", "key"):
        words += _option(option, getattr(choice, option), getattr(Choice(), option))
    return words


def _averages(averages: tuple[Average, ...], *, exact: bool) -> list[str]:
    """Return the options that ask for averages; `exact`: under the labels they have."""
    specs = [spec_of(average) for average in averages]
    written = [
        default_label(spec if exact else a.spec) for a, spec in zip(averages, specs, strict=True)
    ]
    named = [average.label != label for average, label in zip(averages, written, strict=True)]
    only = averages[0]
    if len(specs) == 1 and isinstance(only.family, Ema) and not only.window and not named[0]:
        words = ["--decay", specs[0].removeprefix("ema:")]
    else:
        words = []
        for average, spec, name in zip(averages, specs, named, strict=True):
            words += ["--average", f"{average.label}={spec}" if name else spec]
    exponential = next((average for average in averages if average.exponential), None)
    if exponential is not None:
        plain = Average("", "", Ema(0))
        words += _option("num_updates", exponential.num_updates, plain.num_updates)
        if exponential.zero_debias:
            words.append("--zero-debias")
        else:
            words += _option("init", exponential.init, plain.init)
    return words


def spec_of(average: Average) -> str:
    """Return the SPEC of an average, of an `Ema` as its family is now."""
    if not isinstance(average.family, Ema):
        return average.spec
    window = re.search(r"@[^@]*$", average.spec)
    unit = "/step" if average.family.per_step else ""
    return f"ema:{average.family.decay!r}{unit}{window[0] if window else ''}"


def _wishes(wishes: Wishes) -> list[str]:
    words: list[str] = []
    for field in dataclasses.fields(Wishes):
        value = getattr(wishes, field.name)
        if field.name == "rules":
            for pattern, replacement in value:
                words += ["--rule", pattern, replacement]
        elif field.name == "keep_variables":
            words += ["--keep-variables"] if value else []
        else:
            words += _option(field.name, value, getattr(Wishes(), field.name))
    return words
