"""The log of what is done: what it sums up, and that nothing it says is believed unchecked."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from conformance import ROWS
from helpers import Failing, write_run
from interrupted import a_run, model
from torch_views import View, ViewRun, c_strides

import ema_cli
from ema_cli import chunks, durable, engine, progress
from ema_cli.checksums import crc32c
from ema_cli.chunks import Chunks, Made
from ema_cli.errors import StorageError
from ema_cli.plan import Plan
from ema_cli.progress import Log
from ema_cli.readback import is_intact
from ema_cli.states import sealed
from ema_cli.tasks import Done, Task
from ema_cli.worker import run_task

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
    paths: list[str] = []
    for file in [file for outcome in plan.outcomes for file in outcome.layout.files]:
        paths.append(str(place / f"file-{len(paths)}"))
        with open(paths[-1], "wb") as out:
            out.truncate(file.nbytes)
            for offset, data in file.literals:
                out.seek(offset)
                out.write(data)
    return paths


def carry_out(plan: Plan, paths: list[str], log: Log | None = None) -> Job:
    """Carry out a plan into files, one task after the other, but for what the log holds."""
    found = Job(plan, paths, {})
    for ordinal, task in enumerate(found.tasks):
        if log is None or ordinal not in log.done:
            found.done[ordinal] = run_task(task)
            if log is not None:
                log.add(ordinal, found.done[ordinal])
    return found


def summed(plan: Plan) -> Plan:
    """The same plan, with every byte to be seen."""
    manner = dataclasses.replace(plan.work.manner, summed=True)
    return dataclasses.replace(plan, work=dataclasses.replace(plan.work, manner=manner))


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


# ---------------------------------------------------------------------------- the log


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The plan of two averages of three checkpoints."""
    run = write_run(tmp_path / "run", [model(k) for k in range(3)])
    return ema_cli.plan_run(run, tmp_path / "{average}", average=["mean", "ema:0.5"], workers=1)


@pytest.fixture
def logged(tmp_path: Path, plan: Plan) -> Job:
    """The work all done, with a log of it at ``log``."""
    paths = lay_out(plan, tmp_path / "place")
    log = Log(str(tmp_path / "log"), "key", paths)
    found = carry_out(plan, paths, log)
    finish(log)
    assert len(found.done) == 10
    return found


def finish(log: Log) -> None:
    """Close a log once it holds something."""
    while not log.recorded:
        time.sleep(0.001)
    log.close()


def resumed(job: Job, path: Path, key: str = "key") -> Log:
    """The log at `path` after `resume`."""
    log = Log(str(path), key, job.paths)
    log.resume()
    return log


def test_all_that_is_recorded_is_not_done_again(
    tmp_path: Path, logged: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a log holds is told once more, and no task is carried out."""
    log = resumed(logged, tmp_path / "log")
    assert (log.done, log.stale, log.recorded) == (logged.done, "", True)
    assert log.check(logged.tasks) == len(logged.done)
    before = logged.contents
    told: list[Done] = []
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(engine, "run_task", None)
        work = logged.plan.work
        engine.carry_out(work, logged.paths, pool, lambda event: None, told.append, log)
    assert (told, logged.contents) == (list(logged.done.values()), before)
    log.remove()
    assert not (tmp_path / "log").exists()


def test_what_is_left_is_done_and_added(tmp_path: Path, logged: Job) -> None:
    """A log of some tasks: the others are carried out, and then it holds all."""
    path = tmp_path / "log"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], *lines[4:7]]))
    log = resumed(logged, path)
    assert sorted(log.done) == [3, 4, 5]
    log.check(logged.tasks)
    told: list[Done] = []
    before = logged.contents
    with ThreadPoolExecutor(1) as pool:
        work = logged.plan.work
        engine.carry_out(work, logged.paths, pool, lambda event: None, told.append, log)
    log.close()
    assert resumed(logged, path).done == logged.done
    assert sorted(map(repr, told)) == sorted(map(repr, logged.done.values()))
    assert logged.contents == before


def test_short_work_leaves_no_log(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the first two seconds nothing is made durable, and nothing recorded."""
    monkeypatch.setattr(progress, "INTERVAL", 60.0)
    monkeypatch.setattr(durable, "sync_data", None)
    log = Log(str(tmp_path / "log"), "key", paths := lay_out(plan, tmp_path / "place"))
    carry_out(plan, paths, log)
    log.close()
    assert not log.recorded
    assert not (tmp_path / "log").exists()


def test_a_torn_log_holds_what_is_whole(tmp_path: Path, logged: Job) -> None:
    """Cut anywhere: the tasks on whole lines, the rest of the file is cut off; or it is stale."""
    path, torn = tmp_path / "log", tmp_path / "torn"
    content = path.read_bytes()
    ends = [k + 1 for k, byte in enumerate(content) if byte == 10]
    for size in range(len(content)):
        torn.write_bytes(content[:size])
        log = resumed(logged, torn)
        whole = sum(end <= size for end in ends)
        assert list(log.done.items()) == list(logged.done.items())[: max(whole - 1, 0)]
        if whole > 1:
            assert torn.read_bytes() == content[: ends[whole - 1]]
        else:
            assert log.stale == progress.DAMAGED
            assert not torn.exists()
        log.close()


def test_a_flipped_bit_is_never_believed(tmp_path: Path, logged: Job) -> None:
    """Every bit: only tasks before it count, or none, and as they were."""
    path, flipped = tmp_path / "log", tmp_path / "flipped"
    content = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    line = 0
    for place, byte in enumerate(content):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] = byte ^ 1 << bit
            flipped.write_bytes(changed)
            log = resumed(logged, flipped)
            assert list(log.done.items()) == list(logged.done.items())[: max(line - 1, 0)]
            assert bool(log.stale) == (line < 2)
            log.close()
        line += byte == 10


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"task": 0, "read": 1, "written": 1, "parts": [], "made": [], "cloned": None},
        {"task": "0", "read": 1, "written": 1, "parts": [], "made": [], "cloned": []},
        {"task": True, "read": 1, "written": 1, "parts": [], "made": [], "cloned": []},
        {"task": 0, "read": 1, "written": 1, "parts": [[1, 2]], "made": [], "cloned": []},
        {"task": 0, "read": 1, "written": 1, "parts": [], "made": [[1, 2]], "cloned": []},
        {"task": 0, "read": 1, "written": 1, "parts": [], "made": [], "cloned": [[1, 2, 3]]},
    ],
)
def test_a_sealed_line_of_something_else_ends_the_log(
    tmp_path: Path, logged: Job, record: object
) -> None:
    """A record is checked field by field: no internal error, and nothing is believed after it."""
    path = tmp_path / "log"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], sealed.seal(record), *lines[3:]]))
    assert list(resumed(logged, path).done) == [0, 1]


def test_a_log_of_other_work_is_stale(tmp_path: Path, logged: Job) -> None:
    """Another key, other files, or files that are gone: removed, and it is told why."""
    path = tmp_path / "log"
    content = path.read_bytes()
    assert resumed(logged, path, "other").stale == progress.OTHER_WORK
    assert not path.exists()
    path.write_bytes(content)
    moved = [*logged.paths[1:], *logged.paths[:1]]
    log = Log(str(path), "key", moved)
    assert (log.resume(), log.stale) == ({}, progress.OTHER_FILES)
    assert not path.exists()
    path.write_bytes(content)
    os.unlink(logged.paths[0])
    assert resumed(logged, path).stale == progress.OTHER_FILES
    assert resumed(logged, path).stale == ""


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_log_is_refused(tmp_path: Path, logged: Job, kind: str) -> None:
    """A link is not followed, a pipe does not block: `StorageError`."""
    path = tmp_path / "other"
    if kind == "link":
        path.symlink_to(tmp_path / "log")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(StorageError):
        resumed(logged, path)
    assert (tmp_path / "log").exists()


# ---------------------------------------------------------------------------- reading back


def test_any_changed_byte_is_found_when_it_is_read_back(tmp_path: Path, logged: Job) -> None:
    """The tasks that wrote there are done again, and no others; then all is as it was."""
    chance, whole = random.Random(1), logged.contents
    path = tmp_path / "log"
    content = path.read_bytes()
    literals = [
        range(offset, offset + len(data))
        for outcome in logged.plan.outcomes
        for offset, data in outcome.layout.files[0].literals
    ]
    for _ in range(30):
        file = chance.randrange(len(logged.paths))
        place = chance.randrange(len(whole[file]))
        if place in literals[file]:
            continue
        with open(logged.paths[file], "r+b") as out:
            out.seek(place)
            out.write(bytes([whole[file][place] ^ 1 << chance.randrange(8)]))
        log = resumed(logged, path)
        log.check(logged.tasks)
        assert len(log.done) == len(logged.done) - 1
        carry_out(logged.plan, logged.paths, log)
        log.close()
        assert logged.contents == whole
        path.write_bytes(content)


LAID_OUT = {
    "c order": View("w", (90, 70), c_strides((90, 70))),
    "transposed": View("w", (90, 70), (1, 90)),
    "a slice": View("w", (90, 70), (301, 4), 3),
}


@pytest.mark.parametrize("last", LAID_OUT)
def test_elements_that_lie_scattered_are_read_back(tmp_path: Path, last: str) -> None:
    """Rows of one element as well: what is there is believed, and not when a byte of it changed."""
    views = [{"w": LAID_OUT[kind]} for kind in ("c order", "transposed", last)]
    run = ViewRun(tmp_path / "run", views)
    plan = ema_cli.plan_run(run.folder, tmp_path / "out.pt", average=["mean"], workers=1)
    found = carry_out(plan, lay_out(plan, tmp_path / "place"))
    for ordinal, task in enumerate(found.tasks):
        assert is_intact(task, found.done[ordinal])
    place = plan.outcomes[0].layout.places["w"].extent.offset
    with open(found.paths[0], "r+b") as out:
        out.seek(place)
        [byte] = out.read(1)
        out.seek(place)
        out.write(bytes([byte ^ 1]))
    tasks = enumerate(found.tasks)
    assert not all(is_intact(task, found.done[ordinal]) for ordinal, task in tasks)


@pytest.mark.parametrize("row", ["safetensors", "torch", "tensorflow"])
def test_truncated_or_emptied_files_are_found(tmp_path: Path, row: str) -> None:
    """Files that lost everything, at their size or not: nothing is believed, all is done again."""
    plan = ema_cli.plan_run(a_run(tmp_path / "run", row), tmp_path / "o", average=["mean"])
    paths = lay_out(plan, tmp_path / "place")
    log = Log(str(tmp_path / "log"), "key", paths)
    found = carry_out(plan, paths, log)
    finish(log)
    content, whole = (tmp_path / "log").read_bytes(), found.contents
    assert any(done.cloned for done in found.done.values()) == (row != "tensorflow")
    for keep in (True, False):
        (tmp_path / "log").write_bytes(content)
        sizes = [os.path.getsize(path) for path in paths]
        for path, n_bytes in zip(paths, sizes, strict=True):
            os.truncate(path, 0)
            os.truncate(path, n_bytes if keep else 1)
        log = resumed(found, tmp_path / "log")
        assert len(log.done) > 0
        log.check(found.tasks)
        assert (log.done, log.stale) == ({}, progress.OTHER_BYTES)
        assert not (tmp_path / "log").exists()
        for path, n_bytes in zip(paths, sizes, strict=True):
            os.truncate(path, n_bytes)
        again = Job(plan, lay_out(plan, tmp_path / "place"), {})
        carry_out(plan, again.paths, log)
        assert again.contents == whole
        log.close()


# ---------------------------------------------------------------------------- barriers


def test_bytes_are_durable_before_they_are_recorded(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a group, then its lines, then the log; and only tasks that were done before."""
    paths = lay_out(plan, tmp_path / "place")
    events: list[tuple[str, str]] = []
    sync, write = durable.sync_data, durable.write_exact
    log = Log(str(tmp_path / "log"), "key", paths)

    def synced(fd: int, path: str) -> None:
        events.append(("sync", path))
        sync(fd, path)

    def wrote(fd: int, data: bytes, offset: int, path: str) -> None:
        events.append(("write", path))
        write(fd, data, offset, path)

    monkeypatch.setattr(durable, "sync_data", synced)
    monkeypatch.setattr(durable, "write_exact", wrote)
    found = carry_out(plan, paths, log)
    finish(log)
    assert resumed(found, tmp_path / "log").done == found.done
    assert {path for _, path in events} == {log.path, *paths}
    while events:
        first = events.index(("write", log.path))
        files = [path for call, path in events[:first] if call == "sync"]
        assert files and set(files) <= set(paths)
        assert events[first + 1] == ("sync", log.path)
        del events[: first + 2]


@pytest.mark.parametrize("nth", range(1, 5))
def test_a_failed_barrier_is_told_and_never_tried_again(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """`StorageError` at the next task or at the end; the log is gone, and what follows is not."""
    failing = Failing(os.fdatasync, nth, errno.EIO)
    monkeypatch.setattr(os, "fdatasync", failing)
    paths = lay_out(plan, tmp_path / "place")
    log = Log(str(tmp_path / "log"), "key", paths)
    with pytest.raises(StorageError, match="cannot make durable"):
        for ordinal, task in enumerate(engine.tasks(plan.work, paths)):
            log.add(ordinal, run_task(task))
            time.sleep(0.002)
        log.close()
    log.remove()
    assert len(failing.calls) == nth
    assert not log.recorded
    assert not (tmp_path / "log").exists()


def test_a_signal_does_not_wait_for_a_slow_disk(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its patience it goes on, and what the thread finishes later is not recorded."""
    paths = lay_out(plan, tmp_path / "place")
    log = Log(str(tmp_path / "log"), "key", paths)
    first, *others = [run_task(task) for task in engine.tasks(plan.work, paths)]
    log.add(0, first)
    while not log.recorded:
        time.sleep(0.001)
    waiting, gate = threading.Event(), threading.Event()
    sync = durable.sync_data

    def slow(fd: int, path: str) -> None:
        waiting.set()
        gate.wait(60)
        sync(fd, path)

    monkeypatch.setattr(durable, "sync_data", slow)
    log.add(1, others[0])
    waiting.wait(60)
    started = time.monotonic()
    log.close(0.05)
    assert time.monotonic() - started < 30
    content = (tmp_path / "log").read_bytes()
    gate.set()
    assert log._thread is not None
    log._thread.join(60)
    assert (tmp_path / "log").read_bytes() == content
    assert list(resumed(Job(plan, paths, {}), tmp_path / "log").done) == [0]
