"""What is asked often answers at once: help, versions and completion load nothing heavy."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import write_run

HEAVY = {
    *("numpy", "ml_dtypes", "safetensors", "fastcrc", "h5py", "rich", "pygments", "markdown_it"),
    *("concurrent", "multiprocessing", "asyncio", "subprocess", "logging", "unittest", "socket"),
    *("http", "urllib", "ssl", "sqlite3", "xml", "tomllib", "email", "importlib.metadata"),
}
# What the versions are read with.
METADATA = {"email", "importlib.metadata", "urllib", "socket", "logging"}
# Every module of this program that may be loaded before anything is done.
LIGHT = {
    "ema_cli",
    "ema_cli.__main__",
    "ema_cli.errors",
    "ema_cli.hints",
    "ema_cli.interruption",
    "ema_cli.text",
    "ema_cli.version",
}
SHARED = ("ema_cli.cli", "ema_cli.views")

LINES = [
    ([], {}),
    (["--help"], {}),
    (["-h"], {}),
    (["run", "--help"], {}),
    (["plan", "-h"], {}),
    (["watch", "--help"], {}),
    (["inspect", "--help"], {}),
    (["verify", "--help"], {}),
    (["export", "--help"], {}),
    (["--version"], {}),
    ([], {"_EMA_AVG_COMPLETE": "bash_source"}),
    ([], {"COMP_WORDS": "ema-avg run --format s", "COMP_CWORD": "3"}),
    ([], {"COMP_WORDS": "ema-avg run --average e", "COMP_CWORD": "3"}),
    ([], {"COMP_WORDS": "ema-avg run --", "COMP_CWORD": "2"}),
]


def loaded(arguments: list[str], environment: dict[str, str]) -> set[str]:
    """The modules a command loads, those of the interpreter's start left out."""
    program = (
        "import sys\nbefore = set(sys.modules)\n"
        "import ema_cli.cli\ncode = ema_cli.cli.main(sys.argv[1:])\n"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)\nsys.exit(code)\n"
    )
    environment = {"_EMA_AVG_COMPLETE": "bash_complete", **environment} if environment else {}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout
    return set(done.stderr.split())


@pytest.mark.parametrize(("arguments", "environment"), LINES, ids=str)
def test_nothing_heavy_is_loaded(arguments: list[str], environment: dict[str, str]) -> None:
    """No library but click, and of the standard library nothing that takes long."""
    heavy = HEAVY - METADATA if arguments == ["--version"] else HEAVY
    found = loaded(arguments, environment)
    assert "click" in found
    assert sorted(name for name in found if name in heavy or name.split(".")[0] in heavy) == []


# What belongs to other formats, to what nobody asked for, or to errors.
UNASKED = {
    *("h5py", "ml_dtypes", "rich", "tempfile", "statistics", "random", "shutil", "subprocess"),
    *("ema_cli.judging", "ema_cli.outliers", "ema_cli.live", "ema_cli.verification"),
    *("ema_cli.formats.torch.reading", "ema_cli.formats.tensorflow.bundle"),
    *("ema_cli.formats.hdf5.archive", "ema_cli.states.commit"),
}


def test_a_run_loads_what_it_needs(tmp_path: Path) -> None:
    """Imports are most of what a small run takes."""
    run = write_run(tmp_path / "run", [{"w": np.float32([k])} for k in (1, 2, 3)])
    found = loaded(["run", str(run), "-o", str(tmp_path / "out.safetensors")], {})
    assert {"ema_cli.running", "numpy", "safetensors"} <= found
    assert found & UNASKED == set()
    assert all(importlib.util.find_spec(name) for name in UNASKED)  # or it proves nothing


@pytest.mark.parametrize(("environment", "threads"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2)])
def test_the_command_starts_no_threads_for_linear_algebra(
    environment: dict[str, str], threads: int
) -> None:
    """NumPy would start one for each core, unless somebody says otherwise."""
    program = (
        "import os\n"
        "from ema_cli import __main__, cli\n"
        "def entry():\n    import numpy\n    print(len(os.listdir('/proc/self/task')))\n"
        "cli.entry = entry\n__main__.start()\n"
    )
    kept = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) == min(threads, os.cpu_count() or 1)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]], ids=str)
def test_only_the_command_line_is_loaded_of_this_program(arguments: list[str]) -> None:
    """Whoever adds an import at the top of a command's file is told."""
    ours = {name for name in loaded(arguments, {}) if name.split(".")[0] == "ema_cli"}
    assert {name for name in ours if not name.startswith(SHARED)} <= LIGHT
