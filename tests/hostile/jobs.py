"""Attacks as jobs of the warden, and what it reports of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attacks import Attack, canary
from hdf5_making import lay_canaries, plugins

import ema_cli

WATCHING = Path(__file__).parent / "watching"
ENOUGH = 900  # seconds for all attacks of a format


class Report(NamedTuple):
    """What came of an attack.

    Attributes:
        folder: where it was tried.
        path: the hostile file.
        done: (code, stdout, stderr, seconds) of each command, by name.
        events: what the audit hooks saw.
        modules: what was imported.
        touched: what was opened or made in the canary's folder.
        changed: files that were made or changed, beside the input.
        peak: most memory of the process, in KiB.
        helper: most memory of a process that it started, in KiB.
        end: how the process ended early, if it did.
    """

    folder: Path
    path: Path
    done: dict[str, dict[str, Any]]
    events: frozenset[tuple[str, ...]]
    modules: frozenset[str]
    touched: list[str]
    changed: list[str]
    peak: int
    helper: int
    end: str


def suffix_of(path: Path) -> str:
    """Return the suffix of an output of the same format."""
    return ".weights.h5" if path.name.endswith(".weights.h5") else path.suffix


def commands(attack: Attack, path: Path, out: Path) -> dict[str, list[str]]:
    """Return the commands to try, by the name of their exit code."""
    same = f"{out}/same{suffix_of(path)}"
    every = {
        "inspect": ["inspect", str(path)],
        "plan": ["plan", str(path), "-o", same],
        "same": ["run", str(path), "-o", same],
        "other": ["run", str(path), "-o", f"{out}/other.safetensors"],
        "dropped": ["run", str(path), "-o", f"{out}/dropped.pt", "--unknown", "drop"],
    }
    return {name: words for name, words in every.items() if getattr(attack.ends, name) >= 0}


def places(folder: Path) -> list[tuple[str, str]]:
    """Return what an attack's folders are called."""
    names = {"in": "input", "out": "output", "canary": "canary"}
    code = [(str(Path(ema_cli.__file__).parent), "python")]
    return [*((str(folder / name), title) for name, title in names.items()), *code]


def environment(folder: Path) -> dict[str, str]:
    """Return what has HDF5 look for plugins."""
    return {"HDF5_PLUGIN_PATH": str(plugins(folder / "in"))}


def watched(folder: Path, log: Path) -> dict[str, str]:
    """Return the environment of an interpreter that is watched from its first line."""
    told = {"places": places(folder), "log": str(log)}
    return {"PYTHONPATH": str(WATCHING), "EMA_AVG_TESTS_WATCH": json.dumps(told)}


def prepare(attack: Attack, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write an attack into a folder of its own; return its path and its job."""
    (folder / "in").mkdir(parents=True)
    (folder / "out").mkdir()
    lay_canaries(folder / "in")
    path = attack.build(folder / "in")
    tried = commands(attack, path, folder / "out")
    return path, {
        "name": attack.name,
        "folder": str(folder),
        "canary": str(canary(folder / "in")),
        "canaries": [str(plugins(folder / "in"))],
        "commands": list(tried.values()),
        "places": places(folder),
        "environment": environment(folder),
        "sound": False,
    }


class Warden:
    """The warden at work on all attacks of a format; `reports` waits for it."""

    def __init__(self, attacks: Sequence[Attack], folder: Path, sound: Sequence[Attack]) -> None:
        # Twice: the first time imports what the others then find imported.
        self._attacks = [*sound, *sound, *attacks]
        self._ignored = len(sound)
        self._paths, jobs = [], []
        for k, attack in enumerate(self._attacks):
            path, job = prepare(attack, folder / f"{k}")
            self._paths.append(path)
            jobs.append({**job, "sound": k < self._ignored})
        given = folder / "jobs"
        given.write_text("".join(json.dumps(job) + "\n" for job in jobs))
        self._out = folder / "reports"
        with open(given) as stdin, open(self._out, "w") as stdout:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", WATCHING / "warden.py"],
                stdin=stdin,
                stdout=stdout,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )

    def reports(self) -> list[Report]:
        """Return a report of each sound file and of each attack, in order."""
        assert self._process.wait(ENOUGH) == 0
        lines = self._out.read_text().splitlines()
        assert len(lines) == len(self._attacks)
        rows = list(zip(self._attacks, self._paths, lines, strict=True))[self._ignored :]
        return [report(attack, path, json.loads(line)) for attack, path, line in rows]


def report(attack: Attack, path: Path, told: dict[str, Any]) -> Report:
    """Return a line of the warden as a report."""
    assert told["name"] == attack.name
    names = commands(attack, path, path)
    return Report(
        path.parent.parent,
        path,
        dict(zip(names, told["done"], strict=False)),
        frozenset(tuple(event) for event in told["events"]),
        frozenset(told["modules"]),
        told["touched"],
        told["changed"],
        told["peak"],
        told["helper"],
        told["end"],
    )
