"""The log of what is done: what it sums up, and that nothing it says is believed unchecked."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conformance import ROWS, make
from helpers import Failing, write_run

import ema_cli
from ema_cli import chunks, durable, engine, progress
from ema_cli.checksums import crc32c
from ema_cli.chunks import Chunks, Made
from ema_cli.errors import StorageError
from ema_cli.progress import Log
from ema_cli.plan import Plan
from ema_cli.tasks import Done, Task

CHUNK = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks and chunks small enough for a small model to have many, and no time to wait."""
    monkeypatch.setattr(engine, "TASK_ELEMENTS", 1000)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)


# ---------------------------------------------------------------------------- contributions


def sums(content: bytes) -> dict[int, int]:
    """The CRC-32C of each chunk."""
    starts = range(0, len(content), CHUNK)
    return {start // CHUNK: crc32c(content[start : start + CHUNK]) for start in starts}


@pytest.mark.parametrize("longest", [7, 300, 20_000])
def test_contributions_in_any_order_make_the_checksum_of_each_chunk(longest: int) -> None:
    """Whatever the order, the cuts and the number of those who write."""
    chance = random.Random(longest)
    content = chance.randbytes(40_000)
    stretches = []
    at = 0
    while at < len(content):
        end = min(len(content), at + chance.randint(1, longest))
        stretches.append((at, end))
        at = end
    for order in ("ascending", "descending", "any"):
        if order == "descending":
            stretches.reverse()
        elif order == "any":
            chance.shuffle(stretches)
        writers = [Chunks(lambda file: len(content)) for _ in range(3)]
        for k, (start, end) in enumerate(stretches):
            writers[k * 3 // len(stretches)].add(5, start, memoryview(content)[start:end])
        found = together(writer.made() for writer in writers)
        assert found == {(5, chunk): crc for chunk, crc in sums(content).items()}, order


def together(parts: Iterator[Made]) -> Made:
    """All contributions combined."""
    found: Made = {}
    for part in parts:
        for key, crc in part.items():
            found[key] = found.get(key, 0) ^ crc
    return found


class Job(NamedTuple):
    """A plan, the files it fills, and what each of its tasks did."""

    plan: Plan
    paths: list[str]
    done: dict[int, Done]

    @property
    def tasks(self) -> list[Task]:
        """Its tasks."""
        return list(engine.tasks(self.plan.work, self.paths))

    @property
    def contents(self) -> list[bytes]:
        """What the files hold."""
        return [Path(path).read_bytes() for path in self.paths]


def lay_out(plan: Plan, place: Path) -> list[str]:
    """Create the files of the outputs, with what is known of them."""
    place.mkdir(exist_ok=True)
    paths = []
    for file in [file for outcome in plan.outcomes for file in outcome.layout.files]:
        paths.append(str(place / f"file-{len(paths)}"))
        with open(paths[-1], "wb") as out:
            out.truncate(file.nbytes)
            for offset, data in file.literals:
                out.seek(offset)
                out.write(data)
    return paths


def carry_out(plan: Plan, paths: list[str], log: Log | None = None) -> Job:
    """Carry out a plan into files, one task after the other."""
    found = Job(plan, paths, {})
    with ThreadPoolExecutor(1) as pool:
        ordinals = iter(range(1 << 30))
        engine.carry_out(
            plan.work,
            paths,
            pool,
            lambda event: None,
            lambda done: found.done.update({next(ordinals): done}),
            log,
        )
    return found


def summed(plan: Plan) -> Plan:
    """The same plan, with every byte to be seen."""
    manner = dataclasses.replace(plan.work.manner, summed=True)
    return dataclasses.replace(plan, work=dataclasses.replace(plan.work, manner=manner))


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


@pytest.mark.parametrize("row", ROWS)
def test_what_the_tasks_made_is_what_is_there(tmp_path: Path, row: str) -> None:
    """In every format: the contributions of all tasks, and of what was known, are the checksums."""
    run, place = a_run(tmp_path / "run", row), tmp_path / "place"
    plan = ema_cli.plan_run(run, place / "{average}", average=["mean", "ema:0.5"], workers=1)
    found = carry_out(summed(plan), lay_out(plan, place))
    assert not any(done.cloned for done in found.done.values())
    known = Chunks(lambda k: os.path.getsize(found.paths[k]))
    files = [file for outcome in plan.outcomes for file in outcome.layout.files]
    for k, file in enumerate(files):
        for offset, data in file.literals:
            known.add(k, offset, memoryview(data))
    there = {(k, c): crc for k, data in enumerate(found.contents) for c, crc in sums(data).items()}
    assert together(iter([*(done.made for done in found.done.values()), known.made()])) == there
