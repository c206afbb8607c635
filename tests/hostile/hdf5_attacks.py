"""Attacks 92-95 on HDF5 files: sizes, filters and types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from attacks import LATE, READ
from hdf5_making import GIB, VARS, File, of_file
from link_attacks import LINK_ATTACKS
from raw_zip import MIB, zeros

# ---------------------------------------------------------------------------- 92, 93: sizes


def _declared(count: int, elements: int, **options: Any) -> Callable[[File, Path], None]:
    """Datasets of so many elements that were never written."""

    def fill(file: File, _: Path) -> None:
        for k in range(count):
            file.create_dataset(f"layers/d{k}/vars/0", (elements,), "<f4", **options)

    return fill


def _chunk(
    data: bytes, shape: tuple[int, ...], chunk: tuple[int, ...]
) -> Callable[[File, Path], None]:
    """A compressed dataset whose first chunk is these bytes."""

    def fill(file: File, _: Path) -> None:
        made = file.create_dataset(
            "layers/b/vars/0", shape, "<f4", chunks=chunk, compression="gzip"
        )
        made.id.write_direct_chunk((0,) * len(shape), data)

    return fill


def _zlib(n_mib: int) -> bytes:
    """A zlib stream of so many MiB of zeros."""
    adler = (n_mib * MIB % 65521) << 16 | 1
    return b"\x78\xda" + zeros(n_mib) + adler.to_bytes(4, "big")


def _big_chunk(file: File, _: Path) -> None:
    """A chunk of almost 4 GiB, never written."""
    n = GIB - 1024
    file.create_dataset("layers/b/vars/0", (n,), "<f4", chunks=(n,), compression="gzip")


QUARTER = MIB // 4
SIZES = (
    of_file("4 TB in nothing", 92, "a shape without data", _declared(1, 1 << 40)),
    of_file(
        "4 TB in no chunks", 92, "a shape without data", _declared(1, 1 << 40, chunks=(1 << 20,))
    ),
    of_file(
        "4 TB of one value", 92, "a shape and a fill value", _declared(1, 1 << 40, fillvalue=1.5)
    ),
    of_file(
        "2^62 in no chunks",
        92,
        "a shape whose bytes overflow",
        _declared(1, 1 << 61, chunks=(1 << 20,)),
    ),
    of_file(
        "1,000 times 1 GiB",
        92,
        "many that are small enough each",
        _declared(1000, GIB // 4, chunks=(QUARTER,), compression="gzip"),
    ),
    of_file(
        "a chunk that is a bomb",
        93,
        "1 MB that inflates to 1 GiB where 1 MiB is declared",
        _chunk(_zlib(1024), (QUARTER,), (QUARTER,)),
        ends=LATE,
    ),
    of_file(
        "a chunk that ends early",
        93,
        "a stream of 1 MiB where 4 are declared",
        _chunk(_zlib(1), (MIB,), (MIB,)),
        ends=LATE,
    ),
    of_file(
        "a chunk that is no stream",
        93,
        "bytes that do not inflate",
        _chunk(b"\xff" * 99, (QUARTER,), (QUARTER,)),
        ends=LATE,
    ),
    of_file("a chunk of 4 GiB", 93, "a chunk that has to be inflated whole", _big_chunk),
)

# ---------------------------------------------------------------------------- 94, 95: kinds


def _filtered(code: int, *values: int) -> Callable[[File, Path], None]:
    """A dataset behind a filter that is a plugin."""

    def fill(file: File, _: Path) -> None:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4,))
        plist.set_filter(code, h5py.h5z.FLAG_OPTIONAL, values)
        space = h5py.h5s.create_simple((4,))
        kind = h5py.h5t.IEEE_F32LE
        made = h5py.h5d.create(file.id, b"filtered", kind, space, plist)
        made.write_direct_chunk((0,), bytes(16))

    return fill


def _scaled(file: File, _: Path) -> None:
    file.create_dataset("scaled", data=np.arange(64), chunks=(64,), scaleoffset=True)


FILTERS = (
    of_file(
        "blosc", 94, "a filter that would be loaded from a folder", _filtered(32001, 2, 2, 4, 16)
    ),
    of_file("zstandard", 94, "a filter that would be loaded from a folder", _filtered(32015, 3)),
    of_file(
        "a filter of nobody", 94, "a filter that would be loaded from a folder", _filtered(65535)
    ),
    of_file(
        "a filter for tests", 94, "a filter that would be loaded from a folder", _filtered(256)
    ),
    of_file("scale and offset", 94, "a filter that loses digits", _scaled),
)


def _typed(make: Callable[[File], Any]) -> Callable[[File, Path], None]:
    def fill(file: File, _: Path) -> None:
        make(file)

    return fill


def _kind(kind: Any) -> Callable[[File, Path], None]:
    """A dataset of a type that only the library can make."""

    def fill(file: File, _: Path) -> None:
        space = h5py.h5s.create_simple((4,))
        h5py.h5d.create(file["layers/dense/vars"].id, b"2", kind(), space)

    return fill


def _float24() -> Any:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(23, 15, 8, 0, 15)
    kind.set_size(4)
    return kind


def _big_int() -> Any:
    kind = h5py.h5t.STD_I64LE.copy()
    kind.set_size(3)
    return kind


def _opaque(tag: bytes, width: int) -> Callable[[], Any]:
    def make() -> Any:
        kind = h5py.h5t.create(h5py.h5t.OPAQUE, width)
        kind.set_tag(tag)
        return kind

    return make


_NAME = f"{VARS}/2"
_PAIR = np.dtype([("a", "<f4"), ("b", "<i4")])
TYPES = tuple(
    of_file(name, 95, "a type that is no number: passed over", fill, ends=READ)
    for name, fill in {
        "a compound": _typed(lambda f: f.create_dataset(_NAME, data=np.zeros(4, _PAIR))),
        "strings": _typed(lambda f: f.create_dataset(_NAME, data=["a", "b"])),
        "fixed strings": _typed(lambda f: f.create_dataset(_NAME, data=np.array([b"abc"]))),
        "lists of floats": _typed(
            lambda f: f.create_dataset(_NAME, (2,), h5py.vlen_dtype(np.float32))
        ),
        "references": _typed(lambda f: f.create_dataset(_NAME, data=f.ref, dtype=h5py.ref_dtype)),
        "region references": _typed(
            lambda f: f.create_dataset(_NAME, (1,), dtype=h5py.regionref_dtype)
        ),
        "arrays": _typed(lambda f: f.create_dataset(_NAME, (2,), np.dtype(("<f4", (2, 2))))),
        "opaque, 3 wide": _kind(_opaque(b"secret", 3)),
        "an enumeration": _typed(
            lambda f: f.create_dataset(_NAME, (2,), h5py.enum_dtype({"A": 0, "B": 7}, "i4"))
        ),
        "bits": _kind(lambda: h5py.h5t.STD_B32LE.copy()),
        "time": _kind(lambda: h5py.h5t.UNIX_D32LE.copy()),
        "no data": _typed(lambda f: f.create_dataset(_NAME, data=h5py.Empty("f4"))),
    }.items()
) + tuple(
    of_file(name, 95, "a number that nobody has", _kind(kind))
    for name, kind in {
        "opaque, 1 wide": _opaque(b"", 1),
        "floats of 24 bits": _float24,
        "integers of 3 bytes": _big_int,
    }.items()
)


def _odd(file: File, _: Path) -> None:
    group = file["layers"].attrs
    group["name"] = "x" * 40_000
    group.create("loop", file.ref, dtype=h5py.ref_dtype)
    group["none"] = h5py.Empty("f4")
    group["pairs"] = np.zeros(3, _PAIR)
    for k in range(200):
        file.attrs[f"a{k}"] = np.zeros(1000, np.float32)


ATTRIBUTES = (
    of_file("attributes of all kinds", 95, "attributes that are never needed", _odd, ends=READ),
    of_file(
        "an attribute that says bfloat16",
        95,
        "a mark on data that are something else",
        _typed(lambda f: f[f"{VARS}/1"].attrs.__setitem__("dtype", "bfloat16")),
        ends=READ,
    ),
)


HDF5_ATTACKS = (
    *LINK_ATTACKS,
    *SIZES,
    *FILTERS,
    *TYPES,
    *ATTRIBUTES,
)
