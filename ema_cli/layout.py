"""Decides what an output will hold: its format, the names, and what each tensor is made of.

Two layouts. *Template*: a copy of the last checkpoint's structure in which only the bytes of the
averaged tensors are replaced. *Fresh*: tensors under new names, when names, dtypes, the selection
or the format change.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ema_cli import hints, naming, schedules
from ema_cli.blueprint import (
    AVERAGE,
    BIASED,
    COPY,
    LOCAL_STEP,
    Draft,
    Entry,
    File,
    Layout,
    entry_of,
)
from ema_cli.errors import UnsupportedInput, UsageError
from ema_cli.formats import FORMATS, folders, foreign, tensorflow
from ema_cli.naming import role_in, shadow_of
from ema_cli.selection import Selection
from ema_cli.tensors import (
    DTYPES,
    NO_FILE,
    Checkpoint,
    Extent,
    Index,
    Role,
    Tensor,
    numpy_dtype,
)
from ema_cli.text import plural, shorten, size, with_article

NAMES = ("auto", "shadow", "variable")
OPTIMIZER = ("auto", "keep", "drop")
UNKNOWN = ("refuse", "keep", "drop")
# What a tensor that shows few bytes many times may become where every element is stored.
EXPANSION_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Wishes:
    """How the output shall look; the options of the same names."""

    format: str | None = None
    names: str = "auto"
    name: str = naming.SHADOW_NAME
    keep_variables: bool = False
    rules: tuple[tuple[str, str], ...] = ()
    dtype: str | None = None
    max_shard_size: int | None = None
    optimizer: str = "auto"
    unknown: str = "refuse"


def output_format(path: str, wishes: Wishes, last: Checkpoint) -> str:
    """Return the format the option, the suffix or the input decides. Raises `UsageError`."""
    if wishes.format is not None:
        if wishes.format not in FORMATS:
            raise UsageError(
                f"--format: expected one of {', '.join(FORMATS)}, found '{shorten(wishes.format)}'",
                hints.did_you_mean(wishes.format, FORMATS, "leave out --format"),
            )
        chosen = wishes.format
    else:
        suffix = os.path.splitext(path.rstrip("/"))[1]
        rows = FORMATS.items()
        by_suffix = [name for name, f in rows if suffix and suffix in (f.suffix, *f.also)]
        if not by_suffix and suffix in foreign.SUFFIXES:
            title = foreign.SUFFIXES[suffix].title
            raise UsageError(
                f"-o {shorten(path)}: this version does not write {title} files",
                "write safetensors: -o NAME.safetensors",
            )
        chosen = by_suffix[0] if by_suffix else last.index.format
    row = FORMATS[chosen]
    if path.endswith("/") and row.kind == "file":
        raise UsageError(
            f"-o {shorten(path)}: expected the name of a file, found that of a directory",
            f"-o {shorten(path)}average{row.suffix}, or a folder with --format {_folder(chosen)}",
        )
    if wishes.max_shard_size is not None and row.kind != "folder":
        raise UsageError(
            f"--max-shard-size: {with_article(row.title)} is not written in shards",
            f"write a folder with --format {_folder(chosen)}",
        )
    return chosen


def _folder(chosen: str) -> str:
    """Return the format of folders whose files are like those of a format, or the usual one."""
    torch = chosen.removesuffix("-folder") == "torch"
    return (folders.TORCH if torch else folders.SAFETENSORS).name


def output_names(wishes: Wishes, chosen: str, last: Index) -> str:
    """Return ``shadow`` or ``variable``: the option's word, or what the format's loaders know.

    A TensorFlow checkpoint with an object graph is restored through that graph, which names
    variables only.
    """
    names = wishes.names
    if names == "auto":
        objects = chosen == last.format and naming.OBJECT_GRAPH in last.by_name
        names = "variable" if FORMATS[chosen].plain_names or objects else "shadow"
    if names == "variable" and wishes.keep_variables:
        raise UsageError(
            "--keep-variables: with --names variable the averages stand under these names",
            "use --names shadow",
        )
    return names


def output_path(path: str, chosen: str, step: int | None) -> str:
    """Return the path of an output: a directory of prefixes gets one that tells the step.

    Raises `UsageError` for what would be found as something else.
    """
    row = FORMATS[chosen]
    if row.kind != "prefix" or not path:
        return path
    if path.endswith("/"):
        return f"{path}{row.stem}-{step or 0}"
    prefix = path.removesuffix(row.suffix)
    taken = [f.suffix for f in FORMATS.values() if f.suffix and prefix.endswith(f.suffix)]
    stem = tensorflow.stem_of(os.path.basename(prefix))
    if os.path.basename(prefix) in ("", ".", "..") or taken or stem is not None:
        raise UsageError(
            f"-o {shorten(path)}: expected the prefix of a {row.title}",
            f"-o {os.path.join(os.path.dirname(path) or '.', '')}, or a name such as "
            f"{row.stem}-{step or 0}",
        )
    return prefix


def _is_template(wishes: Wishes, chosen: str, names: str, last: Checkpoint, s: Selection) -> bool:
    unchanged_dtype = wishes.dtype is None or all(t.dtype.name == wishes.dtype for t in s.averaged)
    return (
        chosen == last.index.format
        and names == "variable"
        and not wishes.rules
        and unchanged_dtype
        and wishes.max_shard_size is None
        and not _tied(last.index, s)
        and (wishes.optimizer != "drop" or not s.optimizer)
    )


def is_whole(wishes: Wishes, last: Checkpoint, selection: Selection) -> bool:
    """Whether an output in the last checkpoint's own format would keep its optimizer state."""
    if wishes.optimizer != "auto":
        return wishes.optimizer == "keep"
    chosen = last.index.format
    names = output_names(wishes, chosen, last.index)
    template = _is_template(wishes, chosen, names, last, selection)
    return template or naming.OBJECT_GRAPH in last.index.by_name


def _tied(index: Index, selection: Selection) -> bool:
    """Whether bytes have two names of which one is averaged and the other is not."""
    averaged = {tensor.name for tensor in (*selection.averaged, *selection.replaced)}
    marked = sorted((e, t.name in averaged) for t in index.tensors for e in t.extents if e.nbytes)
    ends = {True: (NO_FILE, 0), False: (NO_FILE, 0)}  # of the bytes that are averaged, or not
    for (file, offset, n_bytes), mine in marked:
        if ends[not mine] > (file, offset):
            return True
        ends[mine] = max(ends[mine], (file, offset + n_bytes))
    return False


def lay_out(
    path: str, last: Checkpoint, selection: Selection, wishes: Wishes, updates: int | None
) -> Layout:
    """Return the layout of the averaged output `path`.

    Args:
        path: with every placeholder replaced.
        last: the checkpoint whose structure and copies are taken.
        selection: what is averaged and copied.
        wishes: the options.
        updates: how many a zero-debiased average saw, or None for other averages.
    """
    naming.check_shadow_name(wishes.name)
    chosen = output_format(path, wishes, last)
    names = output_names(wishes, chosen, last.index)
    draft = None
    if _is_template(wishes, chosen, names, last, selection):
        changed = (*selection.averaged, *selection.replaced)
        draft = FORMATS[chosen].template(last, changed, wishes.unknown)
    template = draft is not None
    # What an object graph names must be there, or tf.train.Checkpoint cannot restore the whole.
    whole = template or (chosen == last.index.format and naming.OBJECT_GRAPH in last.index.by_name)
    keep_optimizer = wishes.optimizer == "keep" or (wishes.optimizer == "auto" and whole)
    entries = _entries(selection, wishes, names, last.index, updates is not None)
    if keep_optimizer:
        entries += _kept(selection.optimizer, wishes)
    if template:  # whose shadows become the average too, so that whoever restores them gets it
        by_name = last.index.by_name
        entries += [_kept_shadow(tensor, wishes.name, by_name) for tensor in selection.replaced]
        entries += _kept(selection.beside, wishes)
    left_out = []
    if not template:
        left_out += [(t.name, "replaced by this average") for t in selection.replaced]
        left_out += [(t.name, "beside the model") for t in selection.beside]
    if not keep_optimizer:
        left_out += [(t.name, "optimizer state") for t in selection.optimizer]
    entries, unsayable = representable(entries, chosen)
    left_out += unsayable
    draft = draft or _fresh(entries, last, chosen, wishes)
    if template:  # what is dropped with an object has no place
        left_out += [
            (e.source, "part of what is dropped") for e in entries if e.name not in draft.places
        ]
        entries = [entry for entry in entries if entry.name in draft.places]
    draft = _with_ties(draft, entries, last.index)
    big_endian = _big_endian(draft, chosen, last)
    files = _with_local_steps(draft, entries, updates, big_endian)
    return Layout(
        output_path(path, chosen, last.step),
        chosen,
        FORMATS[chosen].kind,
        names,
        tuple(entries),
        tuple(files),
        draft.places,
        tuple(left_out),
        last,
        template,
        big_endian,
        draft.sums,
        draft.own,
        draft.notes,
    )


def _big_endian(draft: Draft, chosen: str, last: Checkpoint) -> bool:
    same = chosen == last.index.format and last.index.big_endian
    return same if draft.big_endian is None else draft.big_endian


def _lost(unsayable: Sequence[tuple[str, str]]) -> list[str]:
    """Return a note for the tensors that a format cannot hold, if there are any."""
    if not unsayable:
        return []
    (name, reason), count = unsayable[0], plural(len(unsayable), "tensor")
    return [f"{count} left out, the first is '{shorten(name)}': {reason}"]


def _with_ties(draft: Draft, entries: Sequence[Entry], index: Index) -> Draft:
    """Return the draft with a note where tensors that were stored once are stored apart."""
    names: dict[Extent, list[str]] = defaultdict(list)
    for tensor in index.tensors:
        if tensor.nbytes and not tensor.slices:
            names[tensor.extent].append(tensor.name)
    tied = {name: extent for extent, some in names.items() if len(some) > 1 for name in some}
    places: dict[tuple[Extent, str], set[Extent]] = defaultdict(set)
    for entry in entries:
        if entry.source in tied:
            made = draft.places[entry.name]
            end = entry.name.removeprefix(entry.source)  # a shadow and its variable are two
            places[tied[entry.source], entry.part + end].add(made.extent)
    apart = {extent for (extent, _), some in places.items() if len(some) > 1}
    if not apart:
        return draft
    note = f"{plural(len(apart), 'tied tensor')} of the input: each name is stored apart"
    return draft._replace(notes=(*draft.notes, note))


def _fresh(entries: Sequence[Entry], last: Checkpoint, chosen: str, wishes: Wishes) -> Draft:
    row = FORMATS[chosen]
    naming.check_distinct(((entry.name, entry.source) for entry in entries), row.can_name)
    place = {name: k for k, name in enumerate(last.index.listed)}
    entries = sorted(entries, key=lambda entry: place.get(entry.source, len(place)))
    for entry in entries:
        source = last.index.by_name[entry.source]
        if source.name in last.index.negated:
            raise UnsupportedInput(
                f"{shorten(last.path, 1000)}: tensor '{shorten(source.name)}': what is stored is "
                "its negative, which only a copy of the file's structure can say",
                "save it again as tensor.resolve_neg(), or keep the format and the names",
            )
        if source.nbytes - source.extent.nbytes > EXPANSION_LIMIT and not source.slices:
            raise UnsupportedInput(
                f"{shorten(last.path, 1000)}: tensor '{shorten(source.name)}' shows "
                f"{size(source.extent.nbytes)} as {size(source.nbytes)}, which are not written out",
                f"leave it out, or keep the format and the names; it is the tensor that "
                f"'{shorten(entry.name)}' is made of",
            )
    return row.fresh(entries, last, wishes.max_shard_size)


def lay_out_entries(
    path: str,
    source: Checkpoint,
    entries: Sequence[Entry],
    wishes: Wishes,
    left_out: Iterable[tuple[str, str]],
) -> Layout:
    """Return the layout of a copy of `source` that holds `entries`, all of them copies."""
    naming.check_shadow_name(wishes.name)
    chosen = output_format(path, wishes, source)
    entries, unsayable = representable(entries, chosen)
    row = FORMATS[chosen]
    same = chosen == source.index.format
    if same and row.renamed is not None:
        naming.check_distinct(((entry.name, entry.source) for entry in entries), row.can_name)
        draft = row.renamed(entries, source)
    else:
        draft = _with_ties(_fresh(entries, source, chosen, wishes), entries, source.index)
    return Layout(
        output_path(path, chosen, source.step),
        chosen,
        row.kind,
        wishes.names,
        tuple(entries),
        tuple(draft.files),
        draft.places,
        (*left_out, *unsayable),
        source,
        big_endian=_big_endian(draft, chosen, source),
        sums=draft.sums,
        own=draft.own,
        notes=(*draft.notes, *_lost(unsayable)),
    )


def representable(
    entries: Sequence[Entry], chosen: str
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Return the entries that a format can hold, and (tensor, reason) of those it cannot.

    Raises `UsageError` for an averaged one: an average that is left out is none.
    """
    row = FORMATS[chosen]
    for entry in entries:
        if entry.part != COPY and not row.representable(entry.dtype):
            raise UsageError(
                f"{with_article(row.title)} cannot hold '{shorten(entry.name)}': expected "
                f"another dtype than {entry.dtype}",
                "write the averages wider with --dtype float32, or in another format",
            )
    kept = [entry for entry in entries if row.representable(entry.dtype)]
    lost = [
        (entry.source, f"{with_article(row.title)} cannot hold {entry.dtype}")
        for entry in entries
        if not row.representable(entry.dtype)
    ]
    return kept, lost


def _entries(
    selection: Selection,
    wishes: Wishes,
    names: str,
    index: Index,
    debiased: bool,
) -> list[Entry]:
    rules = naming.compile_rules(wishes.rules)
    made: list[Entry] = []
    scoped = _scoped(selection, index, wishes.name)
    for tensor in selection.averaged:
        shadows = [shadow_of(tensor.name, wishes.name), *scoped.get(tensor.name, ())]
        made.extend(_averaged(tensor, wishes, names, index, shadows, debiased))
    copied = {choice.tensor.name: choice.tensor for choice in selection.copied}
    for name, tensor in copied.items():
        made.append(entry_of(name, tensor, COPY))
        shadow = shadow_of(name, wishes.name)
        trainable = index.roles.get(name) is Role.VARIABLE
        if names == "shadow" and trainable and shadow not in copied:
            # A restore asks for the shadow of every trainable variable, averaged or not.
            made.append(entry_of(shadow, tensor, COPY))
    if not rules:
        return made
    return [entry._replace(name=naming.apply_rules(entry.name, rules)) for entry in made]


def _kept(tensors: Iterable[Tensor], wishes: Wishes) -> list[Entry]:
    """Return the entries of tensors that are copied and belong to no variable."""
    rules = naming.compile_rules(wishes.rules)
    return [entry_of(naming.apply_rules(t.name, rules), t, COPY) for t in tensors]


def _averaged(
    tensor: Tensor, wishes: Wishes, names: str, index: Index, shadows: Sequence[str], debiased: bool
) -> Iterator[Entry]:
    """Yield what an output holds of an averaged tensor, whose shadow has these names."""
    dtype = DTYPES[wishes.dtype] if wishes.dtype else tensor.dtype
    statistics = role_in(index, tensor.name, wishes.name) is Role.STATISTICS
    if names == "variable" or statistics:
        yield entry_of(tensor.name, tensor, AVERAGE, dtype)
    elif wishes.keep_variables:
        yield entry_of(tensor.name, tensor, COPY)
    for shadow in shadows if names == "shadow" else ():
        yield entry_of(shadow, tensor, AVERAGE, dtype)
        if debiased:
            yield entry_of(f"{shadow}/biased", tensor, BIASED, dtype)
            yield Entry(f"{shadow}/local_step", dtype, (), LOCAL_STEP, tensor.name)


def _scoped(selection: Selection, index: Index, name: str) -> dict[str, list[str]]:
    """Return for each variable the names that training gave its shadow within a scope.

    An evaluation that builds its average in that scope asks for them.
    """
    scoped: dict[str, list[str]] = {}
    for shadow in selection.replaced:
        variable = naming.variable_behind(shadow, name, index.by_name)
        if variable is not None and shadow.name != shadow_of(variable, name):
            scoped.setdefault(variable, []).append(shadow.name)
    return scoped


def _kept_shadow(shadow: Tensor, name: str, saved: Mapping[str, Tensor]) -> Entry:
    """Return what a template makes of a shadow: the average, if it is one of its variable."""
    variable = naming.variable_behind(shadow, name, saved)
    if variable is None or saved[variable].shape != shadow.shape or not shadow.dtype.averaged:
        return entry_of(shadow.name, shadow, COPY)
    return entry_of(shadow.name, shadow, AVERAGE)._replace(source=variable)


def _with_local_steps(
    draft: Draft, entries: Sequence[Entry], updates: int | None, big_endian: bool
) -> list[File]:
    """Return the files with TensorFlow's update counters, which are known in advance."""
    if updates is None:
        return list(draft.files)
    counters: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
    for entry in entries:
        if entry.part == LOCAL_STEP:
            ordinal, offset, _ = draft.places[entry.name].extent
            dtype = numpy_dtype(entry.dtype.name)
            value = dtype.type(schedules.local_step(updates, dtype)).tobytes()
            counters[ordinal].append((offset, value[::-1] if big_endian else value))
    return [
        file._replace(literals=(*file.literals, *counters[ordinal]))
        for ordinal, file in enumerate(draft.files)
    ]
