"""Lays out HDF5 files: a copy of the last checkpoint's in which bytes are replaced, or a new one.

HDF5 keeps no checksums of tensors, so a copy needs no seal. A new file takes over what an HDF5
checkpoint holds besides its tensors: groups, attributes, strings. Its lists of names, which Keras's
older layout goes by, then name what is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ema_cli.blueprint import Draft, Entry, File
from ema_cli.errors import Disagreement, UnsupportedInput
from ema_cli.files import open_unchanged
from ema_cli.formats.hdf5 import isolation
from ema_cli.formats.hdf5.isolation import Building
from ema_cli.formats.hdf5.names import (
    NAME,
    SHADOWS_ATTRIBUTE,
    Shadows,
    ancestors,
    blocked,
    dataset_path,
    natural,
    parted,
    plain_group,
    shadows_of,
    tensor_name,
)
from ema_cli.formats.hdf5.reading import Own, Source, own_of
from ema_cli.tensors import Checkpoint, Extent, Tensor
from ema_cli.text import shorten

# What is read again is not larger, see `listing`.
OBJECT_LIMIT = 390_000


def template(last: Checkpoint, averaged: Sequence[Tensor]) -> Draft | None:
    """Return a copy of the file of `last`, or None when some of the tensors do not lie in it."""
    if not in_place(averaged):
        return None
    file = last.files[0]
    return Draft([File("", file.size, copy_of=file.path)], places_of(last))


def in_place(averaged: Sequence[Tensor]) -> bool:
    """Whether these tensors can be replaced in a copy of their file."""
    return all(tensor.extent.file == 0 for tensor in averaged if tensor.nbytes)


def places_of(last: Checkpoint) -> Mapping[str, Tensor]:
    """Return where in a copy of its file the tensors of `last` lie; not those that spill."""
    return {t.name: t for t in last.index.tensors if t.extent.file == 0}


def fresh(wanted: Sequence[Entry], last: Checkpoint) -> Draft:
    """Return a new HDF5 file with the wanted entries, in the order in which Keras counts."""
    with contextlib.ExitStack() as stack:
        source = None
        if last.index.format == NAME:
            file = last.files[0]
            fd = open_unchanged(file)
            stack.callback(os.close, fd)
            source = Source(fd, file.path, own_of(last.index).window)
        big = last.index.format == NAME and last.index.big_endian
        building, places = built(wanted, last, source, big=big)
    return drafted(building, places)


def drafted(building: Building, places: Mapping[str, Tensor]) -> Draft:
    """Return the draft of a new HDF5 file."""
    return Draft([File("", building.nbytes, building.literals)], places, notes=building.notes)


def built(
    wanted: Sequence[Entry], last: Checkpoint, source: Source | None, *, big: bool
) -> tuple[Building, dict[str, Tensor]]:
    """Return a new HDF5 file and where in it each entry lies.

    Args:
        wanted: its tensors.
        last: the checkpoint they are of.
        source: its HDF5 file, open, when it has one.
        big: whether numbers become big-endian.
    """
    own = own_of(last.index) if source else None
    sheet = _Sheet(wanted, own)
    request: dict[str, Any] = {
        "big": big,
        "groups": sheet.groups(),
        "datasets": sheet.datasets(),
        "strings": sheet.strings(),
    }
    objects = len(request["datasets"]) + len(request["groups"])
    if objects > OBJECT_LIMIT:
        raise UnsupportedInput(
            f"an HDF5 file of {objects:,} groups and datasets: expected at most {OBJECT_LIMIT:,}",
            "write safetensors instead",
        )
    place = None if source is None else (source.fd, source.window)
    building = isolation.build(last.path, request, place)
    places = {}
    for (entry, _), offset in zip(sheet.rows, building.offsets, strict=True):
        nbytes = entry.nbytes
        extent = Extent(0, max(offset, 0), nbytes if offset >= 0 else 0)
        places[entry.name] = Tensor(entry.name, entry.dtype, entry.shape, extent)
    if own is not None and _unloadable(wanted, own):
        note = "Keras does not load bfloat16 from its older .h5 layout"
        building = building._replace(notes=(*building.notes, note))
    return building, places


def _unloadable(wanted: Sequence[Entry], own: Own) -> bool:
    """Whether Keras (3.15) loads a file of these entries: what it saves itself neither."""
    layers = any("layer_names" in attributes for attributes in own.structure.groups.values())
    return layers and any(entry.dtype.name == "bfloat16" for entry in wanted)


class _Row(NamedTuple):
    """An entry and the path of its dataset."""

    entry: Entry
    path: str


class _Sheet:
    """What a new file consists of, put together from entries and what the last file holds."""

    def __init__(self, wanted: Sequence[Entry], own: Own | None) -> None:
        self._own = own
        known = own.shadows if own else Shadows()
        self._shadows = shadows_of(((e.name, e.source) for e in wanted), known)
        rows = [_Row(entry, dataset_path(entry.name, self._shadows)) for entry in wanted]
        self.rows = sorted(rows, key=lambda row: natural(row.path))
        self._check()
        self._paths = {row.path for row in self.rows}
        self._needed = {group for path in self._paths for group in ancestors(path)}

    def _check(self) -> None:
        """Raise `Disagreement` for names that cannot stand in one file."""
        clash = blocked([row.path for row in self.rows])
        if clash is not None:
            group, inner = clash
            raise Disagreement(
                f"'{shorten(inner)}' would have to lie in '{shorten(group)}', which is a tensor: "
                "an HDF5 file cannot hold both",
                "choose other names with --rule PATTERN REPL",
            )
        seen: dict[str, str] = {}
        for entry, path in self.rows:
            back = tensor_name(path, self._shadows)
            other = seen.setdefault(path, entry.name)
            if back != entry.name or other != entry.name:
                raise Disagreement(
                    f"an HDF5 file with shadows cannot hold '{shorten(entry.name)}': as "
                    f"'{shorten(path)}' it would be taken for "
                    f"'{shorten(other if other != entry.name else back)}'",
                    "choose other names with --rule PATTERN REPL",
                )

    # ------------------------------------------------------------------------ rows of a request

    def datasets(self) -> list[Any]:
        """Return (path, dtype, shape, dataset whose attributes it takes over) of each tensor."""
        rows = []
        for entry, path in self.rows:
            like = self._own.datasets[entry.source] if self._own else None
            source = like.path if like is not None and like.more else None
            rows.append([path, entry.dtype.name, entry.shape, source])
        return rows

    def strings(self) -> list[str]:
        """Return the datasets of strings that are taken over."""
        if self._own is None:
            return []
        taken = self._paths | self._needed
        return [
            path
            for path, what in self._own.structure.others
            if what == "strings"
            and path not in taken
            and not any(group in self._paths for group in ancestors(path))
        ]

    def groups(self) -> list[Any]:
        """Return (path, group whose attributes it takes over, its own attributes) of each group."""
        kept = self._needed | {""}
        marks = self._marks()
        if self._own is None:
            return [[path, None, marks.get(path, {})] for path in sorted(kept, key=natural)]
        kept |= {group for path in self._kept_groups() for group in (path, *ancestors(path))}
        lists = _Lists(self._own, self.rows, self._shadows, kept).by_group()
        structure, likes = self._own.structure, self._likes()
        rows = []
        for path in sorted(kept, key=natural):
            like = likes.get(path)
            known = structure.groups.get(like, {}) if like is not None else {}
            names = {"name": known["name"][0]} if len(known.get("name", ())) == 1 else {}
            attributes = {**names, **lists.get(path, {}), **marks.get(path, {})}
            rows.append([path, like if like in structure.more else None, attributes])
        return rows

    def _marks(self) -> dict[str, dict[str, Any]]:
        """Return the attributes that tell where shadows lie."""
        marks: dict[str, dict[str, Any]] = {}
        for end, tree in self._shadows.trees:
            if tree in self._needed:
                marks[tree] = {SHADOWS_ATTRIBUTE: end}
        if self._shadows.ends:
            marks[""] = {SHADOWS_ATTRIBUTE: list(self._shadows.ends)}
        return marks

    def _likes(self) -> dict[str, str]:
        """Return for each group the one of the last file whose attributes it takes over."""
        if self._own is None:
            return {}
        like = {path: path for path in self._own.structure.groups}
        for entry, path in self.rows:
            groups = ancestors(path)
            sources = ancestors(self._own.datasets[entry.source].path)
            for group, source in zip(groups, sources, strict=False):
                if group and source:
                    like.setdefault(group, source)
        return like

    def _kept_groups(self) -> Iterator[str]:
        """Yield the groups of the last file but for those that lost all their tensors.

        What is in a group without tensors, or lists layers, stays where only shadows are left.
        """
        assert self._own is not None  # noqa: S101  # asked by `groups` then only
        filled = {g for d in self._own.datasets.values() for g in ancestors(d.path)}
        gone = filled - {plain_group(group, self._shadows) for group in self._needed}
        gone -= self._needed
        for path, attributes in self._own.structure.groups.items():
            empty = path in filled and path not in self._needed and "layer_names" not in attributes
            inside = path in self._paths or any(g in self._paths for g in ancestors(path))
            lost = any(g in gone for g in (path, *ancestors(path)))
            if not (empty or inside or lost):
                yield path


class _Lists:
    """The lists of names of the last file's groups, for what is there now.

    Those in a tree of shadows name the variables, also those that lie in none: as the tensors lie
    apart, only they tell the order in which Keras expects them, for when a file has one set again.
    """

    def __init__(
        self, own: Own, rows: Sequence[_Row], shadows: Shadows, kept: Collection[str]
    ) -> None:
        self._own = own
        self._shadows = shadows
        self._kept = kept
        self._there = {plain_group(group, shadows) for group in kept}
        self._made_of: dict[str, list[str]] = {}
        for entry, path in sorted(rows, key=lambda row: natural(row.entry.name)):
            variable, _ = parted(own.datasets[entry.source].path, own.shadows)
            self._made_of.setdefault(variable, []).append(path)

    def by_group(self) -> dict[str, dict[str, list[str]]]:
        """Return the lists by group and attribute."""
        layers, weights = self._known("layer_names"), self._known("weight_names")
        found: dict[str, dict[str, list[str]]] = {}
        for group in self._kept:
            plain = plain_group(group, self._shadows)
            inner = f"{plain}/" if plain else ""
            lists = found.setdefault(group, {})
            if plain in layers:
                there = self._kept if plain == group else self._there
                lists["layer_names"] = [
                    path.removeprefix(inner) for path in layers[plain] if path in there
                ]
            if plain in weights:
                made = self._made(weights[plain], names_variables=plain != group)
                lists["weight_names"] = [
                    path.removeprefix(inner) for path in made if path.startswith(inner)
                ]
        return found

    def _known(self, name: str) -> dict[str, dict[str, None]]:
        """Return the paths of the layers or variables that the last file lists, by group."""
        shadows = self._own.shadows
        found: dict[str, dict[str, None]] = {}
        groups = [
            (plain_group(group, shadows), group, attributes[name])
            for group, attributes in self._own.structure.groups.items()
            if name in attributes
        ]
        for plain, _, values in sorted(groups, key=lambda row: row[0] == row[1]):  # trees first
            inner = f"{plain}/" if plain else ""
            paths = found.setdefault(plain, {})
            paths.update((parted(inner + value, shadows)[0], None) for value in values)
        return found

    def _made(self, variables: Iterable[str], *, names_variables: bool) -> Iterable[str]:
        """Return what became of variables, each followed by its shadows; or the variables."""
        made = [path for variable in variables for path in self._made_of.get(variable, ())]
        if names_variables:
            return dict.fromkeys(parted(path, self._shadows)[0] for path in made)
        return made
