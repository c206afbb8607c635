"""``ema-avg inspect``: what lies at a path, told from headers alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CODES, Outcome, cmd, dtype_of, raw_safetensors, write_checkpoint, write_run

import ema_cli
from ema_cli.runs import Run
from ema_cli.tensors import Checkpoint

ONE = np.float32([1, 2])


def table(outcome: Outcome) -> list[list[str]]:
    return [line.split("\t") for line in outcome.out.splitlines()]


def document(outcome: Outcome) -> dict[str, Any]:
    """The one result line."""
    (line,) = outcome.out.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert (found["type"], found["schema"], found["command"]) == ("result", 1, "inspect")
    return found


def test_a_run_is_its_checkpoints_in_the_order_of_steps(digits_bf16: Path) -> None:
    """One row each: path, step, tensors, bytes; numbers decide, not the alphabet."""
    outcome = cmd("inspect", digits_bf16)
    title, *rows = table(outcome)
    assert title == ["checkpoint", "step", "tensors", "bytes"]
    assert [row[:3] for row in rows] == [
        [str(digits_bf16 / f"checkpoint-{step}"), str(step), "14"] for step in range(100, 2001, 100)
    ]
    weights = digits_bf16.glob("checkpoint-700/*.safetensors")
    assert rows[6][3] == str(sum(path.stat().st_size for path in weights))
    assert "20 checkpoints, 100 steps apart" in outcome.err


def test_a_file_is_its_tensors(digits_run: Path) -> None:
    """One row each: name, dtype, shape, bytes and what the name says it is for."""
    outcome = cmd("inspect", digits_run / "digits-step-0100.safetensors")
    title, *rows = table(outcome)
    assert title == ["tensor", "dtype", "shape", "bytes", "role"]
    assert len(rows) == 21
    assert [row for row in rows if not row[0].startswith("hidden")] == [
        ["global_step", "int64", "[]", "8", "counter"],
        ["logits/bias", "float32", "[10]", "40", "variable"],
        ["logits/bias/Momentum", "float32", "[10]", "40", "optimizer state"],
        ["logits/kernel", "float32", "[24, 10]", "960", "variable"],
        ["logits/kernel/Momentum", "float32", "[24, 10]", "960", "optimizer state"],
    ]
    assert ["hidden1/batch_norm/moving_mean", "float32", "[40]", "160", "statistics"] in rows
    assert "safetensors, step 100: 21 tensors" in outcome.err


def test_a_folder_tells_the_file_of_every_tensor(digits_bf16: Path) -> None:
    """Shards are one checkpoint; the step comes from what the trainer stored."""
    outcome = cmd("inspect", digits_bf16 / "checkpoint-300")
    title, *rows = table(outcome)
    assert title[-1] == "file"
    assert {row[-1] for row in rows} == {f"model-0000{k}-of-00002.safetensors" for k in (1, 2)}
    assert "safetensors-folder, step 300: 14 tensors" in outcome.err
    assert "in 2 files" in outcome.err


def test_an_output_of_ours_tells_where_it_came_from(digits_run: Path, tmp_path: Path) -> None:
    """The average it is, of how many checkpoints; a renamed copy says so, too."""
    out, copy = tmp_path / "average.safetensors", tmp_path / "copy.safetensors"
    cmd("run", digits_run, "-o", out, "--decay", "0.9", "-q")
    outcome = cmd("inspect", out)
    assert "an average made by ema-avg: ema:0.9" in outcome.err
    assert "of 20 checkpoints" in outcome.err
    roles = {row[0]: row[4] for row in table(outcome)[1:]}
    assert roles["logits/bias/ExponentialMovingAverage"] == "shadow"
    found = document(cmd("inspect", out, "--json"))["provenance"]
    assert [entry["step"] for entry in found["inputs"]] == list(range(100, 2001, 100))
    cmd("rename", out, "-o", copy, "--names", "variable", "-q")
    assert "a renamed copy made by ema-avg" in cmd("inspect", copy).err


def test_provenance_that_is_no_longer_true_is_not_shown(digits_run: Path, tmp_path: Path) -> None:
    """Another file under the name of an output is no output of ours."""
    out = tmp_path / "average.safetensors"
    cmd("run", digits_run, "-o", out, "--decay", "0.9", "-q")
    write_checkpoint(out, {"a": ONE})
    outcome = cmd("inspect", out, "--json")
    assert document(outcome)["provenance"] is None
    assert "made by ema-avg" not in cmd("inspect", out).err


def test_json_of_a_checkpoint_has_every_field(tmp_path: Path) -> None:
    """Path, format, step, metadata, and each tensor with dtype, shape, bytes, role and file."""
    values = {"a": ONE, "a/ema": ONE, "step": np.int64(7)}
    path = write_checkpoint(tmp_path / "model.safetensors", values, {"format": "pt"})
    found = document(cmd("inspect", path, "--json", "--name", "ema"))
    assert found["path"] == str(path)
    assert (found["format"], found["step"]) == ("safetensors", 7)
    assert found["metadata"] == {"format": "pt"}
    common = {"dtype": "float32", "shape": [2], "bytes": 8, "file": "", "slices": 0}
    counter = {**common, "dtype": "int64", "shape": [], "role": "counter"}
    assert found["tensors"] == [
        {"tensor": "a", "role": "variable", **common},
        {"tensor": "a/ema", "role": "shadow", **common},
        {"tensor": "step", **counter},
    ]


def test_json_of_a_run_tells_what_was_passed_over(tmp_path: Path) -> None:
    """Aliases and foreign files are reasons, no failures; a damaged checkpoint is exit 3."""
    run = write_run(tmp_path / "run", [{"a": ONE}] * 3)
    (run / "notes.txt").write_text("hello")
    os.symlink("model-step-300.safetensors", run / "last.safetensors")
    found = document(cmd("inspect", run, "--json"))
    assert [entry["step"] for entry in found["checkpoints"]] == [100, 200, 300]
    passed = {Path(entry["path"]).name: entry for entry in found["passed_over"]}
    assert set(passed) == {"notes.txt", "last.safetensors"}
    assert all(entry["reason"] and not entry["unusable"] for entry in passed.values())
    (run / "model-step-400.safetensors").write_bytes(b"short")
    found = document(cmd("inspect", run, "--json", code=3))
    unusable = [entry["path"] for entry in found["passed_over"] if entry["unusable"]]
    assert unusable == [str(run / "model-step-400.safetensors")]
    assert "model-step-400.safetensors" in cmd("inspect", run, code=3).err


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A checkpoint of a terabyte of nothing is shown at once."""
    n_bytes = 1 << 40
    path = tmp_path / "big-step-5.safetensors"
    entry = {"v": {"dtype": "F32", "shape": [n_bytes // 4], "data_offsets": [0, n_bytes]}}
    path.write_bytes(raw_safetensors(entry))
    try:
        os.truncate(path, path.stat().st_size + n_bytes)
    except OSError:
        pytest.skip("this file system holds no sparse file of a terabyte")
    outcome = cmd("inspect", path)
    assert table(outcome)[1] == ["v", "float32", f"[{n_bytes // 4}]", str(n_bytes), "variable"]
    assert "1.0 TiB" in outcome.err


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_every_dtype_is_shown(tmp_path: Path, dtype: str) -> None:
    """Also those nobody averages."""
    path = write_checkpoint(tmp_path / "a.safetensors", {"v": np.zeros((2, 3), dtype_of(dtype))})
    size = 6 * dtype_of(dtype).itemsize
    assert table(cmd("inspect", path))[1] == ["v", dtype, "[2, 3]", str(size), "variable"]


def test_a_checkpoint_without_a_step_is_shown_as_well(tmp_path: Path) -> None:
    """Nothing tells the step of a lone file: it is left open, not made up."""
    path = write_checkpoint(tmp_path / "model.safetensors", {"a": ONE})
    assert document(cmd("inspect", path, "--json"))["step"] is None


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    """Nothing there, an empty directory, a file that is no checkpoint: named, with its code."""
    assert "none" in cmd("inspect", tmp_path / "none", code=12).err
    (tmp_path / "empty").mkdir()
    assert "no usable checkpoint" in cmd("inspect", tmp_path / "empty", code=10).err
    (tmp_path / "text.txt").write_text("hello")
    assert "not a checkpoint" in cmd("inspect", tmp_path / "text.txt", code=12).err


def test_hostile_names_are_shown_escaped(tmp_path: Path) -> None:
    """A name cannot clear the screen, start a new row or be taken for markup."""
    name = "a\x1b[2J\nb\t[red]c"
    path = write_checkpoint(tmp_path / "a.safetensors", {name: ONE})
    rows = table(cmd("inspect", path))
    assert len(rows) == 2
    assert rows[1][0] == r"a\x1b[2J\nb\t[red]c"


def test_the_function_returns_a_run_or_a_checkpoint(digits_run: Path, digits_bf16: Path) -> None:
    """`ema_cli.inspect` gives what the command shows, as data."""
    run = ema_cli.inspect(digits_run)
    assert isinstance(run, Run)
    assert run.steps == list(range(100, 2001, 100))
    checkpoint = ema_cli.inspect(digits_bf16 / "checkpoint-100")
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.step == 100
    assert len(checkpoint.index.tensors) == 14
