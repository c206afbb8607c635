"""A run that was killed is continued by the same command, and by no other."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import cmd, write_run
from interrupted import Counted, a_run, in_child, killed_at, model, record_at_once, stopped_at

from ema_cli import chunks, engine, progress

TASKS = 10


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks small enough for a small model to have several, recorded two by two at once."""
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


@pytest.mark.parametrize("form", FORMS)
def test_killed_anywhere_the_same_command_continues(
    tmp_path: Path, place: Path, counted: Counted, form: str
) -> None:
    """Before any change: the same bytes in the end, and only what was not recorded is done again."""
    row, name, more = FORMS[form]
    run, said = a_run(tmp_path / "run", row), tmp_path / "said"
    command = words(run, place, *more, name=name)
    cmd(*command)
    expected, total = outputs(place), counted.calls
    continued = 0
    for nth in itertools.count(1):
        emptied(place)
        if not killed_at(nth, command, said):
            break
        known, counted.calls = recorded(place), 0
        hidden = sorted(p.name for p in place.rglob(".*"))
        err = cmd(*command).err
        print(form, nth, known, total, "->", counted.calls, [l for l in err.splitlines() if "resum" in l or "starting" in l], hidden if known and not "resuming" in err else "")
        assert outputs(place) == expected, nth
        if "resuming: " in err:
            continued += 1
            assert counted.calls <= total - known, nth
        elif known:
            assert counted.calls in (0, total), nth
    assert outputs(place) == expected
    assert continued > total
