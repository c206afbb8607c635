"""What a restoring program asks for, held against what a checkpoint has."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ema_cli import formats, provenance
from ema_cli.errors import InputError, UsageError
from ema_cli.files import read_small
from ema_cli.formats.tensorflow import graphs
from ema_cli.naming import (
    OBJECT_GRAPH,
    Restored,
    Rule,
    check_rules,
    instead,
    restore_map,
    role_in,
    ruling,
    shadow_of,
    variable_of,
)
from ema_cli.tensors import Checkpoint, DType, Index, Role, Tensor, describe
from ema_cli.text import near_misses, shorten

Spec = tuple[DType, tuple[int, ...] | None]

_LIST_LIMIT = 16 << 20
# Guessing what was meant takes long; after so many names a list is simply a wrong one.
_MANY = 10


@dataclass(frozen=True)
class RestoreMap:
    """The rows of a restore map and what stands beside it.

    Attributes:
        rows: one per restore name.
        orphans: shadows whose variable nobody asks for.
        name: of the shadows.
    """

    rows: tuple[Restored, ...]
    orphans: tuple[str, ...]
    name: str

    @property
    def missing(self) -> tuple[Restored, ...]:
        """Rows whose restore would fail."""
        return tuple(row for row in self.rows if row.source in ("missing", "mismatch"))


def restored(
    checkpoint: Checkpoint,
    program: str | Sequence[str] | None,
    rules: Sequence[Rule],
    name: str,
) -> RestoreMap:
    """Return the restore map of `checkpoint`; see `ema_cli.restore_map`."""
    saved = checkpoint.index
    if program is None:
        variables = _variables(saved, name)
        check_rules(rules, variables)
        averaged = _averaged(saved, variables, rules, name, _recorded(checkpoint))
        rows = [_named(row, saved) for row in restore_map(saved.by_name, averaged, name)]
    elif isinstance(program, str) and graphs.is_graph(program):
        rows = _of_graph(program, saved, rules, name)
    elif isinstance(program, str) and _is_checkpoint(program):
        asking = formats.read(program, {}).index
        variables = _variables(asking, name)
        check_rules(rules, variables)
        rows = restore_map(saved.by_name, _averaged(asking, variables, rules, name), name)
        rows = [_fitting(row, variables.get(row.variable), saved) for row in rows]
    elif rules:
        raise UsageError(
            "--include and --exclude choose among variables, but --for lists restore names",
            "leave them out, or name a graph or a checkpoint with --for",
        )
    else:
        asked = _list(program) if isinstance(program, str) else list(program)
        rows = []
        guesses = _MANY
        for wanted in asked:
            rows.append(_literal(wanted, saved, name, guess=guesses > 0))
            guesses -= not rows[-1].saved_as and rows[-1].source == "missing"
    found = {row.restore_name for row in rows}
    variables_asked = {row.variable for row in rows}
    orphans = tuple(
        tensor
        for tensor in saved.by_name
        if tensor not in found
        and (variable := variable_of(tensor, name)) is not None
        and variable not in variables_asked
    )
    return RestoreMap(tuple(rows), orphans, name)


def _is_checkpoint(path: str) -> bool:
    return os.path.exists(path) and formats.detect(path) is not None


def _variables(index: Index, name: str) -> Mapping[str, Tensor]:
    """Return the variables a checkpoint tells of: plain ones, and those only a shadow tells of."""
    variables: dict[str, Tensor] = {}
    for tensor in index.tensors:
        if tensor.name == OBJECT_GRAPH:
            continue  # read by tf.train.Checkpoint, and no variable
        if role_in(index, tensor.name, name) is not Role.SHADOW:
            variables[tensor.name] = tensor
        elif (variable := variable_of(tensor.name, name)) is not None:
            variables.setdefault(variable, tensor)
    return variables


def _recorded(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the variables that an output of ours is an average of; empty for other checkpoints."""
    origin = provenance.load(checkpoint.path) or {}
    averaged, renamed = (origin.get(key) for key in ("averaged", "renamed"))
    names = list(averaged) if isinstance(averaged, list) else []
    if isinstance(renamed, list):
        names += [pair.get("from") for pair in renamed if isinstance(pair, dict)]
    return frozenset(name for name in names if isinstance(name, str))


def _named(row: Restored, index: Index) -> Restored:
    """Return the row with what else is told: the variable's own name, and where it lies."""
    lies = index.lies_as.get(row.restore_name)
    told = [index.full_names.get(row.variable), f"lies in '{shorten(lies)}'" if lies else None]
    note = ", ".join(filter(None, told))
    return row._replace(note=note) if note and not row.note else row


def _averaged(
    index: Index,
    variables: Mapping[str, Tensor],
    rules: Sequence[Rule],
    name: str,
    only: Collection[str] = (),
) -> dict[str, bool]:
    """Return for each variable whether it is asked for under its shadow name.

    As TensorFlow has it: the trainable variables, not the statistics; rules override. `only`, if
    any, are those that can be. Through an object graph all are restored under their own names.
    """
    objects = OBJECT_GRAPH in index.by_name and not any(variable_of(t, name) for t in index.by_name)
    averaged = {}
    for variable, tensor in variables.items():
        rule = ruling(rules, variable)
        # What a shadow alone tells of was a variable; its role is not recorded.
        recorded = index.roles.get(variable) is Role.VARIABLE or (
            variable not in index.by_name and bool(index.lies_as)
        )
        by_role = recorded or (
            role_in(index, variable, name) is Role.VARIABLE and tensor.dtype.averaged
        )
        by_role = by_role and not objects and (not only or variable in only)
        averaged[variable] = by_role if rule is None else rule.include
    return averaged


def _of_graph(path: str, saved: Index, rules: Sequence[Rule], name: str) -> list[Restored]:
    """Return what a program with the graph at `path` asks for, variable by variable."""
    found = graphs.collections(path)
    listed = {
        one.name: one for one in (*(found.variables or ()), *found.trainable, *found.moving_average)
    }
    check_rules(rules, listed)
    averaged = {one.name for one in (*found.trainable, *found.moving_average)}
    asked = {}
    for variable in listed:
        rule = ruling(rules, variable)
        asked[variable] = variable in averaged if rule is None else rule.include
    rows = restore_map(saved.by_name, asked, name)
    rows = [_partition(row, listed[row.variable], saved, name) for row in rows]
    declared = {} if path.endswith(".pb") else graphs.declared(path)
    return [_declared(row, declared, saved) for row in rows]


def _declared(row: Restored, declared: Mapping[str, Spec], saved: Index) -> Restored:
    """Return the row, marked when the graph declares its variable otherwise than it is saved."""
    tensor, spec = saved.by_name.get(row.restore_name), declared.get(row.variable)
    if tensor is None or spec is None:
        return row
    dtype, shape = spec
    shape = tensor.shape if shape is None else shape
    return _fitting(row, tensor._replace(dtype=dtype, shape=shape), saved)


def _partition(row: Restored, variable: graphs.Listed, saved: Index, name: str) -> Restored:
    """Return the row; TensorFlow asks for a partition by a name under which it never saves one."""
    whole = shadow_of(variable.key, name)
    whole = variable.key if row.restore_name == row.variable else whole
    if not variable.partition or row.source != "missing" or whole not in saved.by_name:
        return row
    note = f"a partition of '{shorten(whole)}', which is saved whole"
    return row._replace(note=note)


def _fitting(row: Restored, wanted: Tensor | None, saved: Index) -> Restored:
    """Return the row, marked when dtype or shape would make the restore fail."""
    tensor = saved.by_name.get(row.restore_name)
    if tensor is None or wanted is None:
        return row
    if (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape):
        return row
    expected, found = (describe(t.dtype, t.shape) for t in (wanted, tensor))
    return row._replace(source="mismatch", note=f"expected {expected}, found {found}")


def _list(path: str) -> list[str]:
    """Return the restore names of a text file, one per line; ``:0`` of graph tensors is cut."""
    try:
        text = read_small(path, _LIST_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{shorten(path)}: not UTF-8: byte {error.start}",
            "name a checkpoint, a graph, or a text with one restore name in each line",
        ) from None
    return names_in(text.splitlines())


def names_in(lines: Iterable[str]) -> list[str]:
    """Return the names in the lines of a list, blank lines and repetitions left out."""
    stripped = (line.strip().removesuffix(":0") for line in lines)
    return list(dict.fromkeys(line for line in stripped if line))


def _literal(wanted: str, saved: Index, name: str, *, guess: bool) -> Restored:
    """Return the row of a restore name that is asked for literally."""
    variable = variable_of(wanted, name)
    if wanted in saved.by_name:
        return Restored(wanted, variable or wanted, "plain" if variable is None else "shadow")
    other = instead(wanted, variable or wanted, saved.by_name, name)
    if other:
        return Restored(
            wanted, variable or wanted, "missing", f"'{shorten(other)}' is saved", other
        )
    close = near_misses(wanted, saved.by_name) if guess else []
    note = f"did you mean '{shorten(close[0])}'" if close else ""
    return Restored(wanted, variable or wanted, "missing", note)
