"""The safetensors format held against the reference library, both ways, byte for byte."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from helpers import CODES, dtype_of, raw_safetensors, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import numpy as library

from ema_cli.errors import InputError
from ema_cli.formats import read
from ema_cli.formats.safetensors import encode_header, representable, writing_order
from ema_cli.tensors import DTYPES, DType

# Every dtype of the format: its code and its name here.
PACKED = {
    "float4_e2m1fn": "F4",
    "float6_e2m3fn": "F6_E2M3",
    "float6_e3m2fn": "F6_E3M2",
}
ALL_CODES = {**CODES, **PACKED}
Shape = tuple[int, ...]
Row = tuple[str, str, Shape]

anything = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def nbytes(dtype: str, shape: Shape) -> int:
    """Return the bytes of a tensor."""
    return int(np.prod(shape, dtype=object)) * DTYPES[dtype].bits // 8


def by_the_library(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Return code, shape and bytes of each tensor as the reference library reads them."""
    return {
        name: (found["dtype"], found["shape"], bytes(found["data"]))
        for name, found in safetensors.deserialize(content)
    }


def by_us(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return the same as we read it."""
    content = path.read_bytes()
    found = {}
    for name, dtype, shape, (file, offset, size), *_ in read(str(path), {}).index.tensors:
        assert file == 0
        found[name] = (ALL_CODES[dtype.name], list(shape), content[offset : offset + size])
    return found


def written_by_the_library(rows: list[Row], metadata: Mapping[str, str] | None) -> bytes:
    """Return the bytes of the reference writer for tensors of zeros."""
    keep, given_to = [], {}
    for name, dtype, shape in rows:
        size = nbytes(dtype, shape)
        buffer = ctypes.create_string_buffer(max(size, 1))
        keep.append(buffer)
        # The library takes packed 4 bit types by the name and the shape of their pairs.
        stored, kind = shape, dtype
        if dtype == "float4_e2m1fn":
            stored, kind = (*shape[:-1], shape[-1] // 2), "float4_e2m1fn_x2"
        given_to[name] = safetensors.TensorSpec(
            dtype=kind, shape=list(stored), data_ptr=ctypes.addressof(buffer), data_len=size
        )
    return bytes(safetensors.serialize(given_to, metadata=metadata))


def written_by_us(rows: list[Row], metadata: Mapping[str, str] | None) -> bytes:
    """Return the bytes our writer lays out for the same tensors."""
    ordered = sorted(rows, key=lambda row: writing_order(row[1], row[0]))
    header, extents = encode_header([(n, DTYPES[d], s) for n, d, s in ordered], metadata or {})
    return header + bytes(sum(extent.nbytes for extent in extents))


# ---------------------------------------------------------------------------- reading


def test_we_know_every_dtype_of_the_format() -> None:
    """There is no code that the library of this version reads and we refuse, or the reverse."""
    assert set(ALL_CODES) == {d.name for d in DTYPES.values() if representable(d)}
    assert len(ALL_CODES) == 22


@pytest.mark.parametrize("name", sorted(ALL_CODES))
def test_each_dtype_is_read_as_the_library_reads_it(tmp_path: Path, name: str) -> None:
    """Name, dtype, shape and bytes of every dtype, packed ones included, are the library's."""
    size = nbytes(name, (2, 4))
    header = {"x": {"dtype": ALL_CODES[name], "shape": [2, 4], "data_offsets": [0, size]}}
    content = raw_safetensors(header, bytes(range(size)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert by_us(path) == by_the_library(content)
    assert by_us(path) == {"x": (ALL_CODES[name], [2, 4], bytes(range(size)))}


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@st.composite
def tables(draw: st.DrawFn, dtypes: list[str] | None = None) -> list[Row]:
    """Draw names with dtypes and shapes that fill whole bytes."""
    rows = []
    for name in draw(st.lists(names, unique=True, max_size=8)):
        dtype = draw(st.sampled_from(dtypes or sorted(ALL_CODES)))
        shape = draw(shapes)
        if dtype in PACKED:
            shape = (*shape, 4)
        rows.append((name, dtype, shape))
    return rows


@anything
@given(rows=tables(), key=st.none() | names, data=st.data())
def test_any_file_is_read_as_the_library_reads_it(
    tmp_path: Path, rows: list[Row], key: str | None, data: st.DataObject
) -> None:
    """Headers in any order, odd names, scalars, empty tensors, metadata: the library agrees."""
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in rows:
        begin, end = end, end + nbytes(dtype, shape)
        code = ALL_CODES[dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    header = {name: header[name] for name in data.draw(st.permutations(sorted(header)))}
    if key is not None:
        header["__metadata__"] = {key: key}
    escaped = data.draw(st.booleans())
    text = json.dumps(header, ensure_ascii=escaped, indent=data.draw(st.none() | st.integers(0, 2)))
    text += " " * data.draw(st.integers(0, 9))
    content = raw_safetensors(text.encode(), os.urandom(end))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert by_us(path) == by_the_library(content)
    checkpoint = read(str(path), {})
    assert checkpoint.index.metadata == ({} if key is None else {key: key})
    assert checkpoint.files[0].size == len(content)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """The index is in file order, whatever order the header has."""
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "early": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(header, b"abcde"))
    tensors = read(str(path), {}).index.tensors
    start = path.stat().st_size - 5
    assert [(t.name, t.extent) for t in tensors] == [
        ("early", (0, start, 3)),
        ("late", (0, start + 3, 2)),
    ]


# ---------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", sorted(set(ALL_CODES) - set(PACKED)))
def test_each_dtype_is_written_as_the_library_writes_it(name: str) -> None:
    """Prefix, header, padding and size of one tensor of every dtype are the library's."""
    rows = [("x", name, (2, 4))]
    assert written_by_us(rows, None) == written_by_the_library(rows, None)


def test_4_bit_types_are_written_as_the_library_writes_them() -> None:
    """The packed type the library can write has the library's bytes."""
    rows = [("x", "float4_e2m1fn", (2, 4))]
    assert written_by_us(rows, None) == written_by_the_library(rows, None)


@anything
@given(rows=tables(sorted(set(ALL_CODES) - set(PACKED))), key=st.none() | names)
def test_any_header_is_the_one_the_library_writes(rows: list[Row], key: str | None) -> None:
    """Sorted by `writing_order`, any names, shapes and metadata give the library's bytes."""
    metadata = None if key is None else {key: key}
    assert written_by_us(rows, metadata) == written_by_the_library(rows, metadata)


@anything
@given(rows=tables(), alignment=st.sampled_from([1, 8, 64, 4096]))
def test_data_starts_aligned_and_leaves_no_hole(rows: list[Row], alignment: int) -> None:
    """The header is padded with spaces to the alignment; the extents tile what follows."""
    listed: list[tuple[str, DType, Shape]] = [(n, DTYPES[d], s) for n, d, s in rows]
    header, extents = encode_header(listed, {}, alignment)
    length = int.from_bytes(header[:8], "little")
    assert len(header) == 8 + length
    assert len(header) % alignment == 0
    text = header[8:].rstrip(b" ")
    assert text.endswith(b"}")
    assert len(header) - 8 - len(text) < alignment
    assert list(json.loads(text)) == [name for name, _, _ in rows]
    end = len(header)
    for (_, dtype, shape), extent in zip(rows, extents, strict=True):
        assert extent == (0, end, nbytes(dtype, shape))
        end += extent.nbytes


def test_arrays_saved_by_the_library_are_read_and_written_alike(tmp_path: Path) -> None:
    """A file of ``safetensors.numpy.save_file`` is read exactly and its header made again."""
    arrays = {
        name: np.arange(6).reshape(2, 3).astype(dtype_of(name))
        for name in sorted(CODES)
        if not name.startswith(("float8", "bfloat16"))
    }
    arrays["scalar"] = np.array(7, np.int64)
    arrays["empty"] = np.zeros((0, 3), np.float32)
    path = tmp_path / "x.safetensors"
    library.save_file(arrays, path, {"format": "np"})
    content = path.read_bytes()
    found = by_us(path)
    assert found == by_the_library(content)
    for name, array in arrays.items():
        assert found[name][1:] == (list(array.shape), array.tobytes())
    rows = [(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    header = written_by_us(rows, {"format": "np"})[: -sum(a.nbytes for a in arrays.values())]
    assert content.startswith(header)


def fixture_files() -> list[Path]:
    """Return every safetensors file that is committed."""
    return sorted((Path(__file__).parents[2] / "fixtures" / "digits").rglob("*.safetensors"))


def test_every_committed_header_is_encoded_again_byte_for_byte() -> None:
    """What real writers wrote is what `encode_header` makes of what was read."""
    assert len(fixture_files()) > 20
    for path in fixture_files():
        index = read(str(path), {}).index
        rows = [(t.name, t.dtype, t.shape) for t in index.tensors]
        header, extents = encode_header(rows, index.metadata)
        assert path.read_bytes().startswith(header), path
        assert extents == [tensor.extent for tensor in index.tensors]
        assert rows == sorted(rows, key=lambda row: writing_order(row[1].name, row[0]))


# ---------------------------------------------------------------------------- shared indexes


def test_files_with_the_same_header_share_one_index(tmp_path: Path) -> None:
    """Equal headers over other bytes give the very same `Index` object, parsed once."""
    a = write_checkpoint(tmp_path / "a.safetensors", {"w": np.float32([1])})
    b = write_checkpoint(tmp_path / "b.safetensors", {"w": np.float32([2])})
    known: dict = {}
    first, second = read(str(a), known), read(str(b), known)
    assert first.index is second.index
    assert first.path != second.path
    assert first.files[0].path == str(a)
    assert second.files[0].path == str(b)


@pytest.mark.parametrize(
    "other", [{"v": np.float32([1])}, {"w": np.int32([1])}, {"w": np.float32([[1]])}]
)
def test_files_with_other_headers_have_other_indexes(
    tmp_path: Path, other: dict[str, np.ndarray]
) -> None:
    """Another name, dtype or shape is another index."""
    a = write_checkpoint(tmp_path / "a.safetensors", {"w": np.float32([1])})
    b = write_checkpoint(tmp_path / "b.safetensors", other)
    known: dict = {}
    assert read(str(a), known).index is not read(str(b), known).index


def test_an_equal_header_does_not_vouch_for_a_truncated_file(tmp_path: Path) -> None:
    """Sharing an index never skips the check of the file's size."""
    a = write_checkpoint(tmp_path / "a.safetensors", {"w": np.float32([1, 2])})
    known: dict = {}
    read(str(a), known)
    b = tmp_path / "b.safetensors"
    b.write_bytes(a.read_bytes()[:-4])
    with pytest.raises(InputError, match="truncated"):
        read(str(b), known)
