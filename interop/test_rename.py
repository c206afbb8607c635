"""``ema-avg rename``: other names, the same bits; the restore that asks for them finds them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tensorflow as tf
from support import (
    EVALUATION,
    GRAPH,
    PARTITIONED,
    SHADOW,
    Array,
    agreed,
    differences,
    files,
    latest,
    restored,
    theirs,
    tool,
    v1,
)

LAST = GRAPH / "digits.ckpt-300"


def evaluated(prefix: str | Path, *, plainly: bool) -> dict[str, Array]:
    """Restore as the program that evaluates graph/, by plain names or through an average."""
    with tf.Graph().as_default():
        v1.train.import_meta_graph(str(EVALUATION))
        ema = v1.train.ExponentialMovingAverage(0.9)
        return restored(prefix, None if plainly else ema.variables_to_restore())


def plain(values: dict[str, Array]) -> dict[str, Array]:
    """Return the values with each shadow under the name of its variable."""
    shadows = {k.removesuffix(f"/{SHADOW}"): v for k, v in values.items() if k.endswith(SHADOW)}
    return {**{k: v for k, v in values.items() if not k.endswith(SHADOW)}, **shadows}


def test_shadows_of_a_training_take_the_names_of_their_variables(tmp_path: Path) -> None:
    """`--names variable`: what TensorFlow averaged is what a plain `Saver()` restores."""
    tool("rename", LAST, "-o", tmp_path / "out", "--names", "variable")
    saved, training = agreed(tmp_path / "out"), theirs(LAST)
    assert differences(saved, plain(training)) == []
    found = evaluated(tmp_path / "out", plainly=True)
    assert len(found) == 10
    assert differences(found, {name: saved[name] for name in found}) == []


def test_averages_take_the_names_of_their_variables_and_back(tmp_path: Path, average: Path) -> None:
    """An output to plain names and again to those of shadows: both restores work."""
    tool("rename", latest(average), "-o", tmp_path / "plain", "--names", "variable")
    expected = evaluated(latest(average), plainly=False)
    assert differences(evaluated(tmp_path / "plain", plainly=True), plain(expected)) == []
    # The graph beside the checkpoint says what is trained, and so is asked for by a shadow's name.
    shutil.copy(EVALUATION, tmp_path / "plain.meta")
    tool("rename", tmp_path / "plain", "-o", tmp_path / "back", "--names", "shadow")
    assert differences(evaluated(tmp_path / "back", plainly=False), expected) == []
    for out in ("plain", "back"):
        agreed(tmp_path / out)


def test_weights_take_the_names_of_shadows(tmp_path: Path) -> None:
    """`--names shadow --name`: the last weights of a training, restored as if averaged."""
    tool("rename", LAST, "-o", tmp_path / "out", "--names", "shadow", "--name", "last")
    training = theirs(LAST)
    with tf.Graph().as_default():
        v1.train.import_meta_graph(str(EVALUATION))
        ema = v1.train.ExponentialMovingAverage(0.9, name="last")
        found = restored(tmp_path / "out", ema.variables_to_restore())
    assert sum(name.endswith("/last") for name in found) == 5
    for name, value in found.items():
        assert differences({name: value}, {name: training[name.removesuffix("/last")]}) == []
    agreed(tmp_path / "out")


def test_partitions_in_two_shards_take_the_names_of_their_variables(tmp_path: Path) -> None:
    """Slices keep their cuts; the data files stay as they are, byte for byte."""
    source = PARTITIONED / "model.ckpt-60"
    tool("rename", source, "-o", tmp_path / "out", "--names", "variable")
    assert differences(agreed(tmp_path / "out"), plain(theirs(source))) == []
    before, after = files(source), files(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [".index"]
    with tf.Graph().as_default():
        cut = v1.fixed_size_partitioner(5)
        names = {
            "embedding/rows": v1.get_variable("embedding/rows", [12, 10], partitioner=cut),
            "projection/columns": v1.get_variable("projection/columns", [10, 8]),
            "embedding/scale": v1.get_variable("embedding/scale", [10], tf.bfloat16),
            "embedding/shift": v1.get_variable("embedding/shift", [10], tf.float16),
        }
        found = restored(tmp_path / "out", names)
    training = theirs(source)
    assert differences(found, {name: training[f"{name}/{SHADOW}"] for name in names}) == []


def test_partitions_take_the_names_of_shadows(tmp_path: Path, partitioned: Path) -> None:
    """To plain names and back: an evaluation without partitions restores what it did before."""
    tool("rename", latest(partitioned), "-o", tmp_path / "plain", "--names", "variable")
    tool("rename", tmp_path / "plain", "-o", tmp_path / "back", "--names", "shadow")
    found = agreed(tmp_path / "back")
    assert differences(found, agreed(latest(partitioned))) == []
    key = f"embedding/rows/{SHADOW}"
    with tf.Graph().as_default():
        v1.get_variable("embedding/rows", [12, 10])
        ema = v1.train.ExponentialMovingAverage(0.9)
        assert (
            differences(restored(tmp_path / "back", ema.variables_to_restore()), {key: found[key]})
            == []
        )


@pytest.mark.parametrize("name", ["a/ü", "a b", "a\x7f", "x" * 300, "-", "A/a/A"])
def test_rules_give_names_that_tensorflow_finds(tmp_path: Path, name: str) -> None:
    """`--rule` with characters beyond those of graphs, and names longer than a byte can count."""
    tool("rename", LAST, "-o", tmp_path / "out", "--rule", "^conv/kernel$", name)
    found, training = agreed(tmp_path / "out"), theirs(LAST)
    training[name] = training.pop("conv/kernel")
    assert differences(found, training) == []
