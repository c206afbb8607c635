"""What a run reads, writes and copies is what its plan says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    BF16,
    bits_equal,
    dtype_of,
    raw_safetensors,
    read_checkpoint,
    write_checkpoint,
    write_run,
)

import ema_cli
from ema_cli.engine import Progress
from ema_cli.running import run_plan

SHADOW = "/ExponentialMovingAverage"


def constant(value: float, dtype: Any = np.float32, count: int = 10) -> np.ndarray:
    return np.full(count, value, dtype)


# ---------------------------------------------------------------------------- bytes


def test_plan_tells_the_bytes_of_the_run(tmp_path: Path) -> None:
    """Bytes read and written, names, dtypes and shapes are planned exactly."""
    models = [
        {"w": constant(k, count=1000), "b": constant(k, BF16, 7), "id": np.arange(5)}
        for k in range(4)
    ]
    run = write_run(tmp_path / "run", models)
    averages = ["mean=mean", "two=mean@last=2", "old=mean@100:300"]
    events: list[Progress] = []
    result = ema_cli.average_run(
        run, tmp_path / "{average}.safetensors", average=averages, on_event=events.append
    )
    costs = result.plan.costs
    # Four passes over the averaged tensors; the integers once per last checkpoint.
    assert costs.read == 4 * (4000 + 14) + 2 * 40
    assert (events[0].read, events[0].total) == (0, costs.read)
    assert (events[-1].read, events[-1].total) == (costs.read, costs.read)
    assert [event.read for event in events] == sorted(event.read for event in events)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("mean", "two", "old")]
    assert costs.write == sum(sizes)
    assert [written.nbytes for written in result.outputs] == sizes
    for outcome in result.plan.outcomes:
        planned = {e.name: (e.dtype.name, e.shape) for e in outcome.layout.entries}
        found = read_checkpoint(outcome.layout.path)
        assert planned == {name: (a.dtype.name, a.shape) for name, a in found.items()}
        assert set(planned) == {f"w{SHADOW}", f"b{SHADOW}", "id"}


def test_equal_coefficients_are_computed_once(tmp_path: Path) -> None:
    """Averages with the same coefficients share one pass and get one result each."""
    run = write_run(tmp_path / "run", [{"w": constant(k)} for k in (1.0, 2.0, 6.0)])
    output = tmp_path / "{average}.safetensors"
    result = ema_cli.average_run(run, output, average=["a=mean", "b=lr:linear", "c=mean@last=3"])
    assert len(result.plan.schedules) == 1
    assert result.plan.costs.read == 3 * 40
    for label in "abc":
        found = read_checkpoint(tmp_path / f"{label}.safetensors")
        assert found[f"w{SHADOW}"].tolist() == [3.0] * 10


def test_checkpoint_without_weight_is_not_read(tmp_path: Path) -> None:
    """What weighs nothing may vanish or be rewritten once the plan is made."""
    run = write_run(tmp_path / "run", [{"w": constant(k)} for k in (1.0, 2.0, 6.0, 4.0)])
    listing = tmp_path / "weights"
    listing.write_text("200 1\n400 3\n")
    output = tmp_path / "out.safetensors"
    plan = ema_cli.plan_run(run, output, average=[f"weights:{listing}"])
    (run / "model-step-100.safetensors").unlink()
    write_checkpoint(run / "model-step-300.safetensors", {"w": constant(np.nan)})
    assert plan.costs.read == 2 * 40
    events: list[Progress] = []
    run_plan(plan, on_event=events.append)
    assert events[-1].read == 2 * 40
    assert read_checkpoint(output)[f"w{SHADOW}"].tolist() == [3.5] * 10


def test_what_a_copy_overwrites_is_not_read(tmp_path: Path) -> None:
    """With decay 0 only the last checkpoint counts, so nothing else is opened."""
    run = write_run(tmp_path / "run", [{"w": constant(k)} for k in (np.nan, 2.0, 6.0)])
    output = tmp_path / "out.safetensors"
    result = ema_cli.average_run(run, output, decay=0)
    assert [Path(stamp.path).name for stamp in result.plan.work.inputs] == [
        "model-step-300.safetensors"
    ]
    assert read_checkpoint(output)[f"w{SHADOW}"].tolist() == [6.0] * 10


def test_twenty_thousand_small_tensors(tmp_path: Path) -> None:
    """Tensors that lie alike in every file are worked on as one range, and are right."""
    count = 20_000
    for step in (1, 2, 3):
        header = {
            f"t{k:05}": {"dtype": "F32", "shape": [2], "data_offsets": [8 * k, 8 * k + 8]}
            for k in range(count)
        }
        data = (np.arange(2 * count, dtype=np.float32) * step).tobytes()
        path = tmp_path / "run" / f"step-{step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw_safetensors(json.dumps(header).encode(), data))
    output = tmp_path / "{average}.safetensors"
    for names in ("variable", "shadow"):
        options = {"names": names, "average": [f"{names}=mean"]}
        result = ema_cli.average_run(tmp_path / "run", output, **options)
        assert len(result.plan.work.averaged) == 1
        found = read_checkpoint(tmp_path / f"{names}.safetensors")
        suffix = SHADOW if names == "shadow" else ""
        together = np.concatenate([found[f"t{k:05}{suffix}"] for k in range(count)])
        assert bits_equal(together, np.arange(2 * count, dtype=np.float32) * 2)


@pytest.mark.parametrize(("code", "dtype"), [("I64", "int64"), ("F64", "float64")])
def test_neighbours_by_offset_in_different_files(tmp_path: Path, code: str, dtype: str) -> None:
    """Tensors that only seem adjacent, in two shards, are read from their own files."""
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        weights = {"a": (200, 10 * step), "b": (208, 20 * step), "w": (200, 30 * step)}
        for name, (length, value) in weights.items():
            kind = "F64" if name == "w" else code
            header = {name: {"dtype": kind, "shape": [1], "data_offsets": [0, 8]}}
            data = np.array([value], "float64" if name == "w" else dtype).tobytes()
            padded = json.dumps(header).encode().ljust(length)
            (folder / f"{name}.safetensors").write_bytes(raw_safetensors(padded, data))
        index = {"weight_map": {name: f"{name}.safetensors" for name in weights}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    output = tmp_path / "o.safetensors"
    ema_cli.average_run(tmp_path / "run", output, average=["mean"], names="variable")
    found = {name: float(array[0]) for name, array in read_checkpoint(output).items()}
    averaged = {"a": 15, "b": 30} if code == "F64" else {"a": 20, "b": 40}
    assert found == {**averaged, "w": 45}


# ---------------------------------------------------------------------------- copies


def test_copies_keep_every_bit(tmp_path: Path) -> None:
    """Tensors that are not averaged have the last checkpoint's bytes, whatever their dtype."""
    names = ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
    names += ["complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz"]
    rng = np.random.default_rng(1)
    models = []
    for _ in range(3):
        tensors: dict[str, Any] = {"w": rng.normal(size=3), "bf16.kept": constant(1, BF16)}
        for name in names:
            dtype = dtype_of(name)
            raw = rng.integers(0, 2 if name == "bool" else 256, 24 * dtype.itemsize, np.uint8)
            tensors[name] = raw.view(dtype).reshape(4, 6)
        tensors["f32.kept"] = np.array([np.nan, -0.0, 1e-45, np.inf], np.float32)
        tensors["empty"] = np.zeros((0, 3), np.int32)
        models.append(tensors)
    run = write_run(tmp_path / "run", models)
    select = [("exclude", "float8*"), ("exclude", "*.kept")]
    for names_option in ("variable", "shadow"):
        output = tmp_path / f"{names_option}.safetensors"
        ema_cli.average_run(run, output, average=["mean"], select=select, names=names_option)
        found = read_checkpoint(output)
        for name, expected in models[-1].items():
            if name != "w":
                assert found[name].dtype == expected.dtype
                assert found[name].shape == expected.shape
                assert found[name].tobytes() == expected.tobytes()


def test_packed_types_are_copied(tmp_path: Path) -> None:
    """Two four-bit numbers share a byte, which is copied from the last checkpoint."""
    for step in (1, 2):
        header = {
            "packed": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
        }
        data = bytes([step, 16 * step]) + np.float32(step).tobytes()
        path = tmp_path / "run" / f"step-{step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw_safetensors(header, data))
    output = tmp_path / "out.safetensors"
    ema_cli.average_run(
        tmp_path / "run", output, average=["mean"], select=[("exclude", "packed")], names="variable"
    )
    assert output.read_bytes()[-6:] == bytes([2, 32]) + np.float32(1.5).tobytes()


def test_one_checkpoint_is_its_own_average(tmp_path: Path) -> None:
    """The average of a single checkpoint has its bits, subnormal and negative zero included."""
    values = {
        "f4": np.array([-0.0, 1e-45, 3e38], np.float32),
        "f2": np.array([-0.0, 6e-8, 65504], np.float16),
        "bf": np.array([-0.0, 1e-40, 3e38], BF16),
        "f8": np.array([-0.0, 5e-324, 1e308], np.float64),
    }
    run = write_run(tmp_path / "run", [values])
    output = tmp_path / "out.safetensors"
    ema_cli.average_run(run, output, names="variable")
    found = read_checkpoint(output)
    assert all(bits_equal(found[name], value) for name, value in values.items())
