"""Several files under one prefix are published whole or not at all, and old ones replaced so."""

from __future__ import annotations

import errno
import fcntl
import itertools
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from helpers import Failing, cmd
from tensorflow_bundles import (
    Tensors,
    listing,
    read_bundle,
    tensorflow_run,
)

from ema_cli import durable
from ema_cli.cli import main

SHADOW = "/ExponentialMovingAverage"
Files = dict[str, bytes]
# How many shards the old output has, and the new one.
SHARDS = [(1, 1), (3, 1), (1, 3), (2, 2)]
KILLED = 77


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where outputs go, with nothing else in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints in one shard."""
    return a_run(tmp_path / "run", 1)


def a_run(folder: Path, shards: int) -> Path:
    """Three checkpoints of four tensors."""
    values: list[Tensors] = [
        {"w": np.full(4, k, np.float32), "b": np.float32(k), "c": np.float64([k]), "n": np.int32(k)}
        for k in (1, 2, 3)
    ]
    return tensorflow_run(folder, values, shards=shards)


def words(run: Path, place: Path, decay: str = "0.5") -> list[str]:
    """The command that writes a prefix with as many shards as the run has."""
    names = ["--names", "variable"]
    return ["run", str(run), "-o", str(place / "out"), "--decay", decay, *names, "-q"]


def outputs(place: Path) -> Files:
    """Every file, hidden ones too, without what may differ from run to run."""
    files = listing(place)
    return {name: data for name, data in files.items() if not name.endswith(".ema.json")}


def emptied(folder: Path) -> None:
    """Remove everything in a folder."""
    shutil.rmtree(folder)
    folder.mkdir()


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("old", "new"), SHARDS)
def test_an_existing_prefix_is_refused_and_replaced_on_request(
    tmp_path: Path, place: Path, old: int, new: int
) -> None:
    """14 without ``--overwrite``; with it no file of the old one is left, whatever its shards."""
    cmd(*words(a_run(tmp_path / "old", old), place))
    before = listing(place)
    run = a_run(tmp_path / "new", new)
    assert "--overwrite" in cmd(*words(run, place, "0.9"), code=14).err
    assert listing(place) == before
    cmd(*words(run, place, "0.9"), "--overwrite")
    data = [f"out.data-{k:05}-of-{new:05}" for k in range(new)]
    assert set(listing(place)) == {"out.index", "out.ema.json", "checkpoint", *data}
    assert float(read_bundle(place / "out")["b"]) == pytest.approx(1.29, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["out.data-00000-of-00001", "out.data-00002-of-00003", "out.index"]
)
def test_one_file_is_enough_to_be_in_the_way(run: Path, place: Path, name: str) -> None:
    """Data without an index, an index without data: somebody's; replaced on request."""
    (place / name).write_bytes(b"mine")
    cmd(*words(run, place), code=14)
    assert listing(place) == {name: b"mine"}
    cmd(*words(run, place), "--overwrite")
    assert set(outputs(place)) == {"out.index", "out.data-00000-of-00001", "checkpoint"}
    read_bundle(place / "out")


@pytest.mark.parametrize("name", ["out.index", "out.data-00000-of-00001"])
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_only_files_are_replaced(run: Path, place: Path, name: str, kind: str) -> None:
    """A directory or a link where a file would be stays, even with ``--overwrite``."""
    if kind == "directory":
        (place / name).mkdir()
    else:
        (place / name).symlink_to(run / "model.ckpt-100.index")
    for more in ([], ["--overwrite"]):
        cmd(*words(run, place), *more, code=14)
    assert (place / name).is_dir() == (kind == "directory")
    assert os.listdir(place) == [name]


@pytest.mark.parametrize(
    "name", ["model.ckpt-200", "model.ckpt-200.index", "../run/model.ckpt-100", "model.ckpt-300"]
)
def test_an_input_is_never_replaced(run: Path, name: str) -> None:
    """By whatever name, even one that the selection left out."""
    before = listing(run)
    command = ["run", str(run), "-o", str(run / name), "--last", "2", "--overwrite"]
    assert "input" in cmd(*command, code=14).err
    assert listing(run) == before


def test_an_input_behind_a_link_is_never_replaced(run: Path, place: Path) -> None:
    """Hard links and symbolic ones to the files of an input."""
    for suffix in (".index", ".data-00000-of-00001"):
        (place / f"out{suffix}").hardlink_to(f"{run}/model.ckpt-200{suffix}")
    cmd(*words(run, place), "--overwrite", code=14)
    assert len(os.listdir(place)) == 2


def test_a_directory_is_no_prefix(run: Path, place: Path) -> None:
    """One called like the output is 14, and the hint says what to write."""
    (place / "out").mkdir()
    assert f"{place}/out/" in cmd(*words(run, place), code=14).err
    cmd("run", run, "-o", f"{place}/out/")
    assert (place / "out" / "model.ckpt-300.index").exists()


def test_a_directory_to_come_gets_a_prefix_with_the_step(run: Path, place: Path) -> None:
    """``-o DIR/`` writes ``model.ckpt-{step}``; placeholders work in prefixes as elsewhere."""
    cmd("run", run, "-o", f"{place}/new/", "--last", "2")
    assert set(outputs(place / "new")) == {
        "checkpoint",
        "model.ckpt-300.index",
        "model.ckpt-300.data-00000-of-00001",
    }
    cmd("run", run, "-o", place / "a-{step}-{average}", "--average", "mean")
    cmd("run", run, "-o", place / "b.index")
    assert {"a-300-mean.index", "b.index"} <= set(os.listdir(place))


def test_a_bare_name_is_a_prefix_in_the_working_directory(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, found unchanged, replaced, repaired: as with any other path."""
    monkeypatch.chdir(place)
    command = ["run", str(run), "-o", "out", "--names", "variable"]
    assert cmd(*command).out.startswith("written")
    assert cmd(*command).out.startswith("unchanged")
    before = listing(place)
    (place / ".out.ema-avg.old").mkdir()
    (place / "out.index").rename(place / ".out.ema-avg.old" / "out.index")
    assert cmd(*command).out.startswith("unchanged")
    assert listing(place) == before
    assert cmd(*command, "--decay", "0.9", "--overwrite").out.startswith("written")
    assert set(listing(place)) == set(before)


def test_two_processes_never_write_one_prefix(run: Path, place: Path) -> None:
    """While another process holds the temporary the answer is 11."""
    path = place / ".out.ema-avg.tmp"
    path.mkdir()
    held = os.open(path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert "another process" in cmd(*words(run, place), code=11).err
    finally:
        os.close(held)
    assert listing(place) == {}
    cmd(*words(run, place))
    assert not path.exists()


@pytest.mark.parametrize("length", [200, 235, 236, 255])
def test_a_name_of_any_length_is_written_or_refused(run: Path, place: Path, length: int) -> None:
    """The suffix of the data takes 20 of the 255 bytes a file name may have."""
    out = place / ("n" * length)
    code = main(["run", str(run), "-o", str(out), "--names", "variable", "-q"])
    assert code == (0 if length <= 235 else 15)
    assert len(listing(place)) == (4 if length <= 235 else 0)


# ---------------------------------------------------------------------------- failures


CALLS: list[tuple[Any, str, int]] = [
    (os, "fsync", errno.EIO),
    (os, "replace", errno.EIO),
    (os, "rename", errno.EIO),
    (os, "pwrite", errno.ENOSPC),
    (os, "ftruncate", errno.EIO),
    (durable, "rename_new", errno.EIO),
]


@pytest.mark.parametrize("shards", [None, (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize(("module", "call", "code"), CALLS, ids=[call for _, call, _ in CALLS])
def test_a_failure_at_any_call_leaves_the_old_state_or_the_new(
    tmp_path: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    call: str,
    code: int,
    shards: tuple[int, int] | None,
) -> None:
    """Exit 15 at call 1, 2, …: the old checkpoint is back, or the new one stands."""
    old, new = shards or (0, 1)
    run, before_run = a_run(tmp_path / "run", new), a_run(tmp_path / "before", old or 1)
    cmd(*words(run, place))
    expected = outputs(place)
    for nth in itertools.count(1):
        emptied(place)
        if old:
            cmd(*words(before_run, place, "0.9"))
        before = listing(place)
        wrapped = Failing(getattr(module, call), nth, code)
        with monkeypatch.context() as patch:
            patch.setattr(module, call, wrapped)
            exit_code = main([*words(run, place), *(["--overwrite"] if old else [])])
        if len(wrapped.calls) < nth:
            assert exit_code == 0
            break
        where = f"{call} call {nth}"
        assert exit_code == 15, where
        found = listing(place)
        if found != before:  # published already: whole, and the next run settles the rest
            assert checkpoint_in(place) == checkpoint_of(expected), where
            cmd(*words(run, place))
            assert checkpoint_in(place) == checkpoint_of(expected), where
            assert ".out.ema-avg.old" not in os.listdir(place), where


def checkpoint_of(files: Files) -> Files:
    """The index and the data among some files."""
    return {k: v for k, v in files.items() if k.startswith("out.") and not k.endswith(".json")}


def checkpoint_in(place: Path) -> Files:
    """The index and the data in a folder."""
    return checkpoint_of(listing(place))


# ---------------------------------------------------------------------------- kills


def killed_at(nth: int, arguments: list[str]) -> bool:
    """Run a command in a process that ends, without a word, before its change number `nth`.

    Changes are of names and of what is on the disk. Returns whether it came to that.
    """
    with warnings.catch_warnings():
        # Newer Pythons warn of threads; those of a pool have ended, and this child forks none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == nth:
                    os._exit(KILLED)
                return function(*args, **kwargs)

            return call

        for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "fsync"):
            setattr(os, name, dying(getattr(os, name)))
        durable.rename_new = dying(durable.rename_new)
        _finish(arguments)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, KILLED)
    return os.waitstatus_to_exitcode(status) == KILLED


def _finish(arguments: list[str]) -> NoReturn:
    """Run a command and end this process with its exit code."""
    code = 1
    try:
        with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
            code = main(arguments)
    finally:
        os._exit(code)


def whole(place: Path) -> float | None:
    """The bias in the checkpoint that stands, every checksum verified; None when there is none."""
    if not (place / "out.index").exists():
        return None
    try:
        return float(read_bundle(place / "out")["b"])
    except FileNotFoundError:
        return math.inf  # an index without its data


@pytest.mark.parametrize("shards", [None, (1, 1), (3, 1), (1, 3)], ids=str)
def test_killed_anywhere_the_next_run_repairs(
    tmp_path: Path, place: Path, shards: tuple[int, int] | None
) -> None:
    """Between any two changes: nothing half is ever called a checkpoint, and nothing is lost."""
    old, new = shards or (0, 1)
    run, before_run = a_run(tmp_path / "run", new), a_run(tmp_path / "before", old or 1)
    command = [*words(run, place), *(["--overwrite"] if old else [])]
    cmd(*command)
    expected, fresh_value = outputs(place), whole(place)
    emptied(place)
    old_value = None
    if old:
        cmd(*words(before_run, place, "0.9"))
        old_value = whole(place)
    start = tmp_path / "start"
    shutil.copytree(place, start)
    for nth in itertools.count(1):
        shutil.rmtree(place)
        shutil.copytree(start, place)
        if not killed_at(nth, command):
            break
        # What stands, stands whole: the old one, the new one, or none.
        assert whole(place) in (None, old_value, fresh_value), nth
        after = tmp_path / f"after-{nth}"
        shutil.copytree(place, after)
        # Somebody runs something else without --overwrite: what was there is there again.
        code = main(words(run, after, "0.25"))
        found = whole(after)
        if code == 14:
            assert found in (old_value, fresh_value), nth
            assert found is not None, nth
        else:
            assert (code, old_value) == (0, None), nth
        assert ".out.ema-avg.old" not in os.listdir(after), nth
        # The same again: all is as if it had never been killed.
        cmd(*command)
        assert checkpoint_in(place) == checkpoint_of(expected), nth
        assert ".out.ema-avg.old" not in os.listdir(place), nth
    assert nth > 8


@pytest.mark.parametrize("left", ["data", "data and aside"])
def test_what_is_not_ours_is_not_repaired_away(run: Path, place: Path, left: str) -> None:
    """Somebody's data without an index stays, though a killed run's temporary lies beside it."""
    mine = place / "out.data-00002-of-00003"
    mine.write_bytes(b"mine")
    temporary = place / ".out.ema-avg.tmp"
    temporary.mkdir()
    (temporary / "out.data-00000-of-00001").write_bytes(b"half")
    if left != "data":
        (place / ".out.ema-avg.old").mkdir()
    cmd(*words(run, place), code=14)
    assert mine.read_bytes() == b"mine"
