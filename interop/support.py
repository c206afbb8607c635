"""What the tests share: the tool as users call it, TensorFlow's readers and writers, and ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from ema_cli.formats.tensorflow import strings
from ema_cli.reading import Values

v1 = tf.compat.v1
Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
GRAPH = FIXTURES / "tensorflow" / "graph"
PARTITIONED = FIXTURES / "tensorflow" / "partitioned"
KERAS = FIXTURES / "tensorflow" / "keras"
V1 = FIXTURES / "tensorflow" / "v1" / "model.ckpt-0"
EVALUATION = GRAPH / "evaluation.meta"

SHADOW = "ExponentialMovingAverage"
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"

_BIN = str(Path(sys.executable).parent)


def tool(*words: str | os.PathLike[str], code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``ema-avg`` as a user does who has activated this environment; check its exit code."""
    path = os.pathsep.join([_BIN, os.environ.get("PATH", "")])
    done = subprocess.run(
        [os.path.join(_BIN, "ema-avg"), *map(os.fspath, words)],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    shown = f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == code, shown
    return done


# ---------------------------------------------------------------------------- values


def same(found: Any, expected: Any) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    a, b = np.asarray(found), np.asarray(expected)
    if a.dtype == object or b.dtype == object:
        return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the names under which two mappings do not hold the same bits."""
    lone = found.keys() ^ expected.keys()
    both = found.keys() & expected.keys()
    return sorted(lone | {name for name in both if not same(found[name], expected[name])})


def theirs(prefix: str | os.PathLike[str]) -> dict[str, Array]:
    """Return every tensor of a checkpoint as ``tf.train.load_checkpoint`` reads it."""
    reader = tf.train.load_checkpoint(os.fspath(prefix))
    shapes = dict(tf.train.list_variables(os.fspath(prefix)))
    read = {name: _array(reader.get_tensor(name)) for name in shapes}
    assert {name: list(array.shape) for name, array in read.items()} == shapes
    return read


def _array(value: Any) -> Array:
    return np.asarray(value, object if isinstance(value, bytes) else None)


def ours(prefix: str | os.PathLike[str]) -> dict[str, Array]:
    """Return every tensor of a checkpoint as the project reads it, strings decoded."""
    values = Values(os.fspath(prefix))
    read = {}
    for name, (dtype, shape) in values.specs.items():
        with values.open(name) as reader:
            block = reader.block(0, reader.elements)
        if dtype.name == "string":
            count = int(np.prod(shape))
            block = np.array([*strings.decode(block.tobytes(), count), None], object)[:-1]
        read[name] = block.reshape(shape)
    return read


def agreed(prefix: str | os.PathLike[str]) -> dict[str, Array]:
    """Return every tensor of a checkpoint after TensorFlow and the project read the same."""
    read = theirs(prefix)
    assert differences(ours(prefix), read) == []
    return read


def latest(folder: Path) -> str:
    """Return the checkpoint that TensorFlow finds in a folder by its state file."""
    found = tf.train.latest_checkpoint(str(folder))
    assert found is not None
    return str(found)


def files(prefix: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the bytes of a checkpoint's index and data files, by what follows the prefix."""
    folder, stem = os.path.split(os.fspath(prefix))
    names = [name for name in os.listdir(folder) if name.startswith(f"{stem}.")]
    mine = [name for name in names if name.endswith(".index") or ".data-" in name]
    return {name.removeprefix(stem): Path(folder, name).read_bytes() for name in mine}


# ---------------------------------------------------------------------------- TensorFlow


def session() -> Any:
    """A session of the default graph that adds in one order; two devices make two shards."""
    config = v1.ConfigProto(
        intra_op_parallelism_threads=1, inter_op_parallelism_threads=1, device_count={"CPU": 2}
    )
    return v1.Session(config=config)


def restored(
    prefix: str | os.PathLike[str], names: Mapping[str, Any] | None = None
) -> dict[str, Array]:
    """Restore the default graph through a Saver; return the values of its variables.

    Nothing but the restore initialises them. Without names it is the plain `Saver()`, and the
    values go by the names of the variables; else those are restored that stand under the names
    the checkpoint is asked for.
    """
    saver = v1.train.Saver(names)
    if names is None:
        names = {variable.op.name: variable for variable in v1.global_variables()}
    values = {name: v1.convert_to_tensor(variable) for name, variable in names.items()}
    with session() as active:
        saver.restore(active, os.fspath(prefix))
        found: dict[str, Array] = active.run(values)
    return found


def write(prefix: str | os.PathLike[str], tensors: Mapping[str, Any]) -> str:
    """Write tensors in the order of their names, by the operation that Savers use."""
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=os.fspath(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
    )
    return os.fspath(prefix)


def moving_average(values: Sequence[Array], decay: float) -> Array:
    """Return TensorFlow's moving average of a variable that held these values in turn."""
    variable = tf.Variable(values[0])
    ema = tf.train.ExponentialMovingAverage(decay)
    for value in values:  # the first gives the shadow its value, to which it adds nothing
        variable.assign(value)
        ema.apply([variable])
    return np.asarray(ema.average(variable))
