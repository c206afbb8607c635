"""The class of TensorFlow's name: its bits, its names, its restore map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bits_equal, dtype_of, read_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from ema_cli import ExponentialMovingAverage
from ema_cli.errors import Disagreement, UsageError

Array = np.ndarray[Any, Any]
KINDS = ("float16", "bfloat16", "float32", "float64")
SUFFIX = "/ExponentialMovingAverage"
ONE = {"v": np.float32([1, 2, 3]), "w": np.float32([4])}
TWO = {"v": np.float32([5, 0, -1]), "w": np.float32([-4])}
MEAN = "hidden1/batch_norm/moving_mean"
VARIABLES = [
    *(f"hidden{k}/{v}" for k in (1, 2) for v in ("batch_norm/beta", "batch_norm/gamma", "kernel")),
    "logits/bias",
    "logits/kernel",
]


def coefficient(decay: float, n: float | None = None) -> np.float32:
    """1 - decay as TensorFlow forms it: float32 throughout."""
    d = np.float32(decay)
    if n is not None:
        n = np.float32(n)
        d = min(d, np.float32(np.float32(1) + n) / np.float32(np.float32(10) + n))
    return np.float32(np.float32(1) - d)


def mixed(shadow: Array, value: Array, omd: np.float32) -> Array:
    """One update: three operations, each rounded to the dtype; 1 means copy, 0 leave alone."""
    c = omd.astype(value.dtype)
    if c == 0:
        return shadow
    gap = np.asarray(shadow - value)
    return value if c == 1 else np.asarray(shadow - np.asarray(gap * c))


def averaged(values: Sequence[Array], omds: Sequence[np.float32]) -> Array:
    """The shadow after the first value was copied and the others were mixed in."""
    shadow = np.asarray(values[0])
    for value, omd in zip(values[1:], omds, strict=True):
        shadow = mixed(shadow, np.asarray(value), omd)
    return shadow


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_apply_copies_every_bit_and_is_no_update(kind: str) -> None:
    """NaN payloads, -0 and subnormals survive; the next apply is update 1."""
    width = dtype_of(kind).itemsize
    bits = np.random.default_rng(5).bytes(width * 500)
    first = np.frombuffer(bits, dtype_of(kind))
    ema = ExponentialMovingAverage(0.9, "count")
    ema.apply({"v": first})
    assert bits_equal(np.asarray(ema.average("v")), first)
    plain = np.ones(500, dtype_of(kind))
    ema = ExponentialMovingAverage(0.9, "count")
    ema.apply({"v": plain})
    ema.apply({"v": plain * dtype_of(kind).type(3)})
    expected = mixed(plain, plain * dtype_of(kind).type(3), coefficient(0.9, 1))
    assert bits_equal(np.asarray(ema.average("v")), expected)


def shaped(kind: str) -> st.SearchStrategy[list[Array]]:
    """One to four arrays of one small shape; the values stay clear of overflow in float16."""
    numbers = st.floats(-1000, 1000, width=32)
    shape = numpy_st.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    same = shape.flatmap(
        lambda s: st.lists(numpy_st.arrays(np.float32, s, elements=numbers), min_size=1, max_size=4)
    )
    return same.map(lambda values: [np.asarray(value).astype(dtype_of(kind)) for value in values])


@settings(max_examples=60, deadline=None)
@given(
    values=st.sampled_from(KINDS).flatmap(shaped),
    decay=st.floats(0, 1, width=32),
    n=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_any_array_gives_tensorflows_bits(values: list[Array], decay: float, n: int | None) -> None:
    """Whatever shape, dtype, decay and constant num_updates: NumPy's three operations."""
    ema = ExponentialMovingAverage(decay, n)
    for value in values:
        ema.apply({"v": value})
    expected = averaged(values, [coefficient(decay, n)] * (len(values) - 1))
    assert bits_equal(np.asarray(ema.average("v")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nans_follow_the_formula(kind: str) -> None:
    """IEEE decides, as in TensorFlow, and no warning is shown."""
    first = np.array([np.inf, np.inf, 1, np.nan, 1, -np.inf], dtype_of(kind))
    second = np.array([np.inf, 1, -np.inf, 1, np.nan, np.inf], dtype_of(kind))
    ema = ExponentialMovingAverage(0.9)
    ema.apply({"v": first})
    ema.apply({"v": second})
    found = np.asarray(ema.average("v")).astype(np.float64)
    expected = [np.nan, np.nan, -np.inf, np.nan, np.nan, np.nan]
    assert np.array_equal(found, expected, equal_nan=True), found


@pytest.mark.parametrize(
    "num_updates, ns",
    [
        (None, [None] * 3),
        (0, [0] * 3),
        (4, [4] * 3),
        (np.int64(4), [4] * 3),
        ("count", [1, 2, 3]),
        ("step", [7, 30, 1000]),
        (iter([99, 5, 6, 7]).__next__, [5, 6, 7]),
    ],
    ids=["none", "zero", "constant", "numpy", "count", "step", "callable"],
)
def test_num_updates_is_what_it_says_at_every_apply(num_updates: Any, ns: list[Any]) -> None:
    """A constant stays, a function is asked anew, count counts updates, step reads the step."""
    values = [np.float32([k, -3 * k, 0.1]) for k in (1, 2, 5, 7)]
    ema = ExponentialMovingAverage(0.9, num_updates)
    for value, step in zip(values, [1, 7, 30, 1000], strict=True):
        ema.apply({"v": value, "global_step": np.int64(step)})
    expected = averaged(values, [coefficient(0.9, n) for n in ns])
    assert bits_equal(np.asarray(ema.average("v")), expected)


def test_a_decay_that_is_a_function_is_called_once_for_every_apply() -> None:
    """The k-th apply takes the k-th decay: TensorFlow reads a variable at every apply."""
    values = [np.float32([k, -3 * k, 0.1]) for k in (1, 2, 5, 7)]
    decays = iter([0.1, 0.5, 0.75, 0.875])
    ema = ExponentialMovingAverage(lambda: next(decays))
    for value in values:
        ema.apply({"v": value})
    expected = averaged(values, [coefficient(d) for d in (0.5, 0.75, 0.875)])
    assert bits_equal(np.asarray(ema.average("v")), expected)


def test_a_function_that_returns_no_decay_is_refused_and_changes_nothing() -> None:
    """What is outside [0, 1] is found when it is returned, and the shadow stays."""
    current: list[Any] = [0.5]
    ema = ExponentialMovingAverage(lambda: current[0])
    ema.apply({"v": np.float32([1, 2])})
    for current[0] in (1.5, -0.1, math.nan):
        with pytest.raises(UsageError, match="decay"):
            ema.apply({"v": np.float32([3, 4])})
    assert bits_equal(np.asarray(ema.average("v")), np.float32([1, 2]))


@pytest.mark.parametrize(
    "decay, error",
    [
        *((d, TypeError) for d in ("0.9", None, [0.9])),
        *((d, UsageError) for d in (1.5, -0.1, math.nan)),
    ],
)
def test_a_decay_is_a_number_from_0_to_1(decay: Any, error: type[Exception]) -> None:
    """Strings are refused as in TensorFlow; what is out of range, which it takes, as well."""
    with pytest.raises(error, match="decay: expected a number"):
        ExponentialMovingAverage(decay)


def test_unknown_num_updates_and_names_are_refused() -> None:
    """The words are count and step; a name must be one TensorFlow takes for a scope."""
    with pytest.raises(UsageError, match="found 'steps'"):
        ExponentialMovingAverage(0.9, "steps")
    with pytest.raises(ValueError, match="scope"):
        ExponentialMovingAverage(0.9, name="two words")
    with pytest.raises(TypeError, match="name"):
        ExponentialMovingAverage(0.9, name=None)  # type: ignore[arg-type]


def test_a_step_is_needed_only_when_it_counts() -> None:
    """Without a scalar step in it a mapping cannot be applied by step, and nothing changes."""
    ema = ExponentialMovingAverage(0.9, "step")
    with pytest.raises(Disagreement, match="global_step"):
        ema.apply({"v": np.float32([1])})
    assert ema.average("v") is None
    ExponentialMovingAverage(0.9, "count").apply({"v": np.float32([1])})


# ---------------------------------------------------------------------------- zero_debias


def debiased(values: Sequence[Array], ns: Sequence[int | None]) -> tuple[Array, Array, Array]:
    """Shadow, biased and local_step of a plain Tensor, every operation in its own dtype."""
    dt = values[0].dtype.type
    biased, count = np.zeros_like(values[0]), dt(0)
    for value, n in zip(values, ns, strict=True):
        omd = coefficient(0.9, n)
        biased = mixed(biased, value, omd)
        count = dt(count + dt(1))
        kept = dt(dt(1) - omd.astype(value.dtype))
        factor = dt(dt(1) - dt(math.pow(float(kept), float(count))))
    return np.asarray(biased / factor), biased, np.asarray(count)


@pytest.mark.parametrize("num_updates", [None, "count"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_zero_debias_divides_by_tensorflows_factor(
    tmp_path: Path, kind: str, num_updates: str | None
) -> None:
    """The first checkpoint is update 1; biased and local_step lie in the slots as in a graph."""
    values = [np.array([3 * k, -k / 7, 0.1]).astype(dtype_of(kind)) for k in range(1, 8)]
    ema = ExponentialMovingAverage(0.9, num_updates, True, store=tmp_path)
    for k, value in enumerate(values, start=1):
        ema.apply({"v": value})
        ns = [j if num_updates else None for j in range(1, k + 1)]
        shadow, biased, count = debiased(values[:k], ns)
        slot = read_checkpoint(tmp_path / f"slot.{(k - 1) % 2}")
        assert bits_equal(np.asarray(ema.average("v")), shadow), k
        assert bits_equal(slot[f"v{SUFFIX}/biased"], biased), k
        assert bits_equal(slot[f"v{SUFFIX}/local_step"], count), k


def test_local_step_saturates_in_bfloat16(tmp_path: Path) -> None:
    """256 + 1 rounds back to 256 in bfloat16, and the counter stays there."""
    ema = ExponentialMovingAverage(0.5, None, True, store=tmp_path)
    for _ in range(258):
        ema.apply({"v": np.ones(1, dtype_of("bfloat16"))})
    assert float(read_checkpoint(tmp_path / "slot.1")[f"v{SUFFIX}/local_step"]) == 256


def test_zero_debias_counts_each_variable_for_itself(tmp_path: Path) -> None:
    """A variable that joins later starts from zeros with a counter of its own."""
    ema = ExponentialMovingAverage(0.9, None, True, store=tmp_path)
    ema.apply(ONE, ["v"])
    ema.apply(TWO, ["v", "w"])
    ema.apply(ONE, ["w"])
    slot = read_checkpoint(tmp_path / "slot.0")
    for name, values in (("v", (ONE, TWO)), ("w", (TWO, ONE))):
        expected = debiased([one[name] for one in values], [None] * 2)
        found = (name, f"{name}{SUFFIX}/biased", f"{name}{SUFFIX}/local_step")
        assert all(bits_equal(slot[f], e) for f, e in zip(found, expected, strict=True)), name


def test_a_debiased_checkpoint_that_is_applied_spoils_nothing(tmp_path: Path) -> None:
    """Tensors already called biased and local_step do not get into our own of that name."""
    foreign = {f"v{SUFFIX}/biased": np.float32([9, 9, 9]), f"v{SUFFIX}/local_step": np.float32(9)}
    ema = ExponentialMovingAverage(0.9, None, True, store=tmp_path)
    ema.apply({**foreign, **ONE})
    ema.apply({**foreign, **TWO})
    assert bits_equal(np.asarray(ema.average("v")), debiased([ONE["v"], TWO["v"]], [None] * 2)[0])


# ---------------------------------------------------------------------------- names


def test_average_name_before_apply_is_the_name_it_will_have() -> None:
    """`<variable>/<name>`, for any variable and any name TensorFlow takes."""
    for name in ("ExponentialMovingAverage", "ema", "a/b", ""):
        ema = ExponentialMovingAverage(0.9, name=name)
        assert ema.average_name("conv/kernel") == f"conv/kernel/{name}"
        ema.apply({"conv/kernel": np.float32([1]), "count": np.int64(3)})
        assert ema.average_name("conv/kernel") == f"conv/kernel/{name}"
        assert ema.average_name("count") == f"count/{name}"


def test_average_name_is_made_unique_and_then_stays() -> None:
    """A taken name gets `_1`, then `_2`; names that differ only in case count as taken."""
    one = np.float32([1])
    ema = ExponentialMovingAverage(0.9, name="ema")
    ema.apply({"a": one, "a/ema": one, "b": one, "B/EMA": one, "b/ema_1": one, "c": one})
    names = {"a": "a/ema_1", "b": "b/ema_2", "c": "c/ema"}
    assert {name: ema.average_name(name) for name in names} == names
    ema.apply({"a": one, "b": one, "c": one, "c/ema": one})
    assert {name: ema.average_name(name) for name in names} == names
    assert ema.variables_to_restore()["c/ema"] == "c"


def test_variables_to_restore_asks_for_every_trainable_variable(digits_run: Path) -> None:
    """Shadow names for the trainable variables, applied or not; plain names for the rest."""
    path = digits_run / "digits-step-0100.safetensors"
    ema = ExponentialMovingAverage(0.9)
    ema.apply(path, ["logits/bias", MEAN])
    expected = {name: name for name in read_checkpoint(path)}
    for name in (*VARIABLES, MEAN):
        del expected[name]
        expected[name + SUFFIX] = name
    assert ema.variables_to_restore() == expected


def test_variables_to_restore_takes_an_explicit_list(digits_run: Path) -> None:
    """Only what is listed gets the suffix; an empty list is the identity."""
    path = digits_run / "digits-step-0100.safetensors"
    ema = ExponentialMovingAverage(0.9, name="foo")
    ema.apply(path)
    plain = {name: name for name in read_checkpoint(path)}
    assert ema.variables_to_restore([]) == plain
    del plain["logits/bias"]
    found = ema.variables_to_restore(["logits/bias", "logits/bias"])
    assert found == {**plain, "logits/bias/foo": "logits/bias"}
