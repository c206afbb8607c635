"""A request as JSON data in provenance, and back: what decides the bytes of an output.

What is read back comes from a file that anybody may have written: it is hostile until checked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ema_cli import specs
from ema_cli.averages import Average, Mean, Weights
from ema_cli.errors import DamagedFile, UsageError
from ema_cli.formats import FORMATS
from ema_cli.kernel import LIKE, SHADOW_DTYPES
from ema_cli.layout import NAMES, OPTIMIZER, UNKNOWN, Wishes
from ema_cli.naming import Rule
from ema_cli.plan import Request
from ema_cli.runs import ORDERS
from ema_cli.search import Choice
from ema_cli.selection import STATISTICS
from ema_cli.tensors import AVERAGED_DTYPES
from ema_cli.text import shorten

NON_FINITE = ("error", "allow")
# Stands for the contents of a weights file, whose table is recorded apart.
_ANY_WEIGHTS = "0 1"


def recorded(request: Request, average: Average) -> dict[str, Any]:
    """Return what decides the result and the layout of one average of a request, but its inputs.

    Members are called as the keywords of `ema_cli.average_run` are.
    """
    choice, wishes = request.choice, request.wishes
    table = average.family.table if isinstance(average.family, Weights) else None
    return {
        "average": {
            "label": average.label,
            "spec": average.spec,  # its window included
            "weights": None if table is None else [list(row) for row in table],
            "num_updates": average.num_updates,
            "init": average.init,
            "zero_debias": average.zero_debias,
        },
        "step_from": choice.step_from,
        "order": choice.order,
        "key": choice.key,
        "select": [[_kind(rule), rule.pattern] for rule in request.rules],
        "statistics": request.statistics,
        "shadow_dtype": request.shadow_dtype,
        "like": request.like,
        "non_finite": request.non_finite,
        "names": wishes.names,
        "name": wishes.name,
        "keep_variables": wishes.keep_variables,
        "rule": [list(pair) for pair in wishes.rules],
        "dtype": wishes.dtype,
        "format": wishes.format,
        "max_shard_size": wishes.max_shard_size,
        "optimizer": wishes.optimizer,
        "unknown": wishes.unknown,
    }


def _kind(rule: Rule) -> str:
    return "include" if rule.include else "exclude"


def request_of(document: Mapping[str, Any], paths: Sequence[str], where: str) -> Request | None:
    """Return the request that a provenance document records, with `paths` as its input.

    None when it records none, as documents of earlier versions. Raises `DamagedFile`, about the
    document at `where`, when what it records is no request.
    """
    if "request" not in document:
        return None
    fields = _Fields(document["request"], "request", where)
    average = _average(fields.inside("average"))
    like = fields.one_of("like", LIKE)
    try:
        specs.check_like(like, [average])
    except UsageError as error:
        raise DamagedFile(where, f"request: {error.message}") from None
    return Request(
        tuple(paths),
        None,
        (average,),
        choice=Choice(
            step_from=fields.text_or_none("step_from"),
            order=fields.one_of("order", ORDERS),
            key=fields.text_or_none("key"),
        ),
        rules=tuple(
            Rule(fields.check(kind, "select", ("include", "exclude")) == "include", pattern)
            for kind, pattern in fields.pairs("select")
        ),
        statistics=fields.one_of("statistics", STATISTICS),
        shadow_dtype=fields.one_of("shadow_dtype", SHADOW_DTYPES),
        like=like,
        non_finite=fields.one_of("non_finite", NON_FINITE),
        wishes=_wishes(fields),
    )


def _wishes(fields: _Fields) -> Wishes:
    size = fields.get("max_shard_size")
    if size is not None and (type(size) is not int or size < 1):
        raise fields.wrong("max_shard_size", "a number of bytes")
    return Wishes(
        fields.one_of("format", (None, *FORMATS)),
        fields.one_of("names", NAMES),
        fields.text("name"),
        fields.truth("keep_variables"),
        tuple(fields.pairs("rule")),
        fields.one_of("dtype", (None, *AVERAGED_DTYPES)),
        size,
        fields.one_of("optimizer", OPTIMIZER),
        fields.one_of("unknown", UNKNOWN),
    )


def _average(fields: _Fields) -> Average:
    label, spec = fields.text("label"), fields.text("spec")
    table = fields.get("weights")
    try:
        [average] = specs.parse_averages(
            [f"{label}={spec}"],
            None,
            num_updates=None,
            init="first",
            zero_debias=False,
            read_text=lambda path: _ANY_WEIGHTS,
        )
    except UsageError as error:
        raise DamagedFile(fields.where, f"request: {error.message}") from None
    if (average.label, average.spec) != (label, spec):
        raise fields.wrong("label", "the label of an average")
    if isinstance(average.family, Weights) is (table is None):
        raise fields.wrong("weights", "the table of an average of given weights, and of no other")
    if table is not None:
        average = dataclasses.replace(average, family=Weights(_table(fields, table)))
    options = (
        fields.one_of("num_updates", specs.NUM_UPDATES),
        fields.one_of("init", specs.INITS),
        fields.truth("zero_debias"),
    )
    plain = Average("", "", Mean())
    if not average.exponential and options != (plain.num_updates, plain.init, plain.zero_debias):
        raise fields.wrong("num_updates", f"{options} to have no meaning for '{shorten(spec)}'")
    if options[2] and options[1] != "zeros":
        raise fields.wrong("init", "zeros, which zero_debias implies,")
    num_updates, init, zero_debias = options
    return dataclasses.replace(average, num_updates=num_updates, init=init, zero_debias=zero_debias)


def _table(fields: _Fields, rows: object) -> tuple[tuple[str, float], ...]:
    """Return the (step or name, weight) rows of a weights file."""
    table: dict[str, float] = {}
    for row in rows if isinstance(rows, list) else [None]:
        key, weight = row if isinstance(row, list) and len(row) == 2 else (None, None)
        if not isinstance(key, str) or not isinstance(weight, float) or key in table:
            raise fields.wrong("weights", "rows of a step or name, each once, and a weight")
        if not 0 <= weight < math.inf:
            raise fields.wrong("weights", "weights >= 0")
        table[key] = weight
    if not any(table.values()):
        raise fields.wrong("weights", "a weight above 0")
    return tuple(table.items())


class _Fields:
    """The members of a JSON object that must have certain types."""

    def __init__(self, value: object, name: str, where: str) -> None:
        self.where = where
        self._name = name
        if not isinstance(value, dict):
            raise DamagedFile(where, f"{name}: expected an object, found {_shown(value)}")
        self._members: dict[str, Any] = value

    def wrong(self, field: str, expected: str) -> DamagedFile:
        """Return the error for a member that is not what is expected."""
        found = _shown(self._members.get(field))
        return DamagedFile(self.where, f"{self._name}.{field}: expected {expected}, found {found}")

    def get(self, field: str) -> Any:
        """Return a member of any type."""
        if field not in self._members:
            raise DamagedFile(self.where, f"{self._name}: expected a member '{field}', found none")
        return self._members[field]

    def inside(self, field: str) -> _Fields:
        """Return the members of a member."""
        return _Fields(self.get(field), f"{self._name}.{field}", self.where)

    def text(self, field: str) -> str:
        """Return a member that is text."""
        value = self.get(field)
        if type(value) is not str:
            raise self.wrong(field, "text")
        return value

    def text_or_none(self, field: str) -> str | None:
        """Return a member that is text or null."""
        return None if self.get(field) is None else self.text(field)

    def truth(self, field: str) -> bool:
        """Return a member that is true or false."""
        value = self.get(field)
        if type(value) is not bool:
            raise self.wrong(field, "true or false")
        return value

    def check(self, value: Any, field: str, words: Sequence[str | None]) -> Any:
        """Return `value`, a part of a member, when it is one of `words`."""
        if not (value is None or type(value) is str) or value not in words:
            raise self.wrong(field, f"one of {', '.join(word or 'null' for word in words)}")
        return value

    def one_of(self, field: str, words: Sequence[str | None]) -> Any:
        """Return a member that is one of `words`."""
        return self.check(self.get(field), field, words)

    def pairs(self, field: str) -> list[tuple[str, str]]:
        """Return a member that is a list of pairs of texts."""
        rows = self.get(field)
        good = isinstance(rows, list) and all(
            isinstance(row, list) and [type(word) for word in row] == [str, str] for row in rows
        )
        if not good:
            raise self.wrong(field, "pairs of texts")
        return [(first, second) for first, second in rows]


def _shown(value: object) -> str:
    """Return what was found, safe and short; an integer may have a million digits."""
    if isinstance(value, str):
        return f"'{shorten(value)}'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {int: "an integer", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]
