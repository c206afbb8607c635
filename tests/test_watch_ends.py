"""How a watch ends: by itself, by a signal, by an error; and how the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import bytes_of
from helpers import cmd, write_checkpoint
from live import QUIET, STUCK, Live, Training, child, values_of

import ema_cli
from ema_cli.errors import EmaError
from ema_cli.live import readiness, watching
from ema_cli.live.reports import Applied, Dropped
from ema_cli.states import store

OUT = "out-{step}.safetensors"
SHORT = ["--interval", "0.05", "--decay", "0.9"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait as long as people do."""
    monkeypatch.setattr(readiness, "QUIET_SECONDS", QUIET)
    monkeypatch.setattr(readiness, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(watching, "SHORTEST_INTERVAL", 0.01)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """A training that saves safetensors files."""
    return Training(tmp_path)


def rows(state: Path) -> dict[int | None, str]:
    """The ledger: each step, and why it was missed."""
    with store.reading(str(state)) as found:
        assert found.current is not None
        return {row.step: row.missed for row in found.current.rows}


# ---------------------------------------------------------------------------- by itself


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    """Nothing came: exit 0, and the state can be begun by whoever comes next."""
    words = ["watch", tmp_path / "run", "--state", tmp_path / "state", *SHORT]
    done = cmd(*words, "--idle-timeout", "0.1", "-v")
    assert done.out == ""
    assert "not there yet" in done.err
    (tmp_path / "run").mkdir()
    assert cmd(*words, "--idle-timeout", "0.1").out == ""
    (tmp_path / "run" / "file").touch()
    cmd("watch", tmp_path / "run" / "file", "--state", tmp_path / "state", *SHORT, code=2)
    cmd("watch", tmp_path, tmp_path, "--state", tmp_path / "state", *SHORT, code=2)


def test_idle_means_that_nothing_was_applied(training: Training, tmp_path: Path) -> None:
    """What only has to be quiet is waited for, however short the time."""
    training.save(100, 200)
    result = ema_cli.watch(
        training.run,
        tmp_path / "out.safetensors",
        state=tmp_path / "state",
        decay=0.9,
        interval=0.02,
        every=3,
        idle_timeout=0.01,
    )
    assert (result.ended, result.step) == ("idle", 200)
    training.check(result, tmp_path / "out.safetensors")


def test_nothing_beyond_the_last_step_is_applied(training: Training, tmp_path: Path) -> None:
    """Whenever it looked, the watch ends with the same checkpoints averaged."""
    training.save(100, 200, 300, 400)
    done = cmd(
        *["watch", training.run, "--state", tmp_path / "state", *SHORT, "--until-step", "250"],
        "--json",
    )
    *before, result = [json.loads(line) for line in done.out.splitlines()]
    assert [document["type"] for document in before] == ["warning", "applied"][1:]
    assert [row["step"] for row in before[-1]["applied"]] == [100, 200, 300]
    assert (result["type"], result["schema"], result["command"]) == ("result", 1, "watch")
    assert (result["ended"], result["step"], result["checkpoint_count"]) == ("until-step", 300, 3)
    assert cmd("watch", training.run, "--state", tmp_path / "state", *SHORT, "--until-step", "1")


def test_a_damaged_one_is_missed_when_newer_ones_are_complete(
    training: Training, tmp_path: Path
) -> None:
    """Not before: it may still be written. Exit code 3 says so."""
    training.save(100)
    broken = training.run / "model-step-200.safetensors"
    broken.write_bytes(training.files(200)[0].read_bytes()[:-100])
    with Live(training.run, tmp_path / "state", tmp_path / OUT, idle_timeout=0.3) as live:
        result = live.end()
        assert (live.steps(), live.missed()) == ([100], [])
        assert [entry.path for entry in result.unusable] == [str(broken)]
    training.save(300)
    words = ["watch", training.run, "--state", tmp_path / "state", *SHORT, "--idle-timeout", "0.3"]
    done = cmd(*words, "--json", code=3)
    documents = [json.loads(line) for line in done.out.splitlines()]
    assert [d["type"] for d in documents] == ["missed", "applied", "result"]
    assert (documents[0]["step"], documents[0]["path"]) == (200, str(broken))
    assert rows(tmp_path / "state")[200] == documents[0]["reason"]
    assert list(rows(tmp_path / "state")) == [100, 300, 200]
    assert "missed" not in cmd(*words, code=3).out


@pytest.mark.parametrize("row", ["tensorflow", "torch"])
def test_damage_that_only_reading_finds_is_one_checkpoint_s(row: str, tmp_path: Path) -> None:
    """The checksums are wrong: what is older is applied, what is newer after the grace period."""
    training = Training(tmp_path, row)
    training.save(100, 200, 300)
    bias = values_of(200)["dense/bias"].tobytes()
    [path] = [p for p in training.run.iterdir() if "200" in p.name and bias in p.read_bytes()]
    data = path.read_bytes()
    path.write_bytes(data.replace(bias, bias[:-1] + bytes([bias[-1] ^ 1])))
    os.utime(path, (1, 1))
    out = tmp_path / ("out-{step}" + ("" if row == "tensorflow" else ".pt"))
    with Live(training.run, tmp_path / "state", out, until_step=300) as live:
        result = live.end()
    assert (live.steps(), live.missed()) == ([100, 300], [200])
    assert "pins" not in live.of(Dropped)[0].reason
    assert "checksum" in result.missed[0].reason
    training.check(result, tmp_path / out.name.format(step=300))


# ---------------------------------------------------------------------------- by an error


@pytest.mark.parametrize(
    ("tensors", "code"),
    [({"other": np.ones(3, np.float32)}, 13), ({**values_of(1), "dense/bias": None}, 17)],
)
def test_what_is_wrong_with_the_training_ends_the_watch(
    training: Training, tmp_path: Path, tensors: dict[str, Any], code: int
) -> None:
    """Other tensors, or NaN: the message names the run's file, the state is what it was."""
    training.save(100)
    bad = {k: np.full(10, np.nan, np.float32) if v is None else v for k, v in tensors.items()}
    with Live(training.run, tmp_path / "state") as live:
        live.until_applied(100)
        write_checkpoint(training.run / ".new", bad)
        (training.run / ".new").rename(training.run / "model-step-200.safetensors")
        with pytest.raises(EmaError, match=r"/run/model-step-200\.safetensors") as caught:
            live.end()
        assert caught.value.exit_code == code
    assert rows(tmp_path / "state") == {100: ""}
    assert not (tmp_path / "state" / "pins").exists()


def test_steps_that_disagree_for_long_end_the_watch(training: Training, tmp_path: Path) -> None:
    """For a moment they may: files are being moved."""
    training.save(100)
    with Live(training.run, tmp_path / "state") as live:
        live.until_applied(100)
        copy = training.run / "copy-of-step-200.safetensors"
        training.save(200)
        copy.write_bytes(training.files(200)[0].read_bytes())
        copy.unlink()
        live.until_applied(200)
        copy.write_bytes(training.files(200)[0].read_bytes())
        with pytest.raises(EmaError, match="step 200 twice") as caught:
            live.end()
        assert caught.value.exit_code == 13


def test_settings_and_lock_are_those_of_run(training: Training, tmp_path: Path) -> None:
    """A state belongs to its averages; one process writes to it, all the time."""
    training.save(100)
    state = tmp_path / "state"
    with Live(training.run, state) as live:
        live.until_applied(100)
        words = ["--state", state, "--interval", "0.1"]
        cmd("watch", training.run, *words, "--decay", "0.9", code=11)
        cmd("run", training.run, "--state", state, "--decay", "0.9", code=11)
    cmd("watch", training.run, *words, "--decay", "0.8", code=16)
    assert cmd("run", training.run, "--state", state, "--decay", "0.9").out.startswith("unchanged")


@pytest.mark.parametrize(
    "words",
    [
        ["--average", "lr:cosine"],
        ["--average", "mean@last=3"],
        ["--interval", "0"],
        ["--interval", "nan"],
        ["--idle-timeout", "-1"],
        ["--every", "2"],
        ["--every", "0"],
        ["--last", "3"],
        ["--order", "given"],
        ["--step-from", "("],
        ["--average", "mean", "--average", "ema:0.5", "-o", "out.safetensors"],
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    tmp_path: Path, words: list[str]
) -> None:
    """Exit code 2, and no state is begun."""
    (tmp_path / "run").mkdir()
    cmd("watch", tmp_path / "run", "--state", tmp_path / "state", *words, code=2)
    assert not (tmp_path / "state").exists()


# ---------------------------------------------------------------------------- by a signal


def stuck(process: subprocess.Popen[str]) -> None:
    """Wait until the process is about to commit its second update."""
    assert process.stderr is not None
    while line := process.stderr.readline():
        if line == "stuck\n":
            return
    raise AssertionError(process.communicate())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_sleeps_ends_it_at_once(
    training: Training, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Everything that was told is done; the same command goes on."""
    training.save(100)
    words = [training.run, "--state", tmp_path / "state", "-o", tmp_path / OUT]
    with child(*words, "--interval", "600") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("applied  1 checkpoint  step 100")
        assert process.stdout.readline().startswith("written")
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert rows(tmp_path / "state") == {100: ""}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_that_is_ended_in_the_middle_of_an_update_goes_on(
    training: Training, tmp_path: Path, number: signal.Signals
) -> None:
    """The update never was, until the next watch makes it; the bits are those of one run."""
    training.save(100)
    words = [training.run, "--state", tmp_path / "state", "-o", tmp_path / OUT]
    with child(*words, patch=STUCK) as process:
        assert process.stdout is not None
        assert "step 100" in process.stdout.readline()
        training.save(200)
        stuck(process)
        pins = tmp_path / "state" / "pins" / "200"
        assert [path.name for path in pins.iterdir()] == ["model-step-200.safetensors"]
        process.send_signal(number)
        process.communicate(timeout=10)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert pins.exists() is (number == signal.SIGKILL)
    assert rows(tmp_path / "state") == {100: ""}
    training.save(300)
    options = {"state": tmp_path / "state", "decay": 0.9, "interval": 0.02, "until_step": 300}
    result = ema_cli.watch(training.run, tmp_path / OUT, **options)
    assert [row.step for row in result.applied] == [200, 300]
    out = training.expected(tmp_path / "again", [100, 200, 300], "out-300.safetensors")
    assert bytes_of(tmp_path / "out-300.safetensors") == bytes_of(out)
    assert not pins.exists()


def test_what_rotates_while_nobody_watches_is_missed_if_it_was_being_applied(
    training: Training, tmp_path: Path
) -> None:
    """A killed process leaves word of what it had in hand."""
    training.save(100)
    with child(training.run, "--state", tmp_path / "state", patch=STUCK) as process:
        assert process.stdout is not None
        assert "step 100" in process.stdout.readline()
        training.save(200)
        stuck(process)
        process.kill()
        process.communicate(timeout=10)
    training.delete(200)
    training.save(300)
    with Live(training.run, tmp_path / "state", until_step=300) as live:
        [missed] = live.end().missed
    assert (missed.step, missed.path) == (200, str(training.run / "model-step-200.safetensors"))
    assert live.steps() == [300]
    assert rows(tmp_path / "state") == {100: "", 300: "", 200: readiness.GONE}


def test_an_output_that_a_killed_process_owed_is_written(
    training: Training, tmp_path: Path
) -> None:
    """The update was committed, its output was not: the next watch begins with it."""
    training.save(100)
    with Live(training.run, tmp_path / "state", until_step=100) as live:
        live.end()
    with Live(training.run, tmp_path / "state", tmp_path / OUT, until_step=100) as live:
        result = live.end()
    assert [Path(written.path).name for written in result.outputs] == ["out-100.safetensors"]
    assert live.of(Applied) == []
