"""Runs that die or are told to stop, at a chosen moment, in processes of their own."""

from __future__ import annotations

import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from conformance import make

from ema_cli import durable
from ema_cli.cli import main
from ema_cli.progress import Log
from ema_cli.tasks import Done, Task
from ema_cli.worker import run_task

KILLED = 99
# What changes a file or a name.
_OF_FILES = ("pwrite", "copy_file_range", "ftruncate", "fdatasync", "fsync")
CHANGES = (*_OF_FILES, "rename", "replace", "unlink", "mkdir", "rmdir")


def model(step: int) -> dict[str, np.ndarray]:
    """A model of some tensors, one of them copied."""
    chance = np.random.default_rng(step)
    return {
        "dense/kernel": chance.normal(size=(70, 60)).astype(np.float32),
        "dense/bias": chance.normal(size=3000).astype(np.float32),
        "ids": chance.integers(0, 1 << 40, 900),
        "half": chance.normal(size=(50, 33)).astype(np.float16),
    }


def a_run(folder: Path, row: str) -> Path:
    """Two checkpoints in a format."""
    for step in (100, 200):
        make(row, folder, model(step), step)
    for path in folder.glob("*.ema.json"):  # or they would be known for outputs of ours
        path.unlink()
    return folder


def record_at_once(log: Log, ordinal: int, done: Done) -> None:
    """Record every second task with the one before it: what the thread does, at known moments."""
    log._raise()
    log._pending.append((ordinal, done))
    if len(log._pending) == 2:
        log._record()


def in_child(arguments: list[str], said: Path, before: Callable[[], None]) -> int:
    """Run a command in a process of its own; returns its exit code.

    `before` is called there first; what the command says on stderr goes to the file `said`.
    """
    with warnings.catch_warnings():
        # Newer Pythons warn of threads; those of a pool have ended, and this child forks none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        before()
        _finish(arguments, said)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _finish(arguments: list[str], said: Path) -> NoReturn:
    """Run a command and end this process with its exit code."""
    code = 1
    try:
        with open(os.devnull, "w") as sys.stdout, said.open("w") as sys.stderr:
            code = main(arguments)
    finally:
        os._exit(code)


def killed_at(nth: int, arguments: list[str], said: Path) -> bool:
    """Run a command in a process that ends, without a word, before its change number `nth`.

    Returns whether it came to that.
    """
    calls = itertools.count(1)

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == nth:
                os._exit(KILLED)
            return function(*args, **kwargs)

        return call

    def before() -> None:
        for name in CHANGES:
            setattr(os, name, dying(getattr(os, name)))
        durable.rename_new = dying(durable.rename_new)

    code = in_child(arguments, said, before)
    assert code in (0, KILLED), said.read_text()
    return code == KILLED


def stopped_at(
    nth: int, arguments: list[str], said: Path, number: int, *, recorded: bool = True
) -> int:
    """Run a command that gets a signal when task number `nth` is added; returns its exit code.

    `recorded`: not before some are recorded.
    """

    def before() -> None:
        added = itertools.count(1)
        add = Log.add

        def stopping(log: Log, ordinal: int, done: Done) -> None:
            add(log, ordinal, done)
            if next(added) == nth:
                while recorded and not log.recorded:
                    time.sleep(0.001)
                os.kill(os.getpid(), number)

        setattr(Log, "add", stopping)  # noqa: B010  # as a monkeypatch does

    return in_child(arguments, said, before)


class Counted:
    """`run_task`, counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, task: Task) -> Done:
        self.calls += 1
        return run_task(task)
