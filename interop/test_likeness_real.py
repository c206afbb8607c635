"""The arithmetic of PyTorch and Keras, held against PyTorch and Keras on random numbers.

PyTorch fuses products and sums, as on every CPU but an x86 one without AVX2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch
from safetensors.numpy import load_file
from support import FIXTURES, Array, differences
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ema_cli import kernel, likeness, schedules

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
DECAYS = (0.0, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
# Below and above the lengths at which kernels go from elements to vectors to several threads.
COUNTS = (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 1000, 40_003)
UPDATES = 6

SCRATCH = np.empty(likeness.SCRATCH)
Mix = Callable[[int, Array, Array], None]


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """Infinities and NaNs are no events here."""
    with kernel.quiet():
        yield


def to_torch(array: Array) -> torch.Tensor:
    """Return the same bits as a tensor of its own."""
    if array.dtype.itemsize == 2:
        tensor = torch.from_numpy(array.view(np.int16).copy())
        return tensor.view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array.copy())


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return the same bits as an array of its own."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


def numbers(dtype: str, count: int) -> list[Array]:
    """Return values that drift, as weights do, over several powers of ten."""
    rng = np.random.default_rng([list(DTYPES).index(dtype), count])
    value = rng.standard_normal(count) * 10.0 ** rng.integers(-2, 2, count)
    found = []
    for _ in range(UPDATES):
        value = value + rng.standard_normal(count) * 10.0 ** rng.integers(-4, 1, count)
        found.append(value.astype(DTYPES[dtype]))
    return found


def bits(dtype: str, count: int) -> Array:
    """Return any bit patterns at all."""
    kind = DTYPES[dtype]
    rng = np.random.default_rng([3, kind.itemsize, count])
    return np.frombuffer(rng.bytes(count * kind.itemsize), kind).copy()


def unequal(found: Array, expected: Array) -> int:
    """Count the elements with different bits; a NaN is a NaN."""
    raw = f"u{found.dtype.itemsize}"
    both = np.isnan(found) & np.isnan(expected)
    return int(np.count_nonzero((found.view(raw) != expected.view(raw)) & ~both))


# ---------------------------------------------------------------------------- PyTorch


class Weights(torch.nn.Module):
    """A model with one parameter for each length."""

    def __init__(self, arrays: list[Array]) -> None:
        super().__init__()
        tensors = [torch.nn.Parameter(to_torch(array)) for array in arrays]
        self.weights = torch.nn.ParameterList(tensors)


def check_averaged_model(dtype: str, mix: Mix, **options: Any) -> None:
    """Feed an AveragedModel and `mix` the same values and compare after every update."""
    given = [numbers(dtype, count) for count in COUNTS]
    model = Weights([values[0] for values in given])
    average = AveragedModel(model, **options)
    shadows = [values[0].copy() for values in given]
    for update in range(UPDATES):
        with torch.no_grad():
            for weight, values in zip(model.weights, given, strict=True):
                weight.copy_(to_torch(values[update]))
        average.update_parameters(model)
        for shadow, values, theirs in zip(shadows, given, average.module.weights, strict=True):
            if update:
                mix(update + 1, shadow, values[update])
            assert unequal(shadow, to_numpy(theirs)) == 0, (update, len(shadow))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_averaged_model_with_a_decay(dtype: str, decay: float) -> None:
    """The first update copies."""

    def mix(_: int, shadow: Array, value: Array) -> None:
        likeness.update_torch(shadow, value, 1 - decay, SCRATCH)

    check_averaged_model(dtype, mix, multi_avg_fn=get_ema_multi_avg_fn(decay))


@pytest.mark.parametrize("dtype", DTYPES)
def test_averaged_model_as_it_is(dtype: str) -> None:
    """On a CPU an equal average divides."""

    def mix(count: int, shadow: Array, value: Array) -> None:
        likeness.update_torch_mean(shadow, value, count, SCRATCH)

    check_averaged_model(dtype, mix)


def weight_on_gpus(count: int) -> float:
    """`get_swa_multi_avg_fn` divides by a tensor of integers: in float32 for every dtype."""
    return float(np.float32(1) / np.float32(count))


@pytest.mark.parametrize("dtype", DTYPES)
def test_averaged_model_with_the_function_of_a_gpu(dtype: str) -> None:
    """An equal average by `lerp_`, whose weight is a float32."""

    def mix(count: int, shadow: Array, value: Array) -> None:
        likeness.update_torch(shadow, value, weight_on_gpus(count), SCRATCH)

    check_averaged_model(dtype, mix, multi_avg_fn=get_swa_multi_avg_fn())


@pytest.mark.parametrize("weight", [2.0**-53, 1e-3, 0.1, 0.49999999999, 0.5, 0.7, 0.9999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits_are_mixed_as_by_lerp(dtype: str, weight: float) -> None:
    """Subnormals, infinities, cancellation."""
    shadow, value = bits(dtype, 30_011), bits(dtype, 30_013)[2:]
    near = np.arange(len(shadow)) % 3 == 0
    value = np.where(near, np.nextafter(shadow, value), value).astype(shadow.dtype)
    tensor = to_torch(shadow)
    torch._foreach_lerp_([tensor], [to_torch(value)], weight)
    likeness.update_torch(shadow, value, weight, SCRATCH)
    assert unequal(shadow, to_numpy(tensor)) == 0


# ---------------------------------------------------------------------------- Keras


@pytest.mark.parametrize("momentum", DECAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keras_optimizer(dtype: str, momentum: float) -> None:
    """Momentum 0 in the first update, on zeros."""
    values = numbers(dtype, 40_003)
    optimizer = keras.optimizers.SGD(0.0, use_ema=True, ema_momentum=momentum)
    weight = keras.Variable(np.zeros_like(values[0]), dtype=dtype)
    optimizer.build([weight])
    update = tf.function(
        lambda: optimizer._update_model_variables_moving_average([weight]), jit_compile=False
    )
    shadow = np.zeros_like(values[0])
    for iteration, value in enumerate(values):
        weight.assign(value)
        optimizer.iterations.assign(iteration)
        update()
        likeness.update_keras(shadow, value, momentum if iteration else 0.0, SCRATCH)
        theirs = optimizer._model_variables_moving_average[0].numpy()
        assert unequal(shadow, theirs) == 0, iteration


# ---------------------------------------------------------------------------- the fixtures

Run = list[dict[str, Array]]


def torch_run(name: str) -> Run:
    """Return the models in the checkpoints of a run below fixtures/torch, read by PyTorch."""
    folder = FIXTURES / "torch" / name
    if name == "run":
        files = [folder / f"ckpt-{step}.pt" for step in (10, 20, 30, 40)]
        states = [torch.load(file, weights_only=False)["model"] for file in files]
    elif name == "lightning":
        states = [torch.load(file)["state_dict"] for file in sorted(folder.iterdir())]
    else:
        shards = [sorted(one.glob("pytorch_model-*.bin")) for one in sorted(folder.iterdir())]
        states = [{k: v for file in few for k, v in torch.load(file).items()} for few in shards]
    return [{name: to_numpy(tensor) for name, tensor in state.items()} for state in states]


def accumulated(run: Run, mix: Mix, statistics: bool) -> dict[str, Array]:
    """Return the first checkpoint, the others mixed in; counters, perhaps statistics, the last."""
    found = {}
    for name, first in run[0].items():
        still = first.dtype.kind == "i" or ("running" in name and not statistics)
        shadow = (run[-1][name] if still else first).ravel().copy()
        for k, one in enumerate(run[1:], start=2):
            if not still:
                mix(k, shadow, one[name].ravel())
        found[name] = shadow.reshape(first.shape)
    return found


def without_counters(arrays: dict[str, Array]) -> dict[str, Array]:
    """Drop what PyTorch averages in another way, and TensorFlow not at all."""
    return {name: array for name, array in arrays.items() if array.dtype.kind != "i"}


MIXES: dict[str, tuple[Mix, bool]] = {
    "ema": (lambda _, s, v: likeness.update_torch(s, v, 1 - 0.9, SCRATCH), False),
    "ema-buffers": (lambda _, s, v: likeness.update_torch(s, v, 1 - 0.9, SCRATCH), True),
    "mean": (lambda k, s, v: likeness.update_torch_mean(s, v, k, SCRATCH), False),
    "mean-buffers": (lambda k, s, v: likeness.update_torch_mean(s, v, k, SCRATCH), True),
    "mean-multi": (
        lambda k, s, v: likeness.update_torch(s, v, weight_on_gpus(k), SCRATCH),
        False,
    ),
    "tensorflow": (lambda _, s, v: tensorflow_update(s, v), True),
}


def tensorflow_update(shadow: Array, value: Array) -> None:
    """Mix as TensorFlow does with decay 0.9."""
    c = kernel.cast_coefficient(float(schedules.one_minus_decay(0.9)), shadow.dtype.name)
    kernel.update(shadow, value, c, np.empty_like(value))


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("run", ["run", "lightning", "hf"])
def test_torch_fixtures_are_averaged_as_expected(run: str, name: str) -> None:
    """The expected averages in fixtures/torch follow from its checkpoints."""
    expected = load_file(FIXTURES / "torch" / "expected" / run / f"{name}.safetensors")
    mix, statistics = MIXES[name]
    found = accumulated(torch_run(run), mix, statistics)
    if statistics:
        found, expected = without_counters(found), without_counters(expected)
    assert differences(found, expected) == []


def npz_run(folder: Path) -> Run:
    """Return the variables in the checkpoints of a run of npz files."""
    run = []
    for file in sorted(folder.iterdir()):
        with np.load(file) as arrays:
            run.append({name: arrays[name] for name in arrays.files if name != "step"})
    return run


def typed(array: Array) -> Array:
    """Return an array as it is, or as the bfloat16 numbers that HDF5 holds as opaque bytes."""
    return array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array


def weights_run(folder: Path) -> Run:
    """Return the same of a run of `.weights.h5` files."""
    names = json.loads((FIXTURES / "keras" / "names.json").read_text())[folder.name]
    run = []
    for file in sorted(folder.iterdir()):
        with h5py.File(file) as h5:
            run.append(
                {
                    path: typed(np.asarray(h5[name]))
                    for name, (path, role) in names.items()
                    if role != "optimizer"
                }
            )
    return run


KERAS_RUNS: dict[str, tuple[Callable[[Path], Run], str]] = {
    "npz/run": (npz_run, "expected"),
    "npz/compressed": (npz_run, "expected"),
    "keras/weights": (weights_run, "expected"),
    "keras/bfloat16": (weights_run, "expected/bfloat16"),
}


@pytest.mark.parametrize("name", KERAS_RUNS)
def test_keras_fixtures_are_averaged_as_expected(name: str) -> None:
    """The expected averages in fixtures/keras follow from the checkpoints of the trainings."""
    read, folder = KERAS_RUNS[name]
    run, expected = read(FIXTURES / name), FIXTURES / "keras" / folder
    found = {}
    for variable, last in run[-1].items():
        shadow = np.zeros_like(last.ravel())
        for k, one in enumerate(run):
            likeness.update_keras(shadow, one[variable].ravel(), 0.9 if k else 0.0, SCRATCH)
        found[variable] = last if "moving" in variable else shadow.reshape(last.shape)
    assert differences(found, load_file(expected / "keras.safetensors")) == []
    found = accumulated(run, lambda _, s, v: tensorflow_update(s, v), True)
    assert differences(found, load_file(expected / "tensorflow.safetensors")) == []
