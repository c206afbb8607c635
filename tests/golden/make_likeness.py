"""Write likeness.json: what PyTorch's and Keras' own averages make of the inputs in inputs.py.

    python make_likeness.py     needs torch, and keras with tensorflow

Sections, each with one record for every dtype and setting:

    ema         AveragedModel with get_ema_multi_avg_fn(decay); the first update copies
    mean        AveragedModel as it is by default, on a CPU, and with get_swa_multi_avg_fn(); the
                last value is number 5001, so that counts beyond the half types' are seen too
    pairs       one `_foreach_lerp_` of special and of crafted values
    keras       an optimizer with use_ema=True, ema_momentum as given; iterations 0, 1, 2 ...

`after` has the SHA-256 of the little-endian bytes after that many updates, the first included.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="")

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
import torch
from inputs import Array, variable
from make_tensorflow import cpu
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

GOLDEN = Path(__file__).with_name("likeness.json")
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
SEED = 7
COUNT = 40_013  # more than one chunk of the emulation, and no multiple of a vector
UPDATES = 12
SAVED = (1, 2, 3, UPDATES)
DECAYS = (0.0, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
LATE = 5001  # a mean's last value is this one

# Just below 2**-24 and 2**-53: times D they are half a unit in D's last place, but for the last
# bit of the exact product, which no sum of two float64 can hold.
NEARLY_HALF = {"float32": (2**23 - 1) * 2.0**-47, "float64": (2**52 - 1) * 2.0**-105}
D = {"float16": 2**10 + 1, "bfloat16": 2**7 + 1, "float32": 2**23 + 1, "float64": 2**52 + 1}
WEIGHTS = (*NEARLY_HALF.values(), 0.1, 1 / 3, 0.25, 0.5, 0.7)

Record = dict[str, Any]


def to_torch(array: Array) -> torch.Tensor:
    """The same bits as a tensor of its own."""
    if array.dtype.itemsize == 2:
        dtype = getattr(torch, array.dtype.name)
        return torch.from_numpy(array.view(np.int16).copy()).view(dtype)
    return torch.from_numpy(array.copy())


def to_numpy(tensor: torch.Tensor, dtype: np.dtype[Any]) -> Array:
    tensor = tensor.detach().contiguous()
    raw = tensor.view(torch.int16) if dtype.itemsize == 2 else tensor
    return raw.numpy().view(dtype)


def digest(array: Array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


# PyTorch


class Weights(torch.nn.Module):
    """A model of one parameter."""

    def __init__(self, values: Array) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(to_torch(values))

    def take(self, values: Array) -> None:
        with torch.no_grad():
            self.weight.copy_(to_torch(values))


def averaged(dtype: str, late: bool, **options: Any) -> dict[str, str]:
    """Digests of an AveragedModel fed with the values 0, 1, 2 ... of the inputs."""
    kind = DTYPES[dtype]
    model = Weights(variable(SEED, 0, COUNT, kind))
    average = AveragedModel(model, **options)
    after = {}
    for update in range(1, UPDATES + 1):
        model.take(variable(SEED, update - 1, COUNT, kind))
        if late and update == UPDATES:
            average.n_averaged.fill_(LATE - 1)
        average.update_parameters(model)
        if update in SAVED:
            after[str(update)] = digest(to_numpy(average.module.weight, kind))
    return after


def ema_records() -> list[Record]:
    return [
        {
            "dtype": dtype,
            "decay": decay,
            "after": averaged(dtype, False, multi_avg_fn=get_ema_multi_avg_fn(decay)),
        }
        for dtype in DTYPES
        for decay in DECAYS
    ]


def mean_records() -> list[Record]:
    functions = {"default": {}, "multi": {"multi_avg_fn": get_swa_multi_avg_fn()}}
    return [
        {"dtype": dtype, "function": name, "after": averaged(dtype, True, **options)}
        for dtype in DTYPES
        for name, options in functions.items()
    ]


def specials(dtype: np.dtype[Any]) -> Array:
    """Zeros, a subnormal, the largest number, infinity, NaN, and two ordinary numbers."""
    smallest = np.array([1], f"u{dtype.itemsize}").view(dtype)[0]
    largest = ml_dtypes.finfo(dtype).max
    return np.array([0.0, -0.0, smallest, largest, np.inf, np.nan, 1.0, -1.7], dtype)


def pairs(name: str) -> tuple[Array, Array]:
    """Shadows and values: every two specials, then numbers that are half a unit away."""
    dtype = DTYPES[name]
    values = specials(dtype)
    largest, near = values[3], dtype.type(D[name])
    crafted = np.array(
        [(near, 2 * near), (near, 0.0), (-near, -2 * near), (largest, -largest), (0.0, near)]
        + [(near * 2.0**k, -(2.0**k)) for k in (-12, -6, 3)],
        dtype,
    )
    shadow = np.concatenate([np.repeat(values, len(values)), crafted[:, 0]])
    return shadow, np.concatenate([np.tile(values, len(values)), crafted[:, 1]])


def hexadecimal(array: Array) -> str:
    """The little-endian bytes, with one NaN for all."""
    array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return array.astype(array.dtype.newbyteorder("<")).tobytes().hex()


def pair_records() -> list[Record]:
    records = []
    for name, dtype in DTYPES.items():
        shadow, value = pairs(name)
        mixed = {}
        for weight in WEIGHTS:
            tensor = to_torch(shadow)
            torch._foreach_lerp_([tensor], [to_torch(value)], weight)
            mixed[weight.hex()] = hexadecimal(to_numpy(tensor, dtype))
        ends = {"shadow": hexadecimal(shadow), "value": hexadecimal(value)}
        records.append({"dtype": name, **ends, "mixed": mixed})
    return records


# Keras


def keras_averages(dtype: str, momentum: float) -> Iterator[Array]:
    """The optimizer's average after each of its updates, in a graph that XLA did not compile."""
    kind = DTYPES[dtype]
    optimizer = keras.optimizers.SGD(0.0, use_ema=True, ema_momentum=momentum)
    weight = keras.Variable(np.zeros(COUNT, kind), dtype=dtype)
    optimizer.build([weight])
    update = tf.function(
        lambda: optimizer._update_model_variables_moving_average([weight]), jit_compile=False
    )
    for iteration in range(UPDATES):
        weight.assign(variable(SEED, iteration, COUNT, kind))
        optimizer.iterations.assign(iteration)
        update()
        yield optimizer._model_variables_moving_average[0].numpy()


def keras_records() -> list[Record]:
    records = []
    for dtype in DTYPES:
        for momentum in DECAYS:
            after = {
                str(update): digest(average)
                for update, average in enumerate(keras_averages(dtype, momentum), 1)
                if update in SAVED
            }
            records.append({"dtype": dtype, "momentum": momentum, "after": after})
    return records


def main() -> None:
    """Compute everything and write it."""
    versions = {name: version(name) for name in ("keras", "numpy", "ml_dtypes")}
    document = {
        "made_with": {
            "torch": torch.__version__,
            "torch's kernels": torch.backends.cpu.get_cpu_capability(),
            "tensorflow": tf.__version__,
            "python": platform.python_version(),
            **versions,
            "cpu": cpu(),
        },
        "seed": SEED,
        "count": COUNT,
        "late": LATE,
        "ema": ema_records(),
        "mean": mean_records(),
        "pairs": pair_records(),
        "keras": keras_records(),
    }
    GOLDEN.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
