"""What a state is bound to for ever: by whom it was made, with which settings, of which tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ema_cli import machine
from ema_cli.errors import DamagedState
from ema_cli.states.records import Fields
from ema_cli.tensors import DTYPES, DType, describe
from ema_cli.text import shorten

RUN, CLASS = "run", "class"
_BIGGEST = 1 << 48


class Binding(NamedTuple):
    """The contents of the file ``plan``.

    Attributes:
        by: ``run`` for `ema-avg run`, ``class`` for `ExponentialMovingAverage`.
        settings: the options of the one, or the arguments of the other.
        labels: of the averages, in the order in which a slot has them.
        averaged: dtype and shape of each averaged tensor; the class may add to them.
    """

    by: str
    settings: tuple[str, ...] | Mapping[str, Any]
    labels: tuple[str, ...]
    averaged: Mapping[str, tuple[DType, tuple[int, ...]]]

    def to_json(self) -> dict[str, Any]:
        """Return the document, with the versions that wrote it."""
        given = self.settings
        return {
            "by": self.by,
            "settings": list(given) if isinstance(given, tuple) else dict(given),
            "averages": list(self.labels),
            "averaged": [[name, d.name, list(s)] for name, (d, s) in self.averaged.items()],
            "tool": machine.versions(),
        }

    @classmethod
    def from_json(cls, document: Any, where: str) -> Binding:
        """Check a document; raises `DamagedState`."""
        take = Fields(document, where)
        by = take.text("by")
        settings: tuple[str, ...] | dict[str, Any]
        if by == RUN:
            settings = take.items("settings", _text)
        elif by == CLASS:
            settings = take.mapping("settings")
        else:
            raise DamagedState(where, "'by': expected run or class")
        labels = take.items("averages", _text)
        if not labels or len(set(labels)) < len(labels):
            raise DamagedState(where, "'averages': expected labels that differ")
        averaged = take.items("averaged", _averaged)
        if len({name for name, _ in averaged}) < len(averaged):
            raise DamagedState(where, "'averaged': expected names that differ")
        return cls(by, settings, labels, dict(averaged))


def _text(value: Any, where: str) -> str:
    if type(value) is not str:
        raise DamagedState(where, "expected a string")
    return value


def _averaged(value: Any, where: str) -> tuple[str, tuple[DType, tuple[int, ...]]]:
    """Check name, dtype and shape of an averaged tensor."""
    if isinstance(value, list) and len(value) == 3:
        name, dtype, shape = value
        known = DTYPES.get(dtype) if type(dtype) is str else None
        sizes = isinstance(shape, list) and all(
            type(size) is int and 0 <= size < _BIGGEST for size in shape
        )
        if type(name) is str and known is not None and known.averaged and sizes:
            return name, (known, tuple(shape))
    raise DamagedState(where, "expected name, dtype and shape of an averaged tensor")


def difference(mine: Binding, other: Binding) -> str:
    """Return the first tensor that two bindings average otherwise, and how; empty if none."""
    for name in dict.fromkeys((*mine.averaged, *other.averaged)):
        specs = (mine.averaged.get(name), other.averaged.get(name))
        if specs[0] != specs[1]:
            expected, found = (describe(*spec) if spec else "none" for spec in specs)
            return f"tensor '{shorten(name)}': expected {expected} as in the state, found {found}"
    return ""
