"""NumPy loads the averages we wrote of its archives."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file
from support import FIXTURES, Array, differences, same, theirs

from ema_cli import average_run, rename

NPZ = FIXTURES / "npz"
EXPECTED = FIXTURES / "keras" / "expected"
LIKE: dict[str, dict[str, Any]] = {
    "keras": {"decay": 0.9, "like": "keras"},
    "tensorflow": {"decay": 0.9, "shadow_dtype": "same"},
}


def load(path: Path) -> dict[str, Array]:
    """Return the arrays as `np.load` reads them; nothing is pickled, every checksum is right."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def save(folder: Path, run: list[Mapping[str, Array]], write: Callable[..., None]) -> Path:
    """Save a run and return its folder."""
    folder.mkdir()
    for step, arrays in enumerate(run, 1):
        write(folder / f"model-{step}.npz", **arrays)
    return folder


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("run", ["run", "compressed"])
def test_the_average_is_the_frameworks(run: str, like: str, tmp_path: Path) -> None:
    """Under the names of the variables; the step is the last one's."""
    out = tmp_path / "average.npz"
    average_run(NPZ / run, out, names="variable", **LIKE[like])
    found, last = load(out), load(NPZ / run / "epoch-3.npz")
    assert same(found.pop("step"), last["step"])
    assert differences(found, load_file(EXPECTED / f"{like}.safetensors")) == []
    if run == "run":  # a copy
        assert list(load(out)) == list(last)
        kernel = load(out)["digits/logits/kernel"]
        assert kernel.flags.f_contiguous


def test_shadows_beside_the_statistics(tmp_path: Path) -> None:
    """What a Keras model gets back when the shadows take its variables' places."""
    average_run(NPZ / "run", tmp_path / "shadows.npz", names="shadow", **LIKE["keras"])
    shadows = load(tmp_path / "shadows.npz")
    ended = {name for name in shadows if name.endswith("/ExponentialMovingAverage")}
    assert len(ended) == 5
    rename(tmp_path / "shadows.npz", tmp_path / "model.npz", names="variable")
    arrays = load(tmp_path / "model.npz")
    assert same(arrays.pop("step"), shadows["step"])
    assert differences(arrays, load_file(EXPECTED / "keras.safetensors")) == []
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(8, use_bias=False, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Dense(10, name="logits"),
        ],
        name="digits",
    )
    for variable in model.variables:
        variable.assign(arrays.pop(variable.path))
    assert not arrays
    assert np.isfinite(model(np.ones((2, 64), np.float32))).all()


DTYPES = [np.dtype(code) for code in ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8")]
OTHERS = [np.dtype(code) for code in ("?", "i1", "u1", ">i2", "<u4", ">i8", "<u8", "<c8", ">c16")]


def everything(seed: int) -> dict[str, Array]:
    """Return arrays of every dtype, order and extreme shape."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for dtype in DTYPES:
        numbers = rng.standard_normal((5, 6, 7)) * 10
        name = f"{dtype.str}/"
        found[f"{name}c"] = numbers.astype(dtype)
        found[f"{name}fortran"] = np.asfortranarray(numbers.astype(dtype))
        found[f"{name}scalar"] = np.array(numbers[0, 0, 0], dtype)
        found[f"{name}empty"] = np.empty((3, 0, 2), dtype)
        found[f"{name}matrix"] = np.asfortranarray(numbers[0].astype(dtype))
        found[f"{name}row"] = np.asfortranarray(numbers[0, :1].astype(dtype))
    for dtype in OTHERS:
        found[f"{dtype.str}/c"] = (rng.standard_normal((2, 3)) * 3).astype("f4").astype(dtype)
        found[f"{dtype.str}/fortran"] = np.asfortranarray(found[f"{dtype.str}/c"][:, :2])
    found["a name with spaces, and ü/漢字"] = rng.standard_normal(3)
    found["long/" + "n" * 5000] = rng.standard_normal(3)
    return found


def shadow(values: list[Array]) -> Array:
    """Return what Keras' optimizer makes of values in turn: as one of them is stored."""
    plain = [np.asarray(value, value.dtype.newbyteorder("=")) for value in values]
    optimizer = keras.optimizers.SGD(0.0, use_ema=True, ema_momentum=0.9)
    weight = keras.Variable(plain[0], dtype=plain[0].dtype.name)
    optimizer.build([weight])
    update = tf.function(
        lambda: optimizer._update_model_variables_moving_average([weight]), jit_compile=False
    )
    for iteration, value in enumerate(plain):
        weight.assign(value)
        optimizer.iterations.assign(iteration)
        update()
    average = optimizer._model_variables_moving_average[0].numpy()
    return np.asarray(average, values[-1].dtype)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_every_kind_of_array(write: Callable[..., None], tmp_path: Path) -> None:
    """Each comes back as it was stored, down to its byte order and order of elements."""
    run = [everything(seed) for seed in range(3)]
    out = tmp_path / "average.npz"
    average_run(save(tmp_path / "run", run, write), out, names="variable", **LIKE["keras"])
    found = load(out)
    assert found.keys() == run[-1].keys()
    wanted = {}
    for name, last in run[-1].items():
        averaged = last.dtype.kind == "f" and last.size
        wanted[name] = shadow([one[name] for one in run]) if averaged else last
    assert {n: a.dtype.newbyteorder("=") for n, a in found.items()} == {
        n: a.dtype.newbyteorder("=") for n, a in wanted.items()
    }
    native = [
        {name: a.astype(a.dtype.newbyteorder("=")) for name, a in some.items()}
        for some in (found, wanted)
    ]
    assert differences(*native) == []


def test_there_and_back(tmp_path: Path) -> None:
    """As a TensorFlow checkpoint, in other precision, and as an archive again."""
    run = [{k: v for k, v in everything(seed).items() if k[0] in "<>"} for seed in range(2)]
    folder = save(tmp_path / "run", run, np.savez_compressed)
    average_run(folder, tmp_path / "model", format="tensorflow", names="variable", decay=0.5)
    average_run(folder, tmp_path / "model.npz", names="variable", decay=0.5)
    restored, arrays = theirs(tmp_path / "model"), load(tmp_path / "model.npz")
    native = {name: a.astype(a.dtype.newbyteorder("=")) for name, a in arrays.items()}
    assert differences(restored, native) == []
    rename(tmp_path / "model", tmp_path / "back.npz")
    assert differences(load(tmp_path / "back.npz"), restored) == []
    average_run(folder, tmp_path / "wide.npz", names="variable", decay=0.5, dtype="float64")
    wide = load(tmp_path / "wide.npz")
    assert {wide[name].dtype for name in wide if "f" in name[:3]} == {np.dtype(np.float64)}
