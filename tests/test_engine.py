"""Whatever the run, the coefficients and the way of working: the bits of plain NumPy."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact import tensorflow_coefficient
from golden.inputs import rounded
from helpers import bits_equal, dtype_of, read_checkpoint, write_checkpoint, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

import ema_cli
from ema_cli import engine, kernel

Array = np.ndarray[Any, Any]
Model = dict[str, Array]
SUFFIX = "/ExponentialMovingAverage"
HALVES = ("float16", "bfloat16")


def averaged(values: Sequence[Array], coefficients: Sequence[float], policy: str) -> Array:
    """One tensor's shadow over whole arrays: zeros, then copy, skip or three rounded operations.

    Each coefficient is rounded to the shadow's dtype first: one that becomes 1 there copies.
    """
    name = values[0].dtype.name
    dtype = np.dtype(np.float32) if policy == "auto" and name in HALVES else values[0].dtype
    shadow = np.zeros(values[0].shape, dtype)
    for value, c in zip(values, coefficients, strict=True):
        wide, cast = value.astype(dtype), dtype.type(c)
        if cast == 1:
            shadow = wide
        elif cast:
            shadow = np.asarray(shadow - np.asarray(shadow - wide) * cast)
    return shadow


def narrowed(shadow: Array, name: str) -> Array:
    """Round once; NumPy's cast from float64 to bfloat16 goes through float32 and rounds twice."""
    if shadow.dtype == np.float64 and name == "bfloat16":
        return rounded(shadow, dtype_of(name))
    return shadow.astype(dtype_of(name))


def from_weights(weights: Sequence[float]) -> list[float]:
    sums = itertools.accumulate(weights)
    return [weight / total if weight else 0.0 for weight, total in zip(weights, sums, strict=True)]


def model(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], seed: int, order: Sequence[int]
) -> Model:
    """Random values that depend on the seed and the tensor alone, saved in any order."""
    made = {}
    for place, (name, (dtype, shape)) in enumerate(shapes.items()):
        numbers = np.random.default_rng([seed, place]).normal(size=shape)
        exact = np.asarray(numbers if dtype != "int64" else numbers * 1e6)
        made[name] = exact.astype(dtype_of(dtype))
    names = list(made)
    return {names[place]: made[names[place]] for place in order}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


DTYPES = st.sampled_from(["float16", "bfloat16", "float32", "float32", "float64", "int64"])
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (3, 0, 2), (2, 3), (5, 1, 4)]), st.tuples(st.integers(1, 50))
)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A run of one to five checkpoints and up to three averages of it, each with a window."""
    kinds = draw(st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=7))
    shapes = {f"layer.{k}.weight": kind for k, kind in enumerate(kinds)}
    shapes["bias"] = (draw(st.sampled_from(["float32", "bfloat16"])), (3,))
    count = draw(st.integers(1, 5))
    same = list(range(len(shapes)))
    orders = [draw(st.one_of(st.just(same), st.permutations(same))) for _ in range(count)]
    averages = []
    for _ in range(draw(st.integers(1, 3))):
        first, last = sorted(draw(st.tuples(*[st.integers(0, count - 1)] * 2)))
        weight = st.one_of(st.just(0.0), st.floats(1e-3, 10))
        size = last - first + 1
        weights = draw(st.lists(weight, min_size=size, max_size=size).filter(any))
        averages.append((first, last, weights))
    return {
        "models": [model(shapes, seed, order) for seed, order in enumerate(orders)],
        "averages": averages,
        "names": draw(st.sampled_from(["variable", "shadow"])),
        "shadow_dtype": draw(st.sampled_from(["auto", "same"])),
        "dtype": draw(st.sampled_from([None, None, "float16", "bfloat16", "float32", "float64"])),
        "block": draw(st.sampled_from([1, 3, 16, 1 << 16])),
        "task": draw(st.sampled_from([2, 7, 50, 1 << 21])),
        "workers": draw(st.sampled_from([1, 2, 4])),
    }


def check_outcome(
    case: Mapping[str, Any], average: tuple[int, int, list[float]], path: Path
) -> None:
    first, last, weights = average
    taken = case["models"][first : last + 1]
    coefficients = from_weights(weights)
    found = read_checkpoint(path)
    for name, value in taken[-1].items():
        if value.dtype == np.int64:
            assert bits_equal(found.pop(name), value)
            continue
        key = name + SUFFIX if case["names"] == "shadow" else name
        shadow = averaged([one[name] for one in taken], coefficients, case["shadow_dtype"])
        expected = narrowed(shadow, case["dtype"] or value.dtype.name)
        assert bits_equal(found.pop(key), expected), (name, found, expected)
    assert not found


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_any_run_is_averaged_as_whole_arrays_are(case: dict[str, Any]) -> None:
    """Every dtype, shape, order, weight, window, block and worker count gives NumPy's bits."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "BLOCK_ELEMENTS", case["block"])
        patch.setattr(engine, "TASK_ELEMENTS", case["task"])
        folder = Path(name)
        run = write_run(folder / "run", case["models"])
        specs = []
        for k, (first, last, weights) in enumerate(case["averages"]):
            lines = [f"{(first + i + 1) * 100} {w!r}" for i, w in enumerate(weights)]
            (folder / f"{k}.txt").write_text("\n".join(lines))
            window = f"{(first + 1) * 100}:{(last + 1) * 100}"
            specs.append(f"average{k}=weights:{folder / f'{k}.txt'}@{window}")
        keys = ("names", "shadow_dtype", "dtype", "workers")
        options = {key: case[key] for key in keys}
        output = folder / "{average}.safetensors"
        ema_cli.average_run(run, output, average=specs, **options)
        for k, average in enumerate(case["averages"]):
            check_outcome(case, average, folder / f"average{k}.safetensors")


# ---------------------------------------------------------------------------- ways of working

SHAPES_OF_ONE = {
    "a": ("float32", (1000,)),
    "b": ("float32", (37, 11)),
    "c": ("bfloat16", (513,)),
    "d": ("float64", (300,)),
    "e": ("float16", (257,)),
    "f": ("int64", (99,)),
    "g": ("float32", ()),
}
ONE_ORDER = list(range(len(SHAPES_OF_ONE)))


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = [model(SHAPES_OF_ONE, seed, ONE_ORDER) for seed in range(6)]
    return write_run(tmp_path_factory.mktemp("one") / "run", models)


@pytest.fixture(scope="module")
def one_result(one_run: Path) -> str:
    output = one_run.parent / "reference.safetensors"
    ema_cli.average_run(one_run, output, decay=0.9, workers=1)
    return digest(output)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(("block", "task"), [(1, 100), (64, 64), (100, 333), (1 << 16, 1)])
def test_blocks_and_workers_do_not_change_a_bit(
    one_run: Path,
    one_result: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    block: int,
    task: int,
) -> None:
    """The output file is the same however the elements are cut and on however many threads."""
    monkeypatch.setattr(engine, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(engine, "TASK_ELEMENTS", task)
    output = tmp_path / "out.safetensors"
    ema_cli.average_run(one_run, output, decay=0.9, workers=workers)
    assert digest(output) == one_result


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_executors_do_not_change_a_bit(
    one_run: Path, one_result: str, tmp_path: Path, kind: str
) -> None:
    """Threads or processes, the caller's executor gives the same file and stays usable."""
    pool: Executor = ThreadPoolExecutor(3)
    if kind == "processes":
        pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
    output = tmp_path / "out.safetensors"
    with pool:
        ema_cli.average_run(one_run, output, decay=0.9, executor=pool, workers=2)
        assert pool.submit(len, "abc").result() == 3
    assert digest(output) == one_result


@pytest.mark.parametrize("policy", ["auto", "same"])
def test_one_pass_is_one_checkpoint_at_a_time(one_run: Path, tmp_path: Path, policy: str) -> None:
    """Updating whole shadows checkpoint by checkpoint with the kernel gives the same bits."""
    output = tmp_path / "out.safetensors"
    ema_cli.average_run(
        one_run, output, decay=0.99, num_updates="step", shadow_dtype=policy, names="variable"
    )
    shadows: Model = {}
    for step in range(100, 700, 100):
        omd = 1.0 if step == 100 else float(tensorflow_coefficient(0.99, step))
        for name, value in read_checkpoint(one_run / f"model-step-{step}.safetensors").items():
            if value.dtype == np.int64:
                continue
            dtype = kernel.shadow_dtype(value.dtype.name, policy)
            wide = np.zeros(value.shape, dtype_of(dtype))
            kernel.widen(value, wide)
            shadow = shadows.setdefault(name, np.zeros_like(wide))
            kernel.update(shadow, wide, kernel.cast_coefficient(omd, dtype), wide)
    found = read_checkpoint(output)
    for name, shadow in shadows.items():
        expected = np.zeros(shadow.shape, found[name].dtype)
        kernel.narrow(shadow, expected)
        assert bits_equal(found[name], expected)


def test_tensors_may_move_between_shards(tmp_path: Path) -> None:
    """A run of folders whose shards hold other tensors each time is averaged by name."""
    values = [np.array([4.0, 8.0], np.float32) * k for k in (1, 2, 3)]
    names = ["a", "b", "c"]
    for k, cut in enumerate((1, 2, 1), start=1):
        folder = tmp_path / "run" / f"checkpoint-{k}"
        parts = [names[:cut], names[cut:]]
        files = [f"model-{p}-of-2.safetensors" for p in (1, 2)]
        for file, part in zip(files, parts, strict=True):
            write_checkpoint(folder / file, {name: values[k - 1] + ord(name) for name in part})
        rows = [f'"{n}": "{f}"' for f, part in zip(files, parts, strict=True) for n in part]
        text = '{"weight_map": {' + ", ".join(rows) + "}}"
        (folder / "model.safetensors.index.json").write_text(text)
    output = tmp_path / "mean.safetensors"
    single = {"format": "safetensors", "names": "variable"}
    ema_cli.average_run(tmp_path / "run", output, average=["mean"], **single)
    found = read_checkpoint(output)
    for name in names:
        expected = averaged([v + ord(name) for v in values], from_weights([1.0] * 3), "auto")
        assert bits_equal(found[name], expected.astype(np.float32))
