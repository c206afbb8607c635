"""A copy of a checkpoint under other names: a plan that copies and averages nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ema_cli import hints, machine, naming, provenance
from ema_cli.blueprint import COPY, Entry, Layout, entry_of
from ema_cli.durable import free_bytes
from ema_cli.errors import Disagreement
from ema_cli.formats import FORMATS
from ema_cli.layout import Wishes, lay_out_entries
from ema_cli.naming import role_in, role_of, shadow_of, variable_behind
from ema_cli.plan import BASE_BYTES, Costs, Plan, Request
from ema_cli.ranges import Destination
from ema_cli.runs import Run, find_one
from ema_cli.tensors import Checkpoint, Role, Tensor, describe
from ema_cli.text import command, shorten
from ema_cli.work import prepare

TOWARDS = ("shadow", "variable")


@dataclass(frozen=True, slots=True)
class Renamed:
    """What `ema_cli.rename` did.

    Attributes:
        path: of the copy.
        renamed: (old name, new name) pairs.
        replaced: variables whose place a shadow took.
        left_out: tensors that belong to a shadow and have no place in the copy.
        kept: how many tensors kept their names.
        notes: what else is worth knowing about the copy.
        reasons: why, for each that is left out.
        nbytes: size of the copy.
    """

    path: str
    renamed: tuple[tuple[str, str], ...]
    replaced: tuple[str, ...]
    left_out: tuple[str, ...]
    kept: int
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    nbytes: int = 0


def make(request: Request, towards: str | None) -> tuple[Plan, Layout, Renamed]:
    """Return the plan of a renamed copy, its layout, and what it renames."""
    wishes, path = request.wishes, request.output or ""
    checkpoint = find_one(request.paths[0], request.choice.key)
    entries, replaced, left_out = _renamed_entries(checkpoint, towards, wishes)
    beside = _beside(checkpoint)
    apart = set(beside)
    entries = [entry for entry in entries if entry.source not in apart]
    rules = naming.compile_rules(wishes.rules)
    entries = [e._replace(name=naming.apply_rules(e.name, rules)) for e in entries]
    changed = tuple((e.source, e.name) for e in entries if e.name != e.source)
    layout = lay_out_entries(
        path,
        checkpoint,
        entries,
        wishes,
        [(name, "belongs to a shadow") for name in left_out]
        + [(name, "beside the model") for name in beside],
    )
    lost = dict(layout.left_out)
    entries = list(layout.entries)
    changed = tuple(pair for pair in changed if pair[0] not in lost)
    if not changed and layout.format == checkpoint.index.format:
        raise _nothing(request, checkpoint, towards)
    renamed = Renamed(
        layout.path,
        changed,
        tuple(replaced),
        tuple(lost),
        len(entries) - len(changed),
        layout.notes,
        tuple(lost.values()),
        layout.nbytes,
    )
    return _plan(request, checkpoint, layout), layout, renamed


def _beside(checkpoint: Checkpoint) -> list[str]:
    """Return the tensors of a nested checkpoint that are not its model's: a copy is flat."""
    if not FORMATS[checkpoint.index.format].nested:
        return []
    others = (Role.BESIDE, Role.OPTIMIZER)
    return [name for name, role in checkpoint.index.roles.items() if role in others]


def names_after(path: str, towards: str, name: str, key: str | None) -> set[str]:
    """Return the names that the checkpoint at `path` would have; raises `Disagreement`."""
    checkpoint = find_one(path, key)
    entries, _, _ = _renamed_entries(checkpoint, towards, Wishes(name=name))
    naming.check_distinct(((entry.name, entry.source) for entry in entries), lambda name: True)
    return {entry.name for entry in entries}


def _renamed_entries(
    checkpoint: Checkpoint, towards: str | None, wishes: Wishes
) -> tuple[list[Entry], list[str], list[str]]:
    """Return the entries of the copy, the variables a shadow replaces, and what is left out."""
    if towards == "variable":
        return _towards_variable(checkpoint, wishes)
    if towards == "shadow":
        return _towards_shadow(checkpoint, wishes), [], []
    return [_kept(t) for t in checkpoint.index.tensors], [], []


def _nothing(request: Request, checkpoint: Checkpoint, towards: str | None) -> Disagreement:
    path, name = request.paths[0], request.wishes.name
    if towards == "variable":
        others = naming.shadow_names(checkpoint.index)
        hint = (
            f"see the names with {command('ema-avg', 'inspect', path)}, and give the shadows' "
            "name with --name"
        )
        if others:
            words = ("ema-avg", "rename", path, "-o", request.output or "OUT")
            hint = command(*words, "--names", "variable", "--name", others[0])
        return Disagreement(
            f"{shorten(path, 1000)}: no tensor is called <variable>/{shorten(name)}", hint
        )
    rules, names = request.wishes.rules, list(checkpoint.index.by_name)
    near = hints.near_expression(rules[-1][0], names) if rules else ""
    return Disagreement(
        f"{shorten(path, 1000)}: no tensor would be renamed",
        near or "say what to do with --names shadow, --names variable or --rule PATTERN REPL",
    )


def _kept(tensor: Tensor) -> Entry:
    return entry_of(tensor.name, tensor, COPY)


def _towards_variable(
    checkpoint: Checkpoint, wishes: Wishes
) -> tuple[list[Entry], list[str], list[str]]:
    """A shadow takes its variable's name and place."""
    by_name = checkpoint.index.by_name
    shadows: dict[str, Tensor] = {}
    for tensor in checkpoint.index.tensors:
        variable = variable_behind(tensor, wishes.name, by_name)
        if variable:
            _check_shadow(tensor, variable, by_name.get(variable), shadows.get(variable))
            shadows[variable] = tensor
    entries = [_kept(t)._replace(name=v) for v, t in shadows.items()]
    replaced, left_out = [], []
    for tensor in checkpoint.index.tensors:
        if tensor.name in shadows:
            replaced.append(tensor.name)
        elif variable_behind(tensor, wishes.name, by_name):
            continue
        elif role_of(tensor.name, wishes.name) is not Role.SHADOW:
            entries.append(_kept(tensor))
        else:
            left_out.append(tensor.name)
    return entries, replaced, left_out


def _check_shadow(shadow: Tensor, variable: str, mine: Tensor | None, other: Tensor | None) -> None:
    """Raise `Disagreement` unless `shadow` can take the place of its variable."""
    if other is not None:
        raise Disagreement(
            f"two tensors would be called '{shorten(variable)}': '{shorten(other.name)}' and "
            f"'{shorten(shadow.name)}'",
            "say which with --rule PATTERN REPL instead of --names variable",
        )
    if mine is not None and (mine.dtype, mine.shape) != (shadow.dtype, shadow.shape):
        raise Disagreement(
            f"shadow '{shorten(shadow.name)}' is {describe(shadow.dtype, shadow.shape)}, its "
            f"variable {describe(mine.dtype, mine.shape)}: no restore would take it",
            "say which with --rule PATTERN REPL instead of --names variable",
        )


def _towards_shadow(checkpoint: Checkpoint, wishes: Wishes) -> list[Entry]:
    """What a run would average gets its shadow's name; statistics keep their own beside it."""
    entries = []
    for tensor in checkpoint.index.tensors:
        role = role_in(checkpoint.index, tensor.name, wishes.name)
        if tensor.dtype.averaged and role in (Role.VARIABLE, Role.STATISTICS):
            entries.append(_kept(tensor)._replace(name=shadow_of(tensor.name, wishes.name)))
            if role is Role.VARIABLE:
                continue
        elif checkpoint.index.roles.get(tensor.name) is Role.VARIABLE:
            # A restore asks for the shadow of every trainable variable, an integer's too.
            entries.append(_kept(tensor)._replace(name=shadow_of(tensor.name, wishes.name)))
        entries.append(_kept(tensor))
    return entries


def _plan(request: Request, checkpoint: Checkpoint, layout: Layout) -> Plan:
    work = prepare([checkpoint], (), (), [Destination(layout, 0, 0)], request.manner)
    free = free_bytes(os.path.dirname(layout.path.rstrip("/")))
    costs = Costs(work.read, layout.nbytes, BASE_BYTES, free, work.spill)
    return Plan(request, Run((checkpoint,)), (), (), work, costs)


def document(layout: Layout, checkpoint: Checkpoint, renamed: Renamed) -> dict[str, Any]:
    """Return the provenance of a renamed copy, without its checksums."""
    return {
        "schema": provenance.SCHEMA,
        "tool": machine.versions(),
        "renamed": [{"from": old, "to": new} for old, new in renamed.renamed],
        "replaced": list(renamed.replaced),
        "left_out": [
            {"tensor": name, "reason": reason}
            for name, reason in zip(renamed.left_out, renamed.reasons, strict=True)
        ],
        "inputs": [
            {
                "path": checkpoint.path,
                "step": checkpoint.step,
                "files": [
                    {"path": stamp.path, "bytes": stamp.size, "mtime_ns": stamp.mtime_ns}
                    for stamp in checkpoint.files
                ],
            }
        ],
        "output": {
            "path": layout.path,
            "format": layout.format,
            "step": checkpoint.step,
            "files": [{"name": file.name, "bytes": file.nbytes} for file in layout.files],
        },
    }
