"""Outputs are published whole or not at all: refusals, failures at every call, left-overs."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import Failing, cmd, write_checkpoint, write_run

from ema_cli.cli import main

Files = dict[str, bytes]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of two tensors."""
    values = [{"w": np.full(4, k, np.float32), "b": np.float32(k)} for k in (1, 2, 3)]
    return write_run(tmp_path / "run", values)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where outputs go, with nothing else in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


FORMS = {
    "file": ("out.safetensors", []),
    "folder": ("out", ["--format", "safetensors-folder", "--max-shard-size", "8B"]),
}


def words(run: Path, place: Path, form: str, decay: str = "0.5") -> list[str]:
    """The command that writes an output of this form into `place`."""
    name, options = FORMS[form]
    return ["run", str(run), "-o", str(place / name), "--decay", decay, *options]


def contents(folder: Path) -> Files:
    """Every file below a folder, hidden ones too."""
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without_provenance(files: Files) -> Files:
    """Versions, paths and times in the provenance may differ; the outputs may not."""
    return {name: data for name, data in files.items() if not name.endswith(".ema.json")}


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("form", FORMS)
def test_an_existing_output_is_refused_and_replaced_on_request(
    run: Path, place: Path, form: str
) -> None:
    """14 without ``--overwrite`` and nothing changed; with it the new one stands alone."""
    cmd(*words(run, place, form))
    before = contents(place)
    assert "--overwrite" in cmd(*words(run, place, form, "0.9"), code=14).err
    assert contents(place) == before
    cmd(*words(run, place, form, "0.9"), "--overwrite")
    after = contents(place)
    assert set(after) == set(before)
    assert all(after[name] != before[name] for name in after if name.endswith(".ema.json"))


@pytest.mark.parametrize("way", ["itself", "symlink", "hardlink", "dots"])
def test_an_output_that_is_an_input_is_always_refused(run: Path, tmp_path: Path, way: str) -> None:
    """By whatever name the input is reached: 14, even with ``--overwrite``."""
    source = run / "model-step-200.safetensors"
    out = tmp_path / "o.safetensors"
    if way == "symlink":
        out.symlink_to(source)
    elif way == "hardlink":
        out.hardlink_to(source)
    else:
        out = source if way == "itself" else run / ".." / "run" / source.name
    before = contents(tmp_path)
    cmd("run", run, "-o", out, "--overwrite", code=14)
    assert contents(tmp_path) == before


def test_a_folder_that_holds_an_input_is_always_refused(digits_bf16: Path, run: Path) -> None:
    """An input's own folder, the run, and what they lie in: 14, even with ``--overwrite``."""
    for out in (digits_bf16 / "checkpoint-300", digits_bf16, digits_bf16.parent):
        cmd("run", digits_bf16, "-o", out, "--overwrite", code=14)
    for out in (run, run.parent):
        cmd("run", run, "-o", out, "--format", "safetensors-folder", "--overwrite", code=14)
    assert len(list(run.iterdir())) == 3


def test_a_directory_is_no_name_for_a_file(run: Path, place: Path) -> None:
    """A directory as OUT of a single file is 14, and the hint says what to write."""
    outcome = cmd("run", run, "-o", place, "--format", "safetensors", "--overwrite", code=14)
    assert f"hint: -o {place}/average.safetensors" in outcome.err
    assert contents(place) == {}


@pytest.mark.parametrize("kind", ["subfolder", "link", "notes", "no checkpoint", "a file"])
def test_only_a_folder_with_nothing_but_a_checkpoint_is_replaced(
    run: Path, place: Path, kind: str
) -> None:
    """``--overwrite`` deletes a checkpoint, never anything else that lies in the folder."""
    out = place / "out"
    if kind == "a file":
        out.write_bytes(b"mine")
    else:
        out.mkdir()
        if kind != "no checkpoint":
            write_checkpoint(out / "model.safetensors", {"w": np.float32(1)})
        if kind == "subfolder":
            (out / "results").mkdir()
        elif kind == "link":
            (out / "data").symlink_to(run)
        else:
            (out / "notes.txt").write_text("mine")
    before = contents(place)
    cmd(*words(run, place, "folder"), "--overwrite", code=14)
    assert contents(place) == before


# ---------------------------------------------------------------------------- failures


def emptied(folder: Path) -> None:
    """Remove everything in a folder."""
    shutil.rmtree(folder)
    folder.mkdir()


CALLS = [("fsync", errno.EIO), ("replace", errno.EIO), ("pwrite", errno.ENOSPC)]
CALLS += [("rename", errno.EIO), ("ftruncate", errno.EIO)]


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwriting"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("call", "code"), CALLS, ids=[call for call, _ in CALLS])
def test_a_failure_at_any_call_leaves_the_old_state_or_the_new(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, form: str,
    old: bool,
) -> None:  # fmt: skip
    """Exit 15 at call 1, 2, …: all is as it was, or published and settled by the next run."""
    cmd(*words(run, place, form))
    new = without_provenance(contents(place))
    for nth in itertools.count(1):
        emptied(place)
        before: Files = {}
        if old:
            cmd(*words(run, place, form, "0.9"), "--overwrite")
            before = contents(place)
        wrapped = Failing(getattr(os, call), nth, code)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, wrapped)
            exit_code = main([*words(run, place, form), *(["--overwrite"] if old else [])])
        if len(wrapped.calls) < nth:
            assert exit_code == 0
            break
        found, where = contents(place), f"{call} call {nth}"
        assert exit_code == 15, where
        if new.items() <= found.items():  # published already: whole, and the next run knows it
            cmd(*words(run, place, form))
            found = without_provenance(contents(place))
            assert found == new, where
        else:
            assert found == before, where
    assert nth > 1 or (call == "rename" and not (old and form == "folder"))


def test_a_file_size_limit_is_told_before_any_work(run: Path, place: Path) -> None:
    """RLIMIT_FSIZE below the output's size: 15, no traceback, and nothing left."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    done = subprocess.run(
        [sys.executable, "-m", "ema_cli", *words(run, place, "file")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (15, False)
    assert "File too large" in done.stderr
    assert contents(place) == {}


def test_a_full_disk_is_found_before_any_work(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less space than the output needs: 15, with what is needed and what is there."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=100, f_frsize=1))
    err = cmd(*words(run, place, "file"), code=15).err
    assert "the disk has 100 bytes free" in err
    assert contents(place) == {}


# ---------------------------------------------------------------------------- left-overs


def temporary(place: Path, form: str) -> Path:
    """The name under which an output grows."""
    return place / f".{FORMS[form][0]}.ema-avg.tmp"


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_never_write_one_output(run: Path, place: Path, form: str) -> None:
    """While another process holds the temporary the answer is 11, and its work stays."""
    path = temporary(place, form)
    path.mkdir() if form == "folder" else path.write_bytes(b"growing")
    held = os.open(path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert "another process" in cmd(*words(run, place, form), code=11).err
    finally:
        os.close(held)
    assert contents(place) == ({} if form == "folder" else {path.name: b"growing"})
    assert path.exists()


@pytest.mark.parametrize("left", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_what_a_killed_run_left_is_taken_over(run: Path, place: Path, form: str, left: str) -> None:
    """A stale temporary, file or folder, does not stop the next run and does not outlive it."""
    path = temporary(place, form)
    if left == "folder":
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"garbage")
    else:
        path.write_bytes(b"garbage" * 1000)
    cmd(*words(run, place, form))
    assert not path.exists()
    assert b"garbage" not in b"".join(contents(place).values())


@pytest.mark.parametrize("form", FORMS)
def test_a_link_at_the_temporary_name_is_not_followed(
    run: Path, place: Path, tmp_path: Path, form: str
) -> None:
    """Somebody else's link is an error, and what it points to stays whole."""
    victim = tmp_path / "victim"
    path = write_checkpoint(victim / "file" if form == "folder" else victim, {"w": np.float32(1)})
    before = path.read_bytes()
    temporary(place, form).symlink_to(victim)
    cmd(*words(run, place, form), code=15)
    assert path.read_bytes() == before
    assert not (place / FORMS[form][0]).exists()


def test_a_folder_set_aside_by_a_killed_replacement_is_repaired(run: Path, place: Path) -> None:
    """Killed between its two renames: the old folder is back, and safe without ``--overwrite``."""
    out, aside = place / "out", place / ".out.ema-avg.old"
    cmd(*words(run, place, "folder"))
    before = contents(place)
    out.rename(aside)
    cmd(*words(run, place, "folder", "0.9"), code=14)
    assert not aside.exists()
    assert contents(place) == before
    out.rename(aside)
    cmd(*words(run, place, "folder", "0.9"), "--overwrite")
    assert set(contents(place)) == set(before)
    assert contents(place) != before


def test_what_a_finished_replacement_left_aside_is_removed(run: Path, place: Path) -> None:
    """Killed after its two renames: the next run removes the old folder that still waits."""
    aside = place / ".out.ema-avg.old"
    cmd(*words(run, place, "folder"))
    before = contents(place)
    write_checkpoint(aside / "model.safetensors", {"w": np.float32(0)})
    cmd(*words(run, place, "folder", "0.9"), "--overwrite")
    assert set(contents(place)) == set(before)
