"""An update that was killed goes on where it stopped, or starts over: to the same bits."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from helpers import cmd, write_checkpoint
from interrupted import Counted, killed_at, model, record_at_once
from stores import (
    document,
    documents,
    exported,
    slot_of,
    tree,
    update,
    what_counts,
    without_barriers,
)

import ema_cli
from ema_cli import engine, progress


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks small enough for a small model to have several, recorded two by two at once."""
    without_barriers(monkeypatch)
    monkeypatch.setattr(engine, "TASK_ELEMENTS", 1000)
    monkeypatch.setattr(progress.Log, "add", record_at_once)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts the tasks that are carried out in this process."""
    counter = Counted()
    monkeypatch.setattr(engine, "run_task", counter)
    return counter


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Four checkpoints."""
    names = [tmp_path / "run" / f"m-{step}.safetensors" for step in (1, 2, 3, 4)]
    return [write_checkpoint(name, model(k)) for k, name in enumerate(names)]


def words(state: Path, paths: list[Path]) -> list[str]:
    """Return the command."""
    options = ("--average", "mean", "--average", "ema:0.5", "--zero-debias", "--workers", "1")
    return ["run", *map(str, paths), "--state", str(state), *options]


def resumed(err: str) -> int:
    """Return how many tasks were not done again."""
    found = re.search(r"resuming: (\d+) of (\d+) ranges done", err)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("before", [0, 2], ids=["the creation", "an update"])
def test_killed_anywhere_the_same_command_continues(
    before: int, paths: list[Path], tmp_path: Path, counted: Counted
) -> None:
    """Before any change: what counts is a whole generation, and the end is the same."""
    said, origin = tmp_path / "said", tmp_path / "origin"
    if before:
        cmd(*words(origin, paths[:before]))
    whole = Path(shutil.copytree(origin, tmp_path / "whole")) if before else tmp_path / "whole"
    counted.calls = 0
    cmd(*words(whole, paths))
    expected, total = slot_of(whole).read_bytes(), counted.calls
    went_on = 0
    for nth in itertools.count(1, 4):
        state = tmp_path / "S"
        shutil.rmtree(state, ignore_errors=True)
        if before:
            shutil.copytree(origin, state)
        if not killed_at(nth, words(state, paths), said):
            break
        if (state / "ROOT").exists():
            assert ema_cli.inspect(state).step in (2, 4)
            exported(state, tmp_path / "out", average=["mean"])
        counted.calls = 0
        done = cmd(*words(state, paths))
        assert slot_of(state).read_bytes() == expected, nth
        assert [row["step"] for row in documents(state, "ledger")] == [1, 2, 3, 4]
        if resumed(done.err):
            went_on += 1
            assert counted.calls == total - resumed(done.err)
        assert done.out.startswith("unchanged") or not (state / "progress").exists()
        assert not list(state.glob("*.tmp"))
        assert len(list(state.glob("slot.*"))) == 2
    assert went_on > 5


def left(state: Path, paths: list[Path], said: Path) -> int:
    """Leave an update half done; return how many of its tasks are recorded."""
    for nth in itertools.count(12, 3):
        copied = Path(shutil.copytree(state, state.with_name("trial")))
        assert killed_at(nth, words(copied, paths), said)
        progress_of = copied / "progress"
        lines = len(progress_of.read_bytes().splitlines()) if progress_of.exists() else 0
        if lines > 4:
            shutil.rmtree(state)
            copied.rename(state)
            return lines - 1
        shutil.rmtree(copied)
    raise AssertionError


CHANGES: dict[str, Callable[[Path], object]] = {
    "its log is gone": lambda state: (state / "progress").unlink(),
    "its log is torn": lambda state: os.truncate(state / "progress", 300),
    "its log is empty": lambda state: os.truncate(state / "progress", 0),
    "its log is rubbish": lambda state: (state / "progress").write_bytes(bytes(range(256)) * 9),
    "its slot is gone": lambda state: spare(state).unlink(),
    "its slot is another": lambda state: another(spare(state)),
    "its slot is zeros": lambda state: spare(state).write_bytes(bytes(spare(state).stat().st_size)),
    "its slot is short": lambda state: os.truncate(spare(state), 5000),
    "one bit of its slot": lambda state: flip(spare(state), 4096 + 17),
    "the head of its slot": lambda state: flip(spare(state), 100),
}


def spare(state: Path) -> Path:
    """Return the slot that does not count."""
    [found] = [path for path in state.glob("slot.*") if path != slot_of(state)]
    return found


def another(path: Path) -> None:
    """Replace a file by one of the same bytes."""
    shutil.copy(path, path.with_name("x"))
    path.with_name("x").rename(path)


def flip(path: Path, at: int) -> None:
    """Change a bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_left_is_never_believed(
    change: Callable[[Path], object], paths: list[Path], tmp_path: Path
) -> None:
    """Only bytes that are there are taken up."""
    state, whole = tmp_path / "S", tmp_path / "whole"
    for one, group in ((state, paths[:2]), (whole, paths[:2]), (whole, paths)):
        cmd(*words(one, group))
    left(state, paths, tmp_path / "said")
    change(state)
    cmd(*words(state, paths))
    assert slot_of(state).read_bytes() == slot_of(whole).read_bytes()
    assert ema_cli.inspect(state).step == 4


def test_what_was_left_by_another_update_is_not_taken_up(
    paths: list[Path], tmp_path: Path, counted: Counted
) -> None:
    """Fewer checkpoints, others, or the same ones rewritten: each starts over."""
    origin = tmp_path / "S"
    cmd(*words(origin, paths[:2]))
    left(origin, paths, tmp_path / "said")
    before = what_counts(origin)
    for name, group in (("fewer", paths[:3]), ("another", [paths[3]]), ("rewritten", paths)):
        state = Path(shutil.copytree(origin, tmp_path / name))
        assert what_counts(state) == before
        if name == "rewritten":
            write_checkpoint(paths[3], model(9))
        assert not resumed(cmd(*words(state, group)).err), name
        whole = tmp_path / f"whole-{name}"
        for part in (paths[:2], group):
            cmd(*words(whole, part))
        assert slot_of(state).read_bytes() == slot_of(whole).read_bytes(), name
    state = Path(shutil.copytree(origin, tmp_path / "restarted"))
    assert not resumed(cmd(*words(state, paths), "--restart").err)


def test_more_workers_go_on(paths: list[Path], tmp_path: Path) -> None:
    """Cutting the work into tasks does not depend on them."""
    state, whole = tmp_path / "S", tmp_path / "whole"
    for one, group in ((state, paths[:2]), (whole, paths[:2]), (whole, paths)):
        cmd(*words(one, group))
    known = left(state, paths, tmp_path / "said")
    assert resumed(cmd(*words(state, paths), "--workers", "3").err) == known
    assert slot_of(state).read_bytes() == slot_of(whole).read_bytes()


def test_nothing_new_leaves_what_was_left(paths: list[Path], tmp_path: Path) -> None:
    """Looking does no harm; the update can still go on."""
    state = tmp_path / "S"
    cmd(*words(state, paths[:2]))
    known = left(state, paths, tmp_path / "said")
    before = tree(state)
    assert cmd(*words(state, paths[:2])).out.startswith("unchanged")
    cmd("inspect", state)
    exported(state, tmp_path / "out", average=["mean"])
    assert tree(state) == before
    assert resumed(cmd(*words(state, paths)).err) == known


def test_processes_make_the_same(paths: list[Path], tmp_path: Path) -> None:
    """An executor of processes that know of nothing but their tasks."""
    state, whole = tmp_path / "S", tmp_path / "whole"
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        for group in (paths[:2], paths):
            update(state, group, average=["mean"], executor=executor)
            update(whole, group, average=["mean"])
    assert slot_of(state).read_bytes() == slot_of(whole).read_bytes()
    assert document(state, "manifest-2")["checksums"] == document(whole, "manifest-2")["checksums"]
