"""A training that goes on, and a watch over it, for the tests: writers, and `watch` in a thread."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from conformance import CASES, bytes_of, make
from helpers import write_checkpoint

import ema_cli
from ema_cli.live.reports import Applied, Missed, Report, WatchResult

QUIET = 0.1
PATIENCE = 20.0
QUICK = {"interval": 0.02, "decay": 0.9}

# What a process of its own does: the constants are for people, not for tests.
CHILD = f"""
import sys, time
from ema_cli.live import readiness, watching
watching.SHORTEST_INTERVAL = 0.01
readiness.QUIET_SECONDS, readiness.GRACE_SECONDS = {QUIET}, 1.0
from ema_cli.cli import entry
{{patch}}
entry()
"""
# A process that is about to commit its second update, and does not.
STUCK = """
from ema_cli.states.commit import OpenState
whole = OpenState.commit
def stuck(state, *args, **more):
    if state.current is not None:
        print("stuck", file=sys.stderr, flush=True)
        time.sleep(60)
    whole(state, *args, **more)
OpenState.commit = stuck
"""


def values_of(step: int, elements: int = 1000) -> dict[str, Any]:
    """The tensors of a step: none is zero."""
    rng = np.random.default_rng(step)
    return {
        "dense/kernel": rng.uniform(1, 2, (elements // 10, 10)).astype(np.float32),
        "dense/bias": rng.uniform(1, 2, 10).astype(np.float32),
    }


class Training:
    """Writes the checkpoints of a run, and keeps a copy of each for the comparison."""

    def __init__(self, folder: Path, row: str = "safetensors") -> None:
        self.run, self.kept, self.row = folder / "run", folder / "kept", row
        self.run.mkdir()

    def kept_at(self, step: int) -> Path:
        """The copy of a checkpoint that is never rotated away."""
        path = self.kept / CASES[self.row].called.format(step)
        if not self.kept.is_dir() or not any(self.kept.glob(f"{path.name}*")):
            make(self.row, self.kept, values_of(step), step)
            for document in self.kept.glob("*.ema.json"):  # it is not one of our outputs here
                document.unlink()
        return path

    def files(self, step: int) -> list[Path]:
        """The files of the copy, or the folder that it is; a prefix' index last."""
        path = self.kept_at(step)
        return [path] if path.exists() else sorted(path.parent.glob(f"{path.name}.*"))

    def save(self, *steps: int) -> None:
        """Write checkpoints elsewhere and rename them into place, as careful trainers do."""
        for step in steps:
            for source in self.files(step):
                temporary = self.run / f".{source.name}"
                copy = shutil.copytree if source.is_dir() else shutil.copyfile
                copy(source, temporary)
                temporary.rename(self.run / source.name)

    def save_slowly(self, step: int, seconds: float = 0.5, *, preallocate: bool = False) -> None:
        """Write a checkpoint in place, in pieces; `preallocate`: its header and size come first."""
        [source] = self.files(step)
        data = source.read_bytes()
        head = int.from_bytes(data[:8], "little") + 8 if preallocate else 0
        with (self.run / source.name).open("wb", buffering=0) as file:
            file.write(data[:head])
            if preallocate:
                file.truncate(len(data))
            for start in range(head, len(data), len(data) // 8):
                time.sleep(seconds / 8)
                file.write(data[start : start + len(data) // 8])

    def delete(self, step: int) -> None:
        """Rotate a checkpoint away."""
        for source in self.files(step):
            path = self.run / source.name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def expected(self, folder: Path, steps: Sequence[int], output: str, **options: Any) -> Path:
        """What `run` makes of the checkpoints of these steps, at once."""
        folder.mkdir()
        for step in steps:
            for source in self.files(step):
                os.symlink(source, folder / source.name)
        out = folder / output
        ema_cli.average_run(folder, out, decay=0.9, **options)
        return out

    def check(self, result: WatchResult, output: Path) -> None:
        """The last output has the bits that `run` gives over what was applied."""
        steps = [row.step or 0 for row in result.applied]
        assert steps == sorted(set(steps))
        out = self.expected(output.parent / "again", steps, output.name)
        assert bytes_of(output) == bytes_of(out)


class Live(threading.Thread):
    """`ema_cli.watch` in a thread, and what it told."""

    def __init__(self, run: Path, state: Path, output: Path | None = None, **options: Any) -> None:
        super().__init__(daemon=True)
        self.stop, self.error = threading.Event(), None
        self.reports: list[Report] = []
        self._news: queue.Queue[Report] = queue.Queue()
        self._given = (run, output, {**QUICK, "state": state, **options})
        self.result: WatchResult | None = None
        self.error: BaseException | None

    def run(self) -> None:
        """Watch."""
        path, output, options = self._given
        try:
            self.result = ema_cli.watch(
                path, output, **options, on_report=self._news.put, stop=self.stop
            )
        except BaseException as error:
            self.error = error

    def _drained(self) -> list[Report]:
        while not self._news.empty():
            self.reports.append(self._news.get())
        return self.reports

    def of(self, kind: type) -> list[Any]:
        """What was told of one kind."""
        return [report for report in self._drained() if isinstance(report, kind)]

    def steps(self) -> list[int]:
        """The steps that were applied."""
        return [row.step for report in self.of(Applied) for row in report.rows]

    def missed(self) -> list[int]:
        """The steps that were missed."""
        return [report.step for report in self.of(Missed)]

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something to be so."""
        deadline = time.monotonic() + PATIENCE
        while not true():
            if self.error is not None:
                raise self.error
            assert time.monotonic() < deadline, self._drained()
            assert self.is_alive() or true(), self._drained()
            time.sleep(0.01)

    def until_applied(self, step: int) -> None:
        """Wait for a step to be applied."""
        self.until(lambda: step in self.steps())

    def end(self) -> WatchResult:
        """Wait for the watch to end by itself."""
        self.join(PATIENCE)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        assert self.result is not None
        self._drained()
        return self.result

    def __enter__(self) -> Live:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop.set()
        self.join(PATIENCE)
        assert not self.is_alive()


@contextmanager
def child(*words: str | Path, patch: str = "") -> Iterator[subprocess.Popen[str]]:
    """`ema-avg watch` as a process of its own."""
    command = [sys.executable, "-c", CHILD.format(patch=patch), "watch", *map(str, words)]
    pipe = subprocess.PIPE
    options = ["--interval", "0.05", "--decay", "0.9"]
    with subprocess.Popen([*command, *options], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def write(path: Path, step: int) -> Path:
    """Write the safetensors file of a step."""
    return write_checkpoint(path, values_of(step))
