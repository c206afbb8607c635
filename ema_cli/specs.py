"""The words of ``--average [LABEL=]SPEC[@WINDOW]``, parsed into `Average`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from ema_cli.averages import (
    Average,
    Ema,
    Family,
    HalfLife,
    LearningRate,
    Mean,
    Power,
    Weights,
    Window,
)
from ema_cli.errors import UsageError
from ema_cli.hints import did_you_mean, meant
from ema_cli.text import near_misses, shorten

NUM_UPDATES = ("none", "count", "step")
INITS = ("first", "zeros")
SHAPES = ("linear", "cosine", "1-sqrt")
# TensorFlow's warm-up ramp decides for any practical number of files; see docs/architecture.md.
DEFAULT_DECAY = "0.999"
DEFAULT_NUM_UPDATES = "count"

_WINDOW = re.compile(r"@(?:last=(\d{1,18})|(\d{0,18}):(\d{0,18}))$")
_LABEL = re.compile(r"([A-Za-z0-9._-]+)=(?=.)")
_FORMS = (
    "ema:D, ema:D/step, half-life:STEPS, mean, lr:{linear,cosine,1-sqrt}, power:SIGMA_REL, "
    "weights:FILE"
)


_EXAMPLES = {
    "ema": f"ema:{DEFAULT_DECAY}",
    "half-life": "half-life:5000",
    "mean": "mean",
    "lr": "lr:cosine",
    "power": "power:0.1",
    "weights": "weights:FILE",
}
_FOR_EXAMPLE = "for example --average mean or --average ema:0.99"
_LINES = "a line is a step or name and its weight, such as: 5000 0.25"


def parse_averages(
    specs: Sequence[str],
    decay: str | None,
    *,
    num_updates: str | None,
    init: str,
    zero_debias: bool,
    read_text: Callable[[str], str],
) -> list[Average]:
    """Return the averages asked for, in order; `decay` is short for ``ema:DECAY``.

    Without any spec it is ``ema:0.999`` with num_updates ``count``. `read_text` returns the
    contents of a weights file. Raises `UsageError`.
    """
    texts = list(specs) + ([f"ema:{decay}"] if decay is not None else [])
    if not texts:
        texts = [f"ema:{DEFAULT_DECAY}"]
        num_updates = num_updates or DEFAULT_NUM_UPDATES
    averages = [_parse(text, read_text) for text in texts]
    _check_labels(averages)
    asked = num_updates not in (None, "none") or init != "first" or zero_debias
    if asked and not any(average.exponential for average in averages):
        raise UsageError(
            "--num-updates, --init and --zero-debias have a meaning for ema and half-life only, "
            f"found '{shorten(averages[0].spec)}'",
            "leave them out, or give --decay D",
        )
    return [
        replace(
            average,
            num_updates=num_updates or "none",
            init="zeros" if zero_debias else init,
            zero_debias=zero_debias,
        )
        if average.exponential
        else average
        for average in averages
    ]


def _check_labels(averages: Sequence[Average]) -> None:
    seen: set[str] = set()
    for average in averages:
        if average.label in seen:
            raise UsageError(
                f"two averages are called '{average.label}'",
                f"give one another label: --average NAME={average.spec}",
            )
        seen.add(average.label)


def _parse(text: str, read_text: Callable[[str], str]) -> Average:
    spec = text
    label = ""
    if match := _LABEL.match(text):
        label, spec = match[1], text[match.end() :]
    if label and not label.strip("."):
        raise UsageError(
            f"'{shorten(text)}': a label of dots could lead out of a folder",
            f"give it another: --average {shorten(f'NAME={spec}')}",
        )
    bare, window = _split_window(spec)
    family = _family(bare, read_text)
    return Average(label or default_label(spec), spec, family, window)


def default_label(spec: str) -> str:
    """Return what an average is called that was given no label."""
    return re.sub(r"[^A-Za-z0-9.]", "-", spec)


def _split_window(spec: str) -> tuple[str, Window | None]:
    match = _WINDOW.search(spec)
    if match is None:
        if "@" in spec and not spec.startswith("weights:"):
            raise UsageError(
                f"'{shorten(spec)}': expected a window '@last=N' or '@A:B' after the average",
                _window_meant(spec),
            )
        return spec, None
    last, start, stop = (int(text) if text else None for text in match.groups())
    if last == 0:
        raise UsageError(
            f"'{shorten(spec)}': a window of the last 0 checkpoints is empty",
            f"the last one alone is {shorten(spec[: match.start()])}@last=1",
        )
    return spec[: match.start()], Window(last, start, stop)


def _family(spec: str, read_text: Callable[[str], str]) -> Family:
    kind, colon, rest = spec.partition(":")
    if kind == "mean" and not colon:
        return Mean()
    if colon:
        match kind:
            case "ema":
                return _ema(rest, spec)
            case "half-life":
                return HalfLife(_number(rest, spec, "a positive number of steps", low=0))
            case "lr" if rest in SHAPES:
                return LearningRate(rest)
            case "power":
                width = "a width between 0 and 12^-½ = 0.2887"
                return Power(_number(rest, spec, width, low=0, high=12**-0.5))
            case "weights":
                return Weights(parse_weights(read_text(rest), rest))
    raise UsageError(
        f"'{shorten(spec)}' is no average: expected one of {_FORMS}", _meant(kind, rest)
    )


def _meant(kind: str, rest: str) -> str:
    """Return the spec that one of no known family probably stands for."""
    if kind == "lr":
        return did_you_mean(f"lr:{rest}", [f"lr:{shape}" for shape in SHAPES], _FOR_EXAMPLE)
    close = [kind] if kind in _EXAMPLES else near_misses(kind, _EXAMPLES)[:1]
    if close:
        takes_any = rest and close[0] not in ("mean", "lr")
        return meant([f"{close[0]}:{rest}" if takes_any else _EXAMPLES[close[0]]])
    return meant([f"ema:{kind}"]) if _is_share(kind) else _FOR_EXAMPLE


def _window_meant(spec: str) -> str:
    bare, _, window = spec.partition("@")
    digits = re.search(r"\d+", window)
    return f"for example {shorten(bare)}@last={digits[0] if digits else 5}"


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def meant_decay(text: str) -> str:
    """Return what a decay outside [0, 1] was probably meant to be: 99.9 or 99.9% is 0.999."""
    number, _, unit = text.partition("/")
    per = "/step" if unit else ""
    try:
        value = float(number.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    if value > 100:
        return f"a half-life of so many steps is --average half-life:{value:.12g}"
    if (value >= 50 or "%" in number) and value >= 0:
        return f"if that is per cent: --decay {value / 100:.12g}{per}"
    return "a decay per checkpoint is --decay 0.9, one per training step --decay 0.999/step"


def _ema(text: str, spec: str) -> Ema:
    number, slash, unit = text.partition("/")
    if slash and unit != "step":
        raise UsageError(
            f"'{shorten(spec)}': expected 'ema:D' or 'ema:D/step'",
            f"per checkpoint: ema:{shorten(number)}; per training step: ema:{shorten(number)}/step",
        )
    try:
        decay = float(number)
    except ValueError:
        decay = math.nan
    if not 0 <= decay <= 1:
        raise UsageError(
            f"'{shorten(spec)}': a decay lies in [0, 1], found '{shorten(number)}'",
            meant_decay(text),
        )
    return Ema(decay, bool(slash))


def _number(text: str, spec: str, expected: str, *, low: float, high: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low < value < high:
        raise UsageError(
            f"'{shorten(spec)}': expected {expected}, found '{shorten(text)}'",
            f"for example {_EXAMPLES[spec.partition(':')[0]]}",
        )
    return value


def parse_weights(text: str, path: str) -> tuple[tuple[str, float], ...]:
    """Return the (step or name, weight) lines of a weights file; ``#`` starts a comment line."""
    table: dict[str, float] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{shorten(path)}: line {number}"
        key, value = (part.strip(" \t,") for part in _last_field(line))
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not key or not 0 <= weight < math.inf:
            raise UsageError(
                f"{where}: expected a step or name and a weight >= 0, found '{shorten(line)}'",
                _LINES,
            )
        if key in table:
            raise UsageError(
                f"{where}: '{shorten(key)}' is listed twice", "remove one of the two lines"
            )
        table[key] = weight
    if not any(table.values()):
        raise UsageError(
            f"{shorten(path)}: expected at least one weight above 0, found none", _LINES
        )
    return tuple(table.items())


def _last_field(line: str) -> tuple[str, str]:
    """Split at the last comma or white space: names may hold both."""
    match = re.search(r"[\s,]+(?=[^\s,]*$)", line)
    if match is None:
        return "", line
    return line[: match.start()], line[match.end() :]


def parse_window(text: str) -> tuple[int | None, int | None, int | None]:
    """Return (A, B, C) of ``A:B[:C]``; open ends are None. Raises `UsageError`."""
    match = re.fullmatch(r"(\d{0,18}):(\d{0,18})(?::(\d{1,18}))?", text)
    if match is None or match[3] == "0":
        raise UsageError(
            f"--steps: expected A:B or A:B:C with steps A..B, every C-th, found '{shorten(text)}'",
            "for example --steps 1000:5000, --steps 1000: or --steps :5000:2",
        )
    start, stop, stride = (int(part) if part else None for part in match.groups())
    return start, stop, stride


def check_like(like: str, averages: Sequence[Average]) -> None:
    """Raise `UsageError` for an average that the framework does not compute.

    PyTorch's AveragedModel has one decay, or the mean of all; Keras' use_ema has one momentum.
    """
    families = {"torch": (Ema, Mean), "keras": (Ema,)}.get(like)
    for average in averages if families else ():
        plain = average.num_updates == "none" and average.init == "first"
        per_step = isinstance(average.family, Ema) and average.family.per_step
        if not isinstance(average.family, families or ()) or per_step or not plain:
            raise UsageError(
                f"--like {like}: expected one decay for all updates, found '{average.spec}'"
                + ("" if plain else " with --num-updates or --init"),
                "give --decay D" + (", or --average mean" if like == "torch" else ""),
            )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(size: str | int) -> int:
    """Return bytes: ``5GB`` is 5·10^9 as Hugging Face counts, ``5GiB`` is 5·2^30."""
    match = _SIZE.fullmatch(str(size).strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(
            f"--max-shard-size: expected a size such as 5GB, found '{shorten(str(size))}'",
            "--max-shard-size 5GB, as Hugging Face counts, or --max-shard-size 500MiB",
        )
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
