"""What an output will hold and where: names, dtypes, files, headers, every byte placed in advance.

Two layouts. *Template*: a copy of the last checkpoint's structure in which only the bytes of the
averaged tensors are replaced. *Fresh*: tensors under new names, when names, dtypes, the selection
or the format change.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ema_cli import naming, schedules
from ema_cli.errors import UsageError
from ema_cli.files import open_input
from ema_cli.formats import FORMATS, foreign, safetensors, sharded
from ema_cli.naming import Role, role_of, shadow_of
from ema_cli.selection import Selection
from ema_cli.tensors import DTYPES, Checkpoint, DType, Extent, Index, Tensor, numpy_dtype
from ema_cli.text import shorten

NAMES = ("auto", "shadow", "variable")
OPTIMIZER = ("auto", "keep", "drop")
DEFAULT_SHARD_SIZE = 5 * 10**9

# What a tensor of the output is made of.
AVERAGE = "average"
COPY = "copy"
BIASED = "biased"
LOCAL_STEP = "local_step"


class Entry(NamedTuple):
    """One tensor of an output: `part` of the input tensor `source`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    part: str
    source: str


class File(NamedTuple):
    """One file of an output.

    Attributes:
        name: inside the output folder; empty for a single file.
        nbytes: its final size.
        literals: (offset, bytes) known in advance: headers, indexes, scalars.
        copy_of: the side file it is a copy of, or empty.
    """

    name: str
    nbytes: int
    literals: tuple[tuple[int, bytes], ...] = ()
    copy_of: str = ""


@dataclass(frozen=True, eq=False)
class Layout:
    """An output before it exists.

    Attributes:
        path: where it will be published.
        format: a key of `ema_cli.formats.FORMATS`.
        names: ``shadow`` or ``variable``.
        entries: its tensors.
        files: its files, in the order of `Extent.file`.
        places: where each entry's bytes go.
        left_out: input tensors that are not in the output, with the reason.
        like: the index whose structure a template copies; None for a fresh layout.
    """

    path: str
    format: str
    names: str
    entries: tuple[Entry, ...]
    files: tuple[File, ...]
    places: Mapping[str, Extent]
    left_out: tuple[tuple[str, str], ...]
    like: Index | None = None

    @property
    def template(self) -> bool:
        """Whether it is a copy of the last checkpoint's structure."""
        return self.like is not None

    @property
    def folder(self) -> bool:
        """Whether the output is a folder."""
        return FORMATS[self.format].folder

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


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


# ---------------------------------------------------------------------------- format and names


def output_format(path: str, wishes: Wishes, last: Checkpoint) -> str:
    """Return the format the option, the suffix or the input decides. Raises `UsageError`."""
    if wishes.format is not None:
        if wishes.format not in FORMATS:
            raise UsageError(
                f"--format: expected one of {', '.join(FORMATS)}, found '{shorten(wishes.format)}'"
            )
        chosen = wishes.format
    else:
        suffix = os.path.splitext(path.rstrip("/"))[1]
        by_suffix = [name for name, f in FORMATS.items() if f.suffix and f.suffix == suffix]
        if not by_suffix and suffix in foreign.SUFFIXES and suffix not in (".ckpt", ".bin"):
            title = foreign.SUFFIXES[suffix].title
            raise UsageError(
                f"-o {shorten(path)}: this version does not write {title} files",
                "write safetensors: -o NAME.safetensors",
            )
        chosen = by_suffix[0] if by_suffix else last.index.format
    if path.endswith("/") and not FORMATS[chosen].folder:
        raise UsageError(
            f"-o {shorten(path)}: expected the name of a file, found that of a directory",
            f"-o {shorten(path)}average.safetensors, or a folder with --format {sharded.NAME}",
        )
    if wishes.max_shard_size is not None and not FORMATS[chosen].folder:
        raise UsageError(
            "--max-shard-size: a single file has no shards",
            f"write a folder with --format {sharded.NAME}",
        )
    return chosen


def output_names(wishes: Wishes, chosen: str) -> str:
    """Return ``shadow`` or ``variable``: the option's word, or what the format's loaders know."""
    names = wishes.names
    if names == "auto":
        names = "variable" if FORMATS[chosen].folder else "shadow"
    if names == "variable" and wishes.keep_variables:
        raise UsageError(
            "--keep-variables: with --names variable the averages stand under these names",
            "use --names shadow",
        )
    return names


def _is_template(wishes: Wishes, chosen: str, names: str, last: Checkpoint, s: Selection) -> bool:
    unchanged_dtype = wishes.dtype is None or all(t.dtype.name == wishes.dtype for t in s.averaged)
    return (
        chosen == last.index.format
        and names == "variable"
        and not wishes.rules
        and unchanged_dtype
        and wishes.max_shard_size is None
        and not s.replaced
        and (wishes.optimizer != "drop" or not s.optimizer)
    )


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
    names = output_names(wishes, chosen)
    template = _is_template(wishes, chosen, names, last, selection)
    keep_optimizer = wishes.optimizer == "keep" or (wishes.optimizer == "auto" and template)
    entries = _entries(selection, wishes, names, keep_optimizer, updates is not None)
    left_out = [(t.name, "replaced by this average") for t in selection.replaced]
    if not keep_optimizer:
        left_out += [(t.name, "optimizer state") for t in selection.optimizer]
    naming.check_distinct((entry.name, entry.source) for entry in entries)
    if template:
        files, places = _template_files(last), {t.name: t.extent for t in last.index.tensors}
    else:
        files, places = _fresh_files(entries, last, chosen, wishes)
    files = _with_local_steps(files, places, entries, updates) + _side_files(last, chosen)
    return Layout(
        path,
        chosen,
        names,
        tuple(entries),
        tuple(files),
        places,
        tuple(left_out),
        last.index if template else None,
    )


def lay_out_entries(
    path: str, source: Checkpoint, entries: Sequence[Entry], wishes: Wishes
) -> Layout:
    """Return the fresh layout of a copy of `source` that holds `entries`."""
    naming.check_shadow_name(wishes.name)
    chosen = output_format(path, wishes, source)
    files, places = _fresh_files(entries, source, chosen, wishes)
    files += _side_files(source, chosen)
    return Layout(path, chosen, wishes.names, tuple(entries), tuple(files), places, ())


def _entries(
    selection: Selection, wishes: Wishes, names: str, keep_optimizer: bool, debiased: bool
) -> list[Entry]:
    rules = naming.compile_rules(wishes.rules)
    entries: list[Entry] = []

    def add(name: str, tensor: Tensor, part: str, dtype: DType, shape: tuple[int, ...]) -> None:
        entries.append(Entry(naming.apply_rules(name, rules), dtype, shape, part, tensor.name))

    for tensor in selection.averaged:
        dtype = DTYPES[wishes.dtype] if wishes.dtype else tensor.dtype
        shadow = shadow_of(tensor.name, wishes.name)
        statistics = role_of(tensor.name, wishes.name) is Role.STATISTICS
        if names == "variable" or statistics:
            add(tensor.name, tensor, AVERAGE, dtype, tensor.shape)
        elif wishes.keep_variables:
            add(tensor.name, tensor, COPY, tensor.dtype, tensor.shape)
        if names == "shadow":
            add(shadow, tensor, AVERAGE, dtype, tensor.shape)
            if debiased:
                add(f"{shadow}/biased", tensor, BIASED, dtype, tensor.shape)
                add(f"{shadow}/local_step", tensor, LOCAL_STEP, dtype, ())
    for tensor in [choice.tensor for choice in selection.copied]:
        add(tensor.name, tensor, COPY, tensor.dtype, tensor.shape)
    for tensor in selection.optimizer if keep_optimizer else ():
        add(tensor.name, tensor, COPY, tensor.dtype, tensor.shape)
    return entries


# ---------------------------------------------------------------------------- files


def _template_files(last: Checkpoint) -> list[File]:
    """Return the files of the last checkpoint with their headers, byte for byte."""
    files = []
    for name, stamp in zip(last.index.names, last.files, strict=True):
        fd = open_input(stamp.path)
        try:
            raw = safetensors.read_raw_header(fd, stamp)
        finally:
            os.close(fd)
        head = len(raw).to_bytes(8, "little") + bytes(raw)
        files.append(File(name, stamp.size, ((0, head),)))
    if last.index_file:
        name = os.path.basename(last.index_file)
        files.append(File(name, os.path.getsize(last.index_file), copy_of=last.index_file))
    return files


def _fresh_files(
    entries: Sequence[Entry], last: Checkpoint, chosen: str, wishes: Wishes
) -> tuple[list[File], dict[str, Extent]]:
    if not FORMATS[chosen].folder:
        shards = [list(entries)]
        names = [""]
    else:
        shards = _shards(entries, wishes.max_shard_size or DEFAULT_SHARD_SIZE)
        names = _shard_names(_stem(last), len(shards))
    files: list[File] = []
    places: dict[str, Extent] = {}
    for ordinal, (name, shard) in enumerate(zip(names, shards, strict=True)):
        shard.sort(key=lambda entry: safetensors.writing_order(entry.dtype.name, entry.name))
        head, extents = safetensors.encode_header(
            [(entry.name, entry.dtype, entry.shape) for entry in shard], last.index.metadata
        )
        for entry, extent in zip(shard, extents, strict=True):
            places[entry.name] = Extent(ordinal, extent.offset, extent.nbytes)
        end = len(head) + sum(extent.nbytes for extent in extents)
        files.append(File(name, end, ((0, head),)))
    if len(files) > 1:
        weight_map = {name: names[extent.file] for name, extent in places.items()}
        total = sum(extent.nbytes for extent in places.values())
        text = sharded.encode_index(weight_map, total)
        files.append(File(_stem(last) + sharded.INDEX_SUFFIX, len(text), ((0, text),)))
    return files, places


def _stem(last: Checkpoint) -> str:
    """Return ``model`` of ``model-00001-of-00002.safetensors``: loaders look for that name."""
    if last.index.format != sharded.NAME:
        return sharded.DEFAULT_STEM
    stem = last.index.names[0].removesuffix(safetensors.SUFFIX)
    return re.sub(r"-\d+-of-\d+$", "", stem)


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Fill shards of at most `limit` bytes in the order of the input; one tensor may be more."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        nbytes = _nbytes(entry)
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += nbytes
    return shards


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.bits // 8


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [stem + safetensors.SUFFIX]
    return [f"{stem}-{k:05}-of-{count:05}{safetensors.SUFFIX}" for k in range(1, count + 1)]


def _with_local_steps(
    files: list[File],
    places: Mapping[str, Extent],
    entries: Sequence[Entry],
    updates: int | None,
) -> list[File]:
    """Return the files with TensorFlow's update counters, which are known in advance."""
    if updates is None:
        return files
    counters: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
    for entry in entries:
        if entry.part == LOCAL_STEP:
            ordinal, offset, _ = places[entry.name]
            dtype = numpy_dtype(entry.dtype.name)
            value = dtype.type(schedules.local_step(updates, dtype)).tobytes()
            counters[ordinal].append((offset, value))
    return [
        file._replace(literals=(*file.literals, *counters[ordinal]))
        for ordinal, file in enumerate(files)
    ]


def _side_files(last: Checkpoint, chosen: str) -> list[File]:
    """Return the config and tokenizer files that make a Hugging Face folder load."""
    if not FORMATS[chosen].folder or last.index.format != sharded.NAME:
        return []
    folder = last.path if os.path.isdir(last.path) else os.path.dirname(last.path)
    paths = [(name, os.path.join(folder, name)) for name in sharded.side_files(folder)]
    return [File(name, os.path.getsize(path), copy_of=path) for name, path in paths]
