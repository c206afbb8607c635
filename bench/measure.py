"""Runs contestants in turn and keeps what each run cost.

Three things would spoil the numbers on a virtual machine, so they stay outside the timed region:
dirty pages of the previous contestant (``sync``), new memory that the host has yet to provide
(everyone reuses the same files, and only the best of interleaved rounds counts), and the size of
this process, which the kernel reports as the least peak memory of its children.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.contestants import SELF_TIMED, Contestant, Group
from bench.datasets import MIB, ROOT, DataSet


class ContestantError(Exception):
    """A contestant failed, or left no result behind."""


@dataclass(frozen=True)
class Sample:
    """One run: the seconds that count, those of the whole process, and the peak memory."""

    seconds: float
    wall: float
    peak_mib: float
    fsync: float | None = None


@dataclass
class Score:
    """All runs of one contestant."""

    contestant: Contestant
    samples: list[Sample] = field(default_factory=list)
    error: str = ""

    @property
    def best(self) -> Sample:
        """Return the run with the least disturbance."""
        return min(self.samples, key=lambda sample: sample.seconds)

    @property
    def best_seconds(self) -> float:
        """Return the least seconds, or infinity when nothing was measured."""
        return min((sample.seconds for sample in self.samples), default=math.inf)

    @property
    def median(self) -> float:
        """Return the seconds of the middle run."""
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def peak_mib(self) -> float:
        """Return the largest peak of all runs."""
        return max(sample.peak_mib for sample in self.samples)


def environment() -> dict[str, str]:
    """Return the environment without settings of the tool that would change what it does."""
    dropped = ("EMA_AVG_", "PYTHONDONTWRITEBYTECODE")  # compiled modules, as after an install
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


def warm(data_sets: Iterable[DataSet], data: Path) -> None:
    """Bring all inputs into the page cache."""
    buffer = bytearray(MIB)
    for data_set in data_sets:
        for path in data_set.files(data):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def chill(data_sets: Iterable[DataSet], data: Path) -> None:
    """Drop all inputs from the page cache; only clean pages go, hence after a sync."""
    for data_set in data_sets:
        for path in data_set.files(data):
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepare(contestant: Contestant) -> None:
    """Remove the previous result, lest it be found up to date, and settle the disk."""
    for folder in {path.parent for path in contestant.outputs}:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    os.sync()


def check_outputs(contestant: Contestant) -> None:
    """Raise unless all results are there and large enough to hold every tensor."""
    least = contestant.data_set.payload_bytes if contestant.data_set else 0
    for path in contestant.outputs:
        if not path.is_file() or path.stat().st_size < least:
            raise ContestantError(f"exit code 0, but {path} is missing or too small")


def run_process(command: tuple[str, ...]) -> tuple[Sample, str]:
    """Run one process to its end; return its cost and its standard output."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=environment()
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        if process.returncode:
            raise ContestantError(f"exit code {process.returncode}\n{err.read().rstrip()}")
        out.seek(0)
        return Sample(wall, wall, usage.ru_maxrss / 1024), out.read()


def run_once(contestant: Contestant) -> Sample:
    """Run one contestant; some report their own time, without the interpreter's start."""
    sample, text = run_process(contestant.command)
    check_outputs(contestant)
    if contestant.role not in SELF_TIMED:
        return sample
    inner = json.loads(text)
    return Sample(inner["seconds"], sample.wall, sample.peak_mib, inner.get("fsync"))


def run_group(group: Group, data: Path, rounds: int) -> list[Score]:
    """Run all contestants of a group in turn, round after round; failed ones drop out."""
    scores = [Score(contestant) for contestant in group.contestants]
    warm(group.data_sets, data)
    for number in range(1, rounds + 1):
        say(f"{group.key}: round {number} of {rounds}")
        for score in scores:
            if not score.error:
                run_in_turn(score, group, data)
    check_equal(group, scores)
    shutil.rmtree(data / "out" / group.key, ignore_errors=True)
    return scores


def run_in_turn(score: Score, group: Group, data: Path) -> None:
    """Give one contestant its turn in one round."""
    prepare(score.contestant)
    if group.cold:
        chill(group.data_sets, data)
    try:
        score.samples.append(run_once(score.contestant))
    except ContestantError as error:
        score.error = str(error)


def compare(reference: Path, result: Path, *flags: str) -> str:
    """Return the first difference; in a child, since the headers would stay in our memory."""
    command = (sys.executable, "-m", "bench.compare", *flags, str(reference), str(result))
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout


def check_equal(group: Group, scores: list[Score]) -> None:
    """Mark the second of two results that differ as failed: a fast wrong answer wins nothing."""
    by_output = {path: score for score in scores for path in score.contestant.outputs}
    pairs = [(*pair, ()) for pair in group.equal] + [(*pair, ("--close",)) for pair in group.close]
    for reference, result, flags in pairs:
        score, other = by_output[result], by_output.get(reference)  # which may be an input
        if score.error or (other and other.error):
            continue
        difference = compare(reference, result, *flags)
        if difference:
            source = f"the result of {other.contestant.name}" if other else str(reference)
            score.error = f"the result differs from {source}: {difference}"


def best_variants(scores: Iterable[Score]) -> list[Score]:
    """Return one score per name, the one of its fastest variant, in the given order."""
    found: dict[str, Score] = {}
    for score in scores:
        known = found.setdefault(score.contestant.name, score)
        if score.best_seconds < known.best_seconds:
            found[score.contestant.name] = score
    return list(found.values())


def say(text: str) -> None:
    """Report progress where it does not mix with the table."""
    print(text, file=sys.stderr, flush=True)
