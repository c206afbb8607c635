"""Hugging Face folders: one file of weights, or shards with an index, ``*.index.json``.

The index is ``{"metadata": {"total_size": bytes}, "weight_map": {tensor: shard file}}``. Shards
may be symbolic links, as they are in hub caches; their names must be bare file names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ema_cli.blueprint import Draft, Entry, File, Layout, Patch
from ema_cli.errors import DamagedFile, InputError
from ema_cli.files import read_small
from ema_cli.formats.known import Known
from ema_cli.formats.scanning import Repeated, unique
from ema_cli.formats.sidefiles import copied_side_files
from ema_cli.hints import PERMISSION
from ema_cli.tensors import Checkpoint, Extent, Index, Tensor
from ema_cli.text import shorten

DEFAULT_SHARD_SIZE = 5 * 10**9
INDEX_LIMIT = 64 << 20


class Part(NamedTuple):
    """The format of the files in a folder: the functions of its row in the table of formats."""

    read: Callable[[str, Known, str], Checkpoint]
    template: Callable[[Checkpoint, Sequence[Tensor], str], Draft | None]
    fresh: Callable[[Sequence[Entry], Checkpoint, int | None], Draft]
    seal: Callable[[Layout, Mapping[Extent, int]], Sequence[Patch]] | None = None


@dataclasses.dataclass(frozen=True)
class Shards:
    """Folders whose weights are files of one format.

    Attributes:
        name: of the format of such folders.
        suffix: of a file of weights.
        stem: what the files of weights are called.
        part: the format of a file.
        beside: first words of names that hold no weights.
    """

    name: str
    suffix: str
    stem: str
    part: Part
    beside: tuple[str, ...] = ()

    @property
    def index_suffix(self) -> str:
        """How the name of an index ends."""
        return self.suffix + ".index.json"

    # ------------------------------------------------------------------ looking

    def contents(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the (index files, weights files) of `folder`, each sorted by name."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise InputError(
                f"{shorten(folder, 1000)}: cannot list: {reason}", PERMISSION
            ) from error
        visible = [name for name in names if not name.startswith((".", *self.beside))]
        indexes = [name for name in visible if name.endswith(self.index_suffix)]
        return indexes, [name for name in visible if name.endswith(self.suffix)]

    def is_checkpoint(self, folder: str) -> bool:
        """Whether `folder` has an index or exactly one weights file."""
        indexes, weights = self.contents(folder)
        return bool(indexes) or len(weights) == 1

    # ------------------------------------------------------------------ reading

    def read(self, path: str, known: Known, key: str = "") -> Checkpoint:
        """Return the checkpoint in a folder, or behind an index file given by its own path."""
        if path.endswith(self.index_suffix):
            folder, index_name = os.path.split(path)
            return self._read_sharded(path, folder, index_name, known, key)
        indexes, weights = self.contents(path)
        single = [name for name in weights if name + ".index.json" in indexes]
        if single or (not indexes and len(weights) == 1):
            return self._assemble(path, path, [(single or weights)[0]], known, key)
        if len(indexes) == 1:
            return self._read_sharded(path, path, indexes[0], known, key)
        found = f"{len(indexes)} indexes and {len(weights)} weights files"
        raise InputError(
            f"{shorten(path, 1000)}: expected one index or one weights file, found {found}",
            "name the index file itself" if indexes else "name one of the files",
        )

    def _read_sharded(
        self, path: str, folder: str, index_name: str, known: Known, key: str
    ) -> Checkpoint:
        index_path = os.path.join(folder, index_name)
        weight_map, total_size = self._weight_map(index_path)
        shards = sorted(set(weight_map.values()))
        checkpoint = self._assemble(path, folder, shards, known, key)
        _check_weight_map(index_path, weight_map, checkpoint.index)
        notes: tuple[str, ...] = ()
        if total_size is not None and total_size != checkpoint.index.nbytes:
            notes = (
                f"{shorten(index_path, 1000)}: total_size says {total_size:,} bytes, "
                f"the shards hold {checkpoint.index.nbytes:,}",
            )
        return dataclasses.replace(checkpoint, notes=notes, index_file=index_path)

    def _weight_map(self, path: str) -> tuple[dict[str, str], float | None]:
        document = _json_object(path, INDEX_LIMIT)
        weight_map = document.get("weight_map")
        if type(weight_map) is not dict or not weight_map:
            raise DamagedFile(path, "expected an object 'weight_map' of tensors and shard files")
        for tensor, shard in weight_map.items():
            if type(shard) is not str or not self._bare_name(shard):
                raise DamagedFile(
                    path,
                    f"expected the bare name of a {self.suffix} file, "
                    f"found '{shorten(str(shard))}'",
                    tensor,
                )
        metadata = document.get("metadata")
        total = metadata.get("total_size") if type(metadata) is dict else None
        return weight_map, total if type(total) in (int, float) else None

    def _bare_name(self, name: str) -> bool:
        """Whether `name` cannot lead out of its folder on any system."""
        return (
            name.endswith(self.suffix)
            and name != self.suffix
            and not set(name) & set("/\\:\0")
            and len(name.encode("utf-8", "surrogatepass")) <= 255
            and name.isprintable()
        )

    def _assemble(
        self, path: str, folder: str, shards: Sequence[str], known: Known, key: str
    ) -> Checkpoint:
        """Return one checkpoint made of the `shards`, whose order gives `Extent.file`."""
        parts = [self.part.read(os.path.join(folder, name), known, key) for name in shards]
        files = tuple(file for part in parts for file in part.files)
        if len(files) != len(parts):
            raise DamagedFile(path, "a shard holds what cannot be read in place")
        digests = tuple(digest for part in parts for digest in part.digests)
        identity = (self.name, *shards, *(id(part.index) for part in parts))
        if identity not in known:
            # Held together: an index that is gone could leave its identity to another.
            indexes = [part.index for part in parts]
            known[identity] = (_joined(path, self.name, shards, indexes), indexes)
        sums = [part.checksums for part in parts if part.checksums is not None]
        return Checkpoint(
            path,
            files,
            known[identity][0],
            digests,
            checksums=np.concatenate(sums) if len(sums) == len(parts) else None,
            told_step=parts[0].told_step,
        )

    # ------------------------------------------------------------------ writing

    def template(self, last: Checkpoint, averaged: Sequence[Tensor], unknown: str) -> Draft | None:
        """Return the files of `last` with their structure, and its index file, byte for byte."""
        drafts = []
        for ordinal, stamp in enumerate(last.files):
            mine = [t for t in averaged if t.extent.file == ordinal]
            part = self.part.read(stamp.path, {}, last.key)
            inside = [t._replace(extent=t.extent._replace(file=0)) for t in mine]
            drafts.append(self.part.template(part, inside, unknown))
        whole = [draft for draft in drafts if draft is not None]
        if len(whole) < len(drafts):
            return None
        index = []
        if last.index_file:
            name = os.path.basename(last.index_file)
            index = [File(name, os.path.getsize(last.index_file), copy_of=last.index_file)]
        draft = _combined(last.index.names, whole)
        return draft._replace(files=[*draft.files, *index, *copied_side_files(last)])

    def fresh(self, entries: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
        """Return new shards of at most `limit` bytes with `entries`, and their index."""
        shards = _shards(entries, limit or DEFAULT_SHARD_SIZE)
        stem = self._stem(last)
        names = self._shard_names(stem, len(shards))
        draft = _combined(names, [self.part.fresh(shard, last, None) for shard in shards])
        files = list(draft.files)
        if len(files) > 1:
            weight_map = {name: names[t.extent.file] for name, t in draft.places.items()}
            total = sum(tensor.nbytes for tensor in draft.places.values())
            text = encode_index(weight_map, total)
            files.append(File(stem + self.index_suffix, len(text), ((0, text),)))
        beside = copied_side_files(last) if last.index.format == self.name else []
        return draft._replace(files=files + beside)

    def _stem(self, last: Checkpoint) -> str:
        """Return ``model`` of ``model-00001-of-00002.safetensors``: loaders look for that name."""
        if last.index.format != self.name:
            return self.stem
        return re.sub(r"-\d+-of-\d+$", "", last.index.names[0].removesuffix(self.suffix))

    def _shard_names(self, stem: str, count: int) -> list[str]:
        if count == 1:
            return [stem + self.suffix]
        return [f"{stem}-{k:05}-of-{count:05}{self.suffix}" for k in range(1, count + 1)]

    def seal(self, layout: Layout, crc_of: Mapping[Extent, int]) -> list[Patch]:
        """Return the patches of each file, as its own format seals it."""
        patches: list[Patch] = []
        for ordinal, own in enumerate(layout.own if isinstance(layout.own, tuple) else ()):
            if self.part.seal is not None:
                mine = {e._replace(file=0): crc for e, crc in crc_of.items() if e.file == ordinal}
                file = dataclasses.replace(layout, files=(layout.files[ordinal],), own=own)
                sealed = self.part.seal(file, mine)
                patches += [patch._replace(file=ordinal) for patch in sealed]
        return patches


def _combined(names: Sequence[str], drafts: Sequence[Draft]) -> Draft:
    """Return the drafts of single files as one of several files with these names."""
    files = [draft.files[0]._replace(name=name) for name, draft in zip(names, drafts, strict=True)]
    places = {
        name: tensor._replace(extent=tensor.extent._replace(file=ordinal))
        for ordinal, draft in enumerate(drafts)
        for name, tensor in draft.places.items()
    }
    sums = tuple(e._replace(file=k) for k, draft in enumerate(drafts) for e in draft.sums)
    notes = tuple(dict.fromkeys(note for draft in drafts for note in draft.notes))
    own = tuple(draft.own for draft in drafts)
    return Draft(files, places, sums, own, notes, drafts[0].big_endian)


def _json_object(path: str, limit: int) -> dict[str, Any]:
    def hook(pairs: list[tuple[str, Any]]) -> Any:
        value = unique(pairs)
        if isinstance(value, Repeated):
            raise DamagedFile(path, f"'{shorten(value.field)}' stands twice in one object")
        return value

    try:
        document = json.loads(read_small(path, limit).decode("utf-8"), object_pairs_hook=hook)
    except RecursionError:
        raise DamagedFile(path, "the JSON is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"not UTF-8: byte {error.start}") from None
    except ValueError as error:
        raise DamagedFile(path, f"not JSON: {shorten(str(error))}") from None
    if type(document) is not dict:
        raise DamagedFile(path, "expected a JSON object")
    return document


def _joined(path: str, name: str, shards: Sequence[str], parts: Sequence[Index]) -> Index:
    tensors: dict[str, Tensor] = {}
    for ordinal, part in enumerate(parts):
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise DamagedFile(path, "this tensor is in two shards", tensor.name)
            moved = tensor._replace(extent=tensor.extent._replace(file=ordinal))
            tensors[tensor.name] = moved
    if len({part.big_endian for part in parts}) > 1:
        raise DamagedFile(path, "its shards have different byte orders")
    return dataclasses.replace(
        parts[0],
        format=name,
        tensors=tuple(tensors.values()),
        names=tuple(shards),
        roles={tensor: role for part in parts for tensor, role in part.roles.items()},
        records=tuple(e._replace(file=k) for k, part in enumerate(parts) for e in part.records),
        cautions=tuple(dict.fromkeys(c for part in parts for c in part.cautions)),
        own=None,
    )


def _check_weight_map(path: str, weight_map: Mapping[str, str], index: Index) -> None:
    for name, shard in weight_map.items():
        tensor = index.by_name.get(name)
        found = "nowhere" if tensor is None else f"in '{index.names[tensor.extent.file]}'"
        if tensor is None or index.names[tensor.extent.file] != shard:
            raise DamagedFile(path, f"expected it in '{shorten(shard)}', found it {found}", name)


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Fill shards of at most `limit` bytes in the order of the input; one tensor may be more."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def encode_index(places: Mapping[str, str], total_size: int) -> bytes:
    """Return the bytes of an index file as transformers writes them: sorted, indented by two."""
    document = {"metadata": {"total_size": total_size}, "weight_map": places}
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    return text.encode("utf-8")
