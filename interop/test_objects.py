"""keras/ and tf.Module: object-based checkpoints and SavedModels, averaged, load as before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from support import (
    KERAS,
    OBJECT_GRAPH,
    VALUE,
    Array,
    agreed,
    differences,
    files,
    latest,
    same,
    theirs,
    tool,
)

COMPILED = KERAS / "compiled"
CHECKPOINTS = [COMPILED / f"ckpt-{k}" for k in range(1, 5)]
IMAGES = np.linspace(0, 1, 5 * 64, dtype=np.float32).reshape(5, 64)


def model(*, compiled: bool) -> Any:
    """Build the model of the fixtures anew, with other initial weights and the same names."""
    keras.utils.clear_session()
    made = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, use_bias=False, name="hidden"),
            keras.layers.BatchNormalization(momentum=0.9, name="norm"),
            keras.layers.ReLU(name="relu"),
            keras.layers.Dropout(0.1, name="dropout"),
            keras.layers.Dense(10, name="logits"),
        ],
        name="digits",
    )
    if compiled:
        made.compile(
            optimizer=keras.optimizers.SGD(0.05, momentum=0.9, name="sgd"),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        made.optimizer.build(made.trainable_variables)
    return made


def weights(prefix: str | os.PathLike[str]) -> dict[str, Array]:
    """Restore a checkpoint of keras/compiled into a new model; return its variables by path.

    `assert_consumed` proves that all of the checkpoint was used and all of the model restored.
    """
    made = model(compiled=True)
    step = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(model=made, optimizer=made.optimizer, step=step)
    checkpoint.restore(os.fspath(prefix)).assert_consumed()
    variables = [*made.weights, *made.optimizer.variables]
    found = {variable.path: variable.numpy() for variable in variables}
    return {**found, "step": step.numpy(), "seen": made(IMAGES).numpy()}


def mean(values: Sequence[Array]) -> Array:
    """Return the mean as the documented recurrence gives it: s -= (s - v) * c, c = 1/k.

    The coefficients are computed in float64 and rounded to float32 once.
    """
    shadow = values[0].copy()
    for k, value in enumerate(values[1:], start=2):
        shadow = shadow - (shadow - value) * np.float32(1 / k)
    return shadow


def test_a_compiled_model_restores_its_mean(tmp_path: Path) -> None:
    """Weights and statistics are the mean, bit for bit; optimizer and counters are the last's."""
    tool("run", COMPILED, "-o", f"{tmp_path}/", "--average", "mean")
    found = weights(latest(tmp_path))
    each = [weights(prefix) for prefix in CHECKPOINTS]
    averaged = {variable.path for variable in model(compiled=True).weights}
    assert len(averaged) == 7
    for name in averaged:
        values = [one[name] for one in each]
        assert same(found[name], mean(values)), name
        assert not same(found[name], values[3]), name
        exact = np.mean(np.asarray(values, np.float64), axis=0)
        np.testing.assert_allclose(found[name], exact, rtol=1e-6, atol=1e-7)
    rest = found.keys() - averaged - {"seen"}
    assert any("momentum" in name for name in rest)
    assert differences({n: found[n] for n in rest}, {n: each[3][n] for n in rest}) == []
    assert not same(found["seen"], each[3]["seen"])
    agreed(latest(tmp_path))


def test_an_evaluation_restores_the_model_alone(tmp_path: Path) -> None:
    """Without the optimizer, in the program or in the file: the same weights and outputs."""
    tool("run", COMPILED, "-o", tmp_path / "whole", "--average", "mean")
    tool("run", COMPILED, "-o", tmp_path / "part", "--average", "mean", "--optimizer", "drop")
    seen = []
    for name in ("whole", "part"):
        made = model(compiled=False)
        status = tf.train.Checkpoint(model=made).restore(str(tmp_path / name))
        status.expect_partial().assert_existing_objects_matched()
        seen.append(made(IMAGES).numpy())
    assert same(seen[0], weights(tmp_path / "whole")["seen"])
    assert same(*seen)


def test_one_checkpoint_averaged_is_that_checkpoint(tmp_path: Path) -> None:
    """Of a model that is not compiled; `assert_consumed` finds nothing missing or left over."""
    source = KERAS / "uncompiled" / "digits.ckpt-1"
    tool("run", source, "-o", tmp_path / "out", "--average", "mean")
    made = model(compiled=False)
    tf.train.Checkpoint(model=made).restore(str(tmp_path / "out")).assert_consumed()
    saved = theirs(source)
    assert differences(agreed(tmp_path / "out"), saved) == []
    assert same(made.layers[0].kernel, saved[f"model/_functional/_operations/1/_kernel{VALUE}"])


def test_uncompiled_models_restore_their_mean(tmp_path: Path) -> None:
    """Three checkpoints of three models, through `tf.train.Checkpoint(model=...)`."""
    values = []
    for k in range(3):
        keras.utils.set_random_seed(k)
        made = model(compiled=False)
        for variable in made.weights:
            variable.assign(variable + np.float32(k / 7))
        values.append([variable.numpy() for variable in made.weights])
        tf.train.Checkpoint(model=made).write(str(tmp_path / "run" / f"ckpt-{k + 1}"))
    tool("run", tmp_path / "run", "-o", f"{tmp_path}/out/", "--average", "mean")
    agreed(latest(tmp_path / "out"))
    made = model(compiled=False)
    tf.train.Checkpoint(model=made).read(latest(tmp_path / "out")).assert_consumed()
    assert len(made.weights) == 7
    for variable, *several in zip(made.weights, *values, strict=True):
        assert same(variable.numpy(), mean(several)), variable.path


def test_the_latest_of_a_manager_is_the_average(tmp_path: Path) -> None:
    """`CheckpointManager` takes the folder over: it finds the output and numbers on from it."""
    tool("run", COMPILED, "-o", f"{tmp_path}/ckpt", "--average", "mean")
    step = tf.Variable(0, dtype=tf.int64)
    made = model(compiled=True)
    checkpoint = tf.train.Checkpoint(model=made, optimizer=made.optimizer, step=step)
    manager = tf.train.CheckpointManager(checkpoint, str(tmp_path), max_to_keep=None)
    assert manager.latest_checkpoint == str(tmp_path / "ckpt")
    assert manager.restore_or_initialize() == str(tmp_path / "ckpt")
    assert step.numpy() == 80
    assert manager.save().endswith("ckpt-5")


# ---------------------------------------------------------------------------- SavedModels


def exported(folder: Path, values: Array) -> None:
    """Export a module that multiplies with its variable, whose value is `values`."""

    class Layer(tf.Module):
        def __init__(self) -> None:
            self.kernel = tf.Variable(values, name="kernel")
            self.moving_mean = tf.Variable(values[0], trainable=False, name="moving_mean")
            self.calls = tf.Variable(3, trainable=False, name="calls")

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32)])
        def __call__(self, x: Any) -> Any:
            return (x - self.moving_mean) @ self.kernel

    tf.saved_model.save(Layer(), str(folder))


def test_an_average_takes_the_place_of_the_variables_of_an_export(tmp_path: Path) -> None:
    """`-o COPY/variables/variables --overwrite`: `tf.saved_model.load` computes with the mean."""
    values = [np.float32([[k, 1 / (k + 1)], [k * k, -k]]) for k in range(3)]
    folders = [tmp_path / f"export-{k}" for k in range(3)]
    for folder, value in zip(folders, values, strict=True):
        exported(folder, value)
    shutil.copytree(folders[2], tmp_path / "copy")
    out = tmp_path / "copy" / "variables" / "variables"
    tool("run", *folders, "-o", out, "--average", "mean", "--overwrite", "--order", "given")
    loaded = tf.saved_model.load(str(tmp_path / "copy"))
    assert same(loaded.kernel, mean(values))
    assert same(loaded.moving_mean, mean([value[0] for value in values]))
    assert loaded.calls.numpy() == 3
    x = np.float32([[1, 2], [3, 4]])
    assert same(loaded(x), tf.constant(x - loaded.moving_mean) @ loaded.kernel)
    agreed(out)


def test_a_keras_export_is_averaged(tmp_path: Path) -> None:
    """The export of the fixtures: readable alone, and loadable in the place of its variables."""
    source = KERAS / "savedmodel"
    tool("run", source, "-o", tmp_path / "out", "--average", "mean")
    assert differences(agreed(tmp_path / "out"), theirs(source / "variables" / "variables")) == []
    shutil.copytree(source, tmp_path / "copy")
    out = tmp_path / "copy" / "variables" / "variables"
    tool("run", source, "-o", out, "--average", "mean", "--overwrite")
    assert files(out) == files(source / "variables" / "variables")
    found, expected = (tf.saved_model.load(str(f)) for f in (tmp_path / "copy", source))
    assert same(found.serve(IMAGES), expected.serve(IMAGES))


# ---------------------------------------------------------------------------- shards of tiles


@pytest.fixture
def tiled(tmp_path: Path) -> list[dict[str, Array]]:
    """Write three checkpoints cut into tiles over several shards; return what they hold."""
    policy = tf.train.experimental.MaxShardSizePolicy(max_shard_size=50_000)
    options = tf.train.CheckpointOptions(experimental_sharding_callback=policy)
    rng = np.random.default_rng(0)
    saved = []
    for k in range(1, 4):
        values = {
            "table": rng.standard_normal((250, 300), np.float32),
            "wide": rng.standard_normal((3, 20_000), np.float32),
            "cube": rng.standard_normal((7, 50, 60), np.float32),
            "small": rng.standard_normal(5, np.float32),
            "counts": rng.integers(0, 99, (150, 200)),
        }
        variables = {name: tf.Variable(value) for name, value in values.items()}
        tf.train.Checkpoint(**variables).write(str(tmp_path / "run" / f"ckpt-{k}"), options)
        saved.append(values)
    return saved


def test_tiles_in_many_shards_restore_their_mean(
    tmp_path: Path, tiled: list[dict[str, Array]]
) -> None:
    """MaxShardSizePolicy's output, averaged: the same slices in as many shards, all consumed."""
    tool("run", tmp_path / "run", "-o", f"{tmp_path}/out/", "--average", "mean")
    prefix = latest(tmp_path / "out")
    parts = {suffix for suffix in files(prefix) if ".data-" in suffix}
    assert len(parts) > 5
    assert files(prefix).keys() == files(tmp_path / "run" / "ckpt-3").keys()
    variables = {name: tf.Variable(tf.zeros_like(value)) for name, value in tiled[0].items()}
    tf.train.Checkpoint(**variables).read(prefix).assert_consumed()
    found = {name: variable.numpy() for name, variable in variables.items()}
    floats = tiled[0].keys() - {"counts"}
    expected = {name: mean([values[name] for values in tiled]) for name in floats}
    assert differences(found, {**expected, "counts": tiled[2]["counts"]}) == []
    saved = agreed(prefix)
    del saved[OBJECT_GRAPH]
    assert differences({name.removesuffix(VALUE): v for name, v in saved.items()}, found) == []
