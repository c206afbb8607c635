"""partitioned/: variables in slices, in two shards, of half types; TensorFlow restores them all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from support import (
    PARTITIONED,
    SHADOW,
    Array,
    agreed,
    differences,
    latest,
    restored,
    same,
    theirs,
    tool,
    v1,
)

FIRST, LAST = (PARTITIONED / f"model.ckpt-{step}" for step in (0, 60))
STEPS = range(0, 61, 20)
# Each trained variable: shape, dtype, and how the training cut it: parts and axis.
TRAINED = {
    "embedding/rows": ([12, 10], "float32", (5, 0)),
    "projection/columns": ([10, 8], "float32", (3, 1)),
    "embedding/scale": ([10], "bfloat16", None),
    "embedding/shift": ([10], "float16", None),
}
COUNTERS = {"labels_seen": ([8], "int64", None), "global_step": ([], "int64", None)}
Cut = tuple[int, int] | None


def variables(cuts: Mapping[str, Cut], *, resource: bool) -> dict[str, Any]:
    """Build the variables of the program that evaluates, cut into (parts, axis) as asked."""
    made = {}
    for name, (shape, dtype, _) in {**TRAINED, **COUNTERS}.items():
        cut = cuts.get(name)
        made[name] = v1.get_variable(
            name,
            shape,
            dtype,
            v1.zeros_initializer(),
            trainable=name in TRAINED,
            partitioner=v1.fixed_size_partitioner(*cut) if cut else None,
            use_resource=resource,
        )
    return made


def evaluated(prefix: str, *, resource: bool = True) -> dict[str, Array]:
    """Restore through `variables_to_restore` into variables that are not partitioned."""
    with tf.Graph().as_default():
        variables({}, resource=resource)
        ema = v1.train.ExponentialMovingAverage(0.9)
        return restored(prefix, ema.variables_to_restore())


def expected() -> dict[str, Array]:
    """Return what TensorFlow kept during the training: its shadows, and what is not averaged."""
    training = theirs(LAST)
    names = [f"{name}/{SHADOW}" for name in TRAINED]
    return {name: training[name] for name in (*names, *COUNTERS)}


@pytest.mark.parametrize("resource", [True, False], ids=["resource", "reference"])
def test_an_evaluation_without_partitions(partitioned: Path, resource: bool) -> None:
    """The documented restore finds whole variables with the bits of the training's shadows."""
    assert differences(evaluated(latest(partitioned), resource=resource), expected()) == []


def test_the_checkpoint_reads_as_tensorflow_s(partitioned: Path) -> None:
    """Every tensor in it is one that TensorFlow's last checkpoint holds too, bit for bit."""
    saved, training = agreed(latest(partitioned)), theirs(LAST)
    assert saved.keys() == expected().keys()
    assert differences(saved, {name: training[name] for name in saved}) == []


CUTS: dict[str, dict[str, Cut]] = {
    "as in training": {name: cut for name, (_, _, cut) in TRAINED.items()},
    "into other parts": {"embedding/rows": (2, 0), "projection/columns": (4, 1)},
    "along the other axis": {"embedding/rows": (2, 1), "projection/columns": (3, 0)},
    "bfloat16 too": {"embedding/scale": (3, 0)},
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_an_evaluation_with_partitions(partitioned: Path, cuts: Mapping[str, Cut]) -> None:
    """`Saver({restore name: partitioned variable})`, cut as in the training or otherwise."""
    with tf.Graph().as_default():
        made = variables(cuts, resource=False)
        names = {f"{name}/{SHADOW}": made[name] for name in TRAINED}
        assert len(v1.trainable_variables()) > len(TRAINED)
        found = restored(latest(partitioned), names)
    assert differences(found, {name: expected()[name] for name in names}) == []


def trained(prefix: str | Path) -> dict[str, Array]:
    """Restore a checkpoint into the graph of the training; return the values, part by part."""
    with tf.Graph().as_default():
        v1.train.import_meta_graph(f"{FIRST}.meta")
        return restored(prefix)


def test_the_training_graph_restores_plain_names(tmp_path: Path) -> None:
    """`--names variable` into the graph of the training: slices, Adam's slots, both shards."""
    tool(
        *("run", PARTITIONED, "-o", f"{tmp_path}/", "--decay", "0.9"),
        *("--shadow-dtype", "same", "--names", "variable"),
    )
    prefix = latest(tmp_path)
    assert len(list(tmp_path.glob("model.ckpt-60.data-*-of-00002"))) == 2
    saved, last = agreed(prefix), theirs(LAST)
    averages = {name: last[f"{name}/{SHADOW}"] for name in TRAINED}
    assert differences(saved, {**last, **averages}) == []
    found, expected = trained(prefix), trained(LAST)
    parts = [name for name in expected if f"{name}/{SHADOW}" in expected]
    assert len(parts) == 5 + 3 + 2
    averages = {name: expected[f"{name}/{SHADOW}"] for name in parts}
    assert differences(found, {**expected, **averages}) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_another_dtype_restores_whole_and_in_parts(tmp_path: Path, dtype: str) -> None:
    """`--dtype`: float16 restores whole alone, as TensorFlow cannot put its slices together."""
    out = tmp_path / "out"
    tool("run", PARTITIONED, "-o", out, "--decay", "0.9", "--dtype", dtype)
    agreed(out)
    kind = tf.as_dtype(dtype)
    for name in ("embedding/rows", "projection/columns"):
        shape, _, cut = TRAINED[name]
        key = f"{name}/{SHADOW}"
        value = theirs(LAST)[key].astype(kind.as_numpy_dtype)
        for partitioner in (None, v1.fixed_size_partitioner(*cut)):
            if dtype == "float16" and partitioner:
                continue
            with tf.Graph().as_default():
                variable = v1.get_variable(name, shape, kind, partitioner=partitioner)
                assert differences(restored(out, {key: variable}), {key: value}) == []


def test_float32_shadows_of_half_types(tmp_path: Path) -> None:
    """By default half types are averaged in float32, and rounded once to the variable's dtype."""
    out = tmp_path / "out"
    tool("run", PARTITIONED, "-o", out, "--decay", "0.9")
    found = evaluated(str(out))
    omd = np.float32(1) - np.float32(0.9)
    for name in ("embedding/scale", "embedding/shift"):
        values = [theirs(PARTITIONED / f"model.ckpt-{step}")[name] for step in STEPS]
        shadow = values[0].astype(np.float32)
        for value in values[1:]:
            shadow = shadow - (shadow - value.astype(np.float32)) * omd
        assert same(found[f"{name}/{SHADOW}"], shadow.astype(values[0].dtype))
