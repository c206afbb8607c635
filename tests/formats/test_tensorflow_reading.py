"""Checkpoints written by hand and by TensorFlow: every tensor is read as it was saved."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import BF16, bits_equal, dtype_of
from tensorflow_bundles import (
    ALL,
    NUMBER_OF,
    NUMBERS,
    QUANTIZED,
    STRING,
    VARIANT,
    Opaque,
    Rows,
    Sliced,
    read_bundle,
    rewritten,
    strings,
    variants,
    write_bundle,
)

import ema_cli
from ema_cli.errors import DamagedFile
from ema_cli.formats import read
from ema_cli.formats.tensorflow import entries, ordered, table
from ema_cli.formats.tensorflow.strings import decode
from ema_cli.reading import TensorReader
from ema_cli.tensors import Checkpoint, Tensor

FIXTURES = Path(__file__).resolve().parent.parent.parent / "fixtures" / "tensorflow"
GOLDEN = json.loads((FIXTURES / "golden.json").read_bytes())["tensors"]


def value_of(checkpoint: Checkpoint, tensor: Tensor) -> Any:
    """A tensor as the package reads it: an array, or a list of strings; checksums verified."""
    with TensorReader(checkpoint, tensor) as reader:
        flat = reader.block(0, reader.elements)
    if tensor.dtype.name == "string":
        return decode(flat.tobytes(), tensor.elements)
    return flat if tensor.dtype.name == "variant" else flat.reshape(tensor.shape)


def values_of(path: Path | str) -> dict[str, Any]:
    """Everything in a checkpoint as the package reads it."""
    checkpoint = read(str(path), {})
    return {tensor.name: value_of(checkpoint, tensor) for tensor in checkpoint.index.tensors}


def same(found: Any, expected: Any) -> bool:
    """Whether two values have the same strings, or the same dtype, shape and bits."""
    if isinstance(expected, list):
        return bool(found == expected)
    return bits_equal(np.asarray(found), np.asarray(expected))


# ---------------------------------------------------------------------------- dtypes


def samples(name: str) -> np.ndarray:
    """Eight values of a dtype, the odd ones included."""
    dtype = dtype_of(name)
    if name == "bool":
        return np.array([0, 1, 1, 0, 1, 0, 0, 1], bool)
    if name.startswith(("int", "uint")) and name[-1] in "24" and dtype.itemsize == 1:
        return np.array([0, 1, 0, 1, 1, 1, 0, 0]).astype(dtype)
    if name == "float4_e2m1fn":
        return np.array([0, 0.5, 1, 1.5, 2, 3, 4, -6]).astype(dtype)
    rng = np.random.default_rng(dtype.itemsize)
    return np.frombuffer(rng.bytes(8 * dtype.itemsize), dtype)


@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
@pytest.mark.parametrize("number", sorted(NUMBERS))
def test_each_dtype_is_read_in_either_byte_order(
    tmp_path: Path, number: int, big_endian: bool
) -> None:
    """Dtype, shape and bits: as a matrix, a scalar, and without elements."""
    value = samples(NUMBERS[number])
    tensors = {"m": value.reshape(2, 4), "s": value[3], "none": value[:0].reshape(3, 0)}
    found = values_of(write_bundle(tmp_path / "x", tensors, big_endian=big_endian))
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert same(found[name], expected), name


@pytest.mark.parametrize("number", sorted(QUANTIZED))
def test_quantised_numbers_are_read_as_what_they_are_stored_as(tmp_path: Path, number: int) -> None:
    """``qint8`` and its like keep their own names."""
    value = samples(QUANTIZED[number])
    prefix = write_bundle(tmp_path / "x", {"q": Opaque(number, (8,), value.tobytes())})
    [tensor] = read(str(prefix), {}).index.tensors
    assert tensor.dtype.name == f"q{QUANTIZED[number]}"
    assert same(values_of(prefix)["q"], value)


def test_no_number_of_a_dtype_is_left_out() -> None:
    """1 to 33 are all there but 20: a resource lives in memory only."""
    known = {*NUMBERS, *QUANTIZED, STRING, VARIANT}
    assert known == set(range(1, 34)) - {20} == set(entries.DTYPE_NAMES)


def test_numbers_of_less_than_a_byte_take_one_each(tmp_path: Path) -> None:
    """An int4 is stored as ml_dtypes holds it: in the low bits of a byte, sign extended."""
    prefix = write_bundle(tmp_path / "x", {"q": np.array([-8, 7, -1], ml_dtypes.int4)})
    assert [int(value) for value in values_of(prefix)["q"]] == [-8, 7, -1]
    [tensor] = read(str(prefix), {}).index.tensors
    assert tensor.extent.nbytes == 3


TEXTS: dict[str, tuple[list[bytes], tuple[int, ...]]] = {
    "scalar": ([b"hello"], ()),
    "matrix": ([b"ab", b"", b"\0\xff", b"x" * 300], (2, 2)),
    "none": ([], (3, 0)),
}


@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_strings_are_read_in_either_byte_order(tmp_path: Path, big_endian: bool) -> None:
    """Scalars, matrices and none at all, short ones and long ones."""
    tensors = {n: strings(v, s, big_endian=big_endian) for n, (v, s) in TEXTS.items()}
    prefix = write_bundle(tmp_path / "x", tensors, big_endian=big_endian)
    assert values_of(prefix) == {name: found for name, (found, _) in TEXTS.items()}
    assert read_bundle(prefix) == values_of(prefix)


def test_strings_without_a_byte_are_read_too(tmp_path: Path) -> None:
    """No strings are four bytes of checksum, or nothing: TensorFlow reads both."""
    prefix = write_bundle(tmp_path / "x", {"s": Opaque(STRING, (0,), b""), "w": np.float32(1)})
    assert values_of(prefix)["s"] == []


def test_variants_are_carried_as_bytes(tmp_path: Path) -> None:
    """What a list of tensors holds is nobody's business."""
    made = variants([b"one", b""])
    prefix = write_bundle(tmp_path / "x", {"list": made})
    assert values_of(prefix)["list"].tobytes() == made.data


# ---------------------------------------------------------------------------- names

SLICE_KEY = ordered.slice_key(b"v", ((0, 2), ALL))
NAMES = [
    b"plain/name",
    b"\0",
    b"\0\0\xff\xff",
    b"\xff\0\xff",
    b"a\0b",
    b"\xc3\x28",
    "größe/重み".encode(),
    b"n" * 3000,
    SLICE_KEY,
    SLICE_KEY[:-1],
    b"v",
    b"../../etc/passwd",
]


def test_names_hold_any_bytes(tmp_path: Path) -> None:
    """Zero bytes, bytes that are no UTF-8, what looks like the key of a slice: names as others."""
    tensors = {name: np.float32([k]) for k, name in enumerate(NAMES)}
    prefix = write_bundle(tmp_path / "x", tensors)
    found = values_of(prefix)
    assert {name.encode("utf-8", "surrogateescape") for name in found} == set(NAMES)
    for k, name in enumerate(NAMES):
        assert list(found[name.decode("utf-8", "surrogateescape")]) == [k]


@pytest.mark.parametrize("name", [b"v", b"a\0b", b"\xff\xfe", b"\0\x01"])
def test_slices_of_any_name_are_found(tmp_path: Path, name: bytes) -> None:
    """The key of a slice codes the name; slices of others do not get in its way."""
    value = np.arange(24, dtype=np.float32).reshape(4, 6)
    sliced = Sliced(value, [((0, 3), ALL), ((3, 1), ALL)])
    other = ordered.slice_key(name, ((0, 1), ALL))  # not one of its slices: a name
    prefix = write_bundle(tmp_path / "x", {name: sliced, other: np.float64(7)})
    found = values_of(prefix)
    assert len(found) == 2
    assert same(found[name.decode("utf-8", "surrogateescape")], value)
    assert same(found[other.decode("utf-8", "surrogateescape")], np.float64(7))


# ---------------------------------------------------------------------------- where tensors lie


@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_and_gaps(tmp_path: Path, shards: int, gap: int) -> None:
    """Tensors in any shard, at odd offsets, with bytes between them that belong to none."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {f"t{k}": rng.normal(size=k).astype("f4") for k in range(7)}
    tensors["i"] = np.int64(3)
    tensors["v"] = Sliced(rng.normal(size=(5, 4)), [(ALL, (0, 1)), (ALL, (1, 3))])
    prefix = write_bundle(tmp_path / "x", tensors, shards=shards, gap=gap)
    found = values_of(prefix)
    for name, value in tensors.items():
        assert same(found[name], value.value if isinstance(value, Sliced) else value), name
    index = read(str(prefix), {}).index
    places = [tensor.extents[0][:2] for tensor in index.tensors]
    assert places == sorted(places)
    assert index.names == (*(f".data-{k:05}-of-{shards:05}" for k in range(shards)), ".index")


def test_two_entries_share_a_range(tmp_path: Path) -> None:
    """One tensor under two names, even as another dtype, is read under both."""

    def share(rows: Rows) -> None:
        rows[b"tied"] = replace(rows[b"w"])
        rows[b"bits"] = replace(rows[b"w"], dtype=NUMBER_OF["uint32"])

    value = np.float32([1, 2, 3])
    found = values_of(write_bundle(tmp_path / "x", {"w": value, "b": value}, change=share))
    assert same(found["tied"], value)
    assert same(found["bits"], value.view(np.uint32))


def test_two_slices_of_a_tensor_do_not_share_a_range(tmp_path: Path) -> None:
    """No writer stores one part of a tensor for another; parts without a byte may lie anywhere."""

    def share(rows: Rows) -> None:
        first, second = sorted(key for key in rows if key.startswith(b"\0"))
        rows[second] = replace(rows[first], shape=rows[second].shape)

    value = np.float32([1, 2, 1, 2])
    sliced = Sliced(value, [((0, 2),), ((2, 2),)])
    prefix = write_bundle(tmp_path / "x", {"v": sliced}, change=share)
    with pytest.raises(DamagedFile, match="tensor 'v'"):
        read(str(prefix), {})
    empty = Sliced(value[:0].reshape(0, 3), [(ALL, (0, 1)), (ALL, (1, 2))])
    prefix = write_bundle(tmp_path / "y", {"v": empty}, change=share)
    assert same(values_of(prefix)["v"], empty.value)


def test_big_endian_slices(tmp_path: Path) -> None:
    """The bytes of each slice change places, halves of complex numbers apart."""
    value = (np.arange(12) + 1j * np.arange(12)[::-1]).astype(np.complex128).reshape(3, 4)
    sliced = Sliced(value, [(ALL, (0, 3)), (ALL, (3, 1))])
    prefix = write_bundle(tmp_path / "x", {"c": sliced}, big_endian=True)
    assert same(values_of(prefix)["c"], value)
    assert same(read_bundle(prefix)["c"], value)


def test_a_compressed_index_is_read(tmp_path: Path) -> None:
    """LevelDB's own default: the entries are the same."""
    tensors = {f"layer_{k}/kernel": np.full(3, k, BF16) for k in range(20)}
    prefix = write_bundle(tmp_path / "x", tensors, compress=True)
    items = table.read(Path(f"{prefix}.index").read_bytes())
    assert {item.offset for item in items} == {-1}
    found = values_of(prefix)
    assert all(same(found[name], value) for name, value in tensors.items())


def test_a_shard_number_on_the_whole_of_slices_means_nothing(tmp_path: Path) -> None:
    """TensorFlow leaves one there when it merges; so do its size, offset and checksum."""
    value = np.arange(4, dtype=np.float32)
    prefix = write_bundle(tmp_path / "x", {"v": Sliced(value, [((0, 1),), ((1, 3),)])})

    def set_all(rows: Rows) -> None:
        entry = rows[b"v"].encoded()
        more = entries.encode_entry(entries.Entry(1, (4,), 77, 1 << 40, 3, 9))
        rows[b"v"].value = entry + more[entry.index(b"\x3a") :]

    assert same(values_of(rewritten(prefix, set_all))["v"], value)


# ---------------------------------------------------------------------------- TensorFlow's own


def digest(value: Any) -> str:
    """SHA-256 of little-endian bytes, or of strings that each follow their length as 8 bytes."""
    if isinstance(value, list):
        value = b"".join(len(one).to_bytes(8, "little") + one for one in value)
        return hashlib.sha256(value).hexdigest()
    return hashlib.sha256(value.tobytes()).hexdigest()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_package_reads_what_tensorflow_reads(name: str) -> None:
    """Every tensor that TensorFlow saved: its dtype, its shape and the digest of its bytes."""
    path = FIXTURES / name
    checkpoint = ema_cli.inspect(path)
    assert isinstance(checkpoint, Checkpoint)
    found = {
        tensor.name: [tensor.dtype.name, list(tensor.shape), digest(value_of(checkpoint, tensor))]
        for tensor in checkpoint.index.tensors
    }
    assert found == GOLDEN[name]
    by_hand = read_bundle(path if not path.is_dir() else path / "variables" / "variables")
    assert {key: digest(value) for key, value in by_hand.items()} == {
        key: row[2] for key, row in GOLDEN[name].items()
    }


def test_golden_values_cover_the_fixtures() -> None:
    """First and last checkpoint of every run, and all kinds of dtypes."""
    folders = {name.rpartition("/")[0] for name in GOLDEN}
    assert {"graph", "partitioned", "keras/compiled", "keras/uncompiled"} <= folders
    kinds = {row[0] for tensors in GOLDEN.values() for row in tensors.values()}
    assert {"string", "float32", "bfloat16", "float16", "int64"} <= kinds


# ---------------------------------------------------------------------------- shared indexes


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The entries that are parsed while a test runs."""
    seen: list[bytes] = []
    parse = entries.parse_entry

    def counted(value: bytes) -> entries.Entry:
        seen.append(value)
        return parse(value)

    monkeypatch.setattr(entries, "parse_entry", counted)
    return seen


def test_indexes_that_differ_in_checksums_only_are_parsed_once(
    tmp_path: Path, parsed: list[bytes]
) -> None:
    """Twenty checkpoints of one structure cost one index, and each has its own checksums."""
    known: dict[Any, Any] = {}
    expected = []
    for k in range(20):
        tensors = {f"t{n}": np.float32([k, n]) for n in range(10)}
        tensors["v"] = Sliced(np.full((4, 2), k, np.float16), [((0, 1), ALL), ((1, 3), ALL)])
        expected.append(write_bundle(tmp_path / f"m-{k}", tensors, shards=2))
    found = [read(str(prefix), known) for prefix in expected]
    assert len(parsed) == 13
    assert len({id(checkpoint.index) for checkpoint in found}) == 1
    assert len({tuple(np.asarray(checkpoint.checksums)) for checkpoint in found}) == 20
    for k, checkpoint in enumerate(found):
        by_name = checkpoint.index.by_name
        assert list(value_of(checkpoint, by_name["t7"])) == [k, 7]
        assert (value_of(checkpoint, by_name["v"]) == k).all()


def test_an_index_of_the_same_size_that_says_something_else_is_parsed(
    tmp_path: Path, parsed: list[bytes]
) -> None:
    """Another name, another shape, another place: never taken for the one before."""
    known: dict[Any, Any] = {}
    variants_of_it: list[dict[str, Any]] = [
        {"a": np.float32([1, 2]), "b": np.int32([3, 4])},
        {"a": np.float32([1, 2]), "c": np.int32([3, 4])},
        {"a": np.float32([[1], [2]]).reshape(2), "c": np.float32([3, 4])},
        {"b": np.float32([5, 6]), "a": np.int32([7, 8])},
    ]
    sizes = set()
    for k, tensors in enumerate(variants_of_it):
        prefix = write_bundle(tmp_path / f"m-{k}", tensors)
        sizes.add(Path(f"{prefix}.index").stat().st_size)
        checkpoint = read(str(prefix), known)
        assert {t.name for t in checkpoint.index.tensors} == set(tensors)
        for tensor in checkpoint.index.tensors:
            assert same(value_of(checkpoint, tensor), tensors[tensor.name])
    assert len(sizes) == 1
    assert len(parsed) == 8


def test_the_fixtures_share_their_indexes() -> None:
    """Sixteen checkpoints of TensorFlow's graph run have one index."""
    run = ema_cli.inspect(FIXTURES / "graph")
    assert not isinstance(run, Checkpoint)
    assert len(run.checkpoints) == 16
    assert len({id(checkpoint.index) for checkpoint in run.checkpoints}) == 1


def test_an_index_may_have_many_blocks(tmp_path: Path) -> None:
    """Twelve thousand tensors fill more than one block of 256 KiB."""
    tensors = {f"layer_{k:05}/a_rather_long_name": np.float32(k) for k in range(12_000)}
    prefix = write_bundle(tmp_path / "x", tensors)
    assert Path(f"{prefix}.index").stat().st_size > 1 << 18
    index = read(str(prefix), {}).index
    assert [tensor.name for tensor in index.tensors] == list(tensors)
    assert sum(math.prod(tensor.shape) for tensor in index.tensors) == 12_000
