"""An update that fails leaves the state as it was, and the next one is none the worse for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Failing, cmd, write_checkpoint
from stores import (
    Files,
    files_of,
    slot_of,
    tree,
    update,
    values,
    what_counts,
    without_barriers,
    write_steps,
)

import ema_cli
from ema_cli import updating
from ema_cli.engine import Progress
from ema_cli.errors import Disagreement, EmaError, InputError, NonFinite, StorageError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    without_barriers(monkeypatch)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five checkpoints."""
    return write_steps(tmp_path / "run", [100, 200, 300, 400, 500])


def state_of(folder: Path, paths: list[Path], groups: int = 1) -> Path:
    """Return a new state that averaged some checkpoints."""
    for k in range(groups):
        update(folder, paths[k::groups] if groups == 1 else paths[k : k + 1], decay=0.5)
    return folder


# ---------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("event", [0, 1], ids=["before", "after"])
def test_an_interrupted_update(
    error: type[BaseException], event: int, paths: list[Path], tmp_path: Path
) -> None:
    """Whoever listens to its progress may end it; what counts is never written to."""
    state, expected = state_of(tmp_path / "S", paths[:2]), state_of(tmp_path / "E", paths)
    before, events = what_counts(state), []

    def stop(progress: Progress) -> None:
        assert what_counts(state) == before
        events.append(progress)
        if len(events) == event + 1:
            raise error

    for _ in range(2):
        events.clear()
        with pytest.raises(error):
            update(state, paths, decay=0.5, on_event=stop)
        assert what_counts(state) == before
    assert update(state, paths, decay=0.5).checkpoints == 5
    assert slot_of(state).read_bytes() == slot_of(expected).read_bytes()


def test_an_interrupted_creation(paths: list[Path], tmp_path: Path) -> None:
    """There is no generation yet; the next update makes one, of whatever settings."""
    state = tmp_path / "S"

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    for decay in (0.9, 0.5):
        with pytest.raises(KeyboardInterrupt):
            update(state, paths, decay=decay, on_event=stop)
        cmd("inspect", state, code=12)
    update(state, paths[:3], decay=0.5)
    assert slot_of(state).read_bytes() == slot_of(state_of(tmp_path / "E", paths[:3])).read_bytes()


class Dying(ThreadPoolExecutor):
    """An executor whose workers die with their first task."""

    def submit(self, *given: Any, **more: Any) -> Future[Any]:
        """Fail as a pool of processes does when one is killed."""
        del given, more
        raise RuntimeError("a worker was killed")


def test_a_dying_executor(paths: list[Path], tmp_path: Path) -> None:
    """As whatever else may go wrong."""
    state = state_of(tmp_path / "S", paths[:2])
    before = what_counts(state)
    with Dying(1) as executor, pytest.raises(RuntimeError, match="was killed"):
        update(state, paths, decay=0.5, executor=executor)
    assert what_counts(state) == before


# ---------------------------------------------------------------------------- a broken disk


@pytest.mark.parametrize("first", [False, True], ids=["an update", "the creation"])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "open", "ftruncate", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_call_that_fails(
    call: str, code: int, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call in turn: it is told, the state counts as before or as after, nothing between."""
    paths = write_steps(tmp_path / "run", [100, 200, 300])
    after = what_counts(state_of(tmp_path / "E", paths, groups=3 if not first else 1))
    known = slots_and_steps(after)
    failed = 0
    for nth in range(1, 100):
        state = tmp_path / f"S{nth}"
        for path in [] if first else paths[:2]:
            update(state, path, decay=0.5)
        before = {} if first else what_counts(state)
        failing = Failing(getattr(os, call), nth, code)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                update(state, paths, decay=0.5)
            except EmaError:
                failed += 1
        if len(failing.calls) < nth:
            break
        if not first:
            now = what_counts(state)
            assert now == before or slots_and_steps(now) == known
        update(state, paths, decay=0.5)
        assert slots_and_steps(what_counts(state)) == known
        assert len(list(state.glob("*.tmp"))) == 0
    assert failed > 0


def slots_and_steps(counts: Files) -> tuple[bytes, int]:
    """Return the bytes of the slot that counts, and how many checkpoints it averages."""
    [slot] = [data for name, data in counts.items() if name.startswith("slot.")]
    return slot, counts["ledger"].count(b"\n")


def test_a_disk_that_is_full_is_found_before_any_work(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both slots are made at once, so that no later update needs room for another."""
    state = tmp_path / "S"
    real, made = updating.durable.reserve, []

    def reserve(fd: int, n_bytes: int, path: str) -> bool:
        made.append(os.path.basename(path))
        if made[-1] == "slot.1":
            raise StorageError("full")
        return real(fd, n_bytes, path)

    monkeypatch.setattr("ema_cli.durable.reserve", reserve)
    events: list[Progress] = []
    with pytest.raises(StorageError):
        update(state, paths, decay=0.5, on_event=events.append)
    assert (made, events) == (["slot.0", "slot.1"], [])


# ---------------------------------------------------------------------------- wrong input


def refused(state: Path, runs: Any, error: type[EmaError], code: int, **given: Any) -> EmaError:
    """Check that an update is refused and that the state is what it was; return why."""
    before = tree(state)
    with pytest.raises(error) as caught:
        update(state, runs, **{"decay": 0.5, **given})
    assert caught.value.exit_code == code
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    runs = [runs] if isinstance(runs, Path) else runs
    cmd("run", *runs, "--state", state, *(words or ["--decay", "0.5"]), code=code)
    counts = what_counts(state)
    assert counts == {**counts, **{k: v for k, v in before.items() if k in counts}}
    return caught.value


OTHERS: dict[str, dict[str, Any]] = {
    "another shape": {"bias": np.float32([1, 2, 3])},
    "another dtype": {"bias": np.float64([1, 2])},
    "one more": {"scale": np.float32([1])},
    "now an integer": {"bias": np.int32([1, 2])},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_model_is_refused(other: dict[str, Any], paths: list[Path], tmp_path: Path) -> None:
    """Whatever tensor differs from those of the state is named; also one that is missing."""
    state = state_of(tmp_path / "S", paths[:2])
    new = write_steps(tmp_path / "new", [600, 700], **other)
    error = refused(state, new, Disagreement, 13)
    [name] = other
    assert f"'{name}'" in error.message and "model-" in error.message
    missing = write_checkpoint(tmp_path / "m-600.safetensors", {"kernel": values(1)["kernel"]})
    assert "'bias'" in refused(state, missing, Disagreement, 13).message
    mixed = [*paths[2:], *new]
    assert "model-" in refused(state, mixed, Disagreement, 13).message
    assert update(state, paths, decay=0.5).step == 500


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(
    value: float, paths: list[Path], tmp_path: Path
) -> None:
    """With the checkpoint and the tensor it stands in; unless it is allowed from the start."""
    state = state_of(tmp_path / "S", paths[:2])
    [new] = write_steps(tmp_path / "run", [600], bias=np.float32([1, value]))
    error = refused(state, tmp_path / "run", NonFinite, 17)
    assert "'bias'" in error.message and new.name in error.message
    new.unlink()
    assert update(state, paths, decay=0.5).step == 500


def test_a_value_that_may_be_infinite_stays(paths: list[Path], tmp_path: Path) -> None:
    """As without a state."""
    write_steps(tmp_path / "run", [600], bias=np.float32([1, np.inf]))
    given = {"decay": 0.5, "non_finite": "allow"}
    for path in sorted((tmp_path / "run").iterdir()):
        update(tmp_path / "S", path, **given)
    ema_cli.export(tmp_path / "S", tmp_path / "a.safetensors", non_finite="allow")
    ema_cli.average_run(tmp_path / "run", tmp_path / "b.safetensors", **given)
    assert files_of(tmp_path / "a.safetensors") == files_of(tmp_path / "b.safetensors")
    assert np.isinf(ema_cli.inspect(tmp_path / "S").weights[0]).sum() == 0


def test_a_value_too_large_for_its_output(paths: list[Path], tmp_path: Path) -> None:
    """It is found where it becomes infinite: the state is none the worse."""
    write_steps(tmp_path / "run", [600], bias=np.float32([1, 1e38]))
    update(tmp_path / "S", tmp_path / "run", decay=0.5)
    out = tmp_path / "out.safetensors"
    with pytest.raises(NonFinite, match="'bias'"):
        ema_cli.export(tmp_path / "S", out, dtype="float16")
    assert not out.exists()
    ema_cli.export(tmp_path / "S", out, dtype="float16", non_finite="allow")
    ema_cli.export(tmp_path / "S", tmp_path / "wide.safetensors")


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": lambda path: write_checkpoint(path, values(7)),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 8),
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: os.replace(write_checkpoint(path.with_name("x"), values(7)), path),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("moment", ["first task", "last task", "commit"])
@pytest.mark.parametrize("which", [2, 4], ids=["an early one", "the last one"])
def test_a_checkpoint_that_changes_while_it_is_read(
    change: Callable[[Path], object],
    moment: str,
    which: int,
    paths: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never half of one and half of another: nothing counts of it."""
    state = state_of(tmp_path / "S", paths[:2])
    before, done = what_counts(state), []

    def once() -> None:
        if not done:
            done.append(change(paths[which]))

    def on_event(event: Progress) -> None:
        if moment == "first task" or (moment == "last task" and event.read == event.total):
            once()

    if moment == "commit":
        real = updating.skeleton.keep

        def keep(*given: Any) -> Any:
            once()
            return real(*given)

        monkeypatch.setattr("ema_cli.states.skeleton.keep", keep)
    try:
        update(state, paths, decay=0.5, on_event=on_event)
    except InputError:
        assert what_counts(state) == before
    else:  # rotation may remove what was read to its end
        assert not paths[which].exists() and which == 2 and moment != "first task"
    assert done
    write_checkpoint(paths[which], values(100 * (which + 1)))
    update(state, paths, decay=0.5)
    assert slot_of(state).read_bytes() == slot_of(state_of(tmp_path / "E", paths)).read_bytes()


def test_a_slot_of_another_process_is_not_believed(paths: list[Path], tmp_path: Path) -> None:
    """What a failed write may have left in the spare slot is written anew."""
    expected = state_of(tmp_path / "E", paths)
    for k, junk in enumerate((b"\xff" * 10, b"", b"x", None)):
        state = state_of(tmp_path / f"S{k}", paths[:2])
        [spare] = [path for path in state.glob("slot.*") if path != slot_of(state)]
        data = spare.read_bytes()
        spare.write_bytes(bytes(len(data)) if junk is None else data[: 4096 + len(junk)] + junk)
        assert update(state, paths, decay=0.5).step == 500
        assert slot_of(state).read_bytes() == slot_of(expected).read_bytes()


def test_spilled_checkpoints_leave_nothing_behind(tmp_path: Path) -> None:
    """What cannot be read in place is unpacked beside the state and removed."""
    (tmp_path / "run").mkdir()
    for step in (1, 2, 3):
        np.savez_compressed(tmp_path / "run" / f"m-{step}.npz", **values(step))

    def stop(event: Progress) -> None:
        raise KeyboardInterrupt

    state = tmp_path / "states" / "S"
    with pytest.raises(KeyboardInterrupt):
        update(state, tmp_path / "run", decay=0.5, on_event=stop)
    assert os.listdir(state.parent) == ["S"]
    update(state, tmp_path / "run", decay=0.5)
    assert os.listdir(state.parent) == ["S"]
    assert not [name for name in tree(state) if "spill" in name]
