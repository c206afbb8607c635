"""Lays out a new HDF5 file without its tensors' bytes, for the child process.

HDF5 itself makes the file, of which only what it writes exists: the tensors get their places at
once and are never filled. Everything else about the file is known then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ema_cli.formats.hdf5 import library
from ema_cli.formats.hdf5.library import (
    Refused,
    copy_attributes,
    dataset_at,
    h5a,
    h5d,
    h5g,
    h5p,
    h5s,
    h5t,
)
from ema_cli.formats.hdf5.listing import LISTS
from ema_cli.formats.hdf5.windows import Sheet

# What Keras keeps in one attribute at most; its longer lists are split.
_LIST_BYTES = 64512
_TOGETHER = 4096
_STRING_BYTES = 16 << 20
_LISTS = re.compile("|".join(rf"{name}\d*" for name in LISTS))
_DTYPE = re.compile("dtype")
_TEXT = np.dtype("O", metadata={"vlen": str})
_BYTES = np.dtype("O", metadata={"vlen": bytes})


class Built:
    """A new file: where its datasets lie, and all its other bytes.

    Attributes:
        sheet: the file, without the tensors' bytes.
    """

    def __init__(self, request: Mapping[str, Any], source: Any) -> None:
        self._source = source
        self.sheet = Sheet()
        self._notes: list[str] = []
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        file = library.new_file(self.sheet)
        self._file = h5g.open(file, b"/")
        self._groups(request["groups"])
        rows = request["datasets"]
        self._offsets: list[tuple[int, int]] = []
        # Those that are created before any of them has its place lie beside each other then.
        for first in range(0, len(rows), _TOGETHER):
            created = [
                self._dataset(row, request["big"]) for row in rows[first : first + _TOGETHER]
            ]
            self._offsets += [_placed(dataset) for dataset in created]
        for path in request["strings"]:
            self._strings(path)
        del self._file
        file.close()

    def document(self) -> dict[str, Any]:
        """Return the document that tells of the file, without its bytes."""
        return {
            "nbytes": self.sheet.nbytes,
            "offsets": [offset for offset, _ in self._offsets],
            "literals": [[offset, len(data)] for offset, data in self.literals()],
            "notes": self._notes,
        }

    def literals(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of all but the tensors."""
        return self.sheet.outside(self._offsets)

    # ------------------------------------------------------------------------ groups

    def _groups(self, rows: Sequence[Any]) -> None:
        for path, like, attributes in rows:
            group = self._file
            if path:
                group = h5g.create(self._file, _raw(path), lcpl=self._links)
            for name, value in attributes.items():
                if type(value) is str:
                    _set_text(group, name, value)
                else:
                    _set_list(group, name, value)
            if like is not None and self._source is not None:
                source = library.object_at(self._source, like)
                self._copied(path, copy_attributes(source, group, _LISTS))

    def _copied(self, path: str, failed: Sequence[str]) -> None:
        self._notes += [f"attribute '{name}' of '/{path}' is not kept" for name in failed]

    # ------------------------------------------------------------------------ datasets

    def _dataset(self, row: Sequence[Any], big: bool) -> Any:
        """Create a dataset and return it."""
        path, dtype, shape, like = row
        kind = _kind(dtype, big)
        how = h5p.create(h5p.DATASET_CREATE)
        how.set_layout(h5d.CONTIGUOUS)
        how.set_fill_time(h5d.FILL_TIME_NEVER)
        how.set_obj_track_times(False)
        space = h5s.create_simple(tuple(shape)) if shape else h5s.create(h5s.SCALAR)
        dataset = h5d.create(self._file, _raw(path), kind, space, dcpl=how, lcpl=self._links)
        if dtype == "bfloat16":
            _set_text(dataset, "dtype", dtype)
        if like is not None and self._source is not None:
            self._copied(path, copy_attributes(dataset_at(self._source, like), dataset, _DTYPE))
        return dataset

    def _strings(self, path: str) -> None:
        """Copy a dataset of strings, which is metadata to Keras."""
        try:
            self._copy_strings(path)
        except (Refused, ValueError, TypeError, OSError, RuntimeError, KeyError):
            self._notes.append(f"'/{path}' is not kept")

    def _copy_strings(self, path: str) -> None:
        source = dataset_at(self._source, path)
        library.storage(source, path)
        kind, space = source.get_type(), source.get_space()
        count = space.get_simple_extent_npoints()
        if kind.get_class() != h5t.STRING or count * kind.get_size() > _STRING_BYTES:
            raise Refused("expected a few strings", path)
        values = np.zeros(source.shape, source.dtype)
        form = h5t.py_create(source.dtype)
        source.read(h5s.ALL, h5s.ALL, values, form)
        how = h5p.create(h5p.DATASET_CREATE)
        how.set_obj_track_times(False)
        same = h5s.create_simple(source.shape) if source.shape else h5s.create(h5s.SCALAR)
        target = h5d.create(self._file, _raw(path), kind.copy(), same, dcpl=how, lcpl=self._links)
        target.write(h5s.ALL, h5s.ALL, values, form)
        self._copied(path, copy_attributes(source, target, _DTYPE))


def _placed(dataset: Any) -> tuple[int, int]:
    """Let a dataset have its place; return its offset and size, (-1, 0) without elements."""
    space, kind = dataset.get_space(), dataset.get_type()
    if not space.get_simple_extent_npoints():
        return -1, 0
    one = (1,) * space.get_simple_extent_ndims()
    memory = h5s.create_simple(one) if one else h5s.create(h5s.SCALAR)
    if one:
        space.select_hyperslab((0,) * len(one), one)
    dataset.write(memory, space, np.zeros(one, f"V{kind.get_size()}"), kind)
    return dataset.get_offset(), dataset.get_storage_size()


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _kind(dtype: str, big: bool) -> Any:
    """Return the type of a dataset, as h5py would choose it."""
    if dtype == "bfloat16":
        return h5t.py_create(np.dtype("V2"))
    return h5t.py_create(np.dtype(dtype).newbyteorder(">" if big else "<"))


def _set_text(holder: Any, name: str, value: str) -> None:
    _set(holder, name, np.array(_raw(value), _TEXT))


def _set_list(holder: Any, name: str, values: Sequence[str]) -> None:
    """Set an attribute to a list of strings; long ones are split over several, as Keras does it."""
    raw = [_raw(value) for value in values]
    parts = [np.array(raw or np.empty(0), "S" if raw else "f8")]
    while any(part.nbytes > _LIST_BYTES for part in parts):
        parts = np.array_split(parts[0] if len(parts) == 1 else np.array(raw), len(parts) + 1)
    if len(parts) > 1:
        for number, part in enumerate(parts):
            _set(holder, f"{name}{number}", part)
    else:
        _set(holder, name, np.array(raw, _BYTES) if raw else parts[0])


def _set(holder: Any, name: str, values: np.ndarray[Any, Any]) -> None:
    space = h5s.create_simple(values.shape) if values.shape else h5s.create(h5s.SCALAR)
    stored = h5t.py_create(values.dtype, logical=True)
    attribute = h5a.create(holder, _raw(name), stored, space)
    if values.size:
        attribute.write(values, mtype=h5t.py_create(values.dtype))
