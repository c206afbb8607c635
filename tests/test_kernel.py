"""The arithmetic of one block, held against digests TensorFlow computed and against integers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.inputs import Array, rounded, variable
from helpers import bits_equal, dtype_of

from ema_cli import kernel, schedules


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """The kernel's functions are called as the engine calls them."""
    with kernel.quiet():
        yield


Golden = dict[str, Any]

GOLDEN: Golden = json.loads((Path(__file__).parent / "golden" / "tensorflow.json").read_text())
NAMES = ("float16", "bfloat16", "float32", "float64")
FLOAT64 = np.dtype(np.float64)
UPDATES = 50
SAVED = (1, 10, UPDATES)
# The n-th setting of a dtype is computed in blocks of the n-th size: whole arrays, the engine's
# own block, an odd one that does not divide a million, and one larger than a task's tail.
BLOCKS = (1_000_000, 1 << 16, 40_009, 1 << 18)

# (decay, update): where TensorFlow's factor, which comes from the C library's powf, is not the
# correctly rounded one. Its last bits differ there by 1, 8 and 16 float32 ulp.
POWF_DIFFERS = {(0.995, 367), (0.997, 31), (0.9998, 235)}


def label(record: Golden) -> str:
    rule = record["num_updates"]
    return f"{record['dtype']}-{record['decay']}-{rule['name'] if rule else 'none'}"


def coefficient(record: Golden, update: int) -> Any:
    rule = record["num_updates"]
    n = rule["stride"] * update if rule else None
    omd = schedules.one_minus_decay(record["decay"], n)
    return kernel.cast_coefficient(float(omd), record["dtype"])


def digest(array: Array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def update_in_blocks(shadow: Array, value: Array, c: Any, scratch: Array, block: int) -> None:
    for start in range(0, len(shadow), block):
        part = slice(start, start + block)
        kernel.update(shadow[part], value[part], c, scratch[: len(shadow[part])])


@pytest.fixture(scope="module")
def averages() -> dict[tuple[str, int], str]:
    """Every plain average, all settings and dtypes from one set of exact inputs."""
    records = GOLDEN["averages"]
    seed, count = records[0]["seed"], records[0]["count"]
    start = variable(seed, 0, count, FLOAT64)
    shadows = [rounded(start, dtype_of(record["dtype"])) for record in records]
    scratches = {name: np.empty(count, dtype_of(name)) for name in NAMES}
    digests = {}
    for update in range(1, UPDATES + 1):
        exact = variable(seed, update, count, FLOAT64)
        values = {name: rounded(exact, dtype_of(name)) for name in NAMES}
        for place, (record, shadow) in enumerate(zip(records, shadows, strict=True)):
            name = record["dtype"]
            block = BLOCKS[place % len(BLOCKS)]
            c = coefficient(record, update)
            update_in_blocks(shadow, values[name], c, scratches[name], block)
            if update in SAVED:
                digests[label(record), update] = digest(shadow)
    return digests


@pytest.mark.parametrize("record", GOLDEN["averages"], ids=label)
def test_average_is_tensorflow_bit_for_bit(
    record: Golden, averages: dict[tuple[str, int], str]
) -> None:
    """A million elements have TensorFlow's bits after 1, 10 and 50 updates, in any blocks."""
    found = {str(update): averages[label(record), update] for update in SAVED}
    assert found == {update: state["sha256"] for update, state in record["after"].items()}


@pytest.mark.parametrize("record", GOLDEN["zero_debias"], ids=label)
def test_zero_debias_is_tensorflow_bit_for_bit(record: Golden) -> None:
    """Biased sum, debiased result and local_step have TensorFlow's bits after 1, 10, 50 updates."""
    dtype, count = dtype_of(record["dtype"]), record["count"]
    biased, scratch, shadow = (np.zeros(count, dtype) for _ in range(3))
    for update in range(1, UPDATES + 1):
        c = coefficient(record, update)
        value = variable(record["seed"], update, count, dtype)
        update_in_blocks(biased, value, c, scratch, 33_333)
        if update in SAVED:
            factor = schedules.debias_factor(float(c), update, dtype)
            kernel.divide(biased, factor, shadow)
            after = record["after"][str(update)]
            assert digest(biased) == after["biased"]["sha256"]
            assert digest(shadow) == after["shadow"]["sha256"]
            assert schedules.local_step(update, dtype) == after["local_step"]["value"]


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_those_tensorflow_multiplies_with(name: str) -> None:
    """1 - decay is formed in float32 and cast once, for every decay and num_updates observed."""
    for record in GOLDEN["omd"]:
        omd = schedules.one_minus_decay(record["decay"], record["num_updates"])
        assert float(kernel.cast_coefficient(float(omd), name)) == float.fromhex(record[name])


@pytest.mark.parametrize("name", NAMES)
def test_bias_factors_are_tensorflows_but_for_powf(name: str) -> None:
    """Divisors equal TensorFlow's at every update except the pairs where its powf is inexact."""
    dtype = dtype_of(name)
    different = set()
    for record in (r for r in GOLDEN["bias_factors"] if r["dtype"] == name):
        omd = float(schedules.one_minus_decay(record["decay"]))
        expected = np.frombuffer(bytes.fromhex(record["hex"]), dtype)
        for update, factor in enumerate(expected, start=1):
            if schedules.debias_factor(omd, update, dtype) != float(factor):
                different.add((record["decay"], update))
    assert different == (POWF_DIFFERS if name == "float32" else set())


@pytest.mark.parametrize(
    ("name", "largest"),
    [("bfloat16", 2**8), ("float16", 2**11), ("float32", 2**24), ("float64", 2**53)],
)
def test_local_step_saturates_where_adding_one_has_no_effect(name: str, largest: int) -> None:
    """The counter stops at the first integer n with n + 1 == n in the tensor's dtype."""
    one = dtype_of(name).type(1)
    assert dtype_of(name).type(largest) + one == dtype_of(name).type(largest)
    assert dtype_of(name).type(largest - 1) + one == dtype_of(name).type(largest)
    for updates in (1, largest - 1, largest, largest + 1, 3 * largest):
        assert schedules.local_step(updates, dtype_of(name)) == min(updates, largest)


# ---------------------------------------------------------------------------- c = 0 and c = 1


@pytest.mark.parametrize("name", NAMES)
def test_one_copies_and_zero_leaves_alone(name: str) -> None:
    """c = 1 gives the value's bits and c = 0 keeps the shadow's: no cancellation, no 0 * inf."""
    dtype = dtype_of(name)
    tiny = np.array([1], f"u{dtype.itemsize}").view(dtype)[0]
    special = [1e4, 1.0, np.inf, -np.inf, np.nan, -0.0, 0.0, tiny, -tiny]
    shadow = np.repeat(np.array(special, dtype), len(special))
    value = np.tile(np.array(special, dtype), len(special))
    for c, expected in ((1.0, value), (0.0, shadow)):
        mixed = shadow.copy()
        kernel.update(mixed, value, kernel.cast_coefficient(c, name), np.empty_like(value))
        assert bits_equal(mixed, expected)


def test_one_does_not_cancel() -> None:
    """A copy onto a large float32 shadow is the value, where 1e8 - (1e8 - 1) * 1 would be 0."""
    shadow, value = np.array([1e8], np.float32), np.array([1.0], np.float32)
    assert (shadow - (shadow - value) * np.float32(1))[0] == 0
    kernel.update(shadow, value, kernel.cast_coefficient(1.0, "float32"), np.empty_like(value))
    assert shadow[0] == 1


@pytest.mark.parametrize(
    ("name", "c"), [("float16", 0.9998), ("bfloat16", 0.999), ("float32", 1 - 1e-9)]
)
def test_what_rounds_to_one_copies(name: str, c: float) -> None:
    """A coefficient that the shadow's dtype cannot tell from 1 copies without arithmetic."""
    shadow, value = np.array([1e4], dtype_of(name)), np.array([1.0], dtype_of(name))
    kernel.update(shadow, value, kernel.cast_coefficient(c, name), np.empty_like(value))
    assert shadow[0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_scratch_may_be_the_value(name: str) -> None:
    """Without a buffer of its own an update gives the same bits; with one it keeps the value."""
    dtype = dtype_of(name)
    shadow, value = (variable(3, k, 1000, dtype) for k in (0, 1))
    c = kernel.cast_coefficient(0.3, name)
    expected = shadow - (shadow - value) * c
    kept, alone, apart = value.copy(), shadow.copy(), shadow.copy()
    kernel.update(apart, value, c, np.empty_like(value))
    assert bits_equal(value, kept)
    kernel.update(alone, value, c, value)
    assert bits_equal(alone, expected)
    assert bits_equal(apart, expected)


@pytest.mark.parametrize(
    ("variable_dtype", "auto"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2],
)
def test_shadow_dtype(variable_dtype: str, auto: str) -> None:
    """Half types get a float32 shadow, the others their own; `same` always has the variable's."""
    assert kernel.shadow_dtype(variable_dtype, "auto") == auto
    assert kernel.shadow_dtype(variable_dtype, "same") == variable_dtype
