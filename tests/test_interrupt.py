"""A run that is interrupted, terminated, killed or no longer read leaves nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, raw_safetensors, read_checkpoint, write_run

CHECKPOINTS = 24
ELEMENTS = 1 << 26
FORMS = {"file": ("out.safetensors", []), "folder": ("out", ["--format", "safetensors-folder"])}


def sparse(path: Path, elements: int, value: float) -> Path:
    """Write a checkpoint of zeros that takes no space, but for one value at its end."""
    nbytes = 4 * elements
    entry = {"dtype": "F32", "shape": [elements], "data_offsets": [0, nbytes]}
    head = raw_safetensors(json.dumps({"w": entry}).encode().ljust(120))
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + nbytes)
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(value).tobytes())
    return path


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six gigabytes to read, none on disk: long enough to be hit in the middle."""
    folder = tmp_path_factory.mktemp("long")
    for k in range(1, CHECKPOINTS + 1):
        sparse(folder / f"model-step-{k}.safetensors", ELEMENTS, k)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where outputs go; emptied afterwards, since they are big."""
    yield tmp_path
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()


def command(run: Path, place: Path, form: str, *more: str) -> list[str]:
    """The words of a run in a process of its own."""
    name, options = FORMS[form]
    words = [sys.executable, "-m", "ema_cli", "run", str(run), "-o", str(place / name)]
    return [*words, "--average", "mean", "--workers", "1", *options, *more]


@contextmanager
def working(run: Path, place: Path, form: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A child process that has laid out its output and is about to fill it."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command(run, place, form, *more), stdout=pipe, stderr=pipe, text=True
    ) as child:
        temporary = place / f".{FORMS[form][0]}.ema-avg.tmp"
        grown = temporary if form == "file" else temporary / "model.safetensors"
        try:
            deadline = time.monotonic() + 60
            while not (grown.exists() and grown.stat().st_size >= 4 * ELEMENTS):
                assert child.poll() is None, child.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.001)
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_nothing(
    long_run: Path, place: Path, form: str, number: signal.Signals, code: int
) -> None:
    """Ctrl-C is 130, SIGTERM 143; no output, no temporary, a line that says so."""
    with working(long_run, place, form) as child:
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert out == ""
    assert err.splitlines()[-1].startswith("ema-avg: ")
    assert "nothing half-written" in err
    assert "Traceback" not in err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_the_last_line_of_json_as_well(
    long_run: Path, place: Path, number: signal.Signals, code: int
) -> None:
    """With ``--json`` the last line on stdout is an error with the exit code."""
    with working(long_run, place, "file", "--json") as child:
        child.send_signal(number)
        out, _ = child.communicate(timeout=60)
    assert child.returncode == code
    last = json.loads(out.splitlines()[-1])
    assert (last["type"], last["code"]) == ("error", code)


def test_an_interrupted_replacement_keeps_the_old_output(long_run: Path, place: Path) -> None:
    """With ``--overwrite`` the old output and its provenance are untouched by Ctrl-C."""
    old = {"out.safetensors": b"old", "out.safetensors.ema.json": b"{}"}
    for name, data in old.items():
        (place / name).write_bytes(data)
    with working(long_run, place, "file", "--overwrite") as child:
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
    assert child.returncode == 130
    assert {path.name: path.read_bytes() for path in place.iterdir()} == old


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_is_run_again(long_run: Path, place: Path, form: str) -> None:
    """SIGKILL: no file under the final name; the same command then does its work whole."""
    name, options = FORMS[form]
    with working(long_run, place, form) as child:
        child.kill()
        child.communicate(timeout=60)
    assert not (place / name).exists()
    cmd("run", long_run, "-o", place / name, "--average", "mean", *options)
    left = {path.name for path in place.iterdir()}
    assert left == {name, f"{name}.ema.json"}
    path = place / name if form == "file" else place / name / "model.safetensors"
    assert path.stat().st_size > 4 * ELEMENTS
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        end = np.frombuffer(file.read(), np.float32)
    assert end.tolist() == [0.0, pytest.approx((CHECKPOINTS + 1) / 2, rel=1e-6)]


def test_a_rerun_after_a_kill_has_the_bytes_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Killed when a part was written already, the next run gives the same bits all the same."""
    rng = np.random.default_rng(7)
    values = [{"w": rng.normal(size=1 << 20).astype(np.float32)} for _ in range(30)]
    run = write_run(tmp_path / "run", values)
    whole = tmp_path / "whole.safetensors"
    cmd("run", run, "-o", whole, "--decay", "0.9")
    temporary = tmp_path / ".out.safetensors.ema-avg.tmp"
    words = [sys.executable, "-m", "ema_cli", "run", run, "-o", tmp_path / "out.safetensors"]
    with subprocess.Popen(
        [*words, "--decay", "0.9"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        while child.poll() is None and not temporary.exists():
            time.sleep(0.0005)
        child.kill()
    cmd("run", run, "-o", tmp_path / "out.safetensors", "--decay", "0.9")
    assert (tmp_path / "out.safetensors").read_bytes() == whole.read_bytes()
    assert not temporary.exists()
    assert set(read_checkpoint(whole)) == {"w/ExponentialMovingAverage"}


# ---------------------------------------------------------------------------- nobody reads


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "RUN"],
        ["plan", "RUN", "--json"],
        ["inspect", "RUN", "--json"],
        ["run", "RUN", "-o", "OUT"],
        ["run", "RUN", "-o", "OUT", "--json"],
        ["nosuch", "--json"],
        ["--help"],
        ["run", "--help"],
        [],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_closed_stdout_ends_quietly(tmp_path: Path, words: list[str]) -> None:
    """``| head -0``: no traceback, no complaint at exit, and no exit code of a bug."""
    run = write_run(tmp_path / "run", [{"w": np.float32(k)} for k in range(1, 200)])
    paths = {"RUN": str(run), "OUT": str(tmp_path / "out.safetensors")}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ema_cli", *(paths.get(word, word) for word in words)],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr
    assert "BrokenPipeError" not in done.stderr
    assert "internal error" not in done.stderr
    assert done.returncode in ((2,) if words[:1] == ["nosuch"] else (0, 141))
    assert not list(tmp_path.glob(".*"))
