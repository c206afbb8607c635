"""HDF5 files and .keras archives are read where their bytes lie, or spilled bit for bit."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import keras_files
import ml_dtypes
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t
from hypothesis import given
from hypothesis import strategies as st

from ema_cli.errors import InputError, UnsupportedInput
from ema_cli.formats.hdf5 import isolation, reading, spilling
from ema_cli.tensors import Role

NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "c8", "c16", "?")
NAMES = {
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
    "?": "bool",
    **{f"{k}{n}": f"{'u' if k == 'u' else ''}int{8 * n}" for k in "iu" for n in (1, 2, 4, 8)},
}


def check_values(path: Path, folder: Path, known: dict | None = None) -> None:
    """Hold every tensor of a file against what h5py reads, little-endian."""
    checkpoint = keras_files.read(path, known)
    assert not checkpoint.index.big_endian
    found = keras_files.payload(checkpoint, folder)
    with h5py.File(path) as file:
        for name, data in found.items():
            assert data == keras_files.value(file[name][()]).tobytes(), name


# ---------------------------------------------------------------------------- in place


@pytest.mark.parametrize("userblock", [0, 512, 4096])
def test_each_dtype_lies_in_the_file_byte_for_byte(tmp_path: Path, userblock: int) -> None:
    """Contiguous numbers are told by offset; nothing spills."""

    def fill(file: h5py.File) -> None:
        for code in NUMBERS:
            file[f"group/{code}"] = np.arange(6).reshape(2, 3).astype(code)
        file["scalar"] = np.float32(7)
        file.create_dataset("none", (0, 3), "f4")

    path = keras_files.make(tmp_path / "x.h5", fill, userblock_size=userblock)
    checkpoint = keras_files.read(path)
    assert checkpoint.files == (checkpoint.files[0],)
    by_name = checkpoint.index.by_name
    assert {c: by_name[f"group/{c}"].dtype.name for c in NUMBERS} == NAMES
    assert by_name["scalar"].shape == ()
    assert by_name["none"].nbytes == 0
    check_values(path, tmp_path)
    offsets = [tensor.extent[:2] for tensor in checkpoint.index.tensors]
    assert offsets == sorted(offsets)


def test_big_endian_numbers_stay_where_they_are(tmp_path: Path) -> None:
    """A file of one byte order is read in place, and the index says which."""

    def fill(file: h5py.File) -> None:
        file["a"] = np.arange(5, dtype=">f4")
        file["b"] = np.arange(5, dtype=">i8")
        file["c"] = np.int8(3)

    checkpoint = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    assert checkpoint.index.big_endian
    assert keras_files.payload(checkpoint, tmp_path)["a"] == np.arange(5, dtype=">f4").tobytes()


def test_two_names_of_one_dataset_share_their_bytes(tmp_path: Path) -> None:
    """Tied weights are two tensors with one extent, in place and spilled."""

    def fill(file: h5py.File) -> None:
        file["w"] = np.arange(4, dtype="f4")
        file["tied"] = file["w"]
        file.create_dataset("packed", data=np.arange(9, dtype="f4"), chunks=(4,))
        file["packed too"] = file["packed"]

    index = keras_files.read(keras_files.make(tmp_path / "x.h5", fill)).index
    assert index.by_name["w"].extent == index.by_name["tied"].extent
    assert index.by_name["packed"].extent == index.by_name["packed too"].extent


def test_what_is_no_tensor_is_passed_over(tmp_path: Path) -> None:
    """Strings, records, lists, references and types are neither tensors nor errors."""

    def fill(file: h5py.File) -> None:
        file["w"] = np.float32(1)
        file["text"] = "x"
        file["texts"] = ["x", "yy"]
        file["fixed"] = np.array([b"ab"], "S2")
        file["records"] = np.zeros(2, [("a", "i4"), ("b", "f8")])
        file.create_dataset("lists", (2,), dtype=h5py.vlen_dtype("f4"))
        file.create_dataset("references", (2,), dtype=h5py.ref_dtype)
        file["nothing"] = h5py.Empty("f4")
        file["letters"] = np.zeros(2, h5py.enum_dtype({"A": 0, "B": 1, "C": 2}, "i1"))
        file["type"] = np.dtype("f8")
        file["other type"] = np.zeros(2, "V7")

    checkpoint = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    assert list(checkpoint.index.by_name) == ["w"]
    assert len(reading.own_of(checkpoint.index).structure.others) == 10


def test_the_parent_never_loads_the_library(tmp_path: Path) -> None:
    """Reading and spilling leave h5py to the child process."""

    def fill(file: h5py.File) -> None:
        file.create_dataset("w", data=np.arange(9, dtype="f4"), chunks=(4,))

    path = keras_files.make(tmp_path / "x.h5", fill)
    (tmp_path / "out").write_bytes(bytes(36))
    code = (
        "import sys; from ema_cli.formats import hdf5\n"
        "c = hdf5.read(sys.argv[1], {}); hdf5.spill(c, ['w'], sys.argv[2])\n"
        "assert not {m for m in sys.modules if m.startswith('h5py')}"
    )
    folder = os.path.dirname(os.path.dirname(reading.__file__.split("formats")[0]))
    subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "out"],
        check=True,
        env={**os.environ, "PYTHONPATH": folder},
    )
    assert (tmp_path / "out").read_bytes() == np.arange(9, dtype="f4").tobytes()


# ---------------------------------------------------------------------------- spilled


def compact(file: h5py.File, name: str, values: np.ndarray, kind: h5t.TypeID) -> None:
    """Put a dataset into its object header."""
    how = h5p.create(h5p.DATASET_CREATE)
    how.set_layout(h5d.COMPACT)
    space = h5s.create_simple(values.shape)
    h5d.create(file.id, name.encode(), kind, space, how).write(h5s.ALL, h5s.ALL, values)


def test_what_does_not_lie_as_one_spills(tmp_path: Path) -> None:
    """Chunked, filtered, compact, unwritten and byte-swapped tensors come out little-endian."""
    rng = np.random.default_rng(3)

    def fill(file: h5py.File) -> None:
        file["plain"] = np.float32([1, 2])
        wide = rng.normal(size=(40, 17)).astype("f4")
        file.create_dataset(
            "all", data=wide, chunks=(7, 5), compression="gzip", shuffle=True, fletcher32=True
        )
        file.create_dataset("lzf", data=np.arange(50.0), chunks=(7,), compression="lzf")
        file.create_dataset("swapped chunks", data=wide.astype(">f8"), chunks=(9, 17))
        file.create_dataset("half written", (6,), "f4", chunks=(4,), fillvalue=2)[:2] = 1
        file.create_dataset("filled", (5,), "i2", fillvalue=3)
        file["swapped"] = np.arange(3, dtype=">c8")
        compact(file, "compact", np.arange(5, dtype="f4"), h5t.IEEE_F32BE)
        half = np.arange(6).astype(ml_dtypes.bfloat16)
        file.create_dataset("half", data=half, chunks=(4,)).attrs["dtype"] = "bfloat16"
        file.create_dataset("flags", data=np.array([True, False]), chunks=(1,))

    path = keras_files.make(tmp_path / "x.h5", fill)
    checkpoint = keras_files.read(path)
    files = {t.name: t.extent.file for t in checkpoint.index.tensors}
    assert {name for name, file in files.items() if not file} == {"plain"}
    assert checkpoint.files[1].path == "" and checkpoint.digests[1] == ""
    assert checkpoint.index.names == ("", "")
    check_values(path, tmp_path)


def test_only_what_is_asked_for_is_spilled(tmp_path: Path) -> None:
    """The bytes of other tensors stay as the file had them."""

    def fill(file: h5py.File) -> None:
        for name in "ab":
            file.create_dataset(name, data=np.ones(64, "f4"), chunks=(8,))

    checkpoint = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    target = tmp_path / "spilled"
    target.write_bytes(bytes(checkpoint.files[1].size))
    reading.spill(checkpoint, ["b"], os.fspath(target))
    assert np.frombuffer(target.read_bytes(), "f4").tolist() == [0] * 64 + [1] * 64


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), max_size=4),
    st.booleans(),
    st.integers(1, 64),
)
def test_boxes_and_their_rows_cover_a_tensor_once(
    dimensions: list[tuple[int, int]], chunked: bool, limit: int
) -> None:
    """Each element is read once, by whole chunks, in boxes no larger than needed."""
    shape = tuple(n for n, _ in dimensions)
    chunk = tuple(c for _, c in dimensions) if chunked else ()
    width = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spilling, "BOX_BYTES", limit * width)
        boxes = spilling.boxes_of(shape, chunk, width)
    seen = np.zeros(int(np.prod(shape)), int)
    for box in boxes:
        starts, lengths = box
        assert all(s % c == 0 for s, c in zip(starts, chunk, strict=False))
        rows = list(spilling.rows_of(shape, box, width))
        assert sum(n for _, n in rows) == int(np.prod(lengths)) * width
        flat = np.arange(seen.size).reshape(shape)
        part = flat[tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))]
        found = itertools.chain(*(range(o // width, (o + n) // width) for o, n in rows))
        assert list(found) == part.reshape(-1).tolist()
        seen[part.reshape(-1)] += 1
        one = int(np.prod([min(c, n) for n, c in dimensions])) if chunked else 1
        assert int(np.prod(lengths)) <= max(limit, one)
    assert (seen == 1).all()


# ---------------------------------------------------------------------------- bfloat16


def test_marked_opaque_bytes_are_bfloat16(tmp_path: Path) -> None:
    """Keras 3 marks them with an attribute."""
    path = keras_files.put(tmp_path / "x.weights.h5", keras_files.BFLOAT16)
    index = keras_files.read(path).index
    assert {tensor.dtype.name for tensor in index.tensors} == {"bfloat16"}


def test_the_older_layout_marks_nothing_and_its_policy_tells(tmp_path: Path) -> None:
    """In a legacy file the dtype policy of the model's configuration decides."""
    path = keras_files.put(tmp_path / "x.h5", keras_files.BFLOAT16_LEGACY)
    index = keras_files.read(path).index
    assert {tensor.dtype.name for tensor in index.tensors} == {"bfloat16"}
    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace("bfloat16", "float32")
    with pytest.raises(UnsupportedInput, match="2 opaque bytes"):
        keras_files.read(path)


def test_hdf5s_own_bfloat16_is_one(tmp_path: Path) -> None:
    """HDF5 2 describes bfloat16 as a float; both byte orders are read."""
    values = np.arange(-3, 3).astype(ml_dtypes.bfloat16)

    def fill(file: h5py.File) -> None:
        for name, order in (("little", h5t.ORDER_LE), ("big", h5t.ORDER_BE)):
            kind = h5t.IEEE_F16LE.copy()
            kind.set_fields(15, 7, 8, 0, 7)
            kind.set_ebias(127)
            kind.set_order(order)
            dataset = h5d.create(file.id, name.encode(), kind, h5s.create_simple((6,)))
            raw = values.view("u2").astype("<u2" if name == "little" else ">u2").view("V2")
            dataset.write(h5s.ALL, h5s.ALL, raw, kind)

    checkpoint = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    assert {tensor.dtype.name for tensor in checkpoint.index.tensors} == {"bfloat16"}
    found = keras_files.payload(checkpoint, tmp_path)
    assert found == {"little": values.tobytes(), "big": values.tobytes()}


# ---------------------------------------------------------------------------- one index, one child


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with each file the child process lists."""
    calls: list[str] = []
    real = isolation.list_file

    def counted(fd: int, path: str, window: isolation.Window) -> object:
        calls.append(path)
        return real(fd, path, window)

    monkeypatch.setattr(isolation, "list_file", counted)
    return calls


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_the_checkpoints_of_a_run_are_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Files that differ in tensors only share one index; the step is each one's own."""
    first = keras_files.MODEL_LEGACY if suffix == ".h5" else keras_files.MODEL_KERAS
    one = keras_files.read(keras_files.put(tmp_path / f"a{suffix}", first))
    step = one.index.by_name[one.told_step[1]].extent.offset
    other = bytearray(first)
    other[step] = 9
    calls = counting(monkeypatch)
    known: dict = {}
    found = [
        keras_files.read(keras_files.put(tmp_path / f"{k}{suffix}", data), known)
        for k, data in enumerate([first, bytes(other), first])
    ]
    assert len(calls) == 1
    assert found[0].index is found[1].index is found[2].index
    assert [c.told_step[0] for c in found] == [3, 9, 3]
    assert found[0].digests == found[1].digests


def test_another_structure_of_the_same_size_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed byte outside the tensors is another file."""
    calls = counting(monkeypatch)
    known: dict = {}
    indexes = []
    for name in ("x", "y"):
        path = tmp_path / f"{name}.h5"
        keras_files.make(path, lambda file, name=name: file.create_dataset(name, data=[1.0]))
        indexes.append(keras_files.read(path, known).index)
    assert len(calls) == 2
    assert [list(index.by_name) for index in indexes] == [["x"], ["y"]]


@pytest.mark.parametrize(
    "make",
    [
        lambda group: group.__setitem__("0", np.int64(77)),
        lambda group: group.__setitem__("0", np.array(77, ">i8")),
        lambda group: group.create_dataset("0", (), "i8", fillvalue=77),
    ],
    ids=["in place", "swapped", "unwritten"],
)
def test_the_optimizers_count_is_the_step(
    tmp_path: Path, make: Callable[[h5py.Group], None]
) -> None:
    """`optimizer/vars/0` is read wherever it lies."""

    def fill(file: h5py.File) -> None:
        file["layers/dense/vars/0"] = np.float32([1])
        make(file.create_group("optimizer/vars"))

    checkpoint = keras_files.read(keras_files.make(tmp_path / "x.weights.h5", fill))
    assert checkpoint.told_step == (77, "optimizer/vars/0")


# ---------------------------------------------------------------------------- whole files


def test_real_files_are_read(tmp_path: Path) -> None:
    """Roles and versions of what Keras wrote; the rest is in test_keras_names."""
    checkpoint = keras_files.read(keras_files.put(tmp_path / "x.h5", keras_files.MODEL_LEGACY))
    assert checkpoint.index.metadata == {"keras_version": "3.15.1", "backend": "tensorflow"}
    assert checkpoint.told_step == (3, "optimizer_weights/sgd/iteration")
    assert set(checkpoint.index.roles.values()) == {
        Role.VARIABLE,
        Role.STATISTICS,
        Role.OPTIMIZER,
        Role.FIXED,
    }


@pytest.mark.parametrize("data", [keras_files.MODEL_KERAS, keras_files.SUBCLASSED])
def test_no_prefix_of_a_file_is_a_file(tmp_path: Path, data: bytes) -> None:
    """A truncated file is refused: HDF5 stores where it ends, a zip file where its end lies."""
    suffix = ".keras" if data is keras_files.MODEL_KERAS else ".h5"
    lengths = [*range(0, 600, 7), *range(600, len(data), 499), *range(len(data) - 40, len(data))]
    for length in lengths:
        path = keras_files.put(tmp_path / f"x{suffix}", data[:length])
        with pytest.raises(InputError) as caught:
            keras_files.read(path)
        assert caught.value.message.isprintable()
