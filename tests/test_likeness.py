"""The arithmetic of PyTorch and Keras, held against what they computed and against integers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.inputs import Array, variable
from helpers import bits_equal, dtype_of

from ema_cli import kernel, likeness

Golden = dict[str, Any]

GOLDEN: Golden = json.loads((Path(__file__).parent / "golden" / "likeness.json").read_text())
NAMES = ("float16", "bfloat16", "float32", "float64")
UPDATES = 12
# Half types are averaged in float32.
WIDE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """The functions are called as the kernel's are."""
    with kernel.quiet():
        yield


@pytest.fixture(scope="module")
def scratch() -> Array:
    return np.full(likeness.SCRATCH, np.nan)


@pytest.fixture(scope="module")
def values() -> dict[str, list[Array]]:
    """The inputs of all averages."""
    count, seed = GOLDEN["count"], GOLDEN["seed"]
    return {
        name: [variable(seed, k, count, dtype_of(name)) for k in range(UPDATES)] for name in NAMES
    }


def label(record: Golden) -> str:
    return "-".join(str(record[key]) for key in record if key not in ("after", "mixed"))[:40]


def digests(
    values: list[Array], shadow: Array, update: Callable[[int, Array, Array], None], first: int
) -> dict[str, str]:
    """Digests of the shadow after the updates that are recorded, counted from 1."""
    found = {}
    for k, value in enumerate(values, 1):
        if k >= first:
            update(k, shadow, value)
        if k in (1, 2, 3, UPDATES):
            found[str(k)] = hashlib.sha256(shadow.tobytes()).hexdigest()
    return found


# ---------------------------------------------------------------------------- whole averages


@pytest.mark.parametrize("record", GOLDEN["ema"], ids=label)
def test_ema_is_pytorchs(record: Golden, values: dict[str, list[Array]], scratch: Array) -> None:
    """The first update copies, the others have the bits of `AveragedModel`."""

    def update(_: int, shadow: Array, value: Array) -> None:
        likeness.update_torch(shadow, value, 1 - record["decay"], scratch)

    given = values[record["dtype"]]
    assert digests(given, given[0].copy(), update, first=2) == record["after"]


def weight_on_gpus(count: int) -> float:
    """`get_swa_multi_avg_fn` divides by a tensor of integers: in float32 for every dtype."""
    return float(np.float32(1) / np.float32(count))


@pytest.mark.parametrize("record", GOLDEN["mean"], ids=label)
def test_mean_is_pytorchs(record: Golden, values: dict[str, list[Array]], scratch: Array) -> None:
    """Both ways `AveragedModel` has to an equal average; the last value has a high number."""

    def update(k: int, shadow: Array, value: Array) -> None:
        count = GOLDEN["late"] if k == UPDATES else k
        if record["function"] == "default":
            likeness.update_torch_mean(shadow, value, count, scratch)
        else:
            likeness.update_torch(shadow, value, weight_on_gpus(count), scratch)

    given = values[record["dtype"]]
    assert digests(given, given[0].copy(), update, first=2) == record["after"]


@pytest.mark.parametrize("record", GOLDEN["keras"], ids=label)
def test_average_is_kerass(record: Golden, values: dict[str, list[Array]], scratch: Array) -> None:
    """Momentum 0 at first, on zeros."""

    def update(k: int, shadow: Array, value: Array) -> None:
        likeness.update_keras(shadow, value, record["momentum"] if k > 1 else 0.0, scratch)

    given = values[record["dtype"]]
    assert digests(given, np.zeros_like(given[0]), update, first=1) == record["after"]


# ---------------------------------------------------------------------------- single values


def unpacked(text: str, dtype: Any) -> Array:
    """An array of its own from little-endian bytes."""
    return np.frombuffer(bytes.fromhex(text), f"<u{dtype.itemsize}").view(dtype).copy()


def one_nan(array: Array) -> Array:
    """NaNs are compared as NaNs: which bits they have depends on where in a tensor they are."""
    return np.where(np.isnan(array), array.dtype.type(np.nan), array)


@pytest.mark.parametrize("weight", GOLDEN["pairs"][0]["mixed"])
@pytest.mark.parametrize("record", GOLDEN["pairs"], ids=label)
def test_special_values_are_mixed_as_by_pytorch(
    record: Golden, weight: str, scratch: Array
) -> None:
    """Zeros, subnormals, the largest numbers, infinities, NaN, and sums next to a tie."""
    dtype = dtype_of(record["dtype"])
    shadow, value = (unpacked(record[key], dtype) for key in ("shadow", "value"))
    likeness.update_torch(shadow, value, float.fromhex(weight), scratch)
    assert bits_equal(one_nan(shadow), unpacked(record["mixed"][weight], dtype))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_a_product_is_not_rounded_before_the_sum(name: str, scratch: Array) -> None:
    """Just under half a unit in the last place of an odd number: two roundings would add one."""
    bits = {"float32": 24, "float64": 53}[name]
    dtype = dtype_of(name)
    weight = (2.0 ** (bits - 1) - 1) * 2.0 ** (1 - 2 * bits)
    near = dtype.type(2 ** (bits - 1) + 1)
    for end in (2 * near, 0 * near):
        shadow, value = np.array([near]), np.array([end])
        assert shadow + (value - shadow) * dtype.type(weight) != near
        likeness.update_torch(shadow, value, weight, scratch)
        assert shadow == near


def exact(weight: float, shadow: Array, value: Array) -> Array:
    """The fused sums in rational arithmetic, each rounded once; for finite float64 numbers."""
    small = abs(weight) < 0.5
    factor, base = (weight, shadow) if small else (weight - 1, value)
    sums = [
        Fraction(factor) * Fraction(change) + Fraction(start)
        for change, start in zip((value - shadow).tolist(), base.tolist(), strict=True)
    ]
    return np.array([x.numerator / x.denominator for x in sums])


@pytest.mark.parametrize("weight", [2.0**-53, 1e-4, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1 - 2.0**-53])
@pytest.mark.parametrize("lowest", [-1074, -1022, -990, -940, -60, 0, 900, 960])
def test_float64_is_exact_over_the_whole_range(lowest: int, weight: float, scratch: Array) -> None:
    """Subnormals, cancellation, products of subnormal size, and numbers next to overflow."""
    rng = np.random.default_rng(lowest + 2000)
    shadow, value = (
        np.ldexp(rng.uniform(-1, 1, 150), rng.integers(lowest, lowest + 64, 150)) for _ in range(2)
    )
    close = rng.random(150) < 0.4
    value = np.where(close, np.nextafter(shadow, value), value)
    expected = exact(weight, shadow, value)
    likeness.update_torch(shadow, value, weight, scratch)
    assert bits_equal(shadow + 0.0, expected + 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_decay_zero_and_one_copy_and_keep(name: str, scratch: Array) -> None:
    """By arithmetic, so an infinity on either side leaves a NaN."""
    dtype = dtype_of(name)
    shadow, value = np.array([1.5, np.inf, -2, 3], dtype), np.array([-7, 1, np.inf, 3], dtype)
    kept, replaced = shadow.copy(), shadow.copy()
    likeness.update_torch(kept, value, 0.0, scratch)
    likeness.update_torch(replaced, value, 1.0, scratch)
    assert bits_equal(one_nan(kept), np.array([1.5, np.nan, np.nan, 3], dtype))
    assert bits_equal(one_nan(replaced), np.array([-7, np.nan, np.nan, 3], dtype))


# ---------------------------------------------------------------------------- blocks

FUNCTIONS: dict[str, Callable[[Array, Array, Array], None]] = {
    "torch, small weight": lambda s, v, t: likeness.update_torch(s, v, 0.1, t),
    "torch, large weight": lambda s, v, t: likeness.update_torch(s, v, 0.7, t),
    "torch mean": lambda s, v, t: likeness.update_torch_mean(s, v, 7, t),
    "keras": lambda s, v, t: likeness.update_keras(s, v, 0.9, t),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_blocks_do_not_matter(function: str, name: str, scratch: Array) -> None:
    """Any length, in any pieces, gives each element the same bits, and the value stays."""
    dtype, update = dtype_of(name), FUNCTIONS[function]
    count = likeness.SCRATCH * 8 // dtype.itemsize // 3 + 5
    shadow, value = (np.resize(variable(5, k, 50_021, dtype), count) for k in (0, 1))
    whole, pieces, kept = shadow.copy(), shadow.copy(), value.copy()
    update(whole, value, scratch)
    for start in range(0, count, 70_001):
        part = slice(start, start + 70_001)
        update(pieces[part], value[part], scratch)
    assert bits_equal(value, kept)
    assert bits_equal(whole, pieces)
    assert not bits_equal(whole, shadow)
    one = shadow[:1].copy()
    update(one, value[:1], scratch)
    assert bits_equal(one, whole[:1])
    update(shadow[:0], value[:0], scratch)
