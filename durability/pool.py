"""Points tried by two processes at once, and what came of it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

PROCESSES = 2
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASE = os.path.join(PROJECT, "build", "durability")
MEMORY = "/dev/shm"
ROOM = 2 << 30

P = TypeVar("P")


@dataclass(frozen=True)
class Found:
    """What trying one point showed: what is wrong, if anything, and what to count."""

    label: str
    problem: str = ""
    tags: tuple[str, ...] = ()


@dataclass
class Report:
    """What a harness found.

    Attributes:
        name: of the harness.
        line: its counts.
        failures: what failed and how to see it again.
        seconds: how long it took.
    """

    name: str
    line: str = ""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """How much of a harness to do.

    Attributes:
        points: at most so many, spread evenly; None for the number that suits a CI run.
        full: everything, however long it takes.
        only: just the point with this label.
        seed: for what is chosen at random.
    """

    points: int | None = None
    full: bool = False
    only: str = ""
    seed: int = 1

    def choose(self, points: Sequence[P], label: Callable[[P], str], usual: int) -> list[P]:
        """Return the points to try, in order, of which a CI run tries `usual`."""
        if self.only:
            chosen = [point for point in points if label(point) == self.only]
            if not chosen:
                raise SystemExit(f"no point {self.only!r}; one is {label(points[0])!r}")
            return chosen
        most = len(points) if self.full else (usual if self.points is None else self.points)
        if most >= len(points):
            return list(points)
        return [points[k * len(points) // most] for k in range(most)]


class Pool(Generic[P]):
    """Tries points with `probe`, two at a time, each process after its own `prepare`."""

    def __init__(
        self, probe: Callable[[P], Found], prepare: Callable[[], None] | None = None
    ) -> None:
        self._probe = probe
        self._prepare = prepare

    def each(self, points: Iterable[P], processes: int = PROCESSES) -> Iterator[Found]:
        """Yield what was found, in the order in which it was."""
        todo = list(points)
        if not todo:
            return
        global _probe
        _probe = self._probe  # the processes inherit it, and what `prepare` changes there
        context = multiprocessing.get_context("fork")
        with context.Pool(min(processes, len(todo)), _begin, (self._prepare,)) as pool:
            yield from pool.imap_unordered(_try, todo)


_probe: Callable[[Any], Found]
_unprepared = ""


def _begin(prepare: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    global _unprepared
    try:
        if prepare is not None:
            prepare()
    except Exception as error:  # raised here, it would only be tried again, for ever
        _unprepared = f"{type(error).__name__}: {error}"


def _try(point: Any) -> Found:
    """Try a point; a failure of the harness is a finding too."""
    name = getattr(point, "label", str(point))
    if _unprepared:
        return Found(str(name), f"the harness cannot work here: {_unprepared}")
    try:
        return _probe(point)
    except Exception:
        last = traceback.format_exc(limit=-3).strip().replace("\n", "\n    ")
        return Found(str(name), f"the harness failed:\n    {last}")


def gather(name: str, found: Iterable[Found], line: Callable[[int, Counter[str]], str]) -> Report:
    """Return the report on a harness; `line` makes its text of the number of points and tags."""
    began = time.monotonic()
    report, tags, count = Report(name), Counter[str](), 0
    try:
        for one in found:
            count += 1
            tags.update(one.tags)
            if one.problem:
                report.failures.append(
                    f"{one.label}: {one.problem}\n"
                    f"    again: python -m durability {name} --only '{one.label}'"
                )
    finally:  # interrupted: nobody may write any more where the directory is about to go
        if isinstance(found, Generator):
            found.close()
    if not count:
        report.failures.append("nothing was tried")
    report.line = line(count, tags)
    report.seconds = time.monotonic() - began
    return report


def _roomy() -> str:
    """Return where to work: in memory if there is room, where other work on disks is not felt."""
    if os.path.isdir(MEMORY):
        status = os.statvfs(MEMORY)
        if status.f_bavail * status.f_frsize >= ROOM:
            return MEMORY
    os.makedirs(BASE, exist_ok=True)
    return BASE


@contextmanager
def scratch() -> Iterator[str]:
    """Yield a new directory that is gone afterwards."""
    where = _roomy()
    path = tempfile.mkdtemp(prefix="ema-avg-durability-", dir=where)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def stop(*_: Any) -> None:
    """End on SIGTERM as on Ctrl-C, so that nothing stays mounted."""
    raise KeyboardInterrupt
