"""The scenarios of TensorFlow's own tests, with the values TensorFlow 2.21 gives, over files.

A scenario's variables become checkpoints: the first one initialises the shadows, as a variable's
value does. Its plain tensor, `tensor2 = v0 + v1` (op name `add`), starts from zeros instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import read_checkpoint, write_checkpoint, write_run

import ema_cli

Values = Mapping[str, Any]
CASES: dict[str, dict[str, Any]] = {
    case["test"].partition(".")[2].split(" ")[0]: case
    for case in json.loads(
        (Path(__file__).parent / "data" / "tf_test_cases.json").read_text(encoding="utf-8")
    )
}
SERIES = {name: case for name, case in CASES.items() if "Updates_" in name}
CONSTANT = {name: case for name, case in SERIES.items() if "DynamicDecay" not in name}

# What needs a graph, devices, or another function than the class has no counterpart in files.
LEFT_OUT = {
    "testAssignMovingAverageNewNamingMultipleCalls": "slots of assign_moving_average",
    "testAssignMovingAverageNewNamingMultipleCallsWithReuse": "slots of assign_moving_average",
    "testWeightedMovingAverage": "weighted_moving_average, another function",
    "testWeightedMovingAverageBfloat16": "weighted_moving_average, another function",
    "testAverageVariablesNamesRespectScope": "variable_scope around apply; files have no scopes",
    "testAverageVariablesNamesRespectScopeNoDebias": "variable_scope around apply",
    "testAverageVariablesDeviceAssignment": "placement on devices",
    "testCopyXlaSharding": "sharding attributes of a graph",
}
TESTED = {
    *SERIES,
    "testAssignMovingAverageWithoutZeroDebias",
    "testAssignMovingAverage",
    "testAverageVariablesWithControlDeps",
    "testBasicEager",
    "testAverageVariablesNames",
    "testAverageVariablesNamesNoDebias",
    "testSubsetAverageVariablesNames",
    "testSubsetAverageVariablesNamesEager",
    "testImportedGraphVariablesToRestore",
}


def test_every_scenario_is_tested_or_left_out_with_a_reason() -> None:
    """None of the 33 scenarios is forgotten, and none is both tested and left out."""
    assert len(CASES) == 33
    assert len(SERIES) == 16
    assert TESTED | set(LEFT_OUT) == set(CASES)
    assert not TESTED & set(LEFT_OUT)


def arrays(values: Values) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def run_average(folder: Path, values: Sequence[Values], **options: Any) -> dict[str, np.ndarray]:
    """The output of `average_run` over checkpoints with these values."""
    run = write_run(folder / "run", [arrays(one) for one in values])
    output = folder / "out.safetensors"
    ema_cli.average_run(run, output, shadow_dtype="same", overwrite=True, **options)
    return read_checkpoint(output)


def exactly(found: np.ndarray | None, expected: Any) -> bool:
    """Whether an array is these float32 values, bit for bit."""
    assert found is not None
    return found.tobytes() == np.asarray(expected, np.float32).tobytes()


# ---------------------------------------------------------------------------- average_run


def test_assign_moving_average(tmp_path: Path) -> None:
    """One update of [10, 11] towards [1, 2] with decay .25; and from zeros with zero-debias."""
    case = CASES["testAssignMovingAverageWithoutZeroDebias"]
    values = [{"v": case["inputs"]["shadow0"]}, {"v": case["inputs"]["value"]}]
    found = run_average(tmp_path / "a", values, decay=0.25, name="ema")
    assert exactly(found["v/ema"], case["tf_actual"]["graph"])
    case = CASES["testAssignMovingAverage"]
    values = [{"v": case["inputs"]["value"]}]
    found = run_average(tmp_path / "b", values, decay=0.25, name="ema", zero_debias=True)
    assert exactly(found["v/ema"], case["tf_actual"]["graph"])
    assert exactly(found["v/ema/biased"], np.float32(0.75) * np.array([1, 2], np.float32))
    assert exactly(found["v/ema/local_step"], 1)


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("updates", [1, 2])
def test_series(tmp_path: Path, name: str, updates: int) -> None:
    """v0 and v1 stay, the plain tensor grows from zero or is debiased, as in TensorFlow."""
    inputs, actual = CONSTANT[name]["inputs"], CONSTANT[name]["tf_actual"]
    # A constant num_updates=1 makes the decay min(.25, 2/11) at every update.
    options = {"decay": inputs["decay"] if inputs["num_updates"] is None else 2 / 11}
    v0, v1 = (np.asarray(inputs[v], np.float32) for v in ("v0", "v1"))
    expected = dict(zip(("v0", "v1", "add"), actual[f"after{updates}"], strict=True))
    checkpoints = [{"v0": v0, "v1": v1}] * (updates + 1)
    found = run_average(tmp_path / "variables", checkpoints, names="variable", **options)
    assert exactly(found["v0"], expected["v0"])
    assert exactly(found["v1"], expected["v1"])
    zero = {"zero_debias": True} if inputs["zero_debias"] else {"init": "zeros"}
    checkpoints = [{"add": v0 + v1}] * updates
    found = run_average(tmp_path / "tensor", checkpoints, name="foo", **options, **zero)
    assert exactly(found["add/foo"], expected["add"])
    slots = {"add/foo", "add/foo/biased", "add/foo/local_step"}
    assert set(found) == (slots if inputs["zero_debias"] else {"add/foo"})


def test_control_dependencies_and_eager(tmp_path: Path) -> None:
    """The shadow starts at the first value and is updated with the one that is there then."""
    case = CASES["testAverageVariablesWithControlDeps"]
    values = [{"v1": case["inputs"]["v1_initial"]}, {"v1": case["inputs"]["v1_at_update"]}]
    found = run_average(tmp_path / "a", values, decay=0.25, names="variable")
    assert exactly(found["v1"], case["tf_actual"]["after1"])
    case = CASES["testBasicEager"]
    inputs, actual = case["inputs"], case["tf_actual"]
    values = [{v: inputs[v][k] for v in ("v0", "v1")} for k in range(2)]
    found = run_average(tmp_path / "b", values, decay=inputs["decay"], name=inputs["name"])
    assert sorted(found) == actual["names"]
    assert exactly(found["v0/foo"], actual["v0"])
    assert exactly(found["v1/foo"], actual["v1"])


def test_output_restores_as_tensorflow_asks(tmp_path: Path) -> None:
    """An averaged file answers every name of TensorFlow's map; without its shadows none is."""
    case = CASES["testAverageVariablesNames"]
    wanted = sorted(case["tf_actual"])
    values = [{"v0": 10.0, "v1": 30.0, "v2": 20.0, "add": 40.0}] * 2
    options = {"name": "foo", "select": [("exclude", "v2")], "zero_debias": True, "decay": 0.25}
    found = run_average(tmp_path, values, **options)
    assert set(wanted) <= set(found)
    output = tmp_path / "out.safetensors"
    rows = ema_cli.restore_map(output, program=wanted, name="foo").rows
    assert {row.restore_name: row.source for row in rows} == {
        name: "plain" if name in ("v2", "add/foo/biased", "add/foo/local_step") else "shadow"
        for name in wanted
    }
    raw = tmp_path / "run" / "model-step-100.safetensors"
    missing = ema_cli.restore_map(raw, program=wanted, name="foo").missing
    assert {row.restore_name for row in missing} == set(wanted) - {"v2"}


# ---------------------------------------------------------------------------- the class


@pytest.fixture(params=["mapping", "file"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Values], Any]:
    """What is applied: a mapping of arrays, or the path of a checkpoint that holds them."""

    def make(values: Values) -> Any:
        if request.param == "mapping":
            return arrays(values)
        return write_checkpoint(tmp_path / "c.safetensors", arrays(values))

    return make


def test_class_assigns(source: Callable[[Values], Any]) -> None:
    """The class updates and debiases as assign_moving_average does."""
    case = CASES["testAssignMovingAverageWithoutZeroDebias"]
    ema = ema_cli.ExponentialMovingAverage(0.25)
    assert ema.average("v") is None
    ema.apply(source({"v": case["inputs"]["shadow0"]}))
    assert exactly(ema.average("v"), case["inputs"]["shadow0"])
    ema.apply(source({"v": case["inputs"]["value"]}))
    assert exactly(ema.average("v"), case["tf_actual"]["eager"])
    case = CASES["testAssignMovingAverage"]
    debiased = ema_cli.ExponentialMovingAverage(0.25, zero_debias=True)
    debiased.apply(source({"v": case["inputs"]["value"]}))
    assert exactly(debiased.average("v"), case["tf_actual"]["graph"])


@pytest.mark.parametrize("name", SERIES)
def test_class_series(source: Callable[[Values], Any], name: str) -> None:
    """Constant or changing decay, constant num_updates, zero-debias: TensorFlow's values."""
    inputs, actual = SERIES[name]["inputs"], SERIES[name]["tf_actual"]
    dynamic = "DynamicDecay" in name
    current = 0.75 if dynamic else inputs["decay"]
    v0, v1 = (np.asarray(inputs[v], np.float32) for v in ("v0", "v1"))
    debias = inputs["zero_debias"]
    tensors = {"add": v0 + v1} if debias else {"v0": v0, "v1": v1}
    decay = (lambda: current) if dynamic else current
    ema = ema_cli.ExponentialMovingAverage(decay, inputs["num_updates"], debias, "foo")
    if not debias:
        ema.apply(source(tensors))
    current = 0.25
    for update in (1, 2):
        ema.apply(source(tensors))
        expected = dict(zip(("v0", "v1", "add"), actual[f"after{update}"], strict=True))
        for variable in tensors:
            assert exactly(ema.average(variable), expected[variable])


def test_class_with_a_constant_num_updates(source: Callable[[Values], Any]) -> None:
    """num_updates=1 is the same at every update: 0 towards 40 gives TensorFlow's two values."""
    actual = CASES["testAverageVariablesNumUpdates_Scalar"]["tf_actual"]
    ema = ema_cli.ExponentialMovingAverage(0.25, num_updates=1)
    ema.apply(source({"add": actual["initial"][2]}))
    for update in (1, 2):
        ema.apply(source({"add": 40.0}))
        assert exactly(ema.average("add"), actual[f"after{update}"][2])


def test_class_eager(source: Callable[[Values], Any]) -> None:
    """Two variables, one update, and the names of their shadows."""
    case = CASES["testBasicEager"]
    ema = ema_cli.ExponentialMovingAverage(case["inputs"]["decay"], name=case["inputs"]["name"])
    for k in range(2):
        ema.apply(source({v: case["inputs"][v][k] for v in ("v0", "v1")}))
    assert exactly(ema.average("v0"), case["tf_actual"]["v0"])
    assert exactly(ema.average("v1"), case["tf_actual"]["v1"])
    assert [ema.average_name(v) for v in ("v0", "v1")] == case["tf_actual"]["names"]


@pytest.mark.parametrize(
    ("name", "tensors", "asked"),
    [
        ("testAverageVariablesNames", ["v0", "v1", "v2"], ["v0", "v1"]),
        ("testAverageVariablesNamesNoDebias", ["v0", "v1", "v2"], ["v0", "v1"]),
        ("testSubsetAverageVariablesNames", ["v0", "v1", "v2", "add"], ["v0", "add"]),
        ("testSubsetAverageVariablesNamesEager", ["v0", "v1", "v2"], ["v0", "v1", "v2"]),
        ("testImportedGraphVariablesToRestore", ["v"], None),
    ],
)
def test_class_restore_names(
    source: Callable[[Values], Any], name: str, tensors: list[str], asked: list[str] | None
) -> None:
    """variables_to_restore is TensorFlow's map, but for the graph's slots of the plain tensor."""
    inputs, actual = CASES[name]["inputs"], CASES[name]["tf_actual"]
    ema_name = inputs["name"] if isinstance(inputs, dict) else "foo_avg"
    ema = ema_cli.ExponentialMovingAverage(0.25, name=ema_name)
    ema.apply(source(dict.fromkeys(tensors, 1.0)), asked)
    found = ema.variables_to_restore(asked)
    if isinstance(actual, list):
        assert list(found) == actual
    else:
        slots = {f"add/{ema_name}{slot}" for slot in ("", "/biased", "/local_step")}
        graph = slots if "add" not in tensors else set()
        assert found == {key: value for key, value in actual.items() if key not in graph}
