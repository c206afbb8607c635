"""Searches a directory for checkpoints, and says what it passed over and why."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ema_cli import formats, provenance
from ema_cli.durable import is_temporary
from ema_cli.errors import InputError, StorageError
from ema_cli.formats import Known, folders, foreign, tensorflow
from ema_cli.states.directory import is_state
from ema_cli.steps import (
    Step,
    compile_step_from,
    save_counter,
    step_from_name,
    stored_step,
    tells_epoch,
)
from ema_cli.tensors import Checkpoint
from ema_cli.text import plural, shorten

_ALIAS = re.compile(r"(?:last|latest|best|final|current|newest)(?:[._-]|$)", re.IGNORECASE)
# What the next look may not meet any more, and says nothing about an entry.
_PASSING = (errno.EIO, errno.EINTR, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_TEMPORARY = re.compile(
    r"(?:^|[._-])(?:tmp|temp|partial|incomplete)(?:[._-]|$)|\.part$|\.tempstate\d*$|~$|^tmp",
    re.IGNORECASE,
)
_NO_INDEX = "its index is missing: still being written, or deleted"
UNMATCHED = "not matched by --glob"
NUMBERED_FOLDER = re.compile(
    r"(?:checkpoint|ckpt|step|iter(?:ation)?)s?[=_-]?\d+$|^\d+$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which checkpoints of the input to take; the options of the same names."""

    glob: str | None = None
    last: int | None = None
    steps: tuple[int | None, int | None, int | None] | None = None
    step_from: str | None = None
    order: str = "step"
    key: str | None = None


@dataclass(frozen=True, slots=True)
class PassedOver:
    """An entry of a run directory that was not taken.

    Attributes:
        path: the entry.
        reason: why, one clause.
        unusable: it looks like a checkpoint that should have been usable (exit code 3).
    """

    path: str
    reason: str
    unusable: bool = False


def search(root: str, choice: Choice, known: Known) -> tuple[list[Checkpoint], list[PassedOver]]:
    """Return the checkpoints in a directory, each with its step, and what was passed over."""
    entries = sorted(os.listdir(root))
    candidates, passed_over = _candidates(root, entries, choice)
    candidates, prefixes, parts = _grouped(root, candidates)
    passed_over += parts
    flat = choice.glob is None and bool(prefixes)
    # Of a prefix its index is the file that is there.
    file_of = {name: name + tensorflow.SUFFIX if name in prefixes else name for name in candidates}
    paths = [os.path.join(root, entry) for entry in file_of.values()]
    siblings = {os.path.realpath(path) for path in paths if not os.path.islink(path)}
    checkpoints: list[Checkpoint] = []
    seen: set[tuple[int, int]] = set()
    for name, entry in file_of.items():
        path, there = os.path.join(root, name), os.path.join(root, entry)
        outcome = (
            _reason_by_state(root, name)
            or _reason_by_name(path, there, siblings)
            or _reason_by_identity(path, there, seen)
            or (_reason_by_place(path, flat) if entry == name else None)
        )
        taken = outcome or _read(path, name, choice, known)
        if isinstance(taken, Checkpoint):
            checkpoints.append(taken)
        else:
            passed_over.append(taken)
    return _settle(root, checkpoints, passed_over)


def _candidates(
    root: str, entries: Sequence[str], choice: Choice
) -> tuple[list[str], list[PassedOver]]:
    if choice.glob is None:
        return list(entries), []
    import fnmatch
    import glob as globbing  # only with --glob

    matched = sorted(globbing.glob(choice.glob, root_dir=root))
    direct = set(matched)
    for name in entries:  # the name of a TensorFlow checkpoint is none of its files'
        stem = tensorflow.stem_of(name)
        if stem is not None and name not in direct and fnmatch.fnmatchcase(stem, choice.glob):
            matched.append(name)
    firsts = {tensorflow.stem_of(name) or name for name in (m.split("/", 1)[0] for m in matched)}
    skipped = {tensorflow.stem_of(name) or name for name in entries} - firsts
    return matched, [PassedOver(os.path.join(root, name), UNMATCHED) for name in sorted(skipped)]


def _grouped(root: str, names: Sequence[str]) -> tuple[list[str], set[str], list[PassedOver]]:
    """Put the prefix of a TensorFlow checkpoint in the place of its files, each once.

    Also returns which of the names are prefixes, and one of the files whose index is not there,
    with the reason.
    """
    prefixes: set[str] = set()
    grouped: dict[str, None] = {}
    parts: dict[str, PassedOver] = {}
    for name in names:
        stem = tensorflow.stem_of(name)
        path = os.path.join(root, name)
        if os.path.isdir(path) or os.path.basename(name).startswith("."):
            grouped[name] = None  # also in the place of a prefix of this name
        elif os.path.basename(name) == tensorflow.STATE_FILE:
            parts[name] = PassedOver(path, "TensorFlow's state file")
        elif stem is None:
            grouped[name] = None
        elif stem in prefixes or is_prefix(os.path.join(root, stem)):
            prefixes.add(stem)
            grouped[stem] = None
        elif not name.endswith(tensorflow.SUFFIX):
            graph = name.endswith(tensorflow.META_SUFFIX)
            reason = "a graph without its checkpoint" if graph else _NO_INDEX
            parts.setdefault(stem, PassedOver(path, reason))
        else:
            grouped[name] = None
    return list(grouped), prefixes, list(parts.values())


def is_prefix(path: str) -> bool:
    """Whether a TensorFlow checkpoint is called `path` itself, not only a file of it."""
    return tensorflow.prefix_of(path) == path


def _reason_by_place(path: str, flat: bool) -> PassedOver | None:
    """A folder of TensorFlow checkpoints is no checkpoint of the run around it."""
    if not os.path.isdir(path) or tensorflow.saved_model_in(path) is not None:
        return None
    inside = len(tensorflow.prefixes(path))
    if inside > 1 or (inside and flat):
        return PassedOver(path, f"a folder with {plural(inside, 'checkpoint')} of its own")
    return None


def _reason_by_state(root: str, name: str) -> PassedOver | None:
    """A state, and what lies inside one, is no checkpoint."""
    within = itertools.accumulate(name.split("/"), os.path.join)
    if any(is_state(os.path.join(root, part)) for part in within):
        return PassedOver(os.path.join(root, name), "a state of ema-avg")
    return None


def _reason_by_name(path: str, there: str, siblings: set[str]) -> PassedOver | None:
    name = os.path.basename(path)
    bare = name.lstrip(".")
    reason = ""
    if is_temporary(name):
        reason = "left by an interrupted run of ema-avg"
    elif name.endswith(provenance.SUFFIX):
        reason = "tells where an output came from"
    elif name.startswith("."):
        reason = "hidden"
    elif _TEMPORARY.search(bare):
        reason = "a temporary name: still being written, or left over"
    elif os.path.islink(there) and os.path.realpath(there) in siblings:
        reason = "a link to another entry"
    elif _ALIAS.match(name) and step_from_name(name) is None:
        reason = "an alias: its name tells no step"
    elif name.startswith(folders.COMPANIONS) and not os.path.isdir(path):
        reason = "training state beside the weights"
    elif provenance.load(path) is not None:
        reason = "an output of ema-avg"
    return PassedOver(path, reason) if reason else None


def _reason_by_identity(path: str, there: str, seen: set[tuple[int, int]]) -> PassedOver | None:
    try:
        status = os.stat(there)
    except OSError as error:
        if error.errno in _PASSING:
            raise StorageError(f"{shorten(path, 1000)}: {os.strerror(error.errno)}") from error
        return PassedOver(path, os.strerror(error.errno or 0), unusable=_promising(path))
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return PassedOver(path, "a link to another entry")
    seen.add(identity)
    return None


def _promising(path: str) -> bool:
    """Whether the name alone says that a checkpoint is meant."""
    rows = formats.FORMATS.values()
    named = any(path.endswith((f.suffix, *f.also)) for f in rows if f.suffix)
    return named or is_prefix(path)


def _read(path: str, within: str, choice: Choice, known: Known) -> Checkpoint | PassedOver:
    try:
        name = formats.detect(path)
        if name is None:
            return _foreign(path)
        read = formats.read_as(name, path, known, choice.key or "")
        checkpoint = dataclasses.replace(read, within=within)
        return with_step(checkpoint, choice)
    except InputError as error:
        reason = error.message.removeprefix(f"{shorten(path, 1000)}: ")
        return PassedOver(path, reason, unusable=_promising(path) or os.path.isdir(path))


def _foreign(path: str) -> PassedOver:
    if os.path.isdir(path):
        weights = folders.weights_in(path)
        if weights:
            reason = f"{plural(len(weights), 'weights file')} and no index"
            return PassedOver(path, reason, unusable=True)
        known = foreign.recognise(path)
        if known is None:
            return PassedOver(path, "a folder without weights", unusable=_promising(path))
    if tensorflow.is_v1(path):
        return PassedOver(path, tensorflow.V1)
    known = foreign.recognise(path)
    reason = f"{known.title}: not read by this version" if known else "not a checkpoint"
    return PassedOver(path, reason)


def with_step(checkpoint: Checkpoint, choice: Choice) -> Checkpoint:
    """Return the checkpoint with its step: the stored one wins, a name that differs is noted."""
    told = _told_step(checkpoint, compile_step_from(choice.step_from))
    stored = stored_step(checkpoint) or _recorded_step(checkpoint)
    if stored is None:
        return dataclasses.replace(checkpoint, step=told)
    notes = checkpoint.notes
    if (
        told is not None
        and not tells_epoch(checkpoint.name)
        and told not in (stored.value, save_counter(checkpoint))
    ):
        where = shorten(checkpoint.path, 1000)
        notes += (f"{where}: its {stored.source} says step {stored.value}, its name says {told}",)
    return dataclasses.replace(checkpoint, step=stored.value, notes=notes)


def _recorded_step(checkpoint: Checkpoint) -> Step | None:
    """Return the step an output of ours was made at; its name may hold any number."""
    origin = provenance.load(checkpoint.path)
    step = origin["output"].get("step") if origin else None
    return Step(step, "provenance") if type(step) is int else None


def _told_step(checkpoint: Checkpoint, expression: re.Pattern[str] | None) -> int | None:
    """Return the step told by the name, or by the folders it lies in, innermost first.

    Within a run all folders down from its directory are asked; of a checkpoint that was named
    only the folder it lies in, when that is called as a checkpoint's folder is.
    """
    parts = checkpoint.name.split("/")
    if not checkpoint.within:
        path = checkpoint.path.rstrip("/").removesuffix(tensorflow.IN_SAVED_MODEL)
        parts = [os.path.basename(path)]
        folder = os.path.basename(os.path.dirname(path))
        parts = [folder, *parts] if NUMBERED_FOLDER.fullmatch(folder) else parts
    steps = (step_from_name(part, expression) for part in reversed(parts))
    return next((step for step in steps if step is not None), None)


def told_step(path: str, root: str, choice: Choice) -> int | None:
    """Return the step that the names of an entry of a run tell, innermost first.

    None where none does, or where that step is not chosen.
    """
    within = os.path.relpath(path, root)
    within = tensorflow.stem_of(within) or within
    expression = compile_step_from(choice.step_from)
    steps = (step_from_name(name, expression) for name in reversed(within.split("/")))
    step = next((step for step in steps if step is not None), None)
    return step if step is not None and _chosen(step, choice) else None


def _chosen(step: int, choice: Choice) -> bool:
    """Whether ``--steps`` leaves a step in."""
    start, stop, stride = choice.steps or (None, None, None)
    low = start or 0
    return low <= step and (stop is None or step <= stop) and (step - low) % (stride or 1) == 0


def _settle(
    root: str, checkpoints: list[Checkpoint], passed_over: list[PassedOver]
) -> tuple[list[Checkpoint], list[PassedOver]]:
    """Pass over unnumbered weights beside numbered folders; tell the newest when incomplete."""
    numbered_folders = any(c.step is not None and os.path.isdir(c.path) for c in checkpoints)
    taken = []
    for checkpoint in checkpoints:
        at_root = os.path.dirname(checkpoint.path) == root.rstrip("/")
        unnumbered = os.path.isfile(checkpoint.path) and step_from_name(checkpoint.name) is None
        if numbered_folders and at_root and unnumbered:
            passed_over.append(PassedOver(checkpoint.path, "unnumbered weights at the run's root"))
        else:
            taken.append(checkpoint)
    newest = max((c.step for c in taken if c.step is not None), default=-1)
    return taken, [_mark_newest(entry, newest) for entry in passed_over]


def _mark_newest(entry: PassedOver, newest: int) -> PassedOver:
    """A numbered folder without weights is a checkpoint being written if it is the newest.

    So is TensorFlow's data without its index.
    """
    name = os.path.basename(entry.path)
    if entry.reason == _NO_INDEX:
        step = step_from_name(tensorflow.stem_of(name) or name)
        return dataclasses.replace(entry, unusable=step is not None and step > newest)
    if entry.reason == "a folder without weights" and NUMBERED_FOLDER.search(name):
        step = step_from_name(name)
        if step is not None and step > newest:
            return PassedOver(entry.path, "the newest, but it holds no weights yet", unusable=True)
    return entry
