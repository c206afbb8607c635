"""A state on disk: what its files say, who may read and write it when, what is cleaned up."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bits_equal, cmd, read_checkpoint
from safetensors import safe_open
from stores import (
    document,
    documents,
    exported,
    manifest_of,
    sealed,
    slot_of,
    tree,
    update,
    values,
    what_counts,
    without_barriers,
    write_steps,
)

import ema_cli
from ema_cli import specs, updating
from ema_cli.checksums import crc32c
from ema_cli.engine import Progress
from ema_cli.errors import DamagedState, Locked, OutputExists, UnsupportedInput
from ema_cli.schedules import schedule
from ema_cli.states import commit, store
from ema_cli.states.commit import OpenState
from ema_cli.states.records import Row

SPECS = ["mean", "half-life:150"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    without_barriers(monkeypatch)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five checkpoints."""
    return write_steps(tmp_path / "run", [100, 200, 300, 400, 500])


def state_of(folder: Path, paths: list[Path], **given: Any) -> Path:
    """Return a new state that averaged some checkpoints, one update each."""
    for path in paths:
        update(folder, path, **{"decay": 0.5, **given})
    return folder


# ---------------------------------------------------------------------------- what it says


def test_nothing_new_is_no_error(paths: list[Path], tmp_path: Path) -> None:
    """The state is as it was, to the byte; nothing is read."""
    state = state_of(tmp_path / "S", paths[:3])
    before = tree(state)
    for _ in range(2):
        done = update(state, paths[:3], decay=0.5)
        assert (done.applied, done.step, done.checkpoints, done.read) == ((), 300, 3, 0)
        assert tree(state) == before


def test_the_ledger_tells_what_was_mixed_in(paths: list[Path], tmp_path: Path) -> None:
    """Step, name, path, each file as it was, and the very coefficients of the schedule."""
    state = tmp_path / "S"
    update(state, paths[:1], average=SPECS)
    update(state, paths[1:], average=SPECS)
    rows = documents(state, "ledger")
    steps = [100, 200, 300, 400, 500]
    averages = specs.parse_averages(
        SPECS, None, num_updates=None, init="first", zero_debias=False, read_text=str
    )
    schedules = [schedule(average, steps, [path.name for path in paths]) for average in averages]
    for k, (row, path) in enumerate(zip(rows, paths, strict=True)):
        assert row["coefficients"] == [one.coefficients[k].hex() for one in schedules]
        assert (row["step"], row["name"], row["path"]) == (steps[k], path.name, str(path))
        assert row["missed"] == "" and row["generation"] == (1 if k == 0 else 2)
        [[name, size, time, digest]] = row["files"]
        status = path.stat()
        assert (name, size, time) == (str(path), status.st_size, status.st_mtime_ns)
        assert len(bytes.fromhex(digest)) == 32
    found = ema_cli.inspect(state)
    assert [row.step for row in found.rows] == steps
    assert found.weights == tuple(one.weights() for one in schedules)


def test_every_small_file_is_sealed_and_told_of(paths: list[Path], tmp_path: Path) -> None:
    """``ROOT`` has the checksums of the others, and is small enough for one block."""
    state = state_of(tmp_path / "S", paths)
    root = document(state, "ROOT")
    assert (state / "FORMAT").read_bytes() == b"ema-avg state 1\n"
    assert len((state / "ROOT").read_bytes()) < 4096
    assert root["plan"] == crc32c((state / "plan").read_bytes())
    assert root["manifest"] == crc32c((state / manifest_of(state)).read_bytes())
    ledger = (state / "ledger").read_bytes()
    assert root["ledger"] == [len(ledger), crc32c(ledger)]
    for name in ("ROOT", "plan", "ledger", manifest_of(state)):
        for line in (state / name).read_bytes().splitlines():
            assert line.isascii() and line[:9] == b"%08x " % crc32c(line[9:])
    slot = slot_of(state).read_bytes()
    assert document(state, manifest_of(state))["checksums"] == [crc32c(slot)]
    assert sorted(path.name for path in state.iterdir()) == [
        *("FORMAT", "LOCK", "ROOT", "last-5", "ledger", "manifest-5", "plan", "slot.0", "slot.1")
    ]


def test_only_its_owner_gets_in(paths: list[Path], tmp_path: Path) -> None:
    """What was averaged may be as secret as the checkpoints."""
    state = state_of(tmp_path / "S", paths[:2])
    for path in [state, *state.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize("several", [False, True])
def test_a_slot_is_a_safetensors_file(several: bool, paths: list[Path], tmp_path: Path) -> None:
    """The reference reader opens it; data begins on a page, without gaps."""
    given = {"average": ["a=ema:0.5", "b=ema:0.5"], "decay": None} if several else {}
    state = state_of(tmp_path / "S", paths[:2], zero_debias=True, **given)
    slot = slot_of(state)
    header = int.from_bytes(slot.read_bytes()[:8], "little")
    assert (8 + header) % 4096 == 0
    prefixes = ["a/", "b/"] if several else [""]
    names = {f"{prefix}{name}" for prefix in prefixes for name in ("kernel", "bias")}
    names |= {f"{name}/ExponentialMovingAverage/biased" for name in names} | {"seen"}
    with safe_open(slot, framework="np") as reader:
        assert set(reader.keys()) == names
        assert all(reader.get_tensor(name).dtype == np.float32 for name in names - {"seen"})
    found = read_checkpoint(slot)
    assert slot.stat().st_size == 8 + header + sum(array.nbytes for array in found.values())
    assert bits_equal(found["seen"], np.asarray(values(200)["seen"]))
    biased = 0.5 * (0.5 * values(100)["bias"]) + 0.5 * values(200)["bias"]
    for prefix in prefixes:
        assert np.allclose(found[f"{prefix}bias"], biased / 0.75)
        assert np.allclose(found[f"{prefix}bias/ExponentialMovingAverage/biased"], biased)


# ---------------------------------------------------------------------------- readers


def test_readers_keep_their_slot(paths: list[Path], tmp_path: Path) -> None:
    """A writer goes on in a third slot, and removes it when nobody reads any more."""
    state = state_of(tmp_path / "S", paths[:1])
    first = what_counts(state)
    with store.reading(str(state)) as open_state:
        for path in paths[1:4]:
            update(state, path, decay=0.5)
            stamp = open_state.slot_stamp()
            assert Path(stamp.path).read_bytes() == first["slot.0"]
            for name in ("manifest-1", "slot.0"):
                assert (state / name).read_bytes() == first[name]
            assert (state / "last-1").is_dir()
        assert sorted(path.name for path in state.glob("slot.*")) == ["slot.0", "slot.1", "slot.2"]
    update(state, paths[4], decay=0.5)
    assert len(list(state.glob("slot.*"))) == 2
    for kind in ("manifest", "last"):
        assert [path.name for path in state.glob(f"{kind}-*")] == [f"{kind}-5"]
    again = state_of(tmp_path / "again", paths)
    assert slot_of(state).read_bytes() == slot_of(again).read_bytes()
    for path in write_steps(tmp_path / "more", [600, 700]):  # whatever its slots are called now
        for one in (state, again):
            update(one, path, decay=0.5)
        assert slot_of(state).read_bytes() == slot_of(again).read_bytes()
        assert len(list(state.glob("slot.*"))) == 2


def test_an_export_amid_an_update_is_of_the_generation_before(
    paths: list[Path], tmp_path: Path
) -> None:
    """To the byte, from the first task to the last."""
    state = state_of(tmp_path / "S", paths[:2])
    before, found = exported(state, tmp_path / "out"), []

    def export(event: Progress) -> None:
        del event
        found.append(exported(state, tmp_path / "out"))

    update(state, paths[2:], decay=0.5, on_event=export)
    assert len(found) >= 2 and all(one == before for one in found)
    assert exported(state, tmp_path / "out") != before


def test_a_reader_at_any_moment(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after every barrier and every rename, it finds one generation or the other."""
    state = state_of(tmp_path / "S", paths[:2])
    seen: list[Any] = []

    def reading(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any) -> Any:
            with monkeypatch.context() as inner:
                for name, real in originals.items():
                    inner.setattr(os, name, real)
                seen.append(exported(state, tmp_path / "out"))
                result = call(*given)
                seen.append(exported(state, tmp_path / "out"))
            return result

        return wrapped

    originals = {name: getattr(os, name) for name in ("fsync", "rename", "ftruncate")}
    before = exported(state, tmp_path / "out")
    for name, real in originals.items():
        monkeypatch.setattr(os, name, reading(real))
    update(state, paths[2:], decay=0.5)
    monkeypatch.undo()
    after = exported(state, tmp_path / "out")
    assert before != after and len(seen) > 10
    turn = seen.index(after)
    assert all(one == before for one in seen[:turn]) and all(one == after for one in seen[turn:])


# ---------------------------------------------------------------------------- writers


def test_there_is_one_writer(paths: list[Path], tmp_path: Path) -> None:
    """Another is told who it is."""
    state = state_of(tmp_path / "S", paths[:1])
    before = tree(state)
    with commit.writing(str(state)):
        done = cmd("run", paths[1], "--state", state, "--decay", "0.5", code=11)
        assert f"pid {os.getpid()}" in done.err
        assert exported(state, tmp_path / "out")
    assert tree(state) == before


MOMENTS = {
    "before it looks what is new": (updating, "news"),
    "before it takes a slot": (OpenState, "claim"),
    "before it writes": (OpenState, "reserve"),
    "before the ledger": (OpenState, "_append"),
    "before ROOT": (OpenState, "_check_alone"),
}


@pytest.mark.parametrize(("where", "name"), MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("other", [False, True], ids=["removed", "another writer"])
def test_a_lock_that_was_removed(
    where: Any,
    name: str,
    other: bool,
    paths: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever comes too late is refused; the state is that of one of them, and whole."""
    state = state_of(tmp_path / "S", paths[:1])
    before = what_counts(state)
    alone = state_of(tmp_path / "alone", paths[:2])
    real = getattr(where, name)
    done: list[bool] = []

    def late(*given: Any) -> Any:
        monkeypatch.setattr(where, name, real)
        (state / "LOCK").unlink()
        if other:
            try:
                update(state, paths[1], decay=0.5)
                done.append(True)
            except Locked:
                done.append(False)
        return real(*given)

    monkeypatch.setattr(where, name, late)
    with pytest.raises(Locked):
        update(state, paths, decay=0.5)
    if done == [True]:
        assert slot_of(state).read_bytes() == slot_of(alone).read_bytes()
        assert ema_cli.inspect(state).step == 200
    else:
        assert what_counts(state) == before
    update(state, paths, decay=0.5)
    assert ema_cli.inspect(state).step == 500


def test_a_ledger_that_another_process_went_on_with(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tells of a missed checkpoint takes no slot; his line is not cut off either."""
    state = state_of(tmp_path / "S", paths[:1])
    real = updating.skeleton.keep
    row = Row(150, "m", "m", (), (), "it was gone", 1)

    def late(*given: Any) -> Any:
        (state / "LOCK").unlink()
        with commit.writing(str(state)) as other:
            other.record([row])
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr("ema_cli.states.skeleton.keep", late)
        with pytest.raises(Locked):
            update(state, paths, decay=0.5)
    assert [found.step for found in ema_cli.inspect(state).rows] == [100, 150]
    assert update(state, paths, decay=0.5).checkpoints == 5


# ---------------------------------------------------------------------------- what was left


def test_another_directory_is_left_alone(paths: list[Path], tmp_path: Path) -> None:
    """One that holds anything, and a file; an empty one becomes a state."""
    before = tree(tmp_path / "run")
    with pytest.raises(OutputExists, match=r"found 'model-100\.safetensors'"):
        update(tmp_path / "run", paths, decay=0.5)
    cmd("run", *paths, "--state", tmp_path / "run", code=14)
    with pytest.raises(OutputExists, match="found a file"):
        update(paths[0], paths[1:], decay=0.5)
    assert tree(tmp_path / "run") == before
    (tmp_path / "deep" / "empty").mkdir(parents=True)
    for name in ("empty", "new/below"):
        assert update(tmp_path / "deep" / name, paths, decay=0.5).step == 500


def test_a_state_of_another_version_is_left_alone(paths: list[Path], tmp_path: Path) -> None:
    """By readers and writers."""
    state = state_of(tmp_path / "S", paths[:1])
    (state / "FORMAT").write_bytes(b"ema-avg state 2\n")
    before = tree(state)
    with pytest.raises(UnsupportedInput, match="version 1"):
        update(state, paths, decay=0.5)
    cmd("run", *paths, "--state", state, code=12)
    for words in (["inspect", state], ["export", state, "-o", tmp_path / "x.safetensors"]):
        assert "version 1" in cmd(*words, code=12).err
    assert tree(state) == before


@pytest.mark.parametrize("left", ["FORMAT", "plan", "slot", "all"])
def test_a_creation_that_was_killed_is_begun_anew(
    left: str, paths: list[Path], tmp_path: Path
) -> None:
    """With other settings too; for a reader there is nothing yet."""
    state = state_of(tmp_path / "S", paths[:1], decay=0.9)
    (state / "ROOT").unlink()
    kept = {"FORMAT": [], "plan": ["plan"], "slot": ["plan", "slot.0"]}.get(left)
    for path in [] if kept is None else state.iterdir():
        if path.name not in ("FORMAT", "LOCK", *kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left == "all":  # of a commit that came to nothing
        (state / "ledger").write_bytes(b"torn")
        (state / "ROOT.tmp").write_bytes(b"")
        (state / "slot.1").write_bytes(bytes(100))
    with pytest.raises(DamagedState, match="no generation"):
        ema_cli.inspect(state)
    alone = state_of(tmp_path / "alone", paths)
    assert update(state, paths, decay=0.5).checkpoints == 5
    assert slot_of(state).read_bytes() == slot_of(alone).read_bytes()
    assert document(state, "plan") == document(alone, "plan")
    assert document(state, "ROOT")["generation"] == 1


def test_what_does_not_count_is_cleared_away(paths: list[Path], tmp_path: Path) -> None:
    """A torn end of the ledger, temporary files, what belongs to other generations."""
    state = state_of(tmp_path / "S", paths[:3])
    expected = state_of(tmp_path / "expected", paths)
    before = what_counts(state)
    row = {**documents(state, "ledger")[0], "step": 350}
    with open(state / "ledger", "ab") as file:
        file.write(sealed(row) * 5 + sealed(row)[:40])
    for name in ("ROOT.tmp", "manifest-4.tmp", "plan.tmp", "manifest-2", "manifest-4", "progress"):
        (state / name).write_bytes(b"rubbish\n")
    for name in ("last-2", "last-4"):
        shutil.copytree(state / "last-3", state / name)
    shutil.copy(state / "slot.0", state / "slot.7")
    assert what_counts(state) == before and ema_cli.inspect(state).step == 300
    update(state, paths[:4], decay=0.5)
    update(state, paths, decay=0.5)
    names = {path.name for path in state.iterdir() if not path.name.startswith("slot.")}
    assert names == {*("FORMAT", "LOCK", "ROOT", "last-5", "ledger", "manifest-5", "plan")}
    assert len(list(state.glob("slot.*"))) == 2
    assert slot_of(state).read_bytes() == slot_of(expected).read_bytes()
    assert (state / "ledger").read_bytes() == (expected / "ledger").read_bytes()


def test_a_state_may_be_moved(paths: list[Path], tmp_path: Path) -> None:
    """It knows no path of its own; what it tells of sources is for people."""
    state = state_of(tmp_path / "S", paths[:3])
    (tmp_path / "elsewhere").mkdir()
    moved = state.rename(tmp_path / "elsewhere" / "T")
    for path in paths[:3]:
        path.rename(tmp_path / "elsewhere" / path.name)
    run = tmp_path / "elsewhere" / "run"
    paths[3].parent.rename(run)
    for path in (tmp_path / "elsewhere").glob("*.safetensors"):
        path.rename(run / path.name)
    done = update(moved, run, decay=0.5)
    assert ([row.step for row in done.applied], done.notes) == ([400, 500], ())
    alone = state_of(tmp_path / "alone", sorted(run.iterdir()))
    assert slot_of(moved).read_bytes() == slot_of(alone).read_bytes()


def test_the_plan_tells_its_settings(paths: list[Path], tmp_path: Path) -> None:
    """As the words of a command; and with which versions it was made."""
    state = state_of(tmp_path / "S", paths[:1])
    plan = json.loads((state / "plan").read_bytes()[9:])
    assert plan["settings"] == ["--decay", "0.5"]
    assert sorted(plan["averaged"]) == [["bias", "float32", [2]], ["kernel", "float32", [3, 5]]]
    assert plan["tool"]["ema-avg"] == ema_cli.__version__
