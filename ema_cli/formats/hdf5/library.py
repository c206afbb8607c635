"""The HDF5 library, as far as it is used: the only importer of h5py, for the child process only.

Only hard links are followed: others lead to other files or in circles. A dataset counts as safe to
read only after its layout, its external files and its filters were looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5fd, h5g, h5l, h5o, h5p, h5s, h5t

from ema_cli.formats.hdf5.names import LINK_LIMIT, UNMARKED
from ema_cli.formats.hdf5.windows import Sheet, Window

__all__ = [
    "Kind",
    "Refused",
    "Storage",
    "address_of",
    "attributes",
    "child_of",
    "classified",
    "copy_attributes",
    "dataset_at",
    "h5a",
    "h5d",
    "h5f",
    "h5g",
    "h5p",
    "h5s",
    "h5t",
    "members",
    "memory_type",
    "new_file",
    "object_at",
    "open_file",
    "storage",
    "texts",
    "version",
]

# Limits of what one file may make us do.
ATTRIBUTE_BYTES = 64 << 20
ATTRIBUTE_COUNT = 1 << 12
ELEMENT_COUNT = 1 << 20

LAYOUTS = {h5d.COMPACT: "compact", h5d.CONTIGUOUS: "contiguous", h5d.CHUNKED: "chunked"}
# Deflate, shuffle and Fletcher-32 come with HDF5, LZF with h5py; others are plug-ins, or built
# into some copies of the library only.
FILTERS = {1, 2, 3, 32000}
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}


class Refused(Exception):
    """Something in a file is not read: why, and the path of the dataset or link."""


def version() -> str:
    """Return the version of the HDF5 library."""
    return str(h5py.version.hdf5_version)


# ---------------------------------------------------------------------------- files and links


def _access(file: Window | Sheet) -> Any:
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5fd.fileobj_driver, file)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    return access


def open_file(file: Window | Sheet) -> Any:
    """Return the open HDF5 file."""
    return h5f.open(b"input", h5f.ACC_RDONLY, fapl=_access(file))


def new_file(sheet: Sheet) -> Any:
    """Return a new HDF5 file, of the form that every version of the library reads."""
    access = _access(sheet)
    access.set_libver_bounds(h5f.LIBVER_EARLIEST, h5f.LIBVER_V110)
    return h5f.create(b"output", h5f.ACC_TRUNC, fapl=access)


class Member(NamedTuple):
    """A hard link: its name, and the address of what it leads to."""

    name: str
    address: int


def members(group: Any, path: str, limit: int) -> list[Member]:
    """Return the members of a group. Raises `Refused` for what is no hard link."""
    found: list[tuple[bytes, int, int]] = []

    def add(name: bytes, info: Any) -> bool | None:
        found.append((name, info.type, info.u))
        return len(found) > limit or None

    group.links.iterate(add, info=True)
    if len(found) > limit:
        raise Refused(f"expected at most {limit:,} more objects, found more", path)
    return [Member(_checked(path, *link), link[2]) for link in found]


def _checked(group: str, name: bytes, kind: int, _: int) -> str:
    text = name.decode("utf-8", "surrogateescape")
    path = f"{group}/{text}" if group else text
    if kind != h5l.TYPE_HARD:
        found = _LINKS.get(kind, "a user-defined link")
        raise Refused(f"expected hard links only, found {found}", path)
    if text in ("", ".", "..") or "/" in text or len(name) > LINK_LIMIT:
        raise Refused("expected a name that can be part of a path", path)
    return text


def address_of(thing: Any) -> int:
    """Return the address of an open object, as its links tell it."""
    return int(h5o.get_info(thing).addr)


def child_of(group: Any, name: str) -> Any:
    """Return the open object that a hard link leads to."""
    return h5o.open(group, name.encode("utf-8", "surrogateescape"))


def object_at(file: Any, path: str) -> Any:
    """Return the open object at a path whose links are all hard ones."""
    found = h5g.open(file, b"/")
    for name in path.split("/") if path else ():
        raw = name.encode("utf-8", "surrogateescape")
        if not isinstance(found, h5g.GroupID) or found.links.get_info(raw).type != h5l.TYPE_HARD:
            raise Refused("expected groups and hard links", path)
        found = h5o.open(found, raw)
    return found


def dataset_at(file: Any, path: str) -> Any:
    """Return the open dataset at a path whose links are all hard ones."""
    found = object_at(file, path)
    if not isinstance(found, h5d.DatasetID):
        raise Refused("expected a dataset", path)
    return found


# ---------------------------------------------------------------------------- attributes


_TEXT = np.dtype("O", metadata={"vlen": bytes})
_TEXT_TYPE = h5t.py_create(_TEXT)


def attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, attribute) of an object."""
    count = h5a.get_num_attrs(holder)
    if count > ATTRIBUTE_COUNT:
        raise Refused(f"expected at most {ATTRIBUTE_COUNT:,} attributes, found {count:,}", "")
    for k in range(count):
        attribute = h5a.open(holder, index=k)
        yield attribute.name.decode("utf-8", "surrogateescape"), attribute


def texts(attribute: Any) -> list[str] | None:
    """Return the strings of an attribute, or None when it holds other things.

    An empty list of names is one of numbers in Keras's files.
    """
    kind, shape = attribute.get_type(), _small_shape(attribute)
    if shape is not None and 0 in shape:
        return []
    if shape is None or kind.get_class() != h5t.STRING:
        return None
    if kind.is_variable_str():
        values = np.zeros(shape, _TEXT)
        attribute.read(values, mtype=_TEXT_TYPE)
    else:
        values = np.zeros(shape, f"S{kind.get_size()}")
        attribute.read(values, mtype=kind)
    found = values.reshape(-1).tolist()
    return [value.decode("utf-8", "surrogateescape") if value else "" for value in found]


def _small_shape(attribute: Any) -> tuple[int, ...] | None:
    """Return the shape of an attribute, None for one without values. Raises `Refused`."""
    space = attribute.get_space()
    if space.get_simple_extent_type() == h5s.NULL:
        return None
    count = space.get_simple_extent_npoints()
    if count > ELEMENT_COUNT or count * attribute.get_type().get_size() > ATTRIBUTE_BYTES:
        raise Refused(f"the attribute is too large: {count:,} elements", "")
    return tuple(space.get_simple_extent_dims())


def _values(attribute: Any) -> Any:
    """Return the values of an attribute of numbers or strings, or None when it has none."""
    shape = _small_shape(attribute)
    if shape is None:
        return None
    values = np.zeros(shape, attribute.dtype)
    attribute.read(values, mtype=h5t.py_create(attribute.dtype))
    return values


def copy_attributes(source: Any, target: Any, left: re.Pattern[str]) -> list[str]:
    """Copy attributes but for those whose names match; return the names of those it cannot."""
    failed = []
    for name, attribute in attributes(source):
        if left.fullmatch(name) or h5a.exists(target, attribute.name):
            continue
        try:
            _copy(attribute, target)
        except (Refused, ValueError, TypeError, OSError, RuntimeError, KeyError):
            failed.append(name)
    return failed


def _copy(attribute: Any, target: Any) -> None:
    kind = attribute.get_type()
    if kind.get_class() not in (h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM):
        raise Refused("its type is not copied", "")
    values = _values(attribute)
    new = h5a.create(target, attribute.name, kind.copy(), attribute.get_space())
    if values is not None:
        new.write(values, mtype=h5t.py_create(attribute.dtype))


# ---------------------------------------------------------------------------- types


def _table() -> dict[tuple[int, int], list[tuple[Any, str, bool]]]:
    """Return the types of numbers that are read, by class and bytes, with their names here."""
    table: dict[tuple[int, int], list[tuple[Any, str, bool]]] = {}

    def add(kind: Any, name: str, big: bool) -> None:
        table.setdefault((kind.get_class(), kind.get_size()), []).append((kind, name, big))

    for bits in (16, 32, 64):
        add(getattr(h5t, f"IEEE_F{bits}LE"), f"float{bits}", False)
        add(getattr(h5t, f"IEEE_F{bits}BE"), f"float{bits}", True)
    for bits in (8, 16, 32, 64):
        for letter, name in (("I", "int"), ("U", "uint")):
            add(getattr(h5t, f"STD_{letter}{bits}LE"), f"{name}{bits}", False)
            add(getattr(h5t, f"STD_{letter}{bits}BE"), f"{name}{bits}", True)
    for bits in (64, 128):
        for order, big in (("<", False), (">", True)):
            add(h5t.py_create(np.dtype(f"{order}c{bits // 8}")), f"complex{bits}", big)
    add(h5t.py_create(np.dtype("?")), "bool", False)
    return table


_TABLE = _table()
# Offsets and sizes of sign, exponent and mantissa in HDF5's own bfloat16, and its bias.
_BFLOAT16 = ((15, 7, 8, 0, 7), 127)
_OTHERS = {
    h5t.STRING: "strings",
    h5t.VLEN: "lists",
    h5t.REFERENCE: "references",
    h5t.COMPOUND: "records",
    h5t.ARRAY: "arrays",
    h5t.ENUM: "enumerations",
    h5t.BITFIELD: "bits",
    h5t.TIME: "times",
}


class Kind(NamedTuple):
    """What the elements of a dataset are.

    Attributes:
        dtype: our name, `UNMARKED`, or empty for what is no tensor.
        big: whether they are big-endian.
        other: what they are when they are no tensor.
    """

    dtype: str
    big: bool = False
    other: str = ""


def classified(dataset: Any, kind: Any, path: str) -> Kind:
    """Return what the elements of a dataset are. Raises `Refused` for numbers we do not read."""
    family, n_bytes = kind.get_class(), kind.get_size()
    for known, name, big in _TABLE.get((family, n_bytes), ()):
        if known.equal(kind):
            return Kind(name, big)
    if family == h5t.FLOAT and (kind.get_fields(), kind.get_ebias()) == _BFLOAT16:
        return Kind("bfloat16", kind.get_order() == h5t.ORDER_BE)
    if family == h5t.OPAQUE and n_bytes == 2:
        marked = ("dtype", ["bfloat16"]) in ((n, texts(a)) for n, a in attributes(dataset))
        return Kind("bfloat16" if marked else UNMARKED)
    if family == h5t.OPAQUE and n_bytes == 1:
        raise Refused("expected numbers, found opaque bytes, perhaps a float8", path)
    if family in (h5t.FLOAT, h5t.INTEGER):
        word = "floats" if family == h5t.FLOAT else "integers"
        raise Refused(f"{word} of {n_bytes} bytes in this form are not read", path)
    return Kind("", other=_OTHERS.get(family, "opaque values"))


def memory_type(kind: Any) -> Any:
    """Return the little-endian type as which values of a `kind` are read."""
    family, n_bytes = kind.get_class(), kind.get_size()
    for known, name, _ in _TABLE.get((family, n_bytes), ()):
        if known.equal(kind):
            return next(k for k, other, big in _TABLE[family, n_bytes] if other == name and not big)
    return kind


# ---------------------------------------------------------------------------- storage


class Storage(NamedTuple):
    """How a dataset is stored: its layout, its offset in the file or -1, its bytes, its chunks."""

    layout: str
    offset: int
    nbytes: int
    chunk: tuple[int, ...]


def storage(dataset: Any, path: str) -> Storage:
    """Return how a dataset is stored. Raises `Refused` where its data may lie elsewhere."""
    how = dataset.get_create_plist()
    layout = how.get_layout()
    if layout not in LAYOUTS:
        what = "a virtual dataset" if layout == h5d.VIRTUAL else f"layout {layout}"
        raise Refused(f"expected data of its own, found {what}: its data lies in other files", path)
    if layout == h5d.CONTIGUOUS and how.get_external_count():
        raise Refused("expected its data in this file, found an external file", path)
    nbytes = dataset.get_storage_size()
    if layout == h5d.CONTIGUOUS:
        offset = dataset.get_offset()
        # Before anything is stored, some versions tell one byte before the file's beginning.
        return Storage(LAYOUTS[layout], -1 if offset is None or not nbytes else offset, nbytes, ())
    for k in range(how.get_nfilters()):
        number = how.get_filter(k)[0]
        if number not in FILTERS:
            raise Refused(
                f"expected deflate, shuffle, fletcher32 or lzf, found filter {number}", path
            )
    chunk = how.get_chunk() if layout == h5d.CHUNKED else ()
    return Storage(LAYOUTS[layout], -1, nbytes, tuple(chunk))
