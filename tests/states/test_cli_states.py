"""What the commands say about states: on stdout, on stderr, in JSON, by exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Outcome, cmd, write_checkpoint
from stores import FIXTURES, documents, tree, update, values, without_barriers, write_steps

from ema_cli import ExponentialMovingAverage
from ema_cli.errors import StorageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with a run of two checkpoints; nothing here is about power cuts."""
    without_barriers(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_steps(Path("run"), [100, 200])


def told(done: Outcome) -> tuple[str, str]:
    """Return what a command wrote, times left out."""
    return done.out, re.sub(r"in \d+\.\d s", "in T s", done.err)


def result(done: Outcome) -> dict[str, Any]:
    """Return the last document on stdout, without what differs from run to run."""
    document: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    document.pop("seconds", None)
    return document


STATE = ("--state", "S", "--decay", "0.5")


# ---------------------------------------------------------------------------- run


def test_what_run_says() -> None:
    """What was applied, the outputs after it; a summary on stderr."""
    assert told(cmd("run", "run", *STATE)) == (
        "applied  2 checkpoints  steps 100 to 200  S\n",
        "2 checkpoints averaged up to step 200; read 144 bytes in T s\n",
    )
    assert told(cmd("run", "run", *STATE)) == (
        "unchanged  step 200  S\n",
        "2 checkpoints averaged up to step 200; read 0 bytes in T s\n",
    )
    write_steps(Path("run"), [3000])
    assert told(cmd("run", "run", *STATE, "-o", "out-{step}.safetensors")) == (
        "applied  1 checkpoint  step 3,000  S\nwritten  316 bytes  out-3000.safetensors\n",
        "ema-0.5: 3 checkpoints averaged, weights 25.0 % (step 100) to 50.0 % (step 3,000)\n"
        "  effective number of checkpoints 2.7, mean age 1,425 steps\n"
        "  2 tensors averaged, 1 copied, 0 left out\n"
        "  check it: ema-avg map out-3000.safetensors\n"
        "3 checkpoints averaged up to step 3,000; read 4.1 KiB in T s\n",
    )
    assert cmd("run", "run", *STATE, "-o", "out-{step}.safetensors").out == (
        "unchanged  step 3,000  S\nunchanged  316 bytes  out-3000.safetensors\n"
    )
    assert cmd("run", "run", *STATE, "-q").err == ""


def test_run_in_json() -> None:
    """One document, also where nothing is new."""
    first = result(cmd("run", "run", *STATE, "--json"))
    assert first == {
        "type": "result",
        "schema": 1,
        "command": "run",
        "state": "S",
        "status": "applied",
        "applied": [
            {"step": 100, "path": "run/model-100.safetensors"},
            {"step": 200, "path": "run/model-200.safetensors"},
        ],
        "step": 200,
        "checkpoint_count": 2,
        "outputs": [],
        "read_bytes": 144,
        "passed_over": [],
        "notes": [],
    }
    again = result(cmd("run", "run", *STATE, "--json", "-o", "x.npz"))
    assert {k: v for k, v in again.items() if first[k] != v} == {
        "status": "unchanged",
        "applied": [],
        "outputs": [{"path": "x.npz", "status": "written", "bytes": Path("x.npz").stat().st_size}],
        "read_bytes": 0,
    }
    error = json.loads(cmd("run", "run", "--state", "S", "--json", code=16).out.splitlines()[-1])
    assert (error["type"], error["code"]) == ("error", 16)


def test_warnings_are_those_of_all_checkpoints() -> None:
    """A decay that leaves most on the first one is told with every update; `--strict` refuses."""
    words = ("run", "run", "--state", "S", "--decay", "0.999")
    assert "first-dominates" in cmd(*words).err
    assert "first-dominates" not in cmd(*words).err
    write_steps(Path("run"), [300])
    before = tree(Path("S"))
    assert "first-dominates" in cmd(*words, "--strict", code=2).err
    assert tree(Path("S")) == before
    warned = cmd(*words).err
    assert "first-dominates" in warned and "99.8 %" in warned


def test_a_dry_run_does_nothing() -> None:
    """It shows all that is averaged then, before there is a state and after."""
    for words in (("plan", "run"), ("run", "run", "-n")):
        done = cmd(*words, *STATE, "-o", "x.npz")
        assert "run: 2 checkpoints, steps 100 to 200" in done.out
        assert not Path("S").exists() and not Path("x.npz").exists()
    cmd("run", "run", *STATE)
    write_steps(Path("run"), [300])
    before = tree(Path("S"))
    for words in (("plan", "run"), ("run", "run", "-n")):
        done = cmd(*words, *STATE)
        assert re.search(r"model-100.safetensors\t100\t1\t25.0 %", done.out)
        assert re.search(r"model-300.safetensors\t300\t0.5\t50.0 %", done.out)
    plan = json.loads(cmd("plan", "run", *STATE, "--json").out.splitlines()[-1])
    assert [entry["step"] for entry in plan["averages"][0]["inputs"]] == [100, 200, 300]
    assert tree(Path("S")) == before
    cmd("plan", "run", "--state", "S", "--decay", "0.9", code=16)


def test_exit_codes_of_run() -> None:
    """Of all that can be wrong with a state or an output."""
    cmd("run", "run", "--decay", "0.5", code=2)
    cmd("run", "nowhere", *STATE, code=12)
    Path("empty").mkdir()
    cmd("run", "empty", *STATE, code=10)
    cmd("run", "run", "--state", "run", code=14)
    cmd("run", "run", "--state", "run/model-100.safetensors", code=14)
    cmd("run", "run", *STATE, "-o", "run/model-100.safetensors", "--overwrite", code=14)
    cmd("run", "run", *STATE)
    cmd("run", "run", "--state", "S", "--decay", "0.6", code=16)
    write_checkpoint(
        Path("run/model-300.safetensors"), {**values(3), "bias": np.float32([1, np.nan])}
    )
    cmd("run", "run", *STATE, code=17)
    write_checkpoint(Path("run/model-300.safetensors"), {"kernel": np.float32([1])})
    cmd("run", "run", *STATE, code=13)
    Path("run/model-300.safetensors").write_bytes(b"")
    assert cmd("run", "run", *STATE, code=3).out.startswith("unchanged  step 200")
    Path("S/ROOT").write_bytes(b"")
    damaged = cmd("run", "run", *STATE, code=12)
    assert "ROOT" in damaged.err and "begin a new one in another directory" in damaged.err


def test_an_output_that_fails_after_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update counts, and stdout says so."""

    def full(*given: object, **more: object) -> None:
        raise StorageError("x.npz: no space left")

    with monkeypatch.context() as patch:
        patch.setattr("ema_cli.running.produce", full)
        done = cmd("run", "run", *STATE, "-o", "x.npz", code=15)
    assert len(documents(Path("S"), "ledger")) == 2
    assert "applied  2 checkpoints  steps 100 to 200  S\n" in done.out
    done = cmd("run", "run", *STATE, "-o", "x.npz")
    assert done.out.startswith("unchanged  step 200  S\nwritten")


def test_a_process_of_its_own() -> None:
    """Seen from the outside: the line is there when it is over."""
    words = [sys.executable, "-m", "ema_cli", "run", "run", *STATE, "--workers", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "applied  2 checkpoints  steps 100 to 200  S\n"
    assert (Path("S") / "LOCK").read_text().startswith("pid ")


# ---------------------------------------------------------------------------- inspect, export


def test_what_inspect_says() -> None:
    """A table of what was mixed in; what it is bound to."""
    cmd("run", "run", *STATE)
    done = cmd("inspect", "S")
    assert done.out == (
        "checkpoint\tstep\tcoefficient\tweight\n"
        "model-100.safetensors\t100\t1\t50.0 %\n"
        "model-200.safetensors\t200\t0.5\t50.0 %\n"
    )
    lines = done.err.splitlines()
    assert lines[0] == ("ema-0.5: ema:0.5: effective number of checkpoints 2.0, mean age 50 steps")
    assert re.fullmatch(r"state of 2 checkpoints up to step 200: 3 tensors, .* on disk", lines[1])
    assert lines[2:] == ["bound to --decay 0.5"]


def test_inspect_in_json() -> None:
    """Coefficients are numbers here; one document."""
    update(Path("S"), "run", average=["a=mean", "ema:0.5"], num_updates="count")
    found = result(cmd("inspect", "S", "--json"))
    assert found.pop("bytes") > 8192
    late = np.float32(1) - np.float32(2 / 11)  # the ramp's decay is (1 + n) / (10 + n)
    weights = [1 - float(late), float(late)]
    assert found == {
        "type": "result",
        "schema": 1,
        "command": "inspect",
        "kind": "state",
        "path": "S",
        "generation": 1,
        "step": 200,
        "settings": ["--average", "a=mean", "--average", "ema:0.5", "--num-updates", "count"],
        "averages": [
            {"label": "a", "spec": "mean", "weights": [0.5, 0.5]},
            {"label": "ema-0.5", "spec": "ema:0.5", "weights": weights},
        ],
        "ledger": [
            {
                "step": step,
                "path": f"run/model-{step}.safetensors",
                "coefficients": c,
                "reason": None,
            }
            for step, c in ((100, [1.0, 1.0]), (200, [0.5, float(late)]))
        ],
        "tensor_count": 5,
    }


def test_inspect_of_several_averages() -> None:
    """A pair of columns for each."""
    update(Path("S"), "run", average=["a=mean", "ema:0.25"])
    done = cmd("inspect", "S")
    assert done.out.splitlines()[0] == (
        "checkpoint\tstep\tcoefficient a\tweight a\tcoefficient ema-0.25\tweight ema-0.25"
    )
    assert done.out.splitlines()[2] == "model-200.safetensors\t200\t0.5\t50.0 %\t0.75\t75.0 %"
    assert "bound to --average a=mean --average ema:0.25" in done.err


def test_inspect_of_a_state_of_the_class() -> None:
    """It has no steps where mappings were applied; a decay may change from update to update."""
    ema = ExponentialMovingAverage(0.5, "count", store="C")
    ema.apply({"v": np.float32([1])})
    ema.apply({"v": np.float32([2])})
    done = cmd("inspect", "C")
    assert done.out.startswith("checkpoint\tstep\tcoefficient\tweight\n")
    assert len(done.out.splitlines()) == 3
    cmd("export", "C", "-o", "c.safetensors")


def test_nothing_hostile_reaches_the_terminal() -> None:
    """Names of checkpoints and tensors come from files."""
    for step in (300, 400):
        path = Path("odd") / f"\x1b[2J\nstep-{step}.safetensors"
        write_checkpoint(path, {**values(1), "\x1b[31m": np.float32([1])})
    for words in (
        ("run", "odd", "--state", "O", "--name", "\x1b]0;x\x07", "-v"),
        ("inspect", "O"),
        ("inspect", "O", "--json"),
        ("export", "O", "-o", "o.safetensors", "-v"),
        ("run", "odd", "--state", "O", "--decay", "0.5"),
    ):
        done = cmd(*words, code=16 if "0.5" in words else 0)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.out + done.err), words


def test_what_export_says() -> None:
    """One line on stdout for each output."""
    update(Path("S"), "run", average=["a=mean", "b=ema:0.25"])
    done = cmd("export", "S", "-o", "{average}-{step}.npz", "--names", "variable")
    size = Path("a-200.npz").stat().st_size
    assert done.out == f"written  {size} bytes  a-200.npz\nwritten  {size} bytes  b-200.npz\n"
    assert done.err.splitlines() == [
        "a: 2 checkpoints averaged, weights 50.0 % (step 100) to 50.0 % (step 200)",
        "  effective number of checkpoints 2.0, mean age 50 steps",
        "  2 tensors averaged, 1 copied, 0 left out",
        "  load it: numpy.load('a-200.npz')",
        "b: 2 checkpoints averaged, weights 25.0 % (step 100) to 75.0 % (step 200)",
        "  effective number of checkpoints 1.6, mean age 25 steps",
        "  2 tensors averaged, 1 copied, 0 left out",
        "  load it: numpy.load('b-200.npz')",
    ]
    again = cmd("export", "S", "-o", "{average}-{step}.npz", "--names", "variable", "-q")
    assert again.out.count("unchanged") == 2 and again.err == ""
    assert result(cmd("export", "S", "-o", "b.npz", "--average", "b", "--json")) == {
        "type": "result",
        "schema": 1,
        "command": "export",
        "state": "S",
        "step": 200,
        "outputs": [{"path": "b.npz", "status": "written", "bytes": Path("b.npz").stat().st_size}],
        "notes": [],
    }


def test_exit_codes_of_export_and_inspect() -> None:
    """Of what is no state, of what is there, of what it has not."""
    cmd("run", "run", *STATE)
    cmd("export", "S", code=2)
    cmd("export", "S", "-o", "x.xyz.h5", "--average", "nothing", code=2)
    cmd("export", "S", "-o", "x.gguf", code=2)
    cmd("export", "S", "-o", "x.keras", code=2)
    cmd("export", "S", "-o", "x.safetensors", "--optimizer", "keep", code=13)
    for what in ("nowhere", "run", "run/model-100.safetensors"):
        cmd("export", what, "-o", "x.safetensors", code=12)
    Path("there.safetensors").touch()
    cmd("export", "S", "-o", "there.safetensors", code=14)
    cmd("export", "S", "-o", "there.safetensors", "--overwrite")
    assert cmd("export", "S", "-o", "there.safetensors").out.startswith("unchanged")
    cmd("export", "S", "-o", "run/model-200.safetensors", "--overwrite", code=14)
    cmd("run", "S", "-o", "x.safetensors", code=12)
    assert "ema-avg export S -o OUT" in cmd("plan", "S", "-o", "x.safetensors", code=12).err


def test_an_export_is_as_good_as_an_output() -> None:
    """Its provenance tells the checkpoints and their weights; `map` and `diff` read it."""
    cmd("run", "run", *STATE)
    cmd("export", "S", "-o", "e.safetensors")
    cmd("run", "run", "-o", "r.safetensors", "--decay", "0.5")
    told_by = [json.loads(Path(f"{name}.safetensors.ema.json").read_text()) for name in "er"]
    for key in ("inputs", "averaged", "average"):
        assert told_by[0].get(key) == told_by[1].get(key), key
    cmd("diff", "e.safetensors", "r.safetensors")
    assert cmd("map", "e.safetensors").out == cmd("map", "r.safetensors").out
    assert cmd("export", "S", "-o", "r.safetensors").out.startswith("unchanged")


def test_an_export_knows_what_a_run_has_made() -> None:
    """Also where it is a copy of the last checkpoint's structure, which the state has kept."""
    run = FIXTURES / "torch" / "run"
    cmd("run", run, "-o", "r.pt", "--decay", "0.5")
    cmd("run", run, "--state", "T", "--decay", "0.5", "-o", "s.pt")
    assert Path("r.pt").read_bytes() == Path("s.pt").read_bytes()
    for name in ("r.pt", "s.pt"):
        assert cmd("export", "T", "-o", name).out.startswith("unchanged")
        assert cmd("run", run, "-o", name, "--decay", "0.5").out.startswith("unchanged")
