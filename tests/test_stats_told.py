"""How ``run --stats`` tells distances: tables before the output, nothing where nothing is asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, write_run

import ema_cli
from ema_cli.errors import UsageError

DIGITS = Path(__file__).resolve().parent.parent / "fixtures" / "digits" / "run"


def test_the_table_stands_before_the_output(tmp_path: Path) -> None:
    """In a pipe it is tab-separated: total, then the group that is farthest; -v shows all."""
    out = tmp_path / "o.safetensors"
    words = ("run", DIGITS, "-o", out, "--decay", "0.9", "--stats")
    lines = cmd(*words).out.splitlines()
    columns = ["checkpoint", "step", "distance", "farthest group", "distance there"]
    assert lines[0].split("\t") == columns
    assert lines[1].split("\t") == ["digits-step-0100.safetensors", "100", "-", "-", "-"]
    assert [float(cell) for cell in lines[2].split("\t")[2::2]] == pytest.approx([0.1901, 0.3823])
    assert lines[-1].startswith("written")
    assert lines[-1].endswith(str(out))
    verbose = cmd(*words, "-v").out.splitlines()[0].split("\t")
    groups = ["hidden1/batch_norm", "hidden1", "hidden2/batch_norm", "hidden2", "logits"]
    assert verbose == columns + groups


def test_several_averages_have_a_table_each(tmp_path: Path) -> None:
    """Each stands under its label."""
    words = ("--average", "fast=ema:0.5", "--average", "mean", "--stats")
    lines = cmd("run", DIGITS, "-o", tmp_path / "{average}.safetensors", *words).out.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["fast:", "mean:"]
    assert len(lines) == 2 * (1 + 1 + 20 + 1) + 2


def test_without_the_option_nothing_is_measured(tmp_path: Path) -> None:
    """No table, no distances in the provenance, none in the result."""
    out = tmp_path / "o.safetensors"
    assert cmd("run", DIGITS, "-o", out, "--decay", "0.9").out.count("\n") == 1
    assert "distances" not in json.loads(Path(f"{out}.ema.json").read_text())
    result = ema_cli.average_run(DIGITS, tmp_path / "p.safetensors", decay=0.9)
    assert (result.distances, result.outliers) == ((), ())


def test_hostile_names_are_shown_safely(tmp_path: Path) -> None:
    """A group's name is that of a tensor: escapes never reach a terminal."""
    values = [{"\x1b[2Jm.w": np.full(4, k, np.float32)} for k in (1, 2, 3)]
    told = cmd(
        "run", write_run(tmp_path / "run", values), "-o", tmp_path / "o.safetensors", "--stats"
    )
    assert "\x1b" not in told.out + told.err
    assert "\\x1b[2Jm" in told.out


def test_a_state_is_not_measured(tmp_path: Path) -> None:
    """A usage error says so before anything is made."""
    state = tmp_path / "state"
    words = ("run", DIGITS, "--state", state, "--decay", "0.9")
    assert "--stats and --state" in cmd(*words, "--stats", code=2).err
    assert "--outliers and --state" in cmd(*words, "--outliers", "warn", code=2).err
    with pytest.raises(UsageError, match="--outliers and --state"):
        ema_cli.average_run(DIGITS, state=state, decay=0.9, outliers="error")
    assert not state.exists()


def test_a_dry_run_measures_nothing(tmp_path: Path) -> None:
    """``-n`` reads headers only, whatever else is asked for."""
    words = ("-n", "--stats", "--outliers", "error")
    assert "distance" not in cmd("run", DIGITS, "-o", tmp_path / "o.safetensors", *words).out
