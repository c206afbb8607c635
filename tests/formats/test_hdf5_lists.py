"""The lists of names in Keras's older layout, by which it finds layers and weights, and shadows.

A shadow without room beside its variable lies in a tree of its own. When the shadows become the
variables again, the lists must say what those of the checkpoints said, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import cmd

LEGACY = Path(__file__).resolve().parents[2] / "fixtures" / "keras" / "legacy"
TREE = "ExponentialMovingAverage"

Lists = dict[tuple[str, str], list[bytes]]


def lists(path: Path) -> Lists:
    """Return the lists of names in a file by group and attribute."""
    found: Lists = {}

    def visit(group: str, thing: h5py.Group | h5py.Dataset) -> None:
        for name in {"layer_names", "weight_names"} & set(thing.attrs):
            found[group, name] = np.array(thing.attrs[name]).tolist()

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return found


def there_and_back(run: Path, folder: Path, *options: str) -> tuple[Path, Path]:
    """Return an average of `run` in shadows, and that with the names of variables again."""
    shadows, back = folder / "shadows.h5", folder / "back.h5"
    cmd("run", run, "-o", shadows, "--names", "shadow", "--decay", "0.9", "-q", *options)
    cmd("rename", shadows, "-o", back, "--names", "variable", "-q")
    return shadows, back


@pytest.mark.parametrize("statistics", ["average", "copy"])
def test_lists_come_back_as_keras_wrote_them(statistics: str, tmp_path: Path) -> None:
    """A whole model of Keras 3: variables in the tree, statistics where they were, or in both."""
    shadows, back = there_and_back(
        LEGACY, tmp_path, "--optimizer", "keep", "--statistics", statistics
    )
    assert lists(back) == lists(LEGACY / "epoch-3.h5")
    found = lists(shadows)
    assert found["model_weights", "layer_names"] == ["norm", "relu"]
    assert found[f"{TREE}/model_weights", "layer_names"] == ["hidden", "norm", "relu", "logits"]
    assert found[f"{TREE}/model_weights/norm", "weight_names"] == [
        f"digits/norm/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")
    ]


def test_what_was_dropped_is_in_no_list(tmp_path: Path) -> None:
    """The optimizer's weights, and the list of them."""
    _, back = there_and_back(LEGACY, tmp_path, "--optimizer", "drop")
    expected = lists(LEGACY / "epoch-3.h5")
    del expected["optimizer_weights", "weight_names"]
    assert lists(back) == expected


WEIGHTS = {"z": ["z/kernel", "z/bias"], "mid": [], "a": ["a/scale", "a/kernel", "a/bias"]}


def save(path: Path, within: str, weights: dict[str, Sequence[str]]) -> None:
    """Write layers in the older layout, in a group or as the root."""
    with h5py.File(path, "w") as file:
        root = file.require_group(within) if within else file
        root.attrs["layer_names"] = [name.encode() for name in weights]
        for layer, made in weights.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in made]
            for name in made:
                group[name] = np.float32([1, 2])
            group.attrs["kept"] = 7


@pytest.mark.parametrize("within", ["", "model_weights"])
@pytest.mark.parametrize("outputs", ["none", "all", "some"])
def test_lists_come_back_where_all_tensors_moved(outputs: str, within: str, tmp_path: Path) -> None:
    """A layer without weights stays, and so does its place among the others."""
    ends = {"none": {}, "all": dict.fromkeys(("kernel", "bias", "scale"), ":0")}
    ends["some"] = {"kernel": ":0"}
    weights = {
        layer: [name + ends[outputs].get(name.split("/")[1], "") for name in made]
        for layer, made in WEIGHTS.items()
    }
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save(run / f"epoch-{step}.h5", within, weights)
    shadows, back = there_and_back(run, tmp_path)
    assert lists(back) == lists(run / "epoch-2.h5")
    with h5py.File(shadows) as one, h5py.File(back) as other:
        assert TREE not in other
        for file in (one, other):
            assert file[f"{within}/mid"].attrs["kept"] == 7
        assert (f"{within}/z" in one) is (outputs != "none")


def test_the_list_of_layers_stays_without_layers(tmp_path: Path) -> None:
    """It tells that this is the older layout, so what the other groups are for."""
    run = tmp_path / "run"
    run.mkdir()
    save(run / "epoch-1.h5", "model_weights", {"z": ["z/kernel"]})
    shadows, back = there_and_back(run, tmp_path)
    assert lists(shadows)["model_weights", "layer_names"] == []
    assert lists(back) == lists(run / "epoch-1.h5")


def test_lists_come_back_a_second_time(tmp_path: Path) -> None:
    """`rename` to shadows keeps them in the tree too, and reads them from there."""
    _, back = there_and_back(LEGACY, tmp_path)
    again, last = tmp_path / "again.h5", tmp_path / "last.h5"
    cmd("rename", back, "-o", again, "--names", "shadow", "-q")
    cmd("rename", again, "-o", last, "--names", "variable", "-q")
    assert lists(last) == lists(back)
    assert lists(last)["model_weights", "layer_names"] == ["hidden", "norm", "relu", "logits"]


def test_groups_above_layers_without_weights_keep_their_attributes(tmp_path: Path) -> None:
    """Keras 3's layout has no lists, but may have such layers too."""
    run = tmp_path / "run"
    run.mkdir()
    with h5py.File(run / "epoch-1.h5", "w") as file:
        file["layers/dense/vars/0"] = np.float32([1, 2])
        file.create_group("layers/re_lu/vars").attrs["name"] = "relu"
        file["layers"].attrs["kept"] = 7
    for path in there_and_back(run, tmp_path):
        with h5py.File(path) as file:
            assert file["layers"].attrs["kept"] == 7
            assert file["layers/re_lu/vars"].attrs["name"] == "relu"
