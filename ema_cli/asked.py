"""What was asked for, from the keywords of the public functions: checked and parsed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from ema_cli import files, hints, machine, specs
from ema_cli.errors import InputError, UsageError
from ema_cli.kernel import LIKE, SHADOW_DTYPES
from ema_cli.layout import NAMES, OPTIMIZER, UNKNOWN, Wishes
from ema_cli.naming import SHADOW_NAME, Rule
from ema_cli.plan import Request
from ema_cli.runs import ORDERS
from ema_cli.search import Choice
from ema_cli.selection import STATISTICS
from ema_cli.tensors import AVERAGED_DTYPES
from ema_cli.text import shorten

Select = Sequence[tuple[str, str]]
_WEIGHTS_FILE_LIMIT = 16 << 20


def request(
    *,
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    output: str | os.PathLike[str] | None = None,
    average: Sequence[str] = (),
    decay: str | float | None = None,
    num_updates: str | None = None,
    init: str = "first",
    zero_debias: bool = False,
    glob: str | None = None,
    last: int | None = None,
    steps: str | None = None,
    step_from: str | None = None,
    order: str = "step",
    key: str | None = None,
    select: Select = (),
    statistics: str | None = None,
    shadow_dtype: str = "auto",
    like: str = "tensorflow",
    non_finite: str = "error",
    names: str = "auto",
    name: str = SHADOW_NAME,
    keep_variables: bool = False,
    rule: Sequence[tuple[str, str]] = (),
    dtype: str | None = None,
    format: str | None = None,
    max_shard_size: str | int | None = None,
    optimizer: str = "auto",
    unknown: str = "refuse",
    workers: int | None = None,
    **others: object,
) -> Request:
    """Return the request that the keywords of `ema_cli.average_run` make; `others` are no part."""
    del others
    check_choices(
        num_updates=num_updates,
        init=init,
        order=order,
        statistics=statistics,
        shadow_dtype=shadow_dtype,
        like=like,
        non_finite=non_finite,
        names=names,
        dtype=dtype,
        optimizer=optimizer,
        unknown=unknown,
    )
    check_workers(workers)
    if output is not None and not os.fspath(output):
        raise UsageError("-o: expected where the result goes", hints.OUTPUT)
    averages = specs.parse_averages(
        average,
        None if decay is None else str(decay),
        num_updates=num_updates,
        init=init,
        zero_debias=zero_debias,
        read_text=_read_weights,
    )
    specs.check_like(like, averages)
    window = specs.parse_window(steps) if steps else None
    return Request(
        paths=_paths(runs),
        output=None if output is None else os.fspath(output),
        averages=tuple(averages),
        implicit=not average and decay is None,
        choice=Choice(glob, last, window, step_from, order, key),
        rules=rules_of(select),
        statistics=statistics or ("average" if like == "tensorflow" else "copy"),
        shadow_dtype=shadow_dtype if like == "tensorflow" else "same",
        like=like,
        non_finite=non_finite,
        wishes=Wishes(
            format,
            names,
            name,
            keep_variables,
            tuple(rule),
            dtype,
            None if max_shard_size is None else specs.parse_size(max_shard_size),
            optimizer,
            unknown,
        ),
        workers=workers or machine.default_workers(),
    )


def wishes_over(recorded: Wishes, **look: Any) -> Wishes:
    """Return how an output shall look: the keywords given, and else what was recorded."""
    words = {k: v for k, v in look.items() if k in _CHOICES}
    check_choices(**words)
    given = {"rules" if k == "rule" else k: v for k, v in look.items()}
    if "rules" in given:
        given["rules"] = tuple((pattern, replacement) for pattern, replacement in given["rules"])
    if given.get("max_shard_size") is not None:
        given["max_shard_size"] = specs.parse_size(given["max_shard_size"])
    return dataclasses.replace(recorded, **given)


_CHOICES = {
    "num_updates": (None, *specs.NUM_UPDATES),
    "init": specs.INITS,
    "order": ORDERS,
    "statistics": (None, *STATISTICS),
    "shadow_dtype": SHADOW_DTYPES,
    "like": LIKE,
    "non_finite": ("error", "allow"),
    "names": NAMES,
    "dtype": (None, *AVERAGED_DTYPES),
    "optimizer": OPTIMIZER,
    "unknown": UNKNOWN,
}


def check_choices(**given: str | None) -> None:
    """Raise `UsageError` for a word that an option does not know."""
    for option, value in given.items():
        if value not in _CHOICES[option]:
            words = ", ".join(str(choice) for choice in _CHOICES[option] if choice)
            raise UsageError(
                f"{option}: expected one of {words}, found '{shorten(str(value))}'",
                hints.did_you_mean(str(value), words.split(", "), f"leave out {option}"),
            )


def check_workers(workers: int | None) -> None:
    """Raise `UsageError` for a number of workers that is none."""
    if workers is not None and workers < 1:
        raise UsageError(f"workers: expected at least 1, found {workers}", "leave out workers")


def _paths(runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    if isinstance(runs, str | os.PathLike):
        return (os.fspath(runs),)
    return tuple(os.fspath(path) for path in runs)


def rules_of(select: Select) -> tuple[Rule, ...]:
    """Return the rules of (kind, glob) pairs."""
    for kind, _ in select:
        if kind not in ("include", "exclude"):
            raise UsageError(
                f"select: expected 'include' or 'exclude', found '{shorten(kind)}'",
                "give pairs such as ('exclude', 'head/*')",
            )
    return tuple(Rule(kind == "include", pattern) for kind, pattern in select)


def _read_weights(path: str) -> str:
    try:
        return files.read_small(path, _WEIGHTS_FILE_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{shorten(path)}: not UTF-8: byte {error.start}",
            "write a text of lines such as: 5000 0.25",
        ) from None
