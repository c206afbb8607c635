"""Inputs that vanish, shrink, grow or are rewritten between the plan and the publication."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, raw_safetensors, read_checkpoint, write_run
from hostile import FILE, entry

from ema_cli import api, files, running
from ema_cli.engine import Progress
from ema_cli.errors import EmaError, InputChanged, InputError, StorageError

Change = Callable[[Path], None]


def _vanish(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def _replace(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def _link(path: Path) -> None:
    path.with_name(".pinned").hardlink_to(path)


CHANGES = [_truncate, _grow, _rewrite, _replace]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of 4,000 elements."""
    values = [np.full(4000, k, np.float32) for k in (1, 2, 6)]
    return write_run(tmp_path / "run", [{"layer/w": value} for value in values])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output in a directory of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "average.safetensors"


def second(run: Path) -> Path:
    """The checkpoint that changes."""
    return run / "model-step-200.safetensors"


def refused(run: Path, out: Path, change: Change, when: Callable[[Progress], bool]) -> EmaError:
    """Return the error of a run whose second checkpoint changes at an event."""
    done = []

    def on_event(event: Progress) -> None:
        if not done and when(event):
            done.append(change(second(run)))

    with pytest.raises(EmaError) as caught:
        api.average_run(run, out, average=["mean"], on_event=on_event)
    assert done
    assert list(out.parent.iterdir()) == []
    return caught.value


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_plan_is_noticed(run: Path, out: Path, change: Change) -> None:
    """What the plan was made for is what is read; anything else ends the run, unpublished."""
    plan = api.plan_run(run, out, average=["mean"])
    change(second(run))
    with pytest.raises(InputChanged) as caught:
        running.run_plan(plan)
    assert caught.value.message == f"{second(run)}: changed while it was read"
    assert caught.value.hint
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_last_byte_was_read_is_noticed(
    run: Path, out: Path, change: Change
) -> None:
    """A result is published only if every input was the same from first to last byte."""
    error = refused(run, out, change, lambda event: event.read == event.total)
    assert isinstance(error, InputChanged)
    assert error.message == f"{second(run)}: changed while it was read"


def test_a_checkpoint_that_vanishes_before_it_is_read_is_an_error(run: Path, out: Path) -> None:
    """A checkpoint rotated away between plan and reading ends the run, unpublished."""
    error = refused(run, out, _vanish, lambda event: event.read == 0)
    assert isinstance(error, InputError)
    assert error.message == f"{second(run)}: cannot open: No such file or directory"


def test_a_checkpoint_rotated_away_after_it_was_read_does_no_harm(run: Path, out: Path) -> None:
    """Deleting a file that was read whole takes nothing from the result."""

    def on_event(event: Progress) -> None:
        if event.read == event.total:
            second(run).unlink(missing_ok=True)

    api.average_run(run, out, average=["mean"], on_event=on_event)
    assert set(read_checkpoint(out)["layer/w/ExponentialMovingAverage"]) == {np.float32(3)}


def test_a_hard_link_made_by_the_trainer_is_no_change(run: Path, out: Path) -> None:
    """Pinning a checkpoint with a hard link changes its ctime and none of its bytes."""
    plan = api.plan_run(run, out, average=["mean"])
    _link(second(run))
    [written] = running.run_plan(plan).outputs
    assert written.status == "written"


def test_truncation_in_the_middle_of_a_read_is_an_error_not_a_signal(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that shrinks under an open descriptor gives a short read, which is told."""
    plan = api.plan_run(run, out, average=["mean"])
    really = files._preadv
    inode = second(run).stat().st_ino

    def shrinking(fd: int, buffer: memoryview, offset: int) -> int:
        if os.fstat(fd).st_ino == inode:
            os.truncate(second(run), 8000)
        return really(fd, buffer, offset)

    monkeypatch.setattr(files, "_preadv", shrinking)
    with pytest.raises(InputChanged) as caught:
        running.run_plan(plan)
    assert str(second(run)) in caught.value.message
    assert "expected 16,000 bytes" in caught.value.message
    assert list(out.parent.iterdir()) == []


def test_a_file_that_grows_for_ever_is_read_to_its_planned_end(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appending during every read neither hangs the run nor gets published."""
    plan = api.plan_run(run, out, average=["mean"])
    really = files._preadv

    def growing(fd: int, buffer: memoryview, offset: int) -> int:
        _grow(second(run))
        return really(fd, buffer, offset)

    monkeypatch.setattr(files, "_preadv", growing)
    with pytest.raises(InputChanged):
        running.run_plan(plan)
    assert list(out.parent.iterdir()) == []


def test_a_read_error_of_the_disk_is_an_io_error(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO while reading an input is exit code 15, names the file and publishes nothing."""
    plan = api.plan_run(run, out, average=["mean"])

    def failing(fd: int, buffer: memoryview, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_preadv", failing)
    with pytest.raises(StorageError) as caught:
        running.run_plan(plan)
    assert "model-step-100.safetensors: cannot read: Input/output error" in caught.value.message
    assert list(out.parent.iterdir()) == []


def test_a_shard_that_changes_is_noticed_in_a_folder(tmp_path: Path, digits_bf16: Path) -> None:
    """Each shard of a folder is held to what the plan saw."""
    run = tmp_path / "run"
    for step in (100, 200):
        shutil.copytree(digits_bf16 / f"checkpoint-{step}", run / f"checkpoint-{step}")
    plan = api.plan_run(run, tmp_path / "out", average=["mean"])
    shard = run / "checkpoint-100" / "model-00002-of-00002.safetensors"
    _rewrite(shard)
    with pytest.raises(InputChanged) as caught:
        running.run_plan(plan)
    assert str(shard) in caught.value.message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- too big


def test_a_sparse_file_of_8_tb_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """What does not fit on the disk is told with both sizes before the first byte."""
    run = tmp_path / "run"
    elements = 1 << 41
    header = {"layer/w": entry(shape=[elements], offsets=[0, 4 * elements])}
    start = raw_safetensors(header)
    run.mkdir()
    for step in (100, 200):
        path = run / f"model-step-{step}.safetensors"
        path.write_bytes(start)
        try:
            os.truncate(path, len(start) + 4 * elements)
        except OSError:
            pytest.skip("the file system holds no file of 8 TiB")
    (tmp_path / "out").mkdir()
    outcome = cmd("run", run, "-o", tmp_path / "out" / FILE, code=15)
    assert "needs 8.0 TiB" in outcome.err
    assert "free" in outcome.err
    assert list((tmp_path / "out").iterdir()) == []
