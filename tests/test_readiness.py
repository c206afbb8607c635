"""Which checkpoints of a growing run are ready: by what was seen, when, and in which order."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_checkpoint
from run_folders import step_files, step_folders
from tensorflow_bundles import write_bundle

from ema_cli.errors import Disagreement, UsageError
from ema_cli.live import readiness
from ema_cli.live.listing import list_files
from ema_cli.live.publishing import is_due
from ema_cli.live.readiness import GRACE_SECONDS, NEVER, QUIET_SECONDS, Lookout, Sight
from ema_cli.search import Choice
from ema_cli.states import commit
from ema_cli.states.records import Row

W = {"w": np.float32([1])}


class Clock:
    """Time that passes when a test says so; the wall clock may be another one."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        """Our own clock."""
        return self.now

    def time(self) -> float:
        """The clock of the files' times."""
        return self.now


class Run:
    """A run, a lookout over it, and the time at which its files are written."""

    def __init__(self, path: Path, clock: Clock, **choice: Any) -> None:
        self.path, self.clock = path / "run", clock
        self.path.mkdir(exist_ok=True)
        self.lookout = Lookout(str(self.path), Choice(**choice), str(path / "state"))
        self.last: int | None = None

    def touch(self, *names: str, ago: float = 0.0) -> None:
        """Let files have been written so many seconds ago; all of them without names."""
        paths = [self.path / name for name in names] or list(self.path.rglob("*"))
        for path in paths:
            os.utime(path, (self.clock.now - ago,) * 2)

    def steps(self, *steps: int, ago: float = 0.0) -> None:
        """Write checkpoints."""
        step_files(self.path, *steps)
        self.touch(*(f"model-step-{step}.safetensors" for step in steps), ago=ago)

    def look(self, after: float = 0.0) -> Sight:
        """Look when some time has passed."""
        self.clock.now += after
        return self.lookout.look(self.last)

    def ready(self, after: float = 0.0) -> list[int]:
        """Return the steps that are ready then."""
        return [checkpoint.step or 0 for checkpoint in self.look(after).ready]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that stands still."""
    made = Clock()
    monkeypatch.setattr(readiness, "time", made)
    return made


@pytest.fixture
def run(tmp_path: Path, clock: Clock) -> Run:
    """An empty run."""
    return Run(tmp_path, clock)


# ---------------------------------------------------------------------------- quiet


def test_one_look_is_never_enough(run: Run) -> None:
    """Two looks at least two seconds apart must show the same, however old the file is."""
    run.steps(100, ago=1000)
    assert run.ready() == []
    assert run.look().soon == QUIET_SECONDS
    assert run.ready(1.9) == []
    assert run.ready(0.1) == [100]


def test_a_young_file_waits_for_its_own_time(run: Run) -> None:
    """Whenever it was seen first, nothing has changed for two seconds before it is read."""
    run.steps(100)
    run.look()
    run.clock.now += 1
    run.steps(200)
    assert run.look(1.5).soon == pytest.approx(2.0)
    assert run.ready(0.0) == [100]
    assert run.ready(1.9) == [100]
    assert run.ready(0.2) == [100, 200]


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_what_changes_begins_anew(run: Run, change: str) -> None:
    """Size, time or inode: any of them means that somebody writes."""
    run.steps(100, ago=100)
    path = run.path / "model-step-100.safetensors"
    run.look()
    run.clock.now += 3
    if change == "size":
        write_checkpoint(path, {"w": np.float32([1, 2])})
    if change == "inode":
        shutil.copy(path, run.path / ".x")
        (run.path / ".x").replace(path)
    run.touch(path.name, ago=99 if change == "mtime" else 103)
    assert run.ready() == []
    assert run.ready(1.0) == []
    assert run.ready(1.0) == [100]


def test_a_time_in_the_future_is_another_clock_s(run: Run) -> None:
    """A file server whose clock is an hour ahead: only what we saw counts."""
    run.steps(100, ago=-3600)
    assert run.ready() == []
    assert run.ready(1.9) == []
    assert run.ready(0.2) == [100]


def test_a_folder_is_quiet_when_all_in_it_is(run: Run) -> None:
    """Trainers write the optimizer and their state after the weights."""
    step_folders(run.path, 100)
    run.touch(ago=100)
    run.look()
    (run.path / "checkpoint-100" / "optimizer.pt").write_bytes(b"x")
    run.clock.now += 3
    run.touch("checkpoint-100/optimizer.pt")
    assert run.ready() == []
    assert run.ready(2.0) == [100]


def test_a_prefix_is_quiet_when_its_files_are(run: Run) -> None:
    """Neither the files of another prefix nor the state file are its own."""
    write_bundle(run.path / "model.ckpt-100", W)
    run.touch(ago=100)
    run.look()
    run.clock.now += 2
    write_bundle(run.path / "model.ckpt-200", W)
    (run.path / "checkpoint").write_text("")
    for path in run.path.glob("*200*"):
        os.utime(path, (run.clock.now,) * 2)
    assert run.ready() == [100]
    assert run.ready(2.0) == [100, 200]


# ---------------------------------------------------------------------------- order


def test_only_newer_steps_count(run: Run) -> None:
    """And not what --steps leaves out."""
    run.steps(100, 200, 300, ago=100)
    run.last = 100
    run.look()
    assert run.ready(2.0) == [200, 300]
    run.last = 300
    assert run.ready(2.0) == []
    assert run.look().soon == NEVER


def test_nothing_is_taken_before_an_older_one_that_is_written(run: Run) -> None:
    """Half a file has a number all the same; it is worth waiting for, for half a minute."""
    run.steps(100, 300, ago=100)
    (run.path / "model-step-200.safetensors").write_bytes(b"x" * 9)
    run.touch("model-step-200.safetensors", ago=10)
    run.look()
    sight = run.look(2.0)
    assert [c.step for c in sight.ready] == [100]
    assert (sight.expected, sight.lost) == (200, ())
    assert sight.soon == pytest.approx(GRACE_SECONDS - 12)
    assert "step 200  " in sight.waiting[0]
    sight = run.look(GRACE_SECONDS - 12)
    assert [c.step for c in sight.ready] == [100, 300]
    assert [(lost.step, lost.checkpoint) for lost in sight.lost] == [(200, None)]
    assert run.look(1.0).lost == ()
    assert [entry.path[-11:] for entry in run.lookout.unusable(None)] == ["safetensors"]
    assert run.lookout.unusable(100) == ()


def test_the_newest_is_waited_for_for_ever(run: Run) -> None:
    """Nothing comes after it, so there is no reason to give it up."""
    run.steps(100, ago=100)
    (run.path / "model-step-200.safetensors").write_bytes(b"x" * 9)
    run.touch(ago=1e6)
    run.last = 100
    run.look()
    sight = run.look(1e6)
    assert (sight.ready, sight.lost, sight.soon, sight.expected) == ((), (), NEVER, 200)
    run.steps(200)
    run.look()
    run.look(2.0)
    assert run.ready(2.0) == [200]


@pytest.mark.parametrize("kind", ["folder", "empty", "data"])
@pytest.mark.parametrize("old", [False, True])
def test_what_may_become_a_checkpoint_is_waited_for_while_it_is_young(
    run: Run, kind: str, old: bool
) -> None:
    """A numbered folder without weights, data without an index; `run` passes over old ones."""
    write_bundle(run.path / "model.ckpt-300", W)
    if kind != "data":
        (run.path / "checkpoint-200").mkdir()
        if kind == "folder":
            (run.path / "checkpoint-200" / "config.json").touch()
    else:
        write_bundle(run.path / "model.ckpt-200", W)
        (run.path / "model.ckpt-200.index").unlink()
    run.touch(ago=1000 if old else 1)
    run.look()
    assert run.ready(2.0) == ([300] if old else [])
    sight = run.look(GRACE_SECONDS)
    assert [c.step for c in sight.ready] == [300]
    assert sight.lost == ()


def test_what_is_no_checkpoint_is_not_waited_for(run: Run) -> None:
    """Temporary names, logs with numbers, aliases, hidden files, links, the state."""
    run.steps(300, ago=100)
    for name in ("model-step-200.safetensors.tmp", "log-200.txt", "last.safetensors", ".x-200.pt"):
        (run.path / name).write_bytes(b"x")
    run.look()
    assert run.ready(2.0) == [300]


def test_a_link_to_nothing_is_given_up_like_any_other(run: Run) -> None:
    """Its target may come."""
    run.steps(300, ago=100)
    link = run.path / "model-step-200.safetensors"
    link.symlink_to("nowhere")
    os.utime(link, (run.clock.now,) * 2, follow_symlinks=False)
    run.look()
    assert run.ready(2.0) == []
    sight = run.look(GRACE_SECONDS)
    assert [c.step for c in sight.ready] == [300]
    assert [lost.reason for lost in sight.lost] == ["No such file or directory"]


def test_a_glob_may_lead_into_folders(tmp_path: Path, clock: Clock) -> None:
    """What lies beside in the same folder does not make it any younger."""
    run = Run(tmp_path, clock, glob="kept/*.safetensors")
    step_files(run.path / "kept", 100)
    run.touch(ago=100)
    run.look()
    run.clock.now += 2
    step_files(run.path / "kept", 200)
    run.touch("kept/model-step-200.safetensors")
    assert run.ready() == [100]
    assert run.ready(2.0) == [100, 200]


# ---------------------------------------------------------------------------- lost


def test_what_was_seen_and_is_gone_is_lost_once(run: Run) -> None:
    """Seen with a step, complete or not, and neither applied nor there any more."""
    run.steps(100, 200, 300)
    (run.path / "model-step-400.safetensors").write_bytes(b"x" * 9)
    run.look()
    run.last = 100
    for step in (100, 200, 400):
        (run.path / f"model-step-{step}.safetensors").unlink()
    sight = run.look(0.1)
    assert [(lost.step, lost.reason) for lost in sight.lost] == [
        (200, "rotated away"),
        (400, "rotated away"),
    ]
    assert sight.lost[0].checkpoint is not None
    assert sight.lost[1].checkpoint is None
    assert run.look(0.1).lost == ()
    assert run.ready(2.0) == [300]


def test_one_that_gets_another_name_is_not_lost(run: Run) -> None:
    """The step is still there."""
    run.steps(100)
    run.look()
    (run.path / "model-step-100.safetensors").rename(run.path / "kept-100.safetensors")
    assert run.look().lost == ()
    assert run.ready(2.0) == [100]


def test_one_that_was_refused_counts_as_damaged_until_it_changes(run: Run) -> None:
    """Its headers are fine, but reading it found that its checksums are not."""
    run.steps(100, 200, ago=100)
    run.look()
    [first, _] = run.look(2.0).ready
    run.lookout.refuse(first, "wrong checksum")
    assert [entry.reason for entry in run.lookout.unusable(None)] == ["wrong checksum"]
    run.touch("model-step-100.safetensors")
    assert run.lookout.look(None).ready == ()
    assert run.ready(1.0) == []
    assert run.ready(1.0) == [100, 200]
    run.lookout.refuse(run.look().ready[0], "wrong checksum")
    assert run.look().waiting[0].endswith("wrong checksum")
    sight = run.look(GRACE_SECONDS)
    assert [lost.reason for lost in sight.lost] == ["wrong checksum"]
    assert [c.step for c in sight.ready] == [200]


# ---------------------------------------------------------------------------- searching


def test_headers_are_read_when_something_came_or_settled(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that grows at each look is never looked into, nor is what lies there unchanged."""
    searches: list[None] = []
    whole = readiness.runs.find

    def find(*args: Any) -> Any:
        searches.append(None)
        return whole(*args)

    monkeypatch.setattr(readiness.runs, "find", find)
    run.steps(*range(100, 1100, 100), ago=100)
    (run.path / "train.log").write_bytes(b"")
    assert run.ready() == []
    assert len(run.ready(2.0)) == 10
    for k in range(10):
        with (run.path / "train.log").open("ab") as file:
            file.write(b"x")
        run.look(float(k))
    assert len(searches) == 1
    run.look()
    assert len(searches) == 2
    run.steps(1100)
    run.look()
    assert len(searches) == 3


def test_a_run_that_makes_no_sense_is_given_time(run: Run) -> None:
    """Two files of one step may be one that is moved; not for half a minute."""
    run.steps(100, 200, ago=100)
    run.look()
    shutil.copy(run.path / "model-step-200.safetensors", run.path / "copy-200.safetensors")
    sight = run.look(2.0)
    assert sight.ready == ()
    assert "step 200 twice" in sight.waiting[0]
    assert sight.soon == GRACE_SECONDS
    with pytest.raises(Disagreement, match="step 200 twice"):
        run.look(GRACE_SECONDS)
    (run.path / "copy-200.safetensors").unlink()
    run.look()
    assert run.ready(2.0) == [100, 200]


def test_a_checkpoint_is_no_run(run: Run) -> None:
    """Until numbered ones come, which are what is followed."""
    write_checkpoint(run.path / "model.safetensors", W)
    sight = run.look()
    assert sight.run is not None
    assert "no run" in sight.run.notes[0]
    step_folders(run.path, 100)
    run.look()
    assert run.ready(2.0) == [100]


def test_a_run_that_vanishes_as_a_whole_is_no_loss(run: Run) -> None:
    """A file system that was unmounted comes back."""
    run.steps(100)
    run.look()
    run.path.rename(run.path.parent / "elsewhere")
    sight = run.look(1.0)
    assert (sight.lost, sight.ready) == ((), ())
    assert "not there yet" in sight.waiting[0]
    (run.path.parent / "elsewhere").rename(run.path)
    assert run.look().lost == ()
    assert run.ready(2.0) == [100]


def test_the_state_is_not_listed(run: Run, tmp_path: Path) -> None:
    """What we write ourselves is no news; a folder of the same name elsewhere is."""
    state = run.path / "state"
    for folder in (state, run.path / "other" / "state"):
        (folder / "pins").mkdir(parents=True)
    files = list_files(str(run.path), 0, str(state))
    assert files is not None
    assert files.entries.keys() == {"other"}
    assert list_files(str(tmp_path / "nowhere"), 0, str(state)) is None


def test_a_state_with_a_number_is_no_folder_to_wait_for(run: Run) -> None:
    """Whoever's it is."""
    run.steps(300, ago=100)
    with commit.writing(str(run.path / "step-200")):
        run.look()
        assert run.ready(2.0) == [300]


def test_an_expression_that_is_none_is_refused_at_once(tmp_path: Path, clock: Clock) -> None:
    """Before there is a name to try it on."""
    with pytest.raises(UsageError, match="--step-from"):
        Run(tmp_path, clock, step_from="(")


# ---------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("batches", "every", "due"),
    [
        ([], 1, False),
        ([1], 1, True),
        ([1], 2, False),
        ([1, 1], 2, True),
        ([3], 2, True),
        ([3, 1], 2, True),
        ([2, 1], 2, False),
        ([1, 1, 1], 5, False),
        ([4, 7], 5, True),
        ([5, 1], 5, False),
    ],
)
def test_an_output_is_due_when_the_last_batch_crossed_a_multiple(
    batches: list[int], every: int, due: bool
) -> None:
    """However the checkpoints came, and whatever was missed between them."""
    rows = []
    for generation, count in enumerate(batches, start=1):
        rows += [Row(0, "", "", (), (0.5,), "", generation)] * count
        rows += [Row(0, "", "", (), (), "rotated away", generation)]
    assert is_due(rows, every) is due
