"""Streams that nobody reads any more, that are full or closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import cmd
from live import Training, child
from terminal import run_of_ten_tasks, words


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of ten tasks."""
    return run_of_ten_tasks(tmp_path / "run")


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> bytes:
    """What comes out of it."""
    path = tmp_path / "expected.safetensors"
    cmd("run", run, "-o", path, "--decay", "0.5")
    return path.read_bytes()


# ---------------------------------------------------------------------------- nobody reads


@contextmanager
def unread() -> Iterator[int]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def in_process(*given: str | Path, **streams: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "ema_cli", *map(str, given)]
    return subprocess.run(command, text=True, timeout=60, **streams)  # type: ignore[call-overload]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("more", [[], ["--json"], ["--state"]])
def test_who_stops_reading_does_not_end_a_run(
    run: Path, expected: bytes, more: list[str], both: bool
) -> None:
    """The output is published, also where a plan longer than a pipe's buffer comes first."""
    for k in range(400, 40000, 100):
        (run / f"model-step-{k}.safetensors").symlink_to(run / "model-step-300.safetensors")
    given = [
        *words(run, "--steps", "100:300"),
        *more,
        *([run.parent / "state"] * ("--state" in more)),
    ]
    with unread() as writer:
        stderr = writer if both else subprocess.PIPE
        done = in_process(*given, stdout=writer, stderr=stderr)
    assert done.returncode == 0
    assert both or "error" not in done.stderr
    assert (run.parent / "place" / "out.safetensors").read_bytes() == expected


def test_the_exit_code_is_the_command_s_own(run: Path) -> None:
    """`ema-avg diff A B | head` still tells that they differ."""
    one, other = (run / f"model-step-{k}00.safetensors" for k in (1, 2))
    with unread() as writer:
        assert in_process("diff", one, other, stdout=writer).returncode == 13
        assert in_process("plan", run, "--json", stdout=writer).returncode == 0


def test_a_watch_that_nobody_reads_stops_and_says_so(tmp_path: Path) -> None:
    """Its work would go on without an end: 141, and the same command goes on."""
    training = Training(tmp_path)
    training.save(100)
    given = [training.run, "--state", tmp_path / "state", "--interval", "0.05"]
    with child(*given) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "step 100" in process.stdout.readline()
        process.stdout.close()
        training.save(200)
        err = process.stderr.read()
        assert process.wait(20) == 141
    assert err.startswith("ema-avg: error: stopped: nobody reads its output any more")
    assert err.endswith("\nhint: the same command goes on where this one stopped\n")
    training.save(300)
    with child(*given, "--until-step", "300") as process:
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "step 300" in out or "steps 200 to 300" in out


# ---------------------------------------------------------------------------- closed and full


def test_a_full_disk_behind_stdout_is_told(run: Path, expected: bytes) -> None:
    """Exit code 15; the work was done before."""
    with Path("/dev/full").open("w") as full:
        for given in (["plan", run], ["plan", run, "--json"], ["--help"], words(run)):
            done = in_process(*given, stdout=full, stderr=subprocess.PIPE)
            assert done.returncode == 15
            assert "standard output: No space left on device" in done.stderr
            assert "Exception ignored" not in done.stderr
    assert (run.parent / "place" / "out.safetensors").read_bytes() == expected


def test_talk_that_cannot_be_written_ends_nothing(run: Path, expected: bytes) -> None:
    """A full disk behind stderr: the work is done, the code is its own."""
    with Path("/dev/full").open("w") as full:
        done = in_process(*words(run, "-v"), stdout=subprocess.PIPE, stderr=full)
        assert (done.returncode, done.stdout.split()[0]) == (0, "written")
        assert in_process("plan", run / "none", stderr=full).returncode == 12
    assert (run.parent / "place" / "out.safetensors").read_bytes() == expected


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(
    run: Path, expected: bytes, closed: str
) -> None:
    """What is said would be written into it."""
    line = f'exec "$@" {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", line, "sh", sys.executable, "-m", "ema_cli", *map(str, words(run, "-v"))],
        timeout=60,
        capture_output=True,
    )
    assert done.returncode == 0
    assert (run.parent / "place" / "out.safetensors").read_bytes() == expected
    document = (run.parent / "place" / "out.safetensors.ema.json").read_text()
    assert json.loads(document)["output"]["format"] == "safetensors"
