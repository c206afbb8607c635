"""Plans an output once more: from the request and the sources that its provenance records.

What the plan knows in advance, names and headers, is compared here; the rest by `comparing`.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ema_cli import plan as planning
from ema_cli import record, replay, spilling
from ema_cli.blueprint import COPY, File, Layout, entry_of
from ema_cli.errors import DamagedFile, Disagreement, InputError, NothingToAverage, UsageError
from ema_cli.files import read_at
from ema_cli.formats import FORMATS, read, tensorflow
from ema_cli.ranges import Copy, Destination
from ema_cli.tensors import NO_FILE, Checkpoint, Stamp, Tensor
from ema_cli.text import shorten
from ema_cli.verification.claims import DamagedOutput, Output
from ema_cli.version import __version__
from ema_cli.work import Manner, Work, prepare

# What ends a plan that is made again: the sources are not what they were.
_UNUSABLE = (InputError, Disagreement, UsageError, NothingToAverage)
_ALL = 1 << 63


class NotRecomputed(Exception):
    """An output cannot be made again; the argument says why, in one clause."""


@dataclass(frozen=True, eq=False)
class Again:
    """What would write the output, once more.

    Attributes:
        work: what would be computed.
        layout: where it would go.
        outputs: the files that are there, in the order of the layout's.
        made_by: the version of this program that made them, when it was another.
    """

    work: Work
    layout: Layout
    outputs: tuple[Stamp, ...]
    made_by: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that are read to recompute all of it: of the sources, and of the output."""
        return self.work.read + self.layout.nbytes


def again(output: Output, key: str, workers: int) -> Again:
    """Return what would write `output` again. Raises `NotRecomputed` when nothing can.

    `key` is where the model is inside the source of a renamed copy.
    """
    document = output.document
    if document is None:
        raise NotRecomputed(f"{shorten(output.provenance, 1000)}: no such file")
    try:
        if "renamed" in document:
            return _renamed(output, document, key, workers)
        return _averaged(output, document, workers)
    except _UNUSABLE as error:
        mine = isinstance(error, DamagedOutput) or error.args[0] == output.provenance
        if mine:
            raise
        raise NotRecomputed(error.message) from error


# ---------------------------------------------------------------------------- averages


def _averaged(output: Output, document: Mapping[str, Any], workers: int) -> Again:
    where = output.provenance
    request = replay.request_of(document, _sources(output, document), where)
    if request is None:
        raise NotRecomputed(f"{shorten(where, 1000)} does not tell what was asked for")
    wishes = dataclasses.replace(request.wishes, format=output.checkpoint.index.format)
    plan = planning.make(dataclasses.replace(request, wishes=wishes, workers=workers))
    [outcome] = plan.outcomes
    found = record.describe(plan, outcome)
    if record.plan_digest(found, outcome) != document.get("plan"):
        raise NotRecomputed(_changed(document, found))
    layout = outcome.layout
    if [file.name for file in layout.files] != [claim.name for claim in output.claims]:
        raise DamagedFile(where, "the files it tells of are not those of its plan")
    sealed, made_by = _sealed(layout), _made_by(document)
    try:
        _check_index(output, layout)
        _check_literals(layout, output.files, sealed)
    except DamagedOutput as error:
        if made_by:
            raise NotRecomputed(f"version {made_by} made it otherwise: {error.message}") from error
        raise
    copies = tuple(part for copy in plan.work.copies for part in _outside(copy, sealed))
    work = dataclasses.replace(plan.work, copies=copies)
    return Again(work, layout, output.files, made_by)


def _made_by(document: Mapping[str, Any]) -> str:
    """Return the version that made an output, or an empty string when it was this one."""
    tool = document.get("tool")
    version = tool.get("ema-avg") if isinstance(tool, dict) else None
    if version == __version__:
        return ""
    return shorten(version, 60) if isinstance(version, str) else "unknown"


def _sources(output: Output, document: Mapping[str, Any]) -> list[str]:
    """Return the paths of the inputs that an output was made of: as recorded, or beside it."""
    rows = document.get("inputs")
    beside, paths = os.path.dirname(output.path), []
    for row in _list(rows) or [None]:
        path = row.get("path") if isinstance(row, dict) else None
        if path == "":
            raise NotRecomputed("it was made of values in memory, not of checkpoints")
        if not isinstance(path, str) or "\0" in path:
            raise DamagedFile(output.provenance, "inputs: expected the paths of checkpoints")
        paths.append(_found(path, beside))
    return paths


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _found(path: str, beside: str) -> str:
    near = os.path.join(beside, os.path.basename(path.rstrip("/")))
    for candidate in (path, near):
        if os.path.lexists(candidate) or tensorflow.prefix_of(candidate) is not None:
            return candidate
    raise NotRecomputed(f"{shorten(path, 1000)}: no such file")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return why two plans differ, in one clause about the first input that is another."""
    old, new = (_list(document.get("inputs")) for document in (before, now))
    for was, row in zip(old, new, strict=False):
        shown = shorten(row["path"], 1000)
        files = zip(_list(was.get("files")), row["files"], strict=False)
        for mine, file in ((mine, file) for mine, file in files if isinstance(mine, dict)):
            for field, word in (("bytes", "size"), ("header", "header"), ("mtime_ns", "time")):
                if mine.get(field) != file[field]:
                    where = shorten(file["path"], 1000) or shown
                    return f"{where}: changed since: its {word} is not the one recorded"
        for field in ("step", "weight", "coefficient"):
            if was.get(field) != row[field]:
                return f"{shown}: its {field} is {row[field]}, not the one recorded"
    return "what is recorded does not lead to the plan that made this output"


def _sealed(layout: Layout) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return for each file the stretches that its seal writes; their checksums prove them."""
    seal = FORMATS[layout.format].seal
    found: list[list[tuple[int, int]]] = [[] for _ in layout.files]
    for patch in seal(layout, dict.fromkeys(layout.sums, 0)) if seal is not None else ():
        end = _ALL if patch.whole else patch.offset + len(patch.data)
        found[patch.file].append((patch.offset, end))
    return tuple(tuple(sorted(stretches)) for stretches in found)


def _check_index(output: Output, layout: Layout) -> None:
    """Raise unless the output's own headers say that its tensors are where the layout has them."""
    ordinals = {os.path.realpath(stamp.path): k for k, stamp in enumerate(output.files)}
    files = [
        ordinals[os.path.realpath(stamp.path)] if stamp.path else k  # what is compressed
        for k, stamp in enumerate(output.checkpoint.files)
    ]
    expected = {entry.name: layout.places[entry.name] for entry in layout.entries}
    for tensor in output.checkpoint.index.tensors:
        if _moved(tensor, files) != expected.pop(tensor.name, None):
            raise _elsewhere(output, tensor.name)
    if expected:
        raise _elsewhere(output, min(expected))


def _moved(tensor: Tensor, files: Sequence[int]) -> Tensor:
    """Return a tensor with other ordinals of its files."""

    def there(file: int) -> int:
        return NO_FILE if file == NO_FILE else files[file]

    slices = tuple(
        piece._replace(extent=piece.extent._replace(file=there(piece.extent.file)))
        for piece in tensor.slices
    )
    extent = tensor.extent._replace(file=there(tensor.extent.file))
    return tensor._replace(extent=extent, slices=slices)


def _elsewhere(output: Output, name: str) -> DamagedOutput:
    return DamagedOutput(
        output.path, "its headers tell something else of it than the plan that made them", name
    )


def _check_literals(
    layout: Layout, outputs: Sequence[Stamp], sealed: Sequence[Sequence[tuple[int, int]]]
) -> None:
    """Raise unless the bytes that were known in advance are there: headers, counters."""
    for file, stamp, holes in zip(layout.files, outputs, sealed, strict=True):
        for offset, data in file.literals:
            last = offset + len(data)
            for start, end in _left(offset, last, _overlapping(offset, last, holes)):
                if read_at(stamp.path, start, end - start) != data[start - offset : end - offset]:
                    reason = f"bytes {start:,} to {end:,} are not those that its plan gives"
                    raise DamagedOutput(stamp.path, reason)


def _outside(copy: Copy, sealed: Sequence[Sequence[tuple[int, int]]]) -> Iterator[Copy]:
    """Yield the parts of a copy that the seal leaves as they were."""
    holes = []
    for target in copy.targets:
        if target.grid is None and copy.place.grid is None:
            first, end = target.offset, target.offset + copy.nbytes
            inside = _overlapping(first, end, sealed[target.file])
            holes += [(start - first, stop - first) for start, stop in inside]
    for start, end in _left(0, copy.nbytes, sorted(holes)):
        yield Copy(
            end - start,
            copy.place._replace(offset=copy.place.offset + start, unit=None),
            tuple(t._replace(offset=t.offset + start) for t in copy.targets),
        )


def _overlapping(
    first: int, end: int, stretches: Sequence[tuple[int, int]]
) -> Sequence[tuple[int, int]]:
    """Return those of some stretches, which are in order, that hold any of the bytes."""
    low = bisect.bisect_right(stretches, first, key=lambda stretch: stretch[1])
    high = bisect.bisect_left(stretches, end, key=lambda stretch: stretch[0])
    return stretches[low:high]


def _left(first: int, end: int, holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what is left of the bytes from `first` to `end` without the holes."""
    at = first
    for start, stop in [*holes, (end, end)]:
        if at < start:
            yield at, start
        at = max(at, stop)


# ---------------------------------------------------------------------------- renamed copies


def _renamed(output: Output, document: Mapping[str, Any], key: str, workers: int) -> Again:
    """Return what copies the tensors of a renamed copy from its source once more."""
    [path, *_] = _sources(output, document)
    source = read(path, {}, key)
    _check_source(document, source)
    back = _former_names(output, document)
    checkpoint = output.checkpoint
    entries = []
    for tensor in checkpoint.index.tensors:
        original = source.index.by_name.get(back.get(tensor.name, tensor.name))
        if original is None or (original.dtype, original.shape) != (tensor.dtype, tensor.shape):
            raise _elsewhere(output, tensor.name)
        if spilling.is_spilled(checkpoint, tensor):
            raise NotRecomputed(f"tensor '{shorten(tensor.name)}' is compressed in the copy")
        entries.append(entry_of(tensor.name, original, COPY))
    row = FORMATS[checkpoint.index.format]
    layout = Layout(
        output.path,
        checkpoint.index.format,
        row.kind,
        "variable",
        tuple(entries),
        tuple(File("", stamp.size) for stamp in checkpoint.files),
        checkpoint.index.by_name,
        (),
        source,
        big_endian=checkpoint.index.big_endian,
    )
    work = prepare([source], (), (), [Destination(layout, 0, 0)], Manner(workers=workers))
    copies = tuple(copy._replace(place=copy.place._replace(unit=None)) for copy in work.copies)
    work = dataclasses.replace(work, copies=copies)
    return Again(work, layout, checkpoint.files)


def _former_names(output: Output, document: Mapping[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for row in _list(document["renamed"]):
        old, new = (row.get("from"), row.get("to")) if isinstance(row, dict) else (None, None)
        if not isinstance(old, str) or not isinstance(new, str):
            raise DamagedFile(output.provenance, "renamed: expected pairs of names")
        names[new] = old
    return names


def _check_source(document: Mapping[str, Any], source: Checkpoint) -> None:
    """Raise `NotRecomputed` when the source of a copy is another by name, size or time."""
    files = document["inputs"][0].get("files")
    recorded = [
        (row["path"].rpartition("/")[2], row.get("bytes"), row.get("mtime_ns"))
        for row in _list(files)
        if isinstance(row, dict) and isinstance(row.get("path"), str)
    ]
    for stamp in source.files:
        if (stamp.path.rpartition("/")[2], stamp.size, stamp.mtime_ns) not in recorded:
            raise NotRecomputed(
                f"{shorten(stamp.path or source.path, 1000)}: changed since: its size or time is "
                "not the one recorded"
            )
