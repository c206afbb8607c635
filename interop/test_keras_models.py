"""Models of many kinds in each layout that Keras has: it loads the averages of what it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from support import Array, same

from ema_cli import average_run, rename

# Keras converts variables as NumPy 1 had it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
]

layers = keras.layers
DECAY = 0.9
SUFFIXES = (".keras", ".weights.h5", ".h5")


def deep() -> Any:
    """More than ten layers of one class, whose groups sort otherwise as text."""
    parts = [layers.Dense(4 + k % 3, activation="tanh") for k in range(13)]
    return keras.Sequential([keras.Input((5,)), *parts])


def images() -> Any:
    """Convolutions and batch norms with and without their optional variables."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = layers.BatchNormalization(center=False)(x)
    x = layers.SeparableConv2D(5, 3)(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = layers.BatchNormalization(center=False, scale=False)(x)
    x = layers.GroupNormalization(5)(x)
    x = layers.LayerNormalization()(x)
    x = layers.BatchNormalization()(x)
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))


def sequences() -> Any:
    """Recurrent layers, whose variables are those of their cells; an embedding; attention."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8)(inputs)
    x = x + layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.GRU(4, return_sequences=True)(x)
    x = layers.LSTM(3)(layers.Dropout(0.1, seed=1)(x))
    return keras.Model(inputs, layers.Dense(2)(x))


def nested() -> Any:
    """A model of models, one of them used twice, one frozen."""
    inner = keras.Sequential([keras.Input((4,)), *(layers.Dense(4) for _ in range(12))])
    frozen = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization()])
    frozen.trainable = False
    inputs = keras.Input((4,))
    x = frozen(inner(inner(inputs)))
    return keras.Model(inputs, layers.Dense(3)(layers.BatchNormalization()(x)))


def mixed() -> Any:
    """Under the policy mixed_bfloat16: variables are float32."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(6), layers.BatchNormalization(), layers.Dense(2)]
    )


BUILDERS = {one.__name__: one for one in (deep, images, sequences, nested, mixed)}


@pytest.fixture(autouse=True)
def fresh_names() -> None:
    """No policy is left over."""
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session()


def drawn(model: Any, seed: int) -> list[Array]:
    """Give all variables other values, moving variances positive ones, and return them."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "float" in variable.dtype:
            variable.assign(rng.uniform(0.1, 1, variable.shape))
    return [np.asarray(variable.value).copy() for variable in model.variables]


def saved(model: Any, folder: Path, suffix: str, count: int = 3) -> list[list[Array]]:
    """Save a run and return the values of all variables in each checkpoint."""
    folder.mkdir()
    run = []
    for step in range(1, count + 1):
        run.append(drawn(model, step))
        path = folder / f"model-{step}{suffix}"
        (model.save_weights if suffix == ".weights.h5" else model.save)(path)
    return run


def average(model: Any, run: list[list[Array]]) -> list[Array]:
    """Return Keras' averages: of trainable variables; others are the last."""
    found = list(run[-1])
    trainable = [
        k for k, v in enumerate(model.variables) if any(v is t for t in model.trainable_variables)
    ]
    weights = [keras.Variable(run[0][k]) for k in trainable]
    optimizer = keras.optimizers.SGD(0.0, use_ema=True, ema_momentum=DECAY)
    optimizer.build(weights)
    for iteration, values in enumerate(run):
        for weight, k in zip(weights, trainable, strict=True):
            weight.assign(values[k])
        optimizer.iterations.assign(iteration)
        optimizer._update_model_variables_moving_average(weights)
    for k, one in zip(trainable, optimizer._model_variables_moving_average, strict=True):
        found[k] = np.asarray(one.value)
    return found


def check(path: Path, model: Any, expected: list[Array]) -> None:
    """Keras loads the file into a model that held something else and finds these values."""
    drawn(model, 0)
    model.load_weights(path)
    assert wrong(model, expected) == []


def wrong(model: Any, expected: list[Array]) -> list[str]:
    """Return the variables with other values; states of random numbers may differ."""
    return [
        variable.path
        for variable, value in zip(model.variables, expected, strict=True)
        if "float" in variable.dtype and not same(np.asarray(variable.value), value)
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_the_average_loads(kind: str, suffix: str, tmp_path: Path) -> None:
    """As a copy of the last file, as a new file, and after its variables were shadows."""
    model = BUILDERS[kind]()
    run = saved(model, tmp_path / "run", suffix)
    expected = average(model, run)
    select = frozen_layers(kind, suffix)
    options: dict[str, Any] = {"decay": DECAY, "like": "keras", "select": select}
    average_run(tmp_path / "run", tmp_path / f"copy{suffix}", **options)
    check(tmp_path / f"copy{suffix}", model, expected)
    if suffix == ".keras" or (suffix == ".h5" and kind != "sequences"):  # which Keras cannot
        whole = keras.saving.load_model(tmp_path / f"copy{suffix}", compile=False)
        assert wrong(whole, expected) == []
    average_run(tmp_path / "run", tmp_path / f"wide{suffix}", dtype="float64", **options)
    check(tmp_path / f"wide{suffix}", model, expected)
    average_run(tmp_path / "run", tmp_path / f"shadows{suffix}", names="shadow", **options)
    rename(tmp_path / f"shadows{suffix}", tmp_path / f"back{suffix}", names="variable")
    check(tmp_path / f"back{suffix}", model, expected)


def frozen_layers(kind: str, suffix: str) -> list[tuple[str, str]]:
    """Return what has to be said of frozen layers where the file tells nothing of them."""
    told = suffix != ".weights.h5" or kind != "nested"
    return [] if told else [("exclude", "layers/sequential_1/*")]


def wide() -> Any:
    """One layer, which is a model, with more names than an attribute can hold."""
    name = "a_layer_with_a_long_name_" * 36
    inner = keras.Sequential(
        [keras.Input((2,)), *(layers.Dense(2, name=f"{name}{k}") for k in range(40))], name="inner"
    )
    return keras.Sequential([keras.Input((2,)), inner])


def test_lists_of_names_beyond_what_an_attribute_holds(tmp_path: Path) -> None:
    """They are split as Keras splits them."""
    model = wide()
    run = saved(model, tmp_path / "run", ".h5", 2)
    expected = average(model, run)
    with h5py.File(tmp_path / "run" / "model-1.h5") as file:
        assert "weight_names1" in file["model_weights/inner"].attrs
    options: dict[str, Any] = {"decay": DECAY, "like": "keras"}
    average_run(tmp_path / "run", tmp_path / "copy.h5", **options)
    average_run(tmp_path / "run", tmp_path / "wide.h5", dtype="float64", **options)
    average_run(tmp_path / "run", tmp_path / "shadows.h5", names="shadow", **options)
    rename(tmp_path / "shadows.h5", tmp_path / "back.h5", names="variable")
    for name in ("copy.h5", "wide.h5", "back.h5"):
        check(tmp_path / name, model, expected)
