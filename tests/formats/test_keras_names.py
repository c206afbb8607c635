"""What the tensors of a Keras file are called and what they are for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import keras_files
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_cli.errors import DamagedFile
from ema_cli.formats.hdf5 import config, keras, names
from ema_cli.formats.hdf5.names import Shadows
from ema_cli.formats.hdf5.structure import Dataset, Structure
from ema_cli.tensors import Role

V, S, O, F = Role.VARIABLE, Role.STATISTICS, Role.OPTIMIZER, Role.FIXED  # noqa: E741
AVG = "ExponentialMovingAverage"

# ---------------------------------------------------------------------------- names


words = st.sampled_from(["a", "b:0", "vars", "0", "x y", "ä", AVG, "biased", "local_step", "avg"])
paths = st.lists(words, min_size=1, max_size=4).map("/".join)


@given(
    st.dictionaries(paths, st.sampled_from(["", AVG, "avg", f"{AVG}/biased", "a/b"]), max_size=6)
)
def test_a_name_and_its_dataset_tell_each_other(made: dict[str, str]) -> None:
    """Whatever is put into a file is called the same when it is read, or was refused before."""
    pairs = [(f"{source}/{end}" if end else source, source) for source, end in made.items()]
    shadows = names.shadows_of(pairs, Shadows())
    trees = {tree for _, tree in shadows.trees}
    for name, _ in pairs:
        path = names.dataset_path(name, shadows)
        back = names.tensor_name(path, shadows)
        inside = path.split("/")[0] in trees
        # A plain name that looks like a shadow's dataset is told apart by `drafting`.
        assert back == name or (path == name and not inside)


@pytest.mark.parametrize(
    ("name", "source", "path"),
    [
        ("layers/dense/vars/0", "layers/dense/vars/0", "layers/dense/vars/0"),
        (f"layers/dense/vars/0/{AVG}", "layers/dense/vars/0", f"{AVG}/layers/dense/vars/0"),
        (f"dense/kernel:0/{AVG}", "dense/kernel:0", f"dense/kernel/{AVG}:0"),
        (f"dense/kernel:0/{AVG}/biased", "dense/kernel:0", f"dense/kernel/{AVG}/biased:0"),
        (f"w/{AVG}/local_step", "w", f"{AVG}.local_step/w"),
        ("w/ema/x", "w", "ema.x/w"),
        ("w/..", "w", "shadows/w"),
        (f"w/{AVG}", f"w/{AVG}", f"{AVG}/w"),
    ],
)
def test_where_shadows_lie(name: str, source: str, path: str) -> None:
    """In a tree of their own, or in Keras's older layout before the number of the output."""
    shadows = names.shadows_of([(name, source)], Shadows())
    assert names.dataset_path(name, shadows) == path
    assert names.tensor_name(path, shadows) == name


def test_a_tree_of_shadows_takes_no_name_that_is_taken() -> None:
    """Where a group is called like the shadows already, the tree gets a number."""
    shadows = names.shadows_of(
        [("layers/w", "layers/w"), ("layers/w/Layers", "layers/w")], Shadows()
    )
    assert shadows.trees == (("Layers", "Layers_1"),)


def test_numbers_are_sorted_as_numbers() -> None:
    """Keras counts its variables; so does the order of names, whatever the digits."""
    made = [f"vars/{k}" for k in (0, 2, 9, 10, 11, 100)]
    assert sorted(sorted(made), key=names.natural) == made
    assert sorted(["v/007", "v/8", "v/" + "9" * 5000], key=names.natural)[0] == "v/007"


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("a/b:0", True),
        ("", False),
        ("/a", False),
        ("a//b", False),
        ("a/", False),
        ("a/../b", False),
        (".", False),
        ("a\0b", False),
        ("\ud800", False),
        ("bytes \udcff", True),
        ("x" * 1024, True),
        ("x" * 1025, False),
        ("x/" * 60 + "x", False),
    ],
)
def test_what_a_dataset_can_be_called(name: str, possible: bool) -> None:
    """Each part of a name becomes a link."""
    assert names.can_name(name) is possible


# ---------------------------------------------------------------------------- roles of real files


NET = {
    "layers/dense/vars/0": V,
    "layers/dense/vars/1": V,
    "layers/batch_normalization/vars/0": V,
    "layers/batch_normalization/vars/1": V,
    "layers/batch_normalization/vars/2": S,
    "layers/batch_normalization/vars/3": S,
    "layers/dense_1/vars/0": F,
    "layers/dense_1/vars/1": F,
    "layers/sequential/layers/batch_normalization/vars/0": V,
    "layers/sequential/layers/batch_normalization/vars/1": S,
    "layers/sequential/layers/batch_normalization/vars/2": S,
    "layers/dense_2/vars/0": V,
    "layers/dense_2/vars/1": V,
    "optimizer/vars/0": O,
    "optimizer/vars/1": O,
}


def test_an_archive_tells_all(tmp_path: Path) -> None:
    """The configuration names the classes and what is frozen."""
    index = keras_files.read(keras_files.put(tmp_path / "x.keras", keras_files.MODEL_KERAS)).index
    assert index.roles == NET
    assert index.roles_from == "config.json and the groups of its layers"
    assert not index.cautions


def test_weights_alone_tell_by_their_groups(tmp_path: Path) -> None:
    """Groups are named after classes; only what is frozen is not told."""
    archive = keras_files.read(keras_files.put(tmp_path / "x.keras", keras_files.MODEL_KERAS))
    [(_, offset, nbytes)] = archive.index.records
    data = keras_files.MODEL_KERAS[offset : offset + nbytes]
    index = keras_files.read(keras_files.put(tmp_path / "x.weights.h5", data)).index
    assert index.roles == {**NET, "layers/dense_1/vars/0": V, "layers/dense_1/vars/1": V}
    assert index.roles_from == "the groups of its layers"
    assert not index.cautions


def test_the_older_layout_names_its_variables(tmp_path: Path) -> None:
    """Names tell statistics, the configuration what is frozen; both are the program's own."""
    index = keras_files.read(keras_files.put(tmp_path / "x.h5", keras_files.MODEL_LEGACY)).index
    weights = {name: role for name, role in index.roles.items() if role is not O}
    assert weights == {
        "model_weights/first/first/kernel": V,
        "model_weights/first/first/bias": V,
        "model_weights/norm/norm/gamma": V,
        "model_weights/norm/norm/beta": V,
        "model_weights/norm/norm/moving_mean": S,
        "model_weights/norm/norm/moving_variance": S,
        "model_weights/kept/kept/kernel": F,
        "model_weights/kept/kept/bias": F,
        "model_weights/inner/inner/batch_normalization/gamma": V,
        "model_weights/inner/inner/batch_normalization/moving_mean": S,
        "model_weights/inner/inner/batch_normalization/moving_variance": S,
        "model_weights/last/last/kernel": V,
        "model_weights/last/last/bias": V,
    }
    assert index.full_names["model_weights/norm/norm/gamma"] == "norm/gamma"
    assert index.roles_from == "model_config and the names of its weights"


def test_what_nothing_tells_is_assumed_and_said(tmp_path: Path) -> None:
    """Layers that a program called as it liked are told by number and shape."""
    path = keras_files.put(tmp_path / "x.weights.h5", keras_files.SUBCLASSED)
    index = keras_files.read(path).index
    statistics = {name for name, role in index.roles.items() if role is S}
    # Keras keeps attributes in alphabetical order, what comes after "layers" by its class. `few`
    # has three vectors and no telling name.
    layers = ("auto", "bn_first", "layers/batch_normalization_1")
    assert statistics == {f"{layer}/vars/{k}" for layer in layers for k in (2, 3)}
    [caution] = index.cautions
    assert caution.code == "assumed-statistics"
    assert "2 tensors" in caution.message and "bn_first/vars/2" in caution.message
    with h5py.File(path, "a") as file:
        file.move("few", "bn_few")
    index = keras_files.read(path).index
    assert index.roles["bn_few/vars/0"] is V
    assert index.roles["bn_few/vars/1"] is index.roles["bn_few/vars/2"] is S


# ---------------------------------------------------------------------------- roles of other layers


def structure(
    shapes: Mapping[str, Any], groups: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None
) -> Structure:
    """Return the structure of a file with these datasets: path to shape or (dtype, shape)."""
    rows = []
    for path, shape in shapes.items():
        dtype, size = shape if shape and isinstance(shape[0], str) else ("float32", shape)
        rows.append(Dataset(path, dtype, False, size, "contiguous", -1, 0, (), 0))
    return Structure(tuple(rows), groups or {}, frozenset(), (), {}, "")


def vectors(group: str, count: int) -> dict[str, tuple[int, ...]]:
    """Return `count` vectors of one length in a group of variables."""
    return {f"{group}/vars/{k}": (5,) for k in range(count)}


def roles(shapes: Mapping[str, Any], document: Any = None, **attributes: str) -> list[Role]:
    """Return the roles of datasets in their order; attributes are the groups' layer names."""
    found = config.NO_CONFIG if document is None else config.parse("x", json.dumps(document), "it")
    groups = {path.replace("__", "/"): {"name": (name,)} for path, name in attributes.items()}
    told = keras.told(structure(shapes, groups), found, "it")
    return [told.roles[path] for path in shapes]


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (vectors("layers/batch_normalization_3", 2), [S] * 2),
        (vectors("layers/sync_batch_normalization", 4), [V, V, S, S]),
        (vectors("layers/batch_normalization", 7), [V, V, *[S] * 5]),
        (vectors("layers/layer_normalization", 2), [V, V]),
        (vectors("layers/fancy_batch_norm", 3), [V, S, S]),
        ({**vectors("normalization", 2), "normalization/vars/2": ("int32", ())}, [F] * 3),
        ({f"a/spectral_normalization/vars/{k}": (k, 2) for k in (1, 3)}, [V, F]),
        ({"layers/lstm/vars/0": (4, 3), "layers/lstm/vars/1": (4, 3)}, [F, F]),
        ({"layers/lstm/cell/vars/0": (4, 3), "layers/lstm/cell/vars/1": (3,)}, [V, V]),
        ({"layers/dropout/seed_generator/vars/0": ("uint32", (2,))}, [F]),
        ({"loss_tracker/vars/0": (), "metrics/mean/vars/0": (), "my_metric/vars/0": ()}, [F] * 3),
        ({"optimizer/vars/0": ("int64", ()), "optimizer/vars/1": ()}, [O, O]),
        ({"optimizer/inner_optimizer/vars/2": (3, 3)}, [O]),
        ({"d_optimizer/vars/0": ("int64", ()), "generator/vars/0": (3,)}, [O, V]),
        ({"layers/dense/vars/0": ("int8", (3, 3)), "layers/dense/vars/1": (3,)}, [F, F]),
        ({"layers/dense/vars/0": (3, 3), "beside/moving_mean": (3,)}, [V, S]),
    ],
)  # fmt: skip
def test_layers_are_known_by_their_groups(shapes: dict[str, Any], expected: list[Role]) -> None:
    """Each class has its own order of variables."""
    assert roles(shapes) == expected


def test_an_optimizer_under_any_name_is_known_by_its_own() -> None:
    """An attribute of a subclassed model; Keras names the optimizer itself."""
    shapes = {"opt/vars/0": ("int64", ()), "opt/vars/1": (), "opt/vars/2": (3, 3)}
    assert roles(shapes, opt__vars="adam_1") == [O, O, O]
    assert roles(shapes, opt__vars="other") == [F, V, V]


def test_eight_bit_weights_are_warned_of() -> None:
    """The scales of quantised weights are no weights to average."""
    shapes = {"layers/dense/vars/0": ("int8", (3, 3)), "layers/dense/vars/1": (3,)}
    [caution] = keras.told(structure(shapes), config.NO_CONFIG, "").cautions
    assert caution.code == "quantised" and "layers/dense/vars/1" in caution.message


def node(kind: str, name: str, **more: Any) -> dict[str, Any]:
    """Return a serialised layer."""
    return {"class_name": kind, "config": {"name": name, "trainable": True, **more}}


WRAPPED = node(
    "Functional",
    "net",
    layers=[
        node("InputLayer", "in"),
        node("TimeDistributed", "each", layer=node("BatchNormalization", "bn")),
        node(
            "Bidirectional",
            "both",
            layer=node("LSTM", "forth", trainable=False),
            backward_layer=node("LSTM", "back"),
        ),
        node("Sequential", "s", layers=[node("InputLayer", "i"), node("Mine>Odd", "odd")]),
        node("RNN", "r", cell=node("StackedRNNCells", "c", cells=[node("LSTMCell", "l")] * 2)),
        node("Dense", "a"),
        node("Dense", "b", trainable=False),
    ],
)


def test_a_configuration_tells_where_layers_are_kept() -> None:
    """Files of older versions hold no names, but their groups follow the configuration."""
    by_path = config.parse("x", json.dumps(WRAPPED), "it").by_path
    assert {path: layer.kind for path, layer in by_path.items()} == {
        "layers/input_layer": "InputLayer",
        "layers/time_distributed": "TimeDistributed",
        "layers/time_distributed/layer": "BatchNormalization",
        "layers/bidirectional": "Bidirectional",
        "layers/bidirectional/forward_layer": "LSTM",
        "layers/bidirectional/backward_layer": "LSTM",
        "layers/sequential": "Sequential",
        "layers/sequential/layers/mine_odd": "Mine>Odd",
        "layers/rnn": "RNN",
        "layers/rnn/cell": "StackedRNNCells",
        "layers/rnn/cell/cells/lstm_cell": "LSTMCell",
        "layers/rnn/cell/cells/lstm_cell_1": "LSTMCell",
        "layers/dense": "Dense",
        "layers/dense_1": "Dense",
    } | {"layers/sequential/layers/mine_odd": "Mine>Odd"}
    shapes = {
        **vectors("layers/time_distributed/layer", 3),
        "layers/bidirectional/forward_layer/vars/0": (3, 3),
        "layers/dense_1/vars/0": (3, 3),
        **vectors("layers/sequential/layers/mine_odd", 4),
    }
    assert roles(shapes, WRAPPED) == [V, S, S, F, F, V, V, V, V]


def test_a_name_that_two_layers_have_tells_nothing() -> None:
    """Then the place in the configuration decides."""
    inner = [
        node("Sequential", "s", layers=[node("Dense", "d")]),
        node("Sequential", "t", layers=[node("Dense", "d", trainable=False)]),
    ]
    shapes = {
        "layers/sequential/layers/dense/vars/0": (3, 3),
        "layers/sequential_1/layers/dense/vars/0": (3, 3),
    }
    assert roles(shapes, node("Functional", "f", layers=inner)) == [V, F]


def test_a_payload_in_a_configuration_is_text(tmp_path: Path) -> None:
    """Classes, modules and marshalled code are compared as names and never looked up."""
    harmful = node(
        "Lambda", "boom", function={"class_name": "__lambda__", "config": {"code": "4w"}}
    )
    harmful["module"] = "os"
    canary = tmp_path / "canary"
    command = node("system", f"touch {os.fspath(canary)}", fn="os.system", trainable="yes")
    document = node("Functional", "net", layers=[harmful, command, {"class_name": 3}, None, 7])
    assert roles({"layers/lambda/vars/0": (3,)}, document) == [V]
    assert not canary.exists()


@pytest.mark.parametrize("text", ['"text"', "[1]", "{", "NaN", "[" * 100_000, ""])
def test_a_configuration_that_is_none_is_refused(text: str) -> None:
    """In one line, whatever the text is."""
    with pytest.raises(DamagedFile, match=r"^x: it"):
        config.parse("x", text, "it")


def test_other_files_have_no_roles() -> None:
    """Without layers or variables of Keras names decide, as everywhere."""
    told = keras.told(structure({"w": (3,), "moving_mean": (3,)}), config.NO_CONFIG, "")
    assert told.roles == {} and told.source == "" and told.step == ""


def legacy(weights: Mapping[str, Any], optimizer: tuple[str, ...] = ()) -> keras.Told:
    """Return what is told of a whole model in the older layout."""
    groups = {
        "model_weights": {"layer_names": ("d",)},
        "optimizer_weights": {"weight_names": optimizer},
    }
    return keras.told(structure(weights, groups), config.NO_CONFIG, "")


@pytest.mark.parametrize(
    ("name", "dtype", "found"),
    [
        ("Adam/iter:0", "int64", True),
        ("sgd/iteration", "int64", True),
        ("Adam/iter:0", "float32", False),
        ("Adam/beta:0", "int64", False),
    ],
)
def test_the_older_layout_counts_steps_too(name: str, dtype: str, found: bool) -> None:
    """The first weight of an optimizer is its count."""
    told = legacy({f"optimizer_weights/{name}": (dtype, ())}, (name,))
    assert told.step == (f"optimizer_weights/{name}" if found else "")
    assert told.roles == {f"optimizer_weights/{name}": O}


def test_names_of_the_older_layout() -> None:
    """With and without the number of the output."""
    told = legacy(
        {
            "model_weights/d/d/moving_mean:0": (3,),
            "model_weights/d/d/sn_u:0": (1, 3),
            "model_weights/d/d/kernel:0": (3, 3),
            "model_weights/d/d/seed:0": ("int64", (2,)),
        }
    )
    assert list(told.roles.values()) == [S, F, V, F]
    assert told.full_names["model_weights/d/d/kernel:0"] == "d/kernel"
