"""What the tool writes has the bytes that TensorFlow writes for the same content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import save_file
from support import (
    GRAPH,
    KERAS,
    PARTITIONED,
    SHADOW,
    agreed,
    differences,
    files,
    latest,
    session,
    theirs,
    tool,
    v1,
)

ONE = {
    "graph": GRAPH / "digits.ckpt-300",
    "partitioned": PARTITIONED / "model.ckpt-60",
    "compiled": KERAS / "compiled" / "ckpt-4",
    "uncompiled": KERAS / "uncompiled" / "digits.ckpt-1",
    "plain": KERAS / "plain" / "v",
    "savedmodel": KERAS / "savedmodel",
}


@pytest.mark.parametrize("source", ONE.values(), ids=ONE.keys())
def test_a_copy_in_the_same_structure_has_the_same_bytes(tmp_path: Path, source: Path) -> None:
    """The mean of one checkpoint under plain names is that checkpoint, index and data alike.

    With another name for shadows, those of the training are tensors like others.
    """
    words = ("--average", "mean", "--names", "variable", "--name", "mean")
    tool("run", source, "-o", tmp_path / "out", *words)
    prefix = source / "variables" / "variables" if source.is_dir() else source
    assert files(tmp_path / "out") == files(prefix)
    assert differences(agreed(tmp_path / "out"), theirs(prefix)) == []


# ---------------------------------------------------------------------------- new layouts


def saved(prefix: Path, names: Mapping[str, Any], *, values: str | None = None) -> dict[str, bytes]:
    """Save variables of the default graph under these names; return the bytes TensorFlow wrote.

    Their values come from the checkpoint `values`, else they are the initial ones.
    """
    saver = v1.train.Saver(dict(names))
    with session() as active:
        if values is None:
            active.run(v1.global_variables_initializer())
        else:
            saver.restore(active, values)
        saver.save(active, os.fspath(prefix), write_meta_graph=False, write_state=False)
    return files(prefix)


def variables_of(prefix: str) -> dict[str, Any]:
    """Make a variable for each tensor of a checkpoint, to be restored from it."""
    reader = tf.train.load_checkpoint(prefix)
    dtypes = reader.get_variable_to_dtype_map()
    made = {}
    for k, (name, shape) in enumerate(sorted(reader.get_variable_to_shape_map().items())):
        made[name] = v1.get_variable(
            f"v{k}", shape, dtypes[name], v1.zeros_initializer(), use_resource=True
        )
    return made


LAYOUTS = {
    "shadow names": (GRAPH, "--decay", "0.9"),
    "with variables": (GRAPH, "--decay", "0.9", "--keep-variables", "--optimizer", "keep"),
    "without optimizer": (GRAPH, "--decay", "0.9", "--names", "variable", "--optimizer", "drop"),
    "float64": (GRAPH, "--decay", "0.9", "--dtype", "float64"),
    "bfloat16": (GRAPH, "--average", "mean", "--dtype", "bfloat16"),
    "objects by shadow names": (KERAS / "compiled", "--average", "mean", "--names", "shadow"),
}


@pytest.mark.parametrize("words", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tensorflow_saves_again_what_it_restored(
    tmp_path: Path, words: tuple[str | Path, ...]
) -> None:
    """A Saver restores every tensor of a new layout and saves it: the same index, the same data."""
    tool("run", *words, "-o", tmp_path / "out")
    with tf.Graph().as_default():
        names = variables_of(str(tmp_path / "out"))
        again = saved(tmp_path / "again", names, values=str(tmp_path / "out"))
    assert again == files(tmp_path / "out")


def test_a_checkpoint_of_every_kind_has_tensorflow_s_bytes(tmp_path: Path) -> None:
    """Strings, integers, half types, nothing, a scalar, and variables in parts on either axis.

    Averaged under the names of shadows, and saved by TensorFlow from the same variables under the
    same names.
    """
    with tf.Graph().as_default():
        half, third = v1.fixed_size_partitioner(2), v1.fixed_size_partitioner(3, axis=1)
        shapes = {"rows": ([70, 3], half), "columns": ([4, 9], third), "z/flat": ([9000], half)}
        made = {
            name: v1.get_variable(name, shape, partitioner=cut, use_resource=False)
            for name, (shape, cut) in shapes.items()
        }
        values = {
            "kernel": np.float32([[1, 2], [3, 4]]),
            "bf16": np.array([1, 2.5], ml_dtypes.bfloat16),
            "f16": np.float16([0.1, 65504]),
            "f64": np.float64(1 / 3),
            "empty": np.zeros((0, 3), np.float32),
            "scalar": np.float32(7),
            "global_step": np.int64(12),
            "small": np.int8([-1, 2]),
            "flags": np.array([True, False]),
            "phase": np.complex64([1 + 2j]),
            "names": np.array([[b"a", b""], [b"\0\xff" * 100, "ü".encode()]], object),
            "batch_norm/moving_mean": np.float32([1, 2]),
            "A.b-c>d/w": np.float32([5]),
        }
        for name, value in values.items():
            made[name] = v1.Variable(value, name=name, use_resource=True)
        saved(tmp_path / "model.ckpt-12", made)
    tool("run", tmp_path / "model.ckpt-12", "-o", tmp_path / "out", "--average", "mean")
    names = agreed(tmp_path / "out").keys()
    assert len(names) == len(made) + 1  # the statistics stand under both names
    with tf.Graph().as_default():
        for name, (shape, cut) in shapes.items():
            made[name] = v1.get_variable(name, shape, partitioner=cut, use_resource=False)
        wanted = {}
        for name in names:
            variable = name.removesuffix(f"/{SHADOW}")
            plain = values.get(variable)
            wanted[name] = made[variable] if plain is None else v1.Variable(plain)
        again = saved(tmp_path / "again", wanted, values=str(tmp_path / "out"))
    assert again == files(tmp_path / "out")


def test_many_tensors_have_tensorflow_s_index(tmp_path: Path) -> None:
    """An index of several blocks, cut where TensorFlow cuts them."""
    names = [f"layer{k % 97}/block{k % 13}/" + "x" * (k % 80) + f"/k{k}" for k in range(9000)]
    tensors = {name: np.float32([k]) for k, name in enumerate(names)}
    arguments = {"shape_and_slices": [""] * len(names)}
    source, expected = str(tmp_path / "model.ckpt-1"), str(tmp_path / "expected")
    values = [tensors[name] for name in sorted(names)]
    tf.raw_ops.SaveV2(prefix=source, tensor_names=sorted(names), tensors=values, **arguments)
    tool("run", source, "-o", tmp_path / "out", "--average", "mean")
    shadows = sorted(f"{name}/{SHADOW}" for name in names)
    values = [tensors[name.removesuffix(f"/{SHADOW}")] for name in shadows]
    tf.raw_ops.SaveV2(prefix=expected, tensor_names=shadows, tensors=values, **arguments)
    assert len(files(expected)[".index"]) > 2 * 262_144
    assert files(tmp_path / "out") == files(expected)


# ---------------------------------------------------------------------------- conversion


def test_a_converted_checkpoint_has_tensorflow_s_bytes(tmp_path: Path) -> None:
    """From safetensors: as if TensorFlow had saved the tensors under their names."""
    tensors = {
        "conv/kernel": np.float32([[1, 2], [3, 4]]),
        "conv/bias": np.array([1, 2.5], ml_dtypes.bfloat16),
        "half": np.float16([0.1]),
        "double": np.float64([0.1]),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(7, np.float32),
        "global_step": np.array(12),
        "flags": np.array([True, False]),
        "phase": np.complex64([1 + 2j]),
        **{f"int/{d}": np.arange(3, dtype=d) for d in ("int8", "uint8", "int16", "uint16")},
        **{f"int/{d}": np.arange(3, dtype=d) for d in ("int32", "uint32", "uint64")},
    }
    save_file(tensors, tmp_path / "in.safetensors")
    source = tmp_path / "in.safetensors"
    tool("rename", source, "-o", tmp_path / "out", "--format", "tensorflow")
    assert differences(agreed(tmp_path / "out"), tensors) == []
    with tf.Graph().as_default():
        made = {name: v1.Variable(value, name="v") for name, value in tensors.items()}
        assert saved(tmp_path / "expected", made) == files(tmp_path / "out")


def test_a_run_in_safetensors_becomes_a_tensorflow_average(tmp_path: Path) -> None:
    """`run --format tensorflow`: what a Saver restores and saves again has the same bytes."""
    runs = Path(GRAPH).parent.parent / "digits" / "run"
    tool("run", runs, "-o", f"{tmp_path}/", "--decay", "0.9", "--format", "tensorflow")
    with tf.Graph().as_default():
        names = variables_of(latest(tmp_path))
        again = saved(tmp_path / "again", names, values=latest(tmp_path))
    assert again == files(latest(tmp_path))
    tool("rename", latest(tmp_path), "-o", tmp_path / "back.safetensors")
    tool("run", runs, "-o", tmp_path / "direct.safetensors", "--decay", "0.9")
    tool("diff", tmp_path / "back.safetensors", tmp_path / "direct.safetensors")
