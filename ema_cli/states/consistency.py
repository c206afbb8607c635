"""Whether the small files of a state fit each other: each of them may be sound for itself."""

from __future__ import annotations

from collections.abc import Sequence

from ema_cli.errors import DamagedState
from ema_cli.states import slots
from ema_cli.states.binding import CLASS, Binding
from ema_cli.states.records import AVERAGE, BIASED, COPY, LOCAL_STEP, Held, Row


def check_held(held: Sequence[Held], binding: Binding, where: str) -> None:
    """Raise `DamagedState` unless a slot holds every average of what the state is bound to."""
    found: dict[tuple[str, int], list[str]] = {}
    for one in held:
        if not slots.can_hold(one.dtype):
            raise DamagedState(where, f"expected tensors that a slot can hold, found {one.dtype}")
        if one.average >= len(binding.labels) or (one.part == COPY and one.average):
            raise DamagedState(where, "expected averages that the state has")
        if one.part == LOCAL_STEP and binding.by != CLASS:
            raise DamagedState(where, "expected no counters")
        found.setdefault((one.part, one.average), []).extend(one.variables)
    if any(len(set(names)) < len(names) for names in found.values()):
        raise DamagedState(where, "expected each tensor once")
    averaged = set(found.get((AVERAGE, 0), ()))
    if binding.by != CLASS and averaged != set(binding.averaged):
        raise DamagedState(where, "expected the tensors that the state is bound to")
    for average in range(len(binding.labels)):
        biased = found.get((BIASED, average), averaged)
        if set(found.get((AVERAGE, average), ())) != averaged or set(biased) != averaged:
            raise DamagedState(where, "expected the same tensors in each average")


def check_rows(rows: Sequence[Row], binding: Binding, where: str) -> None:
    """Raise `DamagedState` unless a ledger has what is averaged, with its coefficients."""
    if all(row.missed for row in rows):
        raise DamagedState(where, "expected a checkpoint that was applied")
    for row in rows:
        if len(row.coefficients) != (0 if row.missed else len(binding.labels)):
            raise DamagedState(where, "expected a coefficient for each average")
