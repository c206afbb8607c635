"""``ema-avg plan``: what is taken, with which weights, and that a dry run is the same."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import cmd, read_checkpoint, write_checkpoint, write_run


@pytest.fixture(autouse=True)
def constant_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plans made one after the other must not differ because the disk did."""
    disk = SimpleNamespace(f_bavail=100 << 20, f_frsize=1 << 10)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, steps 100 to 400, with the values 1 to 4."""
    return write_run(tmp_path / "run", [{"w": np.full(4, k, np.float32)} for k in (1, 2, 3, 4)])


def planned(*args: Any, code: int = 0) -> dict[str, Any]:
    """The result document of ``plan --json``."""
    return json.loads(cmd("plan", *args, "--json", code=code).out.splitlines()[-1])


def weights(*args: Any) -> list[float]:
    """The weight of every checkpoint in the first average of a plan."""
    return [row["weight"] for row in planned(*args)["averages"][0]["inputs"]]


CASES = [
    [],
    ["--decay", "0.99"],
    ["--decay", "0.9/step", "--names", "variable"],
    ["--average", "x=mean@last=2", "--zero-debias", "--average", "y=ema:0.5"],
    ["--last", "1"],
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("form", [[], ["--json"], ["-v"]])
def test_a_dry_run_is_the_plan(
    run: Path, tmp_path: Path, options: list[str], form: list[str]
) -> None:
    """``plan`` and ``run --dry-run`` say the same on both streams, and write nothing."""
    words = [run, "-o", tmp_path / "o-{average}.safetensors", *options, *form]
    before = sorted(tmp_path.rglob("*"))
    assert cmd("plan", *words) == cmd("run", *words, "-n") == cmd("run", *words, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_never_overwrites(run: Path, tmp_path: Path) -> None:
    """``--overwrite`` changes nothing about a dry run: the old output stays as it is."""
    out = tmp_path / "o.safetensors"
    out.write_bytes(b"precious")
    cmd("run", run, "-o", out, "--overwrite", "--dry-run")
    assert out.read_bytes() == b"precious"


def test_nothing_given_means_the_ramp_and_the_plan_says_so(run: Path) -> None:
    """Without any average it is decay 0.999 with the count ramp, which decides."""
    assert "the ramp decides" in cmd("plan", run).out
    implied = weights(run)
    assert implied == weights(run, "--decay", "0.999", "--num-updates", "count")
    ramp = [1 - (1 + n) / (10 + n) for n in (1, 2, 3)]
    assert implied[-1] == pytest.approx(ramp[-1], rel=1e-6)
    assert implied[0] == pytest.approx(math.prod(1 - c for c in ramp), rel=1e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--decay", "0.5"], [0.125, 0.125, 0.25, 0.5]),
        (["--average", "mean"], [0.25] * 4),
        (["--average", "mean@last=2"], [0, 0, 0.5, 0.5]),
        (["--average", "mean@150:300"], [0, 0.5, 0.5, 0]),
        (["--average", "mean@:200"], [0.5, 0.5, 0, 0]),
        (["--average", "ema:0.5@200:"], [0, 0.25, 0.25, 0.5]),
        (["--average", "half-life:100"], [0.125, 0.125, 0.25, 0.5]),
        (["--decay", "1"], [1, 0, 0, 0]),
        (["--decay", "0"], [0, 0, 0, 1]),
        (["--decay", "0.5", "--init", "zeros"], [0.0625, 0.125, 0.25, 0.5]),
    ],
)
def test_weights_of_every_checkpoint(run: Path, words: list[str], expected: list[float]) -> None:
    """The weights a plan prints are those of the formula."""
    assert weights(run, *words) == pytest.approx(expected, rel=1e-6)


def test_a_weights_file_gives_weights_by_step_or_name(run: Path, tmp_path: Path) -> None:
    """Lines of step or name and weight; checkpoints that are not listed weigh nothing."""
    table = tmp_path / "weights.txt"
    table.write_text("# mine\n100, 1\nmodel-step-300.safetensors 3\n")
    assert weights(run, "--average", f"weights:{table}") == pytest.approx([0.25, 0, 0.75, 0])


def test_the_table_shows_every_checkpoint_with_tabs_in_a_pipe(run: Path) -> None:
    """Piped: a header line and one line per checkpoint, values whole, separated by tabs."""
    lines = cmd("plan", run, "--decay", "0.5").out.splitlines()
    rows = [line.split("\t") for line in lines if "\t" in line]
    assert rows[0] == ["checkpoint", "step", "coefficient", "weight"]
    assert [row[:2] for row in rows[1:]] == [
        [f"model-step-{k}.safetensors", str(k)] for k in (100, 200, 300, 400)
    ]
    assert rows[-1][2:] == ["0.5", "50.0 %"]


# ---------------------------------------------------------------------------- placeholders


def test_step_and_average_are_replaced_and_nothing_else(run: Path, tmp_path: Path) -> None:
    """``{step}`` is the window's last step, ``{average}`` the label; other braces stay."""
    out = tmp_path / "{x}-{step}-{average}-{step:>9}.safetensors"
    cmd("run", run, "-o", out, "--average", "mine=mean@:300", "--average", "ema:0.5/step")
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {
        "{x}-300-mine-{step:>9}.safetensors",
        "{x}-400-ema-0.5-step-{step:>9}.safetensors",
    }
    found = read_checkpoint(tmp_path / "{x}-300-mine-{step:>9}.safetensors")
    assert found["w/ExponentialMovingAverage"].tolist() == [2.0] * 4


@pytest.mark.parametrize(
    "specs",
    [
        (["x=mean", "x=ema:0.5"], "o-{average}.safetensors"),
        (["mean", "mean"], "o-{average}.safetensors"),
        (["mean", "ema:0.5"], "o.safetensors"),
        (["mean", "ema:0.5"], "o-{step}.safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_equal_labels_and_a_missing_placeholder_are_usage_errors(
    run: Path, tmp_path: Path, specs: tuple[list[str], str], command: str
) -> None:
    """Two averages need two labels and ``{average}`` in the output's name: exit 2."""
    words = [word for spec in specs[0] for word in ("--average", spec)]
    assert cmd(command, run, "-o", tmp_path / specs[1], *words, code=2).err
    assert list(tmp_path.iterdir()) == [run]


def test_equal_coefficients_are_read_once(run: Path) -> None:
    """Averages with equal coefficients, and several in one pass, read each byte once."""
    alone = planned(run, "--average", "mean")["costs"]
    both = planned(run, "--average", "a=mean", "--average", "b=lr:linear")["costs"]
    mixed = planned(run, "--average", "a=mean", "--average", "b=ema:0.5")["costs"]
    assert alone["read_bytes"] == both["read_bytes"] == mixed["read_bytes"] == 4 * 16
    assert both["write_bytes"] == 2 * alone["write_bytes"]


def test_a_file_format_cannot_go_to_a_directory_name(run: Path, tmp_path: Path) -> None:
    """``-o DIR/`` for a single file is exit 2 and the hint completes the name."""
    err = cmd("plan", run, "-o", f"{tmp_path}/new/", code=2).err
    assert f"hint: -o {tmp_path}/new/" in err


# ---------------------------------------------------------------------------- what is taken


def test_what_is_passed_over_is_told_with_its_reason(run: Path) -> None:
    """Aliases, temporaries, foreign files and our outputs: a reason each, and exit 0."""
    cmd("run", run, "-o", run / "model-step-999.safetensors", "--decay", "0.5")
    (run / "last.safetensors").symlink_to("model-step-400.safetensors")
    (run / "best.safetensors").write_bytes(b"x")
    (run / "model-step-500.safetensors.tmp").write_bytes(b"x")
    (run / "events.log").write_bytes(b"x")
    found = planned(run)
    reasons = {os.path.basename(entry["path"]): entry["reason"] for entry in found["passed_over"]}
    assert reasons == {
        "model-step-999.safetensors": "an output of ema-avg",
        "model-step-999.safetensors.ema.json": "tells where an output came from",
        "last.safetensors": "a link to another entry",
        "best.safetensors": "an alias: its name tells no step",
        "model-step-500.safetensors.tmp": "a temporary name: still being written, or left over",
        "events.log": "not a checkpoint",
    }
    assert not any(entry["unusable"] for entry in found["passed_over"])
    assert len(found["averages"][0]["inputs"]) == 4


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_checkpoint_that_cannot_be_used_is_exit_3(
    run: Path, tmp_path: Path, command: str
) -> None:
    """The rest is averaged and the exit code is 3; with ``--strict`` it is an error, 12."""
    bad = run / "model-step-500.safetensors"
    bad.write_bytes(b"\xff" * 100)
    words = [command, run, "-o", tmp_path / "o.safetensors", "--decay", "0.5"]
    assert f"unusable: {bad}: " in cmd(*words, code=3).err
    assert (tmp_path / "o.safetensors").exists() == (command == "run")
    assert str(bad) in cmd(*words, "--strict", code=12).err


def test_the_newest_folder_without_weights_is_exit_3(tmp_path: Path) -> None:
    """A numbered folder newer than all others that holds nothing yet is being written."""
    for step in (1, 2):
        value = {"w": np.float32(step)}
        write_checkpoint(tmp_path / f"run/checkpoint-{step}/model.safetensors", value)
    (tmp_path / "run/checkpoint-3").mkdir()
    assert "holds no weights yet" in cmd("plan", tmp_path / "run", code=3).err
    (tmp_path / "run/checkpoint-3").rename(tmp_path / "run/checkpoint-0")
    cmd("plan", tmp_path / "run")


def test_named_checkpoints_are_sorted_by_step_and_it_is_said(run: Path) -> None:
    """Given out of order they are sorted and a note says so; ``--order given`` keeps them."""
    names = [run / f"model-step-{k}.safetensors" for k in (300, 100, 200)]
    outcome = cmd("plan", *names, "--decay", "0.5", "--json")
    steps = [row["step"] for row in json.loads(outcome.out)["averages"][0]["inputs"]]
    assert steps == [100, 200, 300]
    assert "--order given" in outcome.err
    kept = cmd("plan", *names, "--decay", "0.5", "--json", "--order", "given")
    steps = [row["step"] for row in json.loads(kept.out)["averages"][0]["inputs"]]
    assert steps == [300, 100, 200]
    assert kept.err == ""


def test_steps_and_last_choose_after_glob(run: Path) -> None:
    """``--steps A:B:C`` counts from A with both ends, ``--last`` comes after it."""

    def steps(*words: str) -> list[int]:
        return [row["step"] for row in planned(run, *words)["averages"][0]["inputs"]]

    assert steps("--steps", "200:400") == [200, 300, 400]
    assert steps("--steps", ":400:200", "--last", "2") == [200, 400]
    assert steps("--steps", "100::200") == [100, 300]
    assert steps("--glob", "*-[123]00*", "--last", "2") == [200, 300]


def test_disagreements_of_steps_and_nothing_to_average(run: Path, tmp_path: Path) -> None:
    """One step twice or none at all: 13; no checkpoint left or none there: 10."""
    write_checkpoint(run / "other-step-400.safetensors", {"w": np.zeros(4, np.float32)})
    assert "--glob" in cmd("plan", run, code=13).err
    (run / "other-step-400.safetensors").rename(run / "no-number.safetensors")
    assert "--step-from" in cmd("plan", run, code=13).err
    cmd("plan", run, "--glob", "model-*", "--steps", "401:", code=10)
    (tmp_path / "empty").mkdir()
    cmd("plan", tmp_path / "empty", code=10)
