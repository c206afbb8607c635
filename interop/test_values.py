"""Every dtype that TensorFlow saves comes through: averaged as TensorFlow averages, or as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from support import (
    SHADOW,
    Array,
    agreed,
    differences,
    files,
    latest,
    moving_average,
    same,
    theirs,
    tool,
    write,
)

AVERAGED = ("float16", "bfloat16", "float32", "float64")
FLOATS = (
    *("float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz"),
    *("float8_e5m2fnuz", "float4_e2m1fn"),
)
NUMBERS = ("complex64", "complex128", "int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64", "int4", "uint4", "int2", "uint2")
QUANTIZED = ("qint8", "quint8", "qint16", "quint16", "qint32")
# How many values fit where they do not take all bits of their bytes.
FEW = {"bool": 2, "int4": 8, "uint4": 16, "int2": 2, "uint2": 4, "float4_e2m1fn": 16}
SHAPES = ((), (0, 3), (7,), (2, 1, 3, 1, 2))
STEPS = (10, 20, 30)


def bits(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    """Return a tensor of random bits."""
    kind = tf.as_dtype(dtype)
    numpy = np.dtype(tf.as_dtype(dtype.removeprefix("q")).as_numpy_dtype)
    n_bytes = int(np.prod(shape)) * numpy.itemsize
    raw = rng.integers(0, FEW.get(dtype, 256), n_bytes, np.uint8).tobytes()
    tensor = tf.constant(np.frombuffer(raw, numpy).reshape(shape))
    return tf.bitcast(tensor, kind) if dtype in QUANTIZED else tensor


def tensors(step: int) -> dict[str, Any]:
    """Return a checkpoint with every dtype in every shape."""
    rng = np.random.default_rng(step)
    made = {"global_step": tf.constant(step, tf.int64)}
    for k, shape in enumerate(SHAPES):
        for dtype in AVERAGED:
            value = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)
            made[f"weights/{dtype}/{k}"] = tf.constant(
                np.asarray(value).astype(tf.as_dtype(dtype).as_numpy_dtype)
            )
        for dtype in ("bool", *FLOATS, *NUMBERS, *UNSIGNED, *QUANTIZED):
            made[f"other/{dtype}/{k}"] = bits(dtype, shape, rng)
        words = [rng.bytes(int(n)) for n in rng.integers(0, 300, int(np.prod(shape)))]
        made[f"other/string/{k}"] = tf.constant(np.array(words, object), tf.string, shape)
    made["weights/ünïcode ▲"] = tf.constant([float(step)])
    made["weights/large"] = tf.constant(rng.standard_normal(1_300_000).astype(np.float32))
    made["weights/large half"] = tf.cast(made["weights/large"], tf.bfloat16)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three checkpoints with every dtype."""
    folder = tmp_path_factory.mktemp("run")
    for step in STEPS:
        write(folder / f"model.ckpt-{step}", tensors(step))
    found = {
        dtype.name
        for dtype in tf.train.load_checkpoint(str(folder / "model.ckpt-10"))
        .get_variable_to_dtype_map()
        .values()
    }
    # 33 dtypes, without resources, which are not saved, and variants, which have their own test.
    assert len(found) == 33 - 2
    return folder


def averages(run: Path) -> dict[str, Array]:
    """Return what TensorFlow makes of the weights of the run."""
    read = [theirs(run / f"model.ckpt-{step}") for step in STEPS]
    names = [name for name in read[0] if name.startswith("weights/")]
    return {name: moving_average([one[name] for one in read], 0.9) for name in names}


WORDS = ("--decay", "0.9", "--shadow-dtype", "same", "--exclude", "other/*")


def test_tensorflow_and_the_tool_read_the_same(run: Path) -> None:
    """Dtypes, shapes and bits of all three."""
    for step in STEPS:
        assert len(agreed(run / f"model.ckpt-{step}")) == 4 * 31 + 4


def test_averages_in_the_same_structure(run: Path, tmp_path: Path) -> None:
    """`--names variable`: weights are TensorFlow's averages, all else is that of the last."""
    tool("run", run, "-o", f"{tmp_path}/", *WORDS, "--names", "variable")
    expected = {**theirs(run / "model.ckpt-30"), **averages(run)}
    assert differences(agreed(latest(tmp_path)), expected) == []


def test_averages_under_the_names_of_shadows(run: Path, tmp_path: Path) -> None:
    """In a new layout; TensorFlow, told to save the same, writes the same bytes."""
    tool("run", run, "-o", f"{tmp_path}/", *WORDS)
    last = tensors(30)
    copied = {name: value for name, value in last.items() if not name.startswith("weights/")}
    shadows = {f"{name}/{SHADOW}": value for name, value in averages(run).items()}
    expected = {name: tf.convert_to_tensor(value) for name, value in {**copied, **shadows}.items()}
    write(tmp_path / "expected", expected)
    assert files(latest(tmp_path)) == files(tmp_path / "expected")
    assert agreed(latest(tmp_path)).keys() == expected.keys()


def test_a_copy_under_other_names(run: Path, tmp_path: Path) -> None:
    """`rename`: every tensor with the same bits."""
    source = run / "model.ckpt-30"
    tool("rename", source, "-o", tmp_path / "out", "--rule", "^(weights|other)/", "new/")
    expected = {
        name.replace("weights/", "new/").replace("other/", "new/"): value
        for name, value in theirs(source).items()
    }
    assert differences(agreed(tmp_path / "out"), expected) == []


def test_variants_are_carried(tmp_path: Path) -> None:
    """Lists of tensors, which only TensorFlow understands, in all three kinds of output."""
    items = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    handle = tf.raw_ops.TensorListFromTensor(tensor=items, element_shape=[2])
    source = write(tmp_path / "model.ckpt-5", {"list": handle, "w": tf.constant([1.0, 2.0])})
    tool("run", source, "-o", tmp_path / "same", "--average", "mean", "--names", "variable")
    tool("run", source, "-o", tmp_path / "new", "--average", "mean")
    tool("rename", source, "-o", tmp_path / "renamed", "--rule", "^w$", "v")
    for name in ("same", "new", "renamed"):
        (found,) = tf.raw_ops.RestoreV2(
            prefix=str(tmp_path / name),
            tensor_names=["list"],
            shape_and_slices=[""],
            dtypes=[tf.variant],
        )
        stacked = tf.raw_ops.TensorListStack(
            input_handle=found, element_shape=[2], element_dtype=tf.float32
        )
        assert same(stacked, items)
    assert files(tmp_path / "same") == files(source)


def test_what_is_not_a_number_is_carried(tmp_path: Path) -> None:
    """Infinities, both zeros and the bits of a NaN, where they are copied."""
    raw = np.array([0x7FC00001, 0xFF800001, 0x7F800000, 0x80000000, 1], np.uint32)
    odd = {"odd": raw.view(np.float32), "w": np.float32([1])}
    source = write(tmp_path / "model.ckpt-5", odd)
    tool("run", source, "-o", tmp_path / "out", "--average", "mean", "--exclude", "odd")
    assert same(agreed(tmp_path / "out")["odd"], odd["odd"])


def test_a_converted_checkpoint_has_the_same_values(run: Path, tmp_path: Path) -> None:
    """To safetensors and back: what safetensors can hold keeps its bits."""
    source = run / "model.ckpt-30"
    done = tool("rename", source, "-o", tmp_path / "out.safetensors", "--format", "safetensors")
    back = ("--format", "tensorflow", "-o", tmp_path / "back")
    tool("rename", tmp_path / "out.safetensors", *back)
    found, expected = agreed(tmp_path / "back"), theirs(source)
    lost = expected.keys() - found.keys()
    kinds = {name.split("/")[1] for name in lost}
    unsayable = {"float4_e2m1fn", "float8_e4m3b11fnuz", "int4", "uint4", "int2", "uint2", "string"}
    assert kinds == {*unsayable, *QUANTIZED, "complex128"}, done.stderr
    assert differences(found, {name: expected[name] for name in found}) == []
