"""Outputs in HDF5: copies in which bytes are replaced, and new files like the last one."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import keras_files
import ml_dtypes
import numpy as np
import pytest

from ema_cli.blueprint import AVERAGE, BIASED, COPY, LOCAL_STEP, Entry, entry_of
from ema_cli.errors import Disagreement, UnsupportedInput
from ema_cli.formats import hdf5
from ema_cli.formats.hdf5 import drafting, names
from ema_cli.tensors import DTYPES, Checkpoint, Extent, Role

AVG = "ExponentialMovingAverage"
F32 = DTYPES["float32"]


def shadows(checkpoint: Checkpoint, end: str = AVG, *, keep: bool = False) -> list[Entry]:
    """Return the entries of a run with shadows: statistics keep their names, optimizers go."""
    entries = []
    for tensor in checkpoint.index.tensors:
        role = checkpoint.index.roles[tensor.name]
        if role is Role.OPTIMIZER:
            continue
        if role is not Role.VARIABLE or keep:
            entries.append(entry_of(tensor.name, tensor, COPY))
        if role is Role.VARIABLE:
            entries.append(entry_of(f"{tensor.name}/{end}", tensor, AVERAGE))
    return entries


@pytest.fixture
def legacy(tmp_path: Path) -> Checkpoint:
    """A whole model in the older layout."""
    return keras_files.read(keras_files.put(tmp_path / "in.h5", keras_files.MODEL_LEGACY))


@pytest.fixture
def archive(tmp_path: Path) -> Checkpoint:
    """A whole model in Keras 3's layout, in its archive."""
    return keras_files.read(keras_files.put(tmp_path / "in.keras", keras_files.MODEL_KERAS))


@pytest.fixture
def weights(tmp_path: Path, archive: Checkpoint) -> Checkpoint:
    """The weights of that archive alone."""
    [(_, offset, nbytes)] = archive.index.records
    data = keras_files.MODEL_KERAS[offset : offset + nbytes]
    return keras_files.read(keras_files.put(tmp_path / "in.weights.h5", data))


# ---------------------------------------------------------------------------- templates


def test_a_copy_differs_in_what_is_averaged_only(legacy: Checkpoint, tmp_path: Path) -> None:
    """The file of the last checkpoint, with other bytes at the tensors' places."""
    averaged = [t for t in legacy.index.tensors if t.name.endswith("kernel")]
    draft = hdf5.template(legacy, averaged)
    assert draft.files[0].copy_of == legacy.path and not draft.sums
    data = {t.name: bytes(range(t.nbytes)) for t in averaged}
    found = keras_files.build(draft, data, tmp_path / "out.h5").read_bytes()
    expected = bytearray(keras_files.MODEL_LEGACY)
    for tensor in averaged:
        expected[tensor.extent.offset : tensor.extent.offset + tensor.nbytes] = data[tensor.name]
    assert found == bytes(expected)


def test_what_spills_cannot_be_replaced_in_a_copy(tmp_path: Path) -> None:
    """Then a new file is made; what is only copied does not matter."""

    def fill(file: h5py.File) -> None:
        file["plain"] = np.float32([1, 2])
        file.create_dataset("packed", data=np.ones(9, "f4"), chunks=(4,), compression="gzip")

    last = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    by_name = last.index.by_name
    assert hdf5.template(last, [by_name["packed"]]) is None
    draft = hdf5.template(last, [by_name["plain"]])
    assert set(draft.places) == {"plain"}


# ---------------------------------------------------------------------------- new files


@pytest.mark.parametrize("name", ["legacy", "weights"])
def test_a_new_file_of_all_tensors_is_like_the_last(
    request: pytest.FixtureRequest, name: str, tmp_path: Path
) -> None:
    """Groups, attributes, order, roles and step; and the same request gives the same bytes."""
    last = request.getfixturevalue(name)
    data = keras_files.payload(last, tmp_path)
    path = tmp_path / "out.weights.h5"
    draft, found = keras_files.written(keras_files.copies(last), last, path, data)
    assert keras_files.attributes(path) == keras_files.attributes(Path(last.path))
    assert found.index.roles == last.index.roles
    assert found.index.roles_from == last.index.roles_from
    assert found.told_step == last.told_step
    assert hdf5.fresh(keras_files.copies(last)[::-1], last, None) == draft
    assert not draft.notes
    with h5py.File(path) as one, h5py.File(last.path) as other:
        for group in (group for group in last.index.own.structure.groups if group):
            assert set(one[group].attrs) == set(other[group].attrs)
            for key in {"layer_names", "weight_names"} & set(other[group].attrs):
                assert one[group].attrs[key].tolist() == other[group].attrs[key].tolist()


def test_tensors_lie_beside_each_other_as_keras_counts(tmp_path: Path) -> None:
    """Small ones make one stretch of bytes, and the tenth comes after the second."""

    def fill(file: h5py.File) -> None:
        for k in range(12):
            file[f"optimizer/vars/{k}"] = np.full(3, k, "f4")

    last = keras_files.read(keras_files.make(tmp_path / "x.weights.h5", fill))
    draft = hdf5.fresh(keras_files.copies(last), last, None)
    extents = [draft.places[f"optimizer/vars/{k}"].extent for k in range(12)]
    first = extents[0].offset
    assert extents == [Extent(0, first + 12 * k, 12) for k in range(12)]
    assert len(draft.files[0].literals) == 1


def test_dropped_tensors_take_their_groups_along(legacy: Checkpoint, tmp_path: Path) -> None:
    """Without its weights the optimizer's group would be one Keras stumbles over."""
    wanted = [e for e in keras_files.copies(legacy) if not e.name.startswith("optimizer")]
    data = keras_files.payload(legacy, tmp_path)
    keras_files.written(wanted, legacy, tmp_path / "out.h5", data)
    with h5py.File(tmp_path / "out.h5") as file:
        assert set(file) == {"model_weights"}
        assert "training_config" in file.attrs
        assert file["model_weights"].attrs["layer_names"].tolist() == [
            "input_layer_1",
            "first",
            "norm",
            "kept",
            "inner",
            "last",
        ]


def test_every_dtype_and_shape_is_written(tmp_path: Path) -> None:
    """From another format: scalars, empty tensors, and bfloat16 as Keras 3 marks it."""
    dtypes = ("float16", "bfloat16", "float32", "float64", "bool", "int8", "uint64", "complex64")
    shapes = {f"group/{name}": (name, (2, 3)) for name in dtypes}
    shapes |= {"scalar": ("float32", ()), "none": ("float32", (0, 4))}
    last = keras_files.foreign(shapes)
    data = {t.name: os.urandom(t.nbytes) for t in last.index.tensors}
    data["group/bool"] = bytes([0, 1, 1, 0, 0, 1])
    keras_files.written(keras_files.copies(last), last, tmp_path / "out.h5", data)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["group/bfloat16"].attrs["dtype"] == "bfloat16"
        assert file["group/bfloat16"].dtype == np.dtype("V2")
        assert file["group/bool"].dtype == bool
        for name, raw in data.items():
            assert file[name][()].tobytes() == raw


@pytest.mark.parametrize(
    ("dtype", "possible"),
    [
        ("bfloat16", True),
        ("bool", True),
        ("complex128", True),
        ("float8_e4m3fn", False),
        ("float6_e2m3fn", False),
        ("string", False),
        ("qint8", False),
        ("int4", False),
    ],
)
def test_what_a_dataset_can_hold(dtype: str, possible: bool) -> None:
    """What it cannot is left out by the plan."""
    assert hdf5.representable(DTYPES[dtype]) is possible


def test_a_big_endian_file_stays_one(tmp_path: Path) -> None:
    """The engine swaps what it writes; the types say so."""

    def fill(file: h5py.File) -> None:
        file["a"] = np.arange(5, dtype=">f4")
        file["b"] = np.arange(5, dtype=">c16")

    last = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    _, found = keras_files.written(
        keras_files.copies(last), last, tmp_path / "out.h5", keras_files.payload(last, tmp_path)
    )
    assert found.index.big_endian
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["a"][()].tolist() == list(range(5))


def test_strings_and_attributes_come_along(tmp_path: Path) -> None:
    """What a new file cannot hold is said: references and lists stay behind."""

    def fill(file: h5py.File) -> None:
        file["g/w"] = np.float32([1, 2])
        file["g/w"].attrs["unit"] = "m"
        file["g/texts"] = ["x", "yy"]
        file["g/texts"].attrs["n"] = 2
        file["g/fixed"] = np.array([b"ab", b"c"], "S2")
        file["g"].attrs.update(
            {"number": 3, "vector": [1.5, 2], "ü": "ä", "none": h5py.Empty("f4")}
        )
        file["g"].attrs["reference"] = file["g/w"].ref
        file.create_dataset("lists", (2,), dtype=h5py.vlen_dtype("f4"))

    path = keras_files.make(tmp_path / "x.h5", fill)
    last = keras_files.read(path)
    out = tmp_path / "out.h5"
    data = keras_files.payload(last, tmp_path)
    draft, _ = keras_files.written(keras_files.copies(last), last, out, data)
    assert draft.notes == ("attribute 'reference' of '/g' is not kept",)
    expected = keras_files.attributes(path)
    del expected["g"]["reference"], expected["lists"]
    assert keras_files.attributes(out) == expected
    with h5py.File(out) as file:
        assert file["g/texts"].asstr()[()].tolist() == ["x", "yy"]
        assert file["g/fixed"][()].tolist() == [b"ab", b"c"]


def test_texts_of_other_encodings_come_along(tmp_path: Path) -> None:
    """Names of layers and weights are bytes, whatever their encoding."""

    def fill(file: h5py.File) -> None:
        group = file.create_group("layers/vars")
        group["0"] = np.float32(1)
        group.attrs["name"] = np.array(b"bad\xff", "S4")
        group.attrs["weight_names"] = np.array([b"0", b"\xfe"], "S1")

    last = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    data = keras_files.payload(last, tmp_path)
    _, found = keras_files.written(keras_files.copies(last), last, tmp_path / "out.h5", data)
    [groups, others] = [c.index.own.structure.groups for c in (found, last)]
    assert groups["layers/vars"]["name"] == others["layers/vars"]["name"] == ("bad\udcff",)
    assert groups["layers/vars"]["weight_names"] == ("0",)


def test_packed_tensors_become_plain_ones(tmp_path: Path) -> None:
    """Chunks and filters are not taken over."""

    def fill(file: h5py.File) -> None:
        file.create_dataset("w", data=np.arange(99, dtype="f4"), chunks=(4,), compression="gzip")

    last = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    data = keras_files.payload(last, tmp_path)
    _, found = keras_files.written(keras_files.copies(last), last, tmp_path / "out.h5", data)
    assert found.files == found.files[:1]
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["w"][()].tolist() == list(range(99))


# ---------------------------------------------------------------------------- shadows


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("end", [AVG, "my/avg", "layers"])
def test_shadows_lie_in_a_tree_of_their_own(
    weights: Checkpoint, tmp_path: Path, end: str, keep: bool
) -> None:
    """It has the groups of the layers, and the names come back as they were asked for."""
    data = keras_files.payload(weights, tmp_path)
    out = tmp_path / "out.weights.h5"
    _, found = keras_files.written(shadows(weights, end, keep=keep), weights, out, data)
    tree = {AVG: AVG, "my/avg": "my.avg", "layers": "layers_1"}[end]
    assert found.index.lies_as[f"layers/dense/vars/0/{end}"] == f"{tree}/layers/dense/vars/0"
    assert f"layers/dense/vars/0/{end}" not in found.index.roles
    statistics = "layers/batch_normalization/vars/2"
    assert found.index.roles[statistics] is Role.STATISTICS
    with h5py.File(out) as file:
        assert file[tree].attrs["ema_avg_shadows"] == end
        assert file[f"{tree}/layers/dense/vars"].attrs["name"] == "first"
        assert ("layers/dense/vars" in file) is keep
        assert statistics in file


def layered(file: h5py.File) -> None:
    """Fill a file with one layer in the older layout of TensorFlow's Keras."""
    group = file.create_group("d")
    for name in ("d/kernel:0", "d/bias:0", "d/moving_mean:0"):
        group[name] = np.float32([1, 2])
    group.attrs["weight_names"] = [b"d/kernel:0", b"d/bias:0", b"d/moving_mean:0"]
    file.attrs["layer_names"] = [b"d", b"gone"]


def test_the_older_layout_has_room_for_shadows(tmp_path: Path) -> None:
    """Beside their variables, and in the lists of names."""
    last = keras_files.read(keras_files.make(tmp_path / "x.h5", layered))
    data = keras_files.payload(last, tmp_path)
    entries = shadows(last, keep=True)
    bias = last.index.by_name["d/d/bias:0"]
    entries.append(entry_of(f"d/d/bias:0/{AVG}/biased", bias, BIASED))
    entries.append(Entry(f"d/d/bias:0/{AVG}/local_step", F32, (), LOCAL_STEP, bias.name))
    draft = hdf5.fresh(entries, last, None)
    made = {e.name: data[e.source] if e.shape else bytes(4) for e in entries}
    out = keras_files.build(draft, made, tmp_path / "out.h5")
    found = keras_files.read(out)
    assert set(found.index.by_name) == {e.name for e in entries}
    assert found.index.lies_as == {
        f"d/d/kernel:0/{AVG}": f"d/d/kernel/{AVG}:0",
        f"d/d/bias:0/{AVG}": f"d/d/bias/{AVG}:0",
        f"d/d/bias:0/{AVG}/biased": f"d/d/bias/{AVG}/biased:0",
        f"d/d/bias:0/{AVG}/local_step": f"d/d/bias/{AVG}/local_step:0",
    }
    with h5py.File(out) as file:
        assert file["d"].attrs["weight_names"].tolist() == [
            "d/kernel:0",
            f"d/kernel/{AVG}:0",
            "d/bias:0",
            f"d/bias/{AVG}:0",
            f"d/bias/{AVG}/biased:0",
            f"d/bias/{AVG}/local_step:0",
            "d/moving_mean:0",
        ]
        assert file.attrs["layer_names"].tolist() == ["d"]


def test_shadows_of_an_output_are_kept_in_the_next(weights: Checkpoint, tmp_path: Path) -> None:
    """Names that are read from a tree go back to one, whatever the shadows are called."""
    data = keras_files.payload(weights, tmp_path)
    _, first = keras_files.written(
        shadows(weights, "avg", keep=True), weights, tmp_path / "a.h5", data
    )
    data = keras_files.payload(first, tmp_path)
    _, second = keras_files.written(keras_files.copies(first), first, tmp_path / "b.h5", data)
    assert second.index.lies_as == first.index.lies_as


def test_shadows_from_another_format_need_no_rule(tmp_path: Path) -> None:
    """TensorFlow's names, of which one lies within another, come apart."""
    shapes = {"w": ("float32", (2,)), f"w/{AVG}": ("float32", (2,)), f"b/{AVG}": ("float32", (2,))}
    last = keras_files.foreign(shapes)
    data = {name: os.urandom(8) for name in shapes}
    keras_files.written(keras_files.copies(last), last, tmp_path / "out.h5", data)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file[f"{AVG}/w"][()].tobytes() == data[f"w/{AVG}"]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (["w", "w.x/a", "w/b"], "'w/b' would have to lie in 'w'"),
        ([f"a:0/{AVG}", f"a/{AVG}:0"], "cannot hold"),
    ],
)
def test_names_that_cannot_stand_in_one_file(made: list[str], words: str) -> None:
    """Told before anything is written, with what helps."""
    last = keras_files.foreign(dict.fromkeys(made, ("float32", (2,))))
    with pytest.raises(Disagreement, match=words) as caught:
        hdf5.fresh(keras_files.copies(last), last, None)
    assert "--rule" in caught.value.hint


# ---------------------------------------------------------------------------- lists of names


def test_long_lists_are_split_as_keras_splits_them(tmp_path: Path) -> None:
    """Beyond 64,512 bytes an attribute has no room; the parts are read as one list again."""
    made = [f"{'long' * 50}/{k:04}" for k in range(700)]

    def fill(file: h5py.File) -> None:
        group = file.create_group("d")
        for name in made:
            group[name] = np.float32(1)
        parts = np.array_split(np.array([name.encode() for name in made]), 3)
        for k, part in enumerate(parts):
            group.attrs[f"weight_names{k}"] = part
        file.attrs["layer_names"] = [b"d"]

    last = keras_files.read(keras_files.make(tmp_path / "x.h5", fill))
    data = keras_files.payload(last, tmp_path)
    _, found = keras_files.written(keras_files.copies(last), last, tmp_path / "out.h5", data)
    own = found.index.own
    assert list(own.structure.groups["d"]["weight_names"]) == made
    with h5py.File(tmp_path / "out.h5") as one, h5py.File(last.path) as other:
        assert sorted(one["d"].attrs) == sorted(other["d"].attrs)
        for key in other["d"].attrs:
            assert one["d"].attrs[key].tolist() == other["d"].attrs[key].tolist()


def test_bfloat16_in_the_older_layout_is_noted(legacy: Checkpoint) -> None:
    """Keras does not load what it saves so itself; in its newer layout it does."""
    entries = [e._replace(dtype=DTYPES["bfloat16"]) for e in keras_files.copies(legacy)]
    assert "Keras does not load" in hdf5.fresh(entries, legacy, None).notes[0]


# ---------------------------------------------------------------------------- limits


def test_bfloat16_is_written_as_keras_writes_it(tmp_path: Path) -> None:
    """The same type and mark, so that Keras reads its values."""
    path = keras_files.put(tmp_path / "in.weights.h5", keras_files.BFLOAT16)
    last = keras_files.read(path)
    data = keras_files.payload(last, tmp_path)
    keras_files.written(keras_files.copies(last), last, tmp_path / "out.weights.h5", data)
    assert keras_files.attributes(tmp_path / "out.weights.h5") == keras_files.attributes(path)
    with h5py.File(tmp_path / "out.weights.h5") as file:
        values = file["layers/dense/vars/0"][()].view(ml_dtypes.bfloat16)
        assert np.isfinite(values.astype("f4")).all()
        assert values.tobytes() == data["layers/dense/vars/0"]


def test_more_than_can_be_read_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of objects holds for outputs too."""
    monkeypatch.setattr(drafting, "OBJECT_LIMIT", 10)
    last = keras_files.foreign({f"w{k}": ("float32", ()) for k in range(11)})
    with pytest.raises(UnsupportedInput, match="12 groups and datasets"):
        hdf5.fresh(keras_files.copies(last), last, None)


def test_a_name_of_many_parts_can_be_read_again(tmp_path: Path) -> None:
    """The deepest name that can be given lies, as a shadow's, within what is read."""
    name = "/".join("abcdefghij" * 6)
    assert names.can_name(name) and not names.can_name(f"{name}/k")
    last = keras_files.foreign({name: ("float32", ())})
    entry = entry_of(f"{name}/{AVG}", last.index.tensors[0], AVERAGE)
    keras_files.written([entry], last, tmp_path / "out.h5", {name: bytes(4)})
