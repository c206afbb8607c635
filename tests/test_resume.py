"""A run that was killed is continued by the same command, and by no other."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conformance import ROWS
from helpers import Failing, cmd, write_run
from interrupted import Counted, a_run, killed_at, model, record_at_once, stopped_at

import ema_cli
from ema_cli import chunks, engine, progress
from ema_cli.output import Unpublished
from ema_cli.producing import NOTHING_RECORDED
from ema_cli.progress import Log

TASKS = 10
ADD = Log.add
PUBLISHED = "starting over: some of the outputs were published"
SUFFIXES = {"torch": ".pt", "hdf5": ".weights.h5", "keras": ".keras", "npz": ".npz"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks small enough for a small model to have several, recorded two by two at once.

    What a killed process wrote is there without any barrier: they would take most of the time.
    """
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(engine, "TASK_ELEMENTS", 1000)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(progress.Log, "add", record_at_once)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts the tasks that are carried out in this process."""
    counter = Counted()
    monkeypatch.setattr(engine, "run_task", counter)
    return counter


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where outputs go, with nothing else in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints."""
    return write_run(tmp_path / "run", [model(k) for k in range(3)])


def words(run: Path, place: Path, *more: str, name: str = "out.safetensors") -> list[str]:
    """The command."""
    return [
        "run",
        str(run),
        "-o",
        str(place / name),
        "--workers",
        "1",
        *(more or ["--decay", "0.5"]),
    ]


def outputs(place: Path) -> dict[str, bytes]:
    """Every file, hidden ones too; provenance without its versions, paths and times: its name."""
    files = (path for path in place.rglob("*") if path.is_file())
    return {
        str(path.relative_to(place)): b"" if path.name.endswith(".ema.json") else path.read_bytes()
        for path in files
    }


def emptied(place: Path) -> None:
    """Remove everything."""
    shutil.rmtree(place)
    place.mkdir()


def recorded(place: Path) -> int:
    """How many tasks the logs tell of."""
    logs = place.glob(".*.ema-avg.progress")
    return sum(max(len(log.read_bytes().splitlines()) - 1, 0) for log in logs)


# ---------------------------------------------------------------------------- kills

FORMS = {
    "file": ("safetensors", "out.safetensors", ["--decay", "0.5"]),
    "folder": (
        "safetensors",
        "out",
        ["--decay", "0.5", "--format", "safetensors-folder", "--max-shard-size", "9KB"],
    ),
    "two": ("safetensors", "{average}.safetensors", ["--average", "mean", "--average", "ema:0.5"]),
    "prefix": ("tensorflow", "out", ["--decay", "0.5"]),
    "torch": ("torch", "out.pt", ["--decay", "0.5"]),
}
# Of the changes of forms with many files every third will do.
EVERY = {"folder": 3, "two": 3, "prefix": 3}


@pytest.mark.parametrize("form", FORMS)
def test_killed_anywhere_the_same_command_continues(
    tmp_path: Path, place: Path, counted: Counted, form: str
) -> None:
    """Before any change: the same bytes, and only what was not recorded is done again."""
    row, name, more = FORMS[form]
    run, said = a_run(tmp_path / "run", row), tmp_path / "said"
    command = words(run, place, *more, name=name)
    counted.calls = 0
    cmd(*command)
    expected, total = outputs(place), counted.calls
    continued = 0
    for nth in itertools.count(1, EVERY.get(form, 1)):
        emptied(place)
        if not killed_at(nth, command, said):
            break
        known, counted.calls = recorded(place), 0
        err = cmd(*command).err
        assert outputs(place) == expected, nth
        if "resuming: " in err:
            continued += 1
            assert counted.calls == total - resumed(err), nth
            # What a seal changed, in a container that keeps checksums, is done again.
            assert resumed(err) == known or (form == "torch" and known == total), nth
        elif known:  # published, the last of several outputs perhaps not
            assert counted.calls == 0 or PUBLISHED in err, nth
    assert outputs(place) == expected
    assert continued > 10


def resumed(err: str) -> int:
    """How many tasks were not done again."""
    found = re.search(r"resuming: (\d+) of (\d+) ranges done", err)
    assert found
    return int(found[1])


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("safetensors", "tensorflow")])
def test_every_format_is_continued(tmp_path: Path, place: Path, counted: Counted, row: str) -> None:
    """Killed at some moments, the seal among them: the same bytes."""
    run, said = a_run(tmp_path / "run", row), tmp_path / "said"
    command = words(run, place, name=f"out{SUFFIXES.get(row, '')}")
    cmd(*command)
    expected = outputs(place)
    found = []
    for nth in itertools.count(9, 11):
        emptied(place)
        if not killed_at(nth, command, said):
            break
        err = cmd(*command).err
        assert outputs(place) == expected, nth
        found.append("resuming: " in err)
    assert sum(found) > 2


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("form", ["file", "folder", "prefix"])
def test_a_signal_leaves_what_is_recorded(
    tmp_path: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    number: signal.Signals,
) -> None:
    """It ends with a hint, all that was finished is recorded, and the same command continues."""
    row, name, more = FORMS[form]
    run, said = a_run(tmp_path / "run", row), tmp_path / "said"
    command = words(run, place, *more, name=name)
    cmd(*command)
    expected = outputs(place)
    emptied(place)
    monkeypatch.setattr(progress.Log, "add", ADD)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    code = stopped_at(5, command, said, number)
    assert code == 128 + number
    text = said.read_text()
    assert "nothing half-written" in text
    assert text.endswith("hint: the same command continues; --restart starts over\n")
    assert 5 <= recorded(place) < TASKS
    err = cmd(*command).err
    assert resumed(err) >= 5
    assert outputs(place) == expected


def test_a_signal_before_anything_is_recorded_leaves_nothing(
    tmp_path: Path, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ever: no output, no temporary, no log, and no hint."""
    said = tmp_path / "said"
    monkeypatch.setattr(progress.Log, "add", ADD)
    code = stopped_at(5, words(run, place), said, signal.SIGINT, recorded=False)
    assert code == 130
    assert "hint" not in said.read_text()
    assert outputs(place) == {}


def test_a_signal_does_not_take_what_an_earlier_run_left(
    tmp_path: Path, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while it is read back, or just before: it is all there still."""
    killed(run, place, tmp_path)
    before, known = outputs(place), recorded(place)
    for owner, name in ((Log, "resume"), (Log, "check"), (Unpublished, "go_on")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            cmd(*words(run, place), code=130)
        assert outputs(place) == before
    assert resumed(cmd(*words(run, place)).err) == known


def interrupt(*_: object) -> None:
    """Be interrupted."""
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------- other work


def killed(run: Path, place: Path, tmp_path: Path, *more: str) -> None:
    """Leave a run of which some is recorded."""
    for nth in itertools.count(20):
        assert killed_at(nth, words(run, place, *more), tmp_path / "said")
        if recorded(place) >= 4:
            return
        emptied(place)


def changed(run: Path) -> Path:
    """Touch an input."""
    os.utime(run / "model-step-200.safetensors", ns=(1, 1))
    return run


def another(run: Path) -> Path:
    """Write one more checkpoint."""
    return write_run(run, [model(k) for k in range(4)])


@pytest.mark.parametrize(
    ("change", "more"),
    [
        (changed, []),
        (another, []),
        (None, ["--decay", "0.25"]),
        (None, ["--decay", "0.5", "--dtype", "float64"]),
        (None, ["--decay", "0.5", "--exclude", "half"]),
        (None, ["--decay", "0.5", "--names", "variable"]),
        (None, ["--decay", "0.5", "--non-finite", "allow"]),
        (None, ["--decay", "0.5", "--like", "torch"]),
        (None, ["--average", "mean"]),
    ],
    ids=str,
)
def test_other_work_starts_over_and_says_so(
    tmp_path: Path,
    place: Path,
    run: Path,
    counted: Counted,
    change: Callable[[Path], Path] | None,
    more: list[str],
) -> None:
    """A touched input, a new one, another option: nothing of the killed run is used."""
    killed(run, place, tmp_path)
    run = change(run) if change else run
    err = cmd(*words(run, place, *more)).err
    assert "starting over: the inputs or the plan changed" in err
    assert "resuming" not in err
    there, calls = outputs(place), counted.calls
    emptied(place)
    assert "starting over" not in cmd(*words(run, place, *more)).err
    assert outputs(place) == there
    assert counted.calls == 2 * calls


def test_more_workers_continue_what_one_began(tmp_path: Path, place: Path, run: Path) -> None:
    """How many work on it decides no byte, and so does not matter."""
    cmd(*words(run, place))
    expected = outputs(place)
    emptied(place)
    killed(run, place, tmp_path)
    assert "resuming: " in cmd(*words(run, place, "--decay", "0.5", "--workers", "3")).err
    assert outputs(place) == expected


def test_restart_starts_over(tmp_path: Path, place: Path, run: Path, counted: Counted) -> None:
    """With ``--restart`` nothing is continued; without anything to continue it says nothing."""
    killed(run, place, tmp_path)
    err = cmd(*words(run, place), "--restart").err
    assert "starting over: --restart\n" in err
    assert counted.calls == TASKS
    assert all(not name.startswith(".") for name in outputs(place))
    emptied(place)
    assert "starting over" not in cmd(*words(run, place), "--restart").err


def test_restart_is_a_keyword_too(tmp_path: Path, place: Path, run: Path) -> None:
    """Events tell what was done with what an earlier run had left."""
    said: list[str] = []
    for restart, text in ((False, "resuming: "), (True, "starting over: --restart")):
        killed(run, place, tmp_path, "--decay", "0.5", "--overwrite")
        ema_cli.average_run(
            *(run, place / "out.safetensors"),
            decay="0.5",
            overwrite=True,
            restart=restart,
            on_event=lambda event: said.append(event.note),
        )
        assert [note[: len(text)] for note in said if note] == [text]
        said.clear()


def test_a_damaged_log_and_changed_files_start_over(tmp_path: Path, place: Path, run: Path) -> None:
    """What cannot be continued is told with its reason, and the result is right."""
    cmd(*words(run, place))
    expected = outputs(place)
    log, temporary = (place / f".out.safetensors.ema-avg.{kind}" for kind in ("progress", "tmp"))

    def overwrite() -> None:
        temporary.write_bytes(bytes(temporary.stat().st_size))

    def replace() -> None:
        copy = shutil.copy(temporary, place / "copy")
        os.replace(copy, temporary)

    for spoil, text in (
        (lambda: log.write_bytes(b"nonsense\n"), progress.DAMAGED),
        (overwrite, progress.OTHER_BYTES),
        (replace, progress.OTHER_FILES),
        (log.unlink, NOTHING_RECORDED),
    ):
        emptied(place)
        killed(run, place, tmp_path)
        spoil()
        assert f"starting over: {text}\n" in cmd(*words(run, place)).err
        assert outputs(place) == expected


def test_a_renamed_copy_takes_over_and_its_log_is_gone(
    tmp_path: Path, place: Path, run: Path
) -> None:
    """Another command that writes this output leaves no log behind to be believed later."""
    killed(run, place, tmp_path)
    last = run / "model-step-300.safetensors"
    err = cmd("rename", last, "-o", place / "out.safetensors", "--rule", "^", "m/").err
    assert "starting over" not in err
    assert set(outputs(place)) == {"out.safetensors", "out.safetensors.ema.json"}


def test_what_was_left_is_no_checkpoint(tmp_path: Path, run: Path) -> None:
    """A log and a temporary in the run's own directory are passed over, and no input."""
    killed(run, run, tmp_path)
    err = cmd(*words(run, run)).err
    assert "resuming: " in err


def test_what_was_left_needs_no_further_space(
    tmp_path: Path, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that it filled the interrupted run can be continued, and strictly."""
    killed(run, place, tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=100, f_frsize=1))
    assert "resuming: " in cmd(*words(run, place), "--strict").err


def test_an_error_takes_what_was_left_away(
    tmp_path: Path, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continued run that fails leaves nothing: what it had is not to be trusted any more."""
    killed(run, place, tmp_path)
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, 1, errno.EIO))
    cmd(*words(run, place), code=15)
    assert outputs(place) == {}


def test_a_locked_output_keeps_what_another_left(tmp_path: Path, place: Path, run: Path) -> None:
    """11 for the second of two outputs: what an earlier run left of the first stays."""
    more = ["--average", "mean", "--average", "ema:0.5"]
    command = words(run, place, *more, name="{average}.safetensors")
    for nth in itertools.count(20):
        assert killed_at(nth, command, tmp_path / "said")
        if recorded(place) >= 4:
            break
        emptied(place)
    before = outputs(place)
    held = os.open(place / ".ema-0.5.safetensors.ema-avg.tmp", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        cmd(*command, code=11)
    finally:
        os.close(held)
    assert outputs(place) == before
    assert "resuming: " in cmd(*command).err


# ---------------------------------------------------------------------------- for real

SCRIPT = """
import sys, time
from ema_cli import chunks, engine, progress
from ema_cli.cli import main
engine.TASK_ELEMENTS, progress.INTERVAL = 1000, 0.05
run_task = engine.run_task
def slow(task):
    time.sleep(0.03)
    return run_task(task)
engine.run_task = slow
sys.exit(main())
"""


def test_a_process_killed_at_random_loses_little(tmp_path: Path, place: Path, run: Path) -> None:
    """SIGKILL with threads, clock and log as they are, again and again until it is done."""
    chance = random.Random(5)
    cmd(*words(run, place))
    expected = outputs(place)
    emptied(place)
    log = place / ".out.safetensors.ema-avg.progress"
    command = [sys.executable, "-c", SCRIPT, *words(run, place)]
    continued, known = 0, 0
    for _ in range(30):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            deadline = time.monotonic() + 60
            while child.poll() is None and recorded(place) <= known:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            child.kill()
            _, err = child.communicate()
        continued += "resuming: " in err
        if child.returncode == 0:
            break
        known = recorded(place)
    assert child.returncode == 0
    assert continued > 1
    assert outputs(place) == expected
    assert not log.exists()
