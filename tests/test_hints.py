"""Hints: what was probably meant, and commands that do what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cmd, write_run

from ema_cli.hints import did_you_mean, near_expression, near_glob, near_path

TENSORS = {"conv/kernel": np.float32([1, 2]), "conv/bias": np.float32([3]), "head/w": [1.0]}
NAMES = ["conv1/kernel", "conv2/kernel", "conv1/bias", "head.weight"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints in ``my run``."""
    values = [{name: np.float32(v) * k for name, v in TENSORS.items()} for k in range(1, 5)]
    return write_run(tmp_path / "my run", values)


def hint(*words: Any, code: int) -> str:
    """The hint of a command that fails."""
    return cmd(*map(str, words), code=code).err.split("\nhint: ")[1].removesuffix("\n")


# ---------------------------------------------------------------------------- near misses


def test_only_names_that_look_like_it_are_meant() -> None:
    """The likeliest ones; or what else there is to say."""
    assert did_you_mean("conv1/kernal", NAMES) == "did you mean conv1/kernel or conv2/kernel"
    assert did_you_mean("head.weigth", NAMES) == "did you mean head.weight"
    assert did_you_mean("zzz", NAMES, "else") == "else"
    assert did_you_mean("zzz", NAMES) == did_you_mean("a", []) == ""


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("conv1/kernal", "did you mean conv1/kernel or conv2/kernel"),
        ("Conv1/*", "near misses: conv1/bias, conv1/kernel"),
        ("*kernel*s", "near misses: conv1/kernel, conv2/kernel"),
        ("*/kernal", "near misses: conv1/kernel, conv2/kernel"),
        ("[c]onv1/*/", "near misses: conv1/bias, conv1/kernel"),
        ("*", "else"),
        ("zzz*", "else"),
    ],
)
def test_near_misses_of_a_glob(pattern: str, found: str) -> None:
    """By its literal part: whatever the case, inside names, as a part of one."""
    assert near_glob(pattern, NAMES, "else") == found


def test_near_misses_are_few() -> None:
    """Of many the first are shown, and how many there are; no name is shown as it came."""
    many = [f"layer{k}/w" for k in range(1, 10)]
    assert near_glob("layer*/v", many) == "near misses: layer1/w, layer2/w, layer3/w and 6 more"
    assert "\x1b" not in near_glob("evil*", ["evil\x1b[31m"])
    assert near_expression(r"^Conv\d/kernel$", NAMES) == ("near misses: conv1/kernel, conv2/kernel")


def test_the_path_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sibling of what is missing, with the rest of the path where it is there."""
    (tmp_path / "train dir" / "model").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    assert near_path(f"{tmp_path}/trian dir") == f"did you mean '{tmp_path}/train dir'"
    assert near_path(f"{tmp_path}/trian dir/model/") == f"did you mean '{tmp_path}/train dir/model'"
    assert near_path(f"{tmp_path}/trian dir/no") == f"did you mean '{tmp_path}/train dir'"
    assert near_path(f"{tmp_path}/zzz", "else") == near_path("/zzz/zzz/zzz", "else") == "else"
    monkeypatch.chdir(tmp_path)
    assert near_path("othr") == "did you mean other"


# ---------------------------------------------------------------------------- of commands


@pytest.mark.parametrize(
    ("words", "expected", "code"),
    [
        (["--decay", "99.9"], "if that is per cent: --decay 0.999", 2),
        (["--decay", "99.99%/step"], "if that is per cent: --decay 0.9999/step", 2),
        (["--decay", "5000"], "a half-life of so many steps is --average half-life:5000", 2),
        (["--decay", "1.01"], "a decay per checkpoint is --decay 0.9, one per", 2),
        (["--decay", "-1"], "a decay per checkpoint is --decay 0.9, one per", 2),
        (["--decay", "much"], "a decay per checkpoint is --decay 0.9, one per", 2),
        (["--average", "emma:0.9"], "did you mean ema:0.9", 2),
        (["--average", "halflife:500"], "did you mean half-life:500", 2),
        (["--average", "lr:cosin"], "did you mean lr:cosine", 2),
        (["--average", "0.99"], "did you mean ema:0.99", 2),
        (["--average", "ema"], "did you mean ema:0.999", 2),
        (["--average", "meen"], "did you mean mean", 2),
        (["--average", "mean:3"], "did you mean mean", 2),
        (["--average", "zzz"], "for example --average mean or --average ema:0.99", 2),
        (["--average", "half-life:x"], "for example half-life:5000", 2),
        (["--average", "ema:0.9/stp"], "per checkpoint: ema:0.9; per training step: ema:0.9/", 2),
        (["--average", "mean@lst=3"], "for example mean@last=3", 2),
        (["--average", "mean@last=0"], "the last one alone is mean@last=1", 2),
        (["--average", "mean@7:9"], "a window of the last 5 checkpoints is @last=5", 2),
        (["--average", "lr:x"], "for example --average mean", 2),
        (["--names", "varable"], "did you mean variable", 2),
        (["--format", "safetensor"], "did you mean safetensors", 2),
        (["--steps", "7"], "for example --steps 1000:5000", 2),
        (["--steps", "7:9"], "all of them: --steps 100:400; the last 5: --last 5", 10),
        (["--glob", "mdoel-*"], "near misses: model-step-100.safetensors, model-step-2", 10),
        (["--include", "conv/kernal"], "did you mean conv/kernel", 13),
        (["--exclude", "Conv/*"], "near misses: conv/bias, conv/kernel", 13),
        (["--step-from", "("], "a regular expression whose first group is the step", 2),
        (["--rule", "(", ""], "a regular expression and what takes its place", 2),
        (["--max-shard-size", "much"], "--max-shard-size 5GB", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_was_probably_meant(run: Path, words: list[str], expected: str, code: int) -> None:
    """The hint begins with it."""
    assert hint("plan", run, *words, code=code).startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pln", "RUN"], ["plan", "RUN"]),
        (["plan", "RUN", "--deacy", "0.9"], ["plan", "RUN", "--decay", "0.9"]),
        (["plan", "RUN", "--deacy=0.9"], ["plan", "RUN", "--decay=0.9"]),
        (["run", "RUN", "--decay", "0.9"], ["run", "RUN", "--decay", "0.9", "-o", "OUT"]),
        (["rename", "RUN/model-step-100.safetensors", "--names", "shadow"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_command_in_the_hint_works(
    run: Path, words: list[str], expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line as it was probably meant, which runs."""
    monkeypatch.chdir(run.parent)
    given = [word.replace("RUN", "my run") for word in words]
    tool, *meant = shlex.split(hint(*given, code=2))
    wanted = [*words, "-o", "OUT"] if expected is None else expected
    places = {"RUN": "my run", "OUT": "average.safetensors"}
    assert tool == "ema-avg"
    assert meant == [re.sub("RUN|OUT", lambda m: places[m[0]], word) for word in wanted]
    cmd(*meant)


def test_labels_of_an_export(run: Path, tmp_path: Path) -> None:
    """The labels that the state has."""
    state, out = tmp_path / "state", tmp_path / "o.safetensors"
    cmd("run", run, "--state", state, "--average", "slow=ema:0.5", "--average", "fast=mean")
    assert hint("export", state, "-o", out, "--average", "slwo", code=2) == "did you mean slow"
    cmd("export", state, "-o", out, "--average", "slow")


def test_a_state_that_is_none(run: Path, tmp_path: Path) -> None:
    """What begins one, or which one is meant."""
    out = tmp_path / "o.safetensors"
    begins = f"ema-avg run RUN --state {shlex.quote(str(run))} begins one"
    assert hint("export", run, "-o", out, code=12) == begins
    cmd("run", run, "--state", tmp_path / "state", "--decay", "0.5")
    meant = f"did you mean {tmp_path / 'state'}"
    assert hint("export", tmp_path / "sate", "-o", out, code=12) == meant


# ---------------------------------------------------------------------------- with a state


def commands(text: str) -> list[list[str]]:
    """The finished commands of a warning's hint."""
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"ema-avg run .*", text)]


@pytest.mark.parametrize("output", [[], ["-o", "o.safetensors"]], ids=["no output", "output"])
def test_a_warning_of_a_state_begins_another(
    run: Path, output: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands keep ``--state``, in a directory of its own, and -o as it was; they run."""
    monkeypatch.chdir(run.parent)
    found = cmd("run", run, "--state", "state", "--decay", "0.999", *output).err
    printed = commands(found)
    assert printed
    for words in printed:
        assert words[words.index("--state") + 1] == "state-2"
        assert ("-o" in words) is ("--overwrite" in words) is bool(output)
    cmd(*printed[0])
    cmd("run", run, "--state", "state-2", "--decay", "0.7", code=16)
    again = cmd("run", run, "--state", "third", "--decay", "0.999", "-n").err
    assert all(words[words.index("--state") + 1] == "third" for words in commands(again))


def test_non_finite_values_of_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which checkpoints are taken is no setting of a state, but the rest is."""
    monkeypatch.chdir(tmp_path)
    values = [{"w": np.float32([k]), "b x": np.float32([k])} for k in (1, 2, np.nan)]
    write_run(tmp_path / "run", values)
    words = ["run", "run", "--decay", "0.5", "--state", "state"]
    fresh = hint(*words, code=17)
    assert "copy the tensor with --exclude w, or let it pass with --non-finite allow" in fresh
    assert "another state" not in fresh
    cmd(*words, "--steps", ":200")
    bound = hint(*words, code=17)
    assert "leave the checkpoint out with --steps or --glob, or begin another state: " in bound
    assert "--non-finite allow with --state state-2" in bound
    cmd(*words, "--glob", "*[12]00.safetensors")
    cmd(*words[:-2], "--state", "state-2", "--non-finite", "allow")
