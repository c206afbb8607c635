"""What a reading by strangers found in TensorFlow's part: each would have gone unnoticed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cmd
from tensorflow_bundles import read_bundle, shard_file, tensorflow_run, write_bundle

GRAPH = Path(__file__).resolve().parent.parent / "fixtures" / "tensorflow" / "graph"
SHADOW = "/ExponentialMovingAverage"


def vector(value: float, dtype: Any = np.float32) -> Any:
    return np.full(4, value, dtype)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------------- shadows


def test_a_shadow_made_in_a_scope_is_replaced_too(tmp_path: Path) -> None:
    """An evaluation in that scope asks for its name: it must not get the training's old value."""
    scoped = f"scope/w{SHADOW}"
    run = tensorflow_run(tmp_path / "run", [{"w": vector(k), scoped: vector(9)} for k in (1, 3)])
    cmd("run", run, "-o", tmp_path / "fresh", "--average", "mean")
    fresh = read_bundle(tmp_path / "fresh")
    assert {name: set(value) for name, value in fresh.items()} == {scoped: {2}, f"w{SHADOW}": {2}}
    cmd("run", run, "-o", tmp_path / "same", "--average", "mean", "--names", "variable")
    assert {set(value).pop() for value in read_bundle(tmp_path / "same").values()} == {2}


def test_a_saved_shadow_of_another_shape_stays_in_a_template(tmp_path: Path) -> None:
    """Or the average would run over what lies behind it."""
    small = {f"a{SHADOW}": np.float32([1, 2]), "b": vector(15)}
    run = tensorflow_run(tmp_path / "run", [{"a": vector(k), **small} for k in (1, 3)])
    cmd("run", run, "-o", tmp_path / "out", "--average", "mean", "--names", "variable")
    found = read_bundle(tmp_path / "out")
    assert [list(found[name]) for name in ("a", f"a{SHADOW}", "b")] == [[2] * 4, [1, 2], [15] * 4]


def test_two_shadows_of_one_variable_are_not_renamed_to_it(tmp_path: Path) -> None:
    """Neither is more right than the other."""
    tensors = {"v": vector(1), f"v{SHADOW}": vector(2), f"scope/v{SHADOW}": vector(3)}
    prefix = write_bundle(tmp_path / "m-1", tensors)
    err = cmd("rename", prefix, "-o", tmp_path / "o", "--names", "variable", code=13).err
    assert "two tensors would be called 'v'" in err


def test_a_shadow_of_another_dtype_does_not_take_its_variables_place(tmp_path: Path) -> None:
    """TensorFlow's restore would refuse it."""
    prefix = write_bundle(tmp_path / "m-1", {"v": vector(1, np.float16), f"v{SHADOW}": vector(2)})
    err = cmd("rename", prefix, "-o", tmp_path / "o", "--names", "variable", code=13).err
    assert "is float32 [4], its variable float16 [4]" in err


# ---------------------------------------------------------------------------- steps and graphs


def test_a_damaged_step_is_not_believed(tmp_path: Path) -> None:
    """It decides the order and the weights, and is read before anything else."""
    values = [{"global_step": np.int64(k * 100), "w": vector(k)} for k in (1, 2, 3)]
    run = tensorflow_run(tmp_path / "run", values)
    flip(shard_file(run / "model.ckpt-200"), 0)
    outcome = cmd("run", run, "-o", tmp_path / "out", "--decay", "0.9/step", code=3)
    assert "model.ckpt-200.data-00000-of-00001: tensor 'global_step'" in outcome.err


@pytest.mark.parametrize("kind", ["a dangling link", "a pipe", "a folder"])
def test_what_is_only_called_a_graph_harms_nothing(tmp_path: Path, kind: str) -> None:
    """It is newer than the real one."""
    run = shutil.copytree(GRAPH, tmp_path / "run")
    odd = run / "digits.ckpt-999.meta"
    {"a dangling link": lambda: odd.symlink_to("gone"), "a pipe": lambda: os.mkfifo(odd)}.get(
        kind, odd.mkdir
    )()
    out = cmd("plan", run, "--decay", "0.9").out
    assert "variables told by the collections in digits.ckpt-0.meta" in out


@pytest.mark.parametrize("data", [b"", b"\x22\xff\xff\xff\xff\x0f"], ids=["empty", "cut off"])
def test_a_graph_still_being_written_leaves_the_word_to_another(
    tmp_path: Path, data: bytes
) -> None:
    """Saver writes it after the index of its checkpoint."""
    run = shutil.copytree(GRAPH, tmp_path / "run")
    (run / "digits.ckpt-300.meta").write_bytes(data)
    outcome = cmd("plan", run, "--decay", "0.9")
    assert "variables told by the collections in digits.ckpt-0.meta" in outcome.out
    assert outcome.err.count("digits.ckpt-300.meta") == 1


def test_a_broken_savedmodel_graph_is_a_note(tmp_path: Path) -> None:
    """It would only say which variables are not trainable."""
    model = shutil.copytree(GRAPH.parent / "keras" / "savedmodel", tmp_path / "model")
    (model / "saved_model.pb").write_bytes(b"\xff" * 40)
    assert "every variable counts as trainable" in cmd("inspect", model).err


# ---------------------------------------------------------------------------- paths


def test_rename_into_a_directory_tells_the_step(tmp_path: Path) -> None:
    """And prints the prefix it wrote."""
    out = cmd(
        "rename", GRAPH / "digits.ckpt-300", "-o", f"{tmp_path}/d/", "--names", "variable"
    ).out
    assert out.strip() == f"{tmp_path}/d/model.ckpt-300"


@pytest.mark.parametrize("name", [".index", "x.meta", "x.data-00000-of-00001", "x.safetensors"])
def test_names_that_mean_something_else_are_no_prefixes(tmp_path: Path, name: str) -> None:
    """What is written under them would be found as another file, or not at all."""
    words = ["rename", GRAPH / "digits.ckpt-300", "-o", tmp_path / name, "--names", "variable"]
    cmd(*words, "--format", "tensorflow", code=2)
    assert not list(tmp_path.iterdir())


def test_a_directory_called_like_a_checkpoint_does_not_hide_it(tmp_path: Path) -> None:
    """In a run whatever is in it, by its own name while it is empty."""
    run = tensorflow_run(tmp_path / "run", [{"w": vector(k)} for k in (1, 2)])
    (run / "model.ckpt-200").mkdir()
    cmd("run", run, "-o", tmp_path / "out", "--average", "mean")
    assert set(read_bundle(tmp_path / "out")[f"w{SHADOW}"]) == {1.5}
    assert "step 200" in cmd("inspect", run / "model.ckpt-200").err


def test_an_index_of_something_else_is_none_of_ours(tmp_path: Path) -> None:
    """FAISS and others call their files so."""
    run = tensorflow_run(tmp_path / "run", [{"w": vector(k)} for k in (1, 2)])
    (run / "faiss.index").write_bytes(b"IxFI" + bytes(100))
    cmd("run", run, "-o", tmp_path / "out", "--average", "mean")


def test_a_glob_matches_the_names_that_messages_use(tmp_path: Path) -> None:
    """Which are those of no file."""
    found = cmd("plan", GRAPH, "--glob", "digits.ckpt-[12]00", "--decay", "0.5").out
    assert "2 checkpoints, steps 100 to 200" in found


def test_several_checkpoints_where_one_is_meant(tmp_path: Path) -> None:
    """The error names them."""
    run = tensorflow_run(tmp_path / "run", [{"w": vector(k)} for k in (1, 2)])
    assert "found 2: model.ckpt-100, model.ckpt-200" in cmd("map", run, code=12).err


def test_an_object_graph_keeps_what_it_names(tmp_path: Path) -> None:
    """Another dtype is a new layout, which elsewhere drops optimizer state."""
    run = GRAPH.parent / "keras" / "compiled"
    words = ["run", run, "--average", "mean", "-o"]
    assert "[" not in cmd(*words, tmp_path / "half", "--dtype", "float16").err
    assert set(read_bundle(tmp_path / "half")) == set(read_bundle(run / "ckpt-4"))
    err = cmd(*words, tmp_path / "small", "--optimizer", "drop").err
    assert "7 tensors that are left out" in err
    assert "[object-graph]" in err


def test_a_directory_of_outputs_can_be_looked_at(tmp_path: Path) -> None:
    """Outputs are no run, but the latest of them is a checkpoint; so is one without a step."""
    cmd("run", GRAPH, "-o", f"{tmp_path}/eval/", "--decay", "0.9")
    found = cmd("inspect", tmp_path / "eval")
    assert "an average made by ema-avg: ema:0.9" in found.err
    assert "tensorflow: 2 tensors" in cmd("inspect", GRAPH.parent / "keras" / "plain").err
