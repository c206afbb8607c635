"""Partitioned variables: however each checkpoint of a run cuts them, the average is NumPy's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bits_equal, cmd, read_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_bundles import (
    ALL,
    Extents,
    Sliced,
    read_bundle,
    rows_of,
    shard_file,
    strings,
    tensorflow_run,
    write_bundle,
)
from tensorflow_strategies import AVERAGED, Shape, filled, shapes, tilings

import ema_cli
from ema_cli import engine, worker

SHADOW = "/ExponentialMovingAverage"
few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbered = itertools.count()
Array = np.ndarray[Any, Any]


def averaged(values: list[Array]) -> Array:
    """The mean of some values as the tool computes it, in float32 for half types."""
    wide = np.float64 if values[0].dtype == np.float64 else np.float32
    shadow = values[0].astype(wide)
    for k, value in enumerate(values[1:], start=2):
        shadow = np.asarray(shadow - (shadow - value.astype(wide)) * wide(1 / k))
    return shadow.astype(values[0].dtype)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, list[Array]]]:
    """Two to four checkpoints of the same tensors, each cut in its own way, and their values."""
    made: list[dict[str, Any]] = [{} for _ in range(draw(st.integers(2, 4)))]
    values: dict[str, list[Array]] = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        dtype = draw(st.sampled_from(AVERAGED if name == "a" else [*AVERAGED, "int32"]))
        shape = draw(shapes)
        one = draw(tilings(shape))
        values[name] = [filled(dtype, shape, k) for k in range(len(made))]
        for k, checkpoint in enumerate(made):
            cut = draw(st.sampled_from(["whole", "as the others", "otherwise"]))
            slices = one if cut == "as the others" else draw(tilings(shape))
            value = values[name][k]
            checkpoint[name] = value if cut == "whole" else Sliced(value, slices)
    orders = [draw(st.permutations(sorted(checkpoint))) for checkpoint in made]
    made = [{n: one[n] for n in order} for one, order in zip(made, orders, strict=True)]
    return made, values


@few
@given(made=runs(), data=st.data())
def test_checkpoints_that_are_cut_differently(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: tuple[list[dict[str, Any]], dict[str, list[Array]]],
    data: st.DataObject,
) -> None:
    """Into TensorFlow's own structure, a fresh one, and safetensors; tasks of any size."""
    checkpoints, values = made
    monkeypatch.setattr(engine, "TASK_ELEMENTS", data.draw(st.sampled_from([1, 4, 1 << 20])))
    monkeypatch.setattr(engine, "BLOCK_ELEMENTS", data.draw(st.sampled_from([1, 3, 1 << 18])))
    monkeypatch.setattr(worker, "COPY_BLOCK", data.draw(st.sampled_from([8, 1 << 20])))
    folder = tmp_path / str(next(numbered))
    for k, tensors in enumerate(checkpoints):
        shards, big_endian = data.draw(st.integers(1, 3)), data.draw(st.booleans())
        write_bundle(folder / f"m-{k + 1}", tensors, shards=shards, big_endian=big_endian)
    paths = [folder / f"m-{k + 1}" for k in range(len(checkpoints))]
    expected = {
        name: averaged(each) if each[0].dtype.kind != "i" else each[-1]
        for name, each in values.items()
    }
    outs = {"t": ("variable", "tensorflow"), "f": ("shadow", "tensorflow")}
    outs |= {"s": ("shadow", "safetensors")}
    for out, (names, kind) in outs.items():
        path = folder / out
        ema_cli.average_run(paths, path, average=["mean"], names=names, format=kind)
        found = read_checkpoint(path) if kind == "safetensors" else read_bundle(path)
        assert len(found) == len(expected)
        for name, value in expected.items():
            shadow = names == "shadow" and value.dtype.kind != "i"
            assert bits_equal(found[f"{name}{SHADOW}" if shadow else name], value), (out, name)


CUTS: dict[str, list[Extents]] = {
    "rows": [((0, 3), ALL), ((3, 5), ALL)],
    "other rows": [((0, 1), ALL), ((1, 6), ALL), ((7, 1), ALL)],
    "columns": [(ALL, (0, 2)), (ALL, (2, 4))],
    "a grid": [((a, 4), (b, 3)) for a in (0, 4) for b in (0, 3)],
    "whole": [],
}


def cut(value: Array, how: str) -> Any:
    return Sliced(value, CUTS[how]) if CUTS[how] else value


@pytest.mark.parametrize("last", CUTS)
@pytest.mark.parametrize("first", CUTS)
def test_the_output_is_cut_as_the_last_checkpoint(tmp_path: Path, first: str, last: str) -> None:
    """Whatever those before it did: a program was restarted with other partitions."""
    values = [filled("float32", (8, 6), k) for k in range(3)]
    how = (first, "columns", last)
    tensors = [{"v": cut(v, h), "n": np.int32(0)} for v, h in zip(values, how, strict=True)]
    run = tensorflow_run(tmp_path / "run", tensors)
    cmd("run", run, "-o", tmp_path / "out", "--average", "mean", "--names", "variable")
    assert bits_equal(read_bundle(tmp_path / "out")["v"], averaged(values))
    assert list(rows_of(tmp_path / "out")[1][b"v"].slices) == CUTS[last]
    whole = write_bundle(tmp_path / "whole", {"v": values[0], "n": np.int32(0)})
    assert not ema_cli.diff(run / "model.ckpt-100", whole)
    [found] = ema_cli.diff(run / "model.ckpt-300", whole).differences
    assert (found.tensor, found.count) == ("v", int((values[2] != values[0]).sum()))


@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
@pytest.mark.parametrize("how", CUTS)
def test_a_nan_that_was_saved_is_told(tmp_path: Path, how: str, big_endian: bool) -> None:
    """With the first checkpoint that holds it and its tensor, however that is cut."""
    values = [filled("float32", (8, 6), k) for k in range(3)]
    values[1][7, 3] = values[2][7, 3] = np.nan
    cuts = ("a grid", how, "rows")
    tensors = [{"v": cut(v, h), "w": v[0]} for v, h in zip(values, cuts, strict=True)]
    run = tensorflow_run(tmp_path / "run", tensors, big_endian=big_endian)
    outcome = cmd("run", run, "-o", tmp_path / "out", "--average", "mean", code=17)
    assert "model.ckpt-200: tensor 'v' holds nan" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("words", [["--keep-variables"], ["--zero-debias", "--decay", "0.5"]])
def test_everything_made_of_a_sliced_variable_is_sliced(tmp_path: Path, words: list[str]) -> None:
    """Last raw values, averages, biased averages."""
    values = [filled("bfloat16", (8, 6), k) for k in range(3)]
    run = tensorflow_run(tmp_path / "run", [{"v": cut(value, "a grid")} for value in values])
    cmd("run", run, "-o", tmp_path / "out", *words)
    _, rows = rows_of(tmp_path / "out")
    wholes = {key for key, row in rows.items() if row.slices}
    parts = ["v"] if words == ["--keep-variables"] else [f"v{SHADOW}/biased"]
    assert wholes == {name.encode() for name in (f"v{SHADOW}", *parts)}
    if words == ["--keep-variables"]:
        assert bits_equal(read_bundle(tmp_path / "out")["v"], values[-1])


def test_a_variable_in_many_slices(tmp_path: Path) -> None:
    """Five hundred parameter servers."""
    shape: Shape = (500, 3)
    values = [filled("float32", shape, k) for k in range(2)]
    slices: list[Extents] = [((k, 1), ALL) for k in range(500)]
    run = tensorflow_run(tmp_path / "run", [{"v": Sliced(v, slices)} for v in values], shards=5)
    cmd("run", run, "-o", tmp_path / "out", "--average", "mean", "--names", "variable")
    assert bits_equal(read_bundle(tmp_path / "out")["v"], averaged(values))
    assert not shard_file(tmp_path / "out").exists()
    assert shard_file(tmp_path / "out", 4, 5).exists()


@pytest.mark.parametrize("options", [{}, {"big_endian": True}, {"compress": True}], ids=str)
def test_a_renamed_copy_keeps_its_slices(tmp_path: Path, options: dict[str, Any]) -> None:
    """The keys of slices follow the name, their bytes stay where they are."""
    value = filled("float16", (8, 6), 1)
    text = strings([b"a"], big_endian="big_endian" in options)
    tensors = {f"v{SHADOW}": cut(value, "columns"), "v": cut(value, "rows"), "s": text}
    prefix = write_bundle(tmp_path / "m-1", tensors, shards=2, **options)
    cmd("rename", prefix, "-o", tmp_path / "out", "--names", "variable")
    found = read_bundle(tmp_path / "out")
    assert set(found) == {"v", "s"}
    assert bits_equal(found["v"], value)
    assert list(rows_of(tmp_path / "out")[1][b"v"].slices) == CUTS["columns"]
    for shard in range(2):
        before = shard_file(prefix, shard, 2).read_bytes()
        assert shard_file(tmp_path / "out", shard, 2).read_bytes() == before
