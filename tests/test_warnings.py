"""Every warning has a code, comes when it should and only then; its finished command works."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import cmd, dtype_of, read_checkpoint, write_checkpoint, write_run

from ema_cli.text import percent

HINT = re.compile(r"(ema-avg run .*)  # leaves (.*) on the first")


def make_run(folder: Path, count: int = 20, dtype: str = "float32") -> Path:
    """A run with one tensor to average, one to exclude, steps 100 apart."""
    return write_run(
        folder,
        [
            {
                "w": np.full(4, k).astype(dtype_of(dtype)),
                "head/w": np.full(2, k).astype(dtype_of(dtype)),
                "bn/moving_mean": np.full(2, k).astype(dtype_of(dtype)),
            }
            for k in range(1, count + 1)
        ],
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty checkpoints in ``my run``; hints that say OUT write into the test's directory."""
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "my run")


def found(*words: Any) -> dict[str, tuple[str, str]]:
    """The warnings of a plan: code to (message, hint)."""
    lines = cmd("plan", *words, "--json").out.splitlines()
    documents = [json.loads(line) for line in lines]
    return {d["warning"]: (d["message"], d["hint"]) for d in documents if d["type"] == "warning"}


def commands(*words: Any) -> list[tuple[list[str], str]]:
    """The finished commands a plan offers, split as a shell does, with the promised share."""
    _, hint = found(*words)["first-dominates"]
    matched = [HINT.fullmatch(line) for line in hint.splitlines()]
    assert matched
    assert all(matched)
    return [(shlex.split(match[1]), match[2]) for match in matched if match]


# ---------------------------------------------------------------------------- when


CASES = [
    ("first-dominates", ["--decay", "0.999"], ["--decay", "0.9"]),
    ("first-dominates", ["--average", "half-life:9e4"], ["--average", "half-life:500"]),
    ("first-dominates", ["--average", "ema:0.99@last=9"], ["--average", "ema:0.99/step@last=9"]),
    ("first-dominates", ["--decay", "1"], ["--average", "mean"]),
    ("last-dominates", ["--decay", "0.05"], ["--decay", "0.2"]),
    ("last-dominates", ["--decay", "0"], ["--decay", "0.11"]),
    ("last-dominates", ["--average", "half-life:20"], ["--average", "half-life:40"]),
    ("last-dominates", ["--average", "power:0.001"], ["--average", "power:0.1"]),
    (
        "decay-never-reached",
        ["--decay", "0.999", "--num-updates", "count"],
        ["--decay", "0.5", "--num-updates", "count"],
    ),
    ("decay-never-reached", ["--decay", "0.7", "--num-updates", "count"], []),
    ("decay-never-reached", ["--decay", "0.999", "--num-updates", "step"], ["--decay", "0.9"]),
    (
        "weights-do-not-sum",
        ["--decay", "0.9", "--init", "zeros"],
        ["--decay", "0.9", "--zero-debias"],
    ),
    (
        "weights-do-not-sum",
        ["--decay", "0.9", "--zero-debias", "--num-updates", "count", "--last", "4"],
        ["--decay", "0.9", "--num-updates", "count", "--last", "4"],
    ),
    ("weights-do-not-sum", ["--decay", "0.99", "--init", "zeros"], ["--decay", "0.99"]),
    ("one-checkpoint", ["--decay", "0.9", "--last", "1"], ["--decay", "0.9", "--last", "2"]),
    ("shadow-names", ["--decay", "0.9", "--names", "shadow", "--format", "safetensors-folder"],
     ["--decay", "0.9", "--format", "safetensors-folder"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "when", "otherwise"), CASES)
def test_a_warning_comes_when_it_should_and_only_then(
    run: Path, code: str, when: list[str], otherwise: list[str]
) -> None:
    """The code stands in plan's JSON for the case and not for its harmless neighbour."""
    assert code in found(run, *when)
    assert code not in found(run, *otherwise)


def test_a_sane_average_warns_of_nothing(run: Path) -> None:
    """The default, a mean, a decay of 0.8 and a warm-up that is used up: no warning at all."""
    for words in ([], ["--average", "mean"], ["--decay", "0.8"], ["--decay", "0.99/step"]):
        assert found(run, *words) == {}


def test_the_ramp_is_used_up_by_the_last_update(run: Path) -> None:
    """(1 + 19)/(10 + 19) is 0.6897: a decay just below it is reached, one above never is."""
    words = ["--num-updates", "count"]
    assert "decay-never-reached" not in found(run, "--decay", "0.6896", *words)
    assert "decay-never-reached" in found(run, "--decay", "0.6898", *words)


@pytest.mark.parametrize(
    ("dtype", "decay", "frozen"),
    [
        ("bfloat16", "0.99", True),
        ("bfloat16", "0.9", False),
        ("float16", "0.999", True),
        ("float16", "0.99", False),
        ("float32", "0.9999", False),
    ],
)
def test_half_shadows_that_cannot_move_are_told(
    tmp_path: Path, dtype: str, decay: str, frozen: bool
) -> None:
    """``frozen-shadow`` for ``same`` with half types and a high decay; never with ``auto``."""
    run = make_run(tmp_path / "run", 3, dtype)
    words = [run, "--decay", decay]
    assert ("frozen-shadow" in found(*words, "--shadow-dtype", "same")) is frozen
    assert "frozen-shadow" not in found(*words)


def test_a_frozen_shadow_really_is_one(tmp_path: Path) -> None:
    """What the warning says happens: the bf16 shadow keeps its first value, the float32 moves."""
    values = [{"w": np.full(4, v).astype(dtype_of("bfloat16"))} for v in (1.0, 1.25, 1.25, 1.25)]
    words = ["run", write_run(tmp_path / "run", values), "--decay", "0.99"]
    name = "w/ExponentialMovingAverage"
    for policy, expected in (("same", 1.0), ("auto", 1.0078125)):
        out = tmp_path / f"{policy}.safetensors"
        cmd(*words, "-o", out, "--shadow-dtype", policy)
        assert float(read_checkpoint(out)[name][0]) == expected


def test_a_full_disk_is_foretold(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``disk-space`` when the output needs more than there is."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=1))
    assert "disk-space" in found(run, "--decay", "0.8")


def test_each_of_several_averages_warns_for_itself(run: Path) -> None:
    """The message names the average by its label."""
    words = ["--average", "x=ema:0.999", "--average", "y=ema:0.8", "-o", "{average}.safetensors"]
    assert "'x'" in found(run, *words)["first-dominates"][0]


# ---------------------------------------------------------------------------- the hint


SELECTIONS = [
    [],
    ["--last", "12"],
    ["--steps", "300:1500"],
    ["--steps", "500:"],
    ["--steps", ":1500:200"],
    ["--glob", "model-step-1*"],
    ["--step-from", r"-(\d+)00\."],
    ["--exclude", "head/*"],
    ["--include", "head/*", "--exclude", "*w", "--include", "w"],
]
STYLES = [
    ["--names", "variable"],
    ["--name", "polyak"],
    ["--keep-variables"],
    ["--rule", "^w", "the w"],
    ["--dtype", "float64"],
    ["--statistics", "copy"],
    ["--format", "safetensors-folder"],
    ["--optimizer", "keep", "--non-finite", "allow"],
    ["--shadow-dtype", "same"],
]


def first_weight(words: list[str]) -> float:
    """The weight a command leaves on its first checkpoint that has any."""
    line = cmd("plan", *words[2:], "--json").out.splitlines()[-1]
    rows = json.loads(line)["averages"][0]["inputs"]
    return next(row["weight"] for row in rows if row["coefficient"])


@pytest.mark.parametrize("options", SELECTIONS + STYLES, ids=str)
def test_the_finished_commands_run_and_keep_their_promise(run: Path, options: list[str]) -> None:
    """Each command of the hint runs as printed and leaves the share it names on the first."""
    offered = commands(run, "-o", "o.safetensors", "--decay", "0.999", *options)
    assert len(offered) == (1 if "--step-from" in options else 2)  # steps 1 to 20 are too near
    for words, promised in offered:
        assert percent(first_weight(words)) == promised
        assert cmd(*words[1:], "--overwrite").out.split()[-1].startswith("o.safetensors")


@pytest.mark.parametrize("options", STYLES, ids=str)
def test_the_finished_commands_differ_in_the_average_only(run: Path, options: list[str]) -> None:
    """Names, format, dtype and the like of the command that was given are kept."""
    cmd("run", run, "-o", "wanted", "--average", "ema:0.999/step", *options)
    (words, _), *_ = commands(run, "-o", "o", "--decay", "0.999", *options)
    cmd(*words[1:])
    wanted, got = (json.loads(Path(f"{name}.ema.json").read_bytes()) for name in ("wanted", "o"))
    for key in ("averaged", "copied", "left_out"):
        assert got[key] == wanted[key]
    wanted["output"] |= {"path": "", "fingerprint": ""}
    assert got["output"] | {"path": "", "fingerprint": ""} == wanted["output"]
    assert got["average"]["shadow_dtype"] == wanted["average"]["shadow_dtype"]


@pytest.mark.parametrize(
    "options",
    [
        ["--decay", "0.9999999"],
        ["--decay", "0.99999991/step"],
        ["--average", "ema:0.999@last=7"],
        ["--average", "mine=ema:0.999@300:1500"],
        ["--decay", "0.999", "--names", "auto", "--init", "first"],
        ["--decay", "0.99999/step", "--num-updates", "none"],
    ],
    ids=str,
)
def test_the_promise_holds_for_other_averages(run: Path, options: list[str]) -> None:
    """Windows and very high decays: the decay is not rounded, the share is the command's own."""
    number = re.search(r"0\.9+[0-9]*", " ".join(options))
    for words, promised in commands(run, "-o", "o.safetensors", *options):
        assert percent(first_weight(words)) == promised
        assert number is not None
        assert number[0] in re.split("[ :/@]", " ".join(words))
        cmd(*words[1:], "--overwrite")


def test_the_finished_commands_keep_the_order_that_was_given(run: Path) -> None:
    """``--order given`` is part of the command: the first checkpoint stays the first."""
    names = [run / f"model-step-{k}.safetensors" for k in (300, 100, 200)]
    given = [*names, "--order", "given", "--average", "ema:0.999"]
    for words, promised in commands(*given):
        assert percent(first_weight(words)) == promised
        cmd(*words[1:], "--overwrite")
        kept = json.loads(Path(f"{words[words.index('-o') + 1]}.ema.json").read_bytes())
        assert [row["step"] for row in kept["inputs"]] == [300, 100, 200]


# ---------------------------------------------------------------------------- strict


@pytest.mark.parametrize("command", ["plan", "run"])
def test_strict_makes_warnings_errors(run: Path, command: str) -> None:
    """``--strict``: exit 2 with the code and the hint, and nothing is written."""
    words = [command, run, "-o", "o.safetensors", "--decay", "0.999"]
    outcome = cmd(*words, "--strict", code=2)
    assert "first-dominates" in outcome.err
    assert "--decay 0.999/step" in outcome.err
    assert not Path("o.safetensors").exists()
    cmd(command, run, "-o", "o.safetensors", "--decay", "0.8", "--strict")


def test_names_in_warnings_are_safe_to_show(tmp_path: Path) -> None:
    """A file name with an escape sequence reaches the terminal escaped."""
    path = tmp_path / "step-1-\x1b[31m\n.safetensors"
    write_checkpoint(path, {"w": np.float32(1)})
    outcome = cmd("plan", path, "--decay", "0.5")
    assert "[one-checkpoint]" in outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    assert len(outcome.err.splitlines()) == 1
