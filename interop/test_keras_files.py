"""Keras loads what we wrote of its files and finds the averages it computed itself."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import FIXTURES, Array, differences

from ema_cli import average_run, rename

ROOT = FIXTURES / "keras"
NAMES = json.loads((ROOT / "names.json").read_text())
SUFFIXES = {
    "archive": ".keras",
    "weights": ".weights.h5",
    "legacy": ".h5",
    "bfloat16": ".weights.h5",
}
LIKE: dict[str, dict[str, Any]] = {
    "keras": {"decay": 0.9, "like": "keras"},
    "tensorflow": {"decay": 0.9, "shadow_dtype": "same"},
}
layers = keras.layers


@pytest.fixture(autouse=True)
def fresh_names() -> None:
    """Layers get the names they have in a program of their own; no policy is left over."""
    keras.utils.clear_session()
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)


def digits(policy: str = "float32") -> Any:
    """Build the model of the fixtures."""
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(8, use_bias=False, name="hidden"),
            layers.BatchNormalization(momentum=0.9, name="norm"),
            layers.ReLU(name="relu"),
            layers.Dense(10, name="logits"),
        ],
        name="digits",
    )
    model.compile(
        optimizer=keras.optimizers.Adam(0.01, beta_2=0.95, use_ema=True, ema_momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def loaded(path: Path, policy: str = "float32") -> Any:
    """Load weights, and the optimizer's state if there is one, in a program of its own."""
    keras.utils.clear_session()
    model = digits(policy)
    model.load_weights(path)
    return model


def values(variables: Sequence[Any]) -> dict[str, Array]:
    """Return the values of variables by their paths."""
    return {variable.path: np.asarray(variable.value) for variable in variables}


def policy_of(layout: str) -> str:
    """Return the dtype policy of a run of the fixtures."""
    return "bfloat16" if layout == "bfloat16" else "float32"


def expected(layout: str, like: str) -> dict[str, Array]:
    """Return the average that the framework computed of a run of the fixtures."""
    folder = "expected/bfloat16" if layout == "bfloat16" else "expected"
    return load_file(ROOT / folder / f"{like}.safetensors")


def last_of(layout: str) -> Path:
    """Return the last checkpoint of a run of the fixtures."""
    return ROOT / layout / f"epoch-3{SUFFIXES[layout]}"


def check(path: Path, layout: str, like: str, *, optimizer: bool = True) -> None:
    """Keras loads the file, finds the average, the optimizer as it was, and goes on with it."""
    average, images = expected(layout, like), np.random.default_rng(0).random((32, 64))
    if ".weights" not in path.suffixes:
        whole = keras.saving.load_model(path, compile=False)
        # The names of models that it builds of a configuration are no part of their paths.
        assert sorted(v.numpy().tobytes() for v in whole.variables) == sorted(
            array.tobytes() for array in average.values()
        )
        assert np.isfinite(whole(images)).all()
    last = loaded(last_of(layout), policy_of(layout))
    model = loaded(path, policy_of(layout))
    assert differences(values(model.variables), average) == []
    ours, theirs = (
        {k: v for k, v in stored(one).items() if k.startswith("optimizer")}
        for one in (path, last_of(layout))
    )
    assert differences(ours, theirs if optimizer else {}) == []
    if optimizer:
        states = [values(one.optimizer.variables) for one in (model, last)]
        assert differences(*states) == []
        assert len(states[0]) == 17
    assert np.isfinite(np.asarray(model(images), np.float32)).all()


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("layout", SUFFIXES)
def test_the_average_is_the_frameworks(layout: str, like: str, tmp_path: Path) -> None:
    """In a copy of the last file."""
    out = tmp_path / f"average{SUFFIXES[layout]}"
    average_run(ROOT / layout, out, **LIKE[like])
    check(out, layout, like)
    assert out.stat().st_size == last_of(layout).stat().st_size


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("layout", SUFFIXES)
def test_a_new_file_without_the_optimizer(layout: str, tmp_path: Path) -> None:
    """Or in other precision, which Keras rounds to its own."""
    out, wide = (tmp_path / f"{name}{SUFFIXES[layout]}" for name in ("average", "wide"))
    average_run(ROOT / layout, out, optimizer="drop", **LIKE["keras"])
    check(out, layout, "keras", optimizer=False)
    average_run(ROOT / layout, wide, dtype="float64", optimizer="keep", **LIKE["keras"])
    check(wide, layout, "keras")
    assert np.dtype(np.float64) in {array.dtype for array in stored(wide).values()}


def stored(path: Path) -> dict[str, Array]:
    """Return the datasets of a file, or of the one in an archive, as HDF5 reads them."""
    found: dict[str, Array] = {}

    def visit(name: str, one: Any) -> None:
        if isinstance(one, h5py.Dataset):
            array = np.asarray(one)
            found[name] = array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array

    source: Any = path
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            source = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(source, "r") as file:
        file.visititems(visit)
    return found


def test_a_training_goes_on_from_an_average(tmp_path: Path) -> None:
    """The optimizer counts on, and keeps averages of its own."""
    out = tmp_path / "average.weights.h5"
    average_run(ROOT / "weights", out, **LIKE["keras"])
    model = loaded(out)
    images, labels = np.random.default_rng(0).random((32, 64)), np.arange(32) % 10
    model.fit(images, labels, batch_size=8, verbose=0)
    assert int(model.optimizer.iterations) == 154
    assert np.isfinite(model.predict(images, verbose=0)).all()


@pytest.mark.parametrize("layout", SUFFIXES)
def test_shadows_lie_where_the_map_says(layout: str, tmp_path: Path) -> None:
    """And once they took their variables' places again, Keras loads them."""
    out, back = (tmp_path / f"{name}{SUFFIXES[layout]}" for name in ("shadows", "back"))
    average_run(ROOT / layout, out, names="shadow", optimizer="keep", **LIKE["keras"])
    found, average = stored(out), expected(layout, "keras")
    shadowed = [k for k, (_, role) in NAMES[layout].items() if role == "trainable"]
    for name in shadowed:
        where = f"ExponentialMovingAverage/{name}"
        if where not in found:
            where = f"{name}/ExponentialMovingAverage"
        assert differences({name: found[where]}, {name: average[NAMES[layout][name][0]]}) == []
    rename(out, back, names="variable")
    check(back, layout, "keras")


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_through_safetensors_and_back(tmp_path: Path) -> None:
    """The names of the datasets are kept, and are all that Keras 3 needs."""
    average_run(ROOT / "weights", tmp_path / "a.safetensors", names="variable", **LIKE["keras"])
    rename(tmp_path / "a.safetensors", tmp_path / "a.weights.h5")
    check(tmp_path / "a.weights.h5", "weights", "keras", optimizer=False)


# ---------------------------------------------------------------------------- other files


def rewritten(source: Path, target: Path, **options: Any) -> None:
    """Copy an HDF5 file with its arrays stored otherwise; scalars cannot be."""

    def visit(name: str, one: Any) -> None:
        made = new.require_group(name) if isinstance(one, h5py.Group) else None
        if made is None:
            more = options if one.ndim and one.size else {}
            made = new.create_dataset(name, data=one[()], dtype=one.dtype, **more)
        made.attrs.update(one.attrs)

    with h5py.File(source, "r") as old, h5py.File(target, "w") as new:
        new.attrs.update(old.attrs)
        old.visititems(visit)


STORAGE: dict[str, dict[str, Any]] = {
    "chunked": {"chunks": True},
    "gzip": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "lzf": {"compression": "lzf"},
}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("layout", ["weights", "legacy", "bfloat16"])
def test_chunked_and_compressed_files(layout: str, storage: str, tmp_path: Path) -> None:
    """What h5py and others rewrote."""
    run = tmp_path / "run"
    run.mkdir()
    for path in (ROOT / layout).iterdir():
        rewritten(path, run / path.name, **STORAGE[storage])
    out = tmp_path / f"average{SUFFIXES[layout]}"
    average_run(run, out, optimizer="keep", **LIKE["keras"])
    check(out, layout, "keras")


def test_deflated_archives(tmp_path: Path) -> None:
    """What zip programs made of `.keras` files."""
    run, out = tmp_path / "run", tmp_path / "average.keras"
    run.mkdir()
    for path in (ROOT / "archive").iterdir():
        with (
            zipfile.ZipFile(path) as old,
            zipfile.ZipFile(run / path.name, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
    average_run(run, out, optimizer="keep", **LIKE["keras"])
    check(out, "archive", "keras")
