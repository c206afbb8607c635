"""A run once more, from the provenance of its output: its inputs, selection and averages.

What the document says is hostile until checked; so is what lies where its inputs were.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ema_cli import asked, files, formats, machine, provenance, replay
from ema_cli import plan as planning
from ema_cli.averages import Weights
from ema_cli.errors import DamagedFile, InputChanged, InputError, UsageError
from ema_cli.formats import FORMATS, Known, tensorflow
from ema_cli.layout import Wishes
from ema_cli.plan import Plan, Request
from ema_cli.runs import Run
from ema_cli.tensors import Checkpoint
from ema_cli.text import plural, shorten

# What a provenance decides, by the keywords of `average_run`: given beside it, they are an error.
DECIDED = (
    *("runs", "glob", "last", "steps", "step_from", "order", "key", "average", "decay"),
    *("num_updates", "init", "zero_debias", "select", "statistics", "shadow_dtype", "like"),
    *("non_finite", "name", "state"),
)
# What it only suggests.
SUGGESTED = (
    *("names", "keep_variables", "rule", "dtype", "format", "max_shard_size", "optimizer"),
    "unknown",
)
_LIMIT = 256 << 20
_LARGEST = 1 << 63
_KINDS: dict[str, type] = {"path": str, "bytes": int, "mtime_ns": int, "header": str}


@dataclass(frozen=True, slots=True)
class _Recorded:
    """An input as a provenance tells of it: its files by their names."""

    path: str
    step: int
    files: Mapping[str, Mapping[str, Any]]


def plan_again(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    **look: Any,
) -> Plan:
    """Return the plan that made the output whose provenance lies at `path`, for another output.

    `look` are keywords of `SUGGESTED`, which come before what is recorded. Raises `InputError`
    when the document is damaged or tells no request, or when an input is gone or changed.
    """
    asked.check_workers(workers)
    where = _document_at(os.fspath(path))
    document = _read(where)
    if "renamed" in document:
        raise InputError(
            f"{shorten(where, 1000)}: expected the provenance of an average, found that of a "
            "renamed copy",
            "give the .ema.json of what ema-avg run, watch or export wrote",
        )
    request = replay.request_of(document, (), where)
    if request is None:
        raise InputError(
            f"{shorten(where, 1000)}: it does not tell what was asked for: an earlier version "
            "wrote it",
            "name the checkpoints it lists, and their average: ema-avg run RUN -o NEW",
        )
    output = None if output is None else os.fspath(output)
    wishes = asked.wishes_over(request.wishes, **look)
    if look.get("format") is None:
        wishes = dataclasses.replace(
            wishes, format=_format(request.wishes, document, where, output)
        )
    run = _run(document, where, request)
    request = dataclasses.replace(
        request,
        paths=tuple(checkpoint.path for checkpoint in run.checkpoints),
        output=output,
        wishes=wishes,
        workers=workers or machine.default_workers(),
    )
    return planning.make(request, run)


def _document_at(path: str) -> str:
    """Return where the document lies that `path` names, or that lies beside the output `path`."""
    if path.endswith(provenance.SUFFIX):
        return path
    beside = provenance.path_for(path)
    if not os.path.lexists(beside):
        raise InputError(
            f"--from {shorten(path, 1000)}: expected an OUT.ema.json, or an output beside which "
            "one lies, found neither",
            "give the OUT.ema.json that ema-avg wrote beside its output",
        )
    return beside


def _read(where: str) -> Mapping[str, Any]:
    try:
        document = json.loads(files.read_small(where, _LIMIT))
    except (ValueError, RecursionError):
        raise DamagedFile(where, "no provenance: it is not JSON") from None
    if not isinstance(document, dict) or document.get("schema") != provenance.SCHEMA:
        raise DamagedFile(where, f"no provenance: expected an object of schema {provenance.SCHEMA}")
    return document


# ---------------------------------------------------------------------------- format


def _format(
    recorded: Wishes, document: Mapping[str, Any], where: str, output: str | None
) -> str | None:
    """Return the format to ask for: what the suffix tells counts, then what there was."""
    described = document.get("output")
    described = described if isinstance(described, dict) else {}
    there, made = described.get("format"), described.get("path")
    if type(there) is not str or there not in FORMATS or type(made) is not str:
        raise DamagedFile(where, "output: expected a format and a path")
    told = _told(output or made)
    if recorded.format is not None:
        return recorded.format if not told or recorded.format in told else None
    return None if told or not _told(made) else there


def _told(path: str) -> list[str]:
    """Return the formats that the suffix of an output tells."""
    suffix = os.path.splitext(path.rstrip("/"))[1]
    return [name for name, f in FORMATS.items() if suffix and suffix in (f.suffix, *f.also)]


# ---------------------------------------------------------------------------- inputs


def _run(document: Mapping[str, Any], where: str, request: Request) -> Run:
    """Return the recorded checkpoints, unchanged, in their order and under their steps."""
    known: Known = {}
    beside = os.path.dirname(where)
    named = _names(request)
    checkpoints, touched = [], 0
    for row in _recorded(document, where):
        path = _found(row.path, beside)
        read = formats.read(path, known, request.choice.key or "")
        touched += _check(row, read, where)
        within = next((name for name in named if f"/{row.path}".endswith(f"/{name}")), "")
        checkpoints.append(dataclasses.replace(read, step=row.step, within=within))
    notes = [note for checkpoint in checkpoints for note in checkpoint.notes]
    if touched:
        notes.append(
            f"{plural(touched, 'checkpoint')} of another time than recorded: copied since, or "
            "with other values under the same header"
        )
    return Run(tuple(checkpoints), notes=tuple(dict.fromkeys(notes)))


def _names(request: Request) -> list[str]:
    """Return the paths within a run by which a table of weights knows its checkpoints."""
    tables = (a.family.table for a in request.averages if isinstance(a.family, Weights))
    return [key for table in tables for key, _ in table if "/" in key]


def _recorded(document: Mapping[str, Any], where: str) -> Iterator[_Recorded]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise DamagedFile(where, "inputs: expected a list of checkpoints")
    seen: set[int] = set()
    for row in inputs:
        if not isinstance(row, dict) or not _is_input(row) or row["step"] in seen:
            raise DamagedFile(
                where, "inputs: expected checkpoints with paths, different steps and files"
            )
        if not row["path"]:
            raise InputError(
                f"{shorten(where, 1000)}: it was made of values in memory, not of checkpoints",
                "only what was averaged from checkpoints can be averaged again",
            )
        seen.add(row["step"])
        files_of = {_last(file["path"]): file for file in row["files"]}
        yield _Recorded(row["path"], row["step"], files_of)


def _is_input(row: Mapping[str, Any]) -> bool:
    path, step, rows = row.get("path"), row.get("step"), row.get("files")
    good = type(path) is str and "\0" not in path and type(step) is int and abs(step) < _LARGEST
    return good and isinstance(rows, list) and all(map(_is_file, rows))


def _is_file(row: object) -> bool:
    if not isinstance(row, dict) or any(type(row.get(k)) is not t for k, t in _KINDS.items()):
        return False
    return bool(max(abs(row["bytes"]), abs(row["mtime_ns"])) < _LARGEST)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _found(path: str, beside: str) -> str:
    """Return where an input is: where it was, or beside the output."""
    for candidate in (path, os.path.join(beside, _last(path))):
        if os.path.lexists(candidate) or tensorflow.prefix_of(candidate) is not None:
            return candidate
    relative = not os.path.isabs(path)
    raise InputError(
        f"{shorten(path, 1000)}: no such checkpoint, though the output was made of it",
        "bring it back"
        + (", or run this in the directory where the output was made" if relative else "")
        + ", or put all of them beside the output",
    )


def _check(row: _Recorded, found: Checkpoint, where: str) -> bool:
    """Raise `InputChanged` for a checkpoint of other files; returns whether their times differ."""
    touched = False
    there = zip(found.files, found.digests, strict=True)
    now = {_last(stamp.path): (stamp, digest) for stamp, digest in there if stamp.path}
    if set(now) != set(row.files):
        names = sorted(set(now) ^ set(row.files))
        raise _changed(found.path, where, f"expected the files it had, found another '{names[0]}'")
    for name, (stamp, digest) in now.items():
        file = row.files[name]
        if stamp.size != file["bytes"]:
            found_size = f"expected {file['bytes']:,} bytes, found {stamp.size:,}"
            raise _changed(stamp.path, where, found_size)
        if digest != file["header"]:
            raise _changed(stamp.path, where, "expected the header it had, found another")
        touched |= stamp.mtime_ns != file["mtime_ns"]
    return touched


def _changed(path: str, where: str, what: str) -> InputChanged:
    return InputChanged(
        f"{shorten(path, 1000)}: changed since {shorten(where, 1000)} was written: {what}",
        "bring back the file it was, or average what is there now: ema-avg run RUN -o NEW",
    )


def check_alone(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a keyword that a provenance decides already."""
    for keyword in DECIDED:
        value, plain = given[keyword], defaults.get(keyword, ())
        if value != plain and not (keyword == "runs" and not value):
            raise decided(keyword)


def decided(option: str) -> UsageError:
    """Return the error for an option given beside a provenance that decides it."""
    return UsageError(
        f"--from: {option} beside it, which the provenance decides",
        "leave out one of the two: --from takes inputs, selection and averages from OUT.ema.json",
    )
