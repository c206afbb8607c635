"""`watch` follows a training: what is complete is averaged in order, once, with the bits of run."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import ROWS, bytes_of
from helpers import cmd, write_checkpoint
from live import QUIET, Live, Training

import ema_cli
from ema_cli import updating
from ema_cli.formats import FORMATS
from ema_cli.live import readiness, watching
from ema_cli.live.reports import Applied, Dropped, Published
from ema_cli.states import store

OUT = "out-{step}.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait as long as people do."""
    monkeypatch.setattr(readiness, "QUIET_SECONDS", QUIET)
    monkeypatch.setattr(readiness, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(watching, "SHORTEST_INTERVAL", 0.01)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """A training that saves safetensors files."""
    return Training(tmp_path)


# ---------------------------------------------------------------------------- writers


def test_what_is_renamed_into_place_is_applied_as_it_comes(
    training: Training, tmp_path: Path
) -> None:
    """Each new checkpoint is an update of its own, and an output follows each."""
    with Live(training.run, tmp_path / "state", tmp_path / OUT, until_step=300) as live:
        for step in (100, 200, 300):
            training.save(step)
            live.until_applied(step)
        result = live.end()
    assert (result.ended, result.step, result.checkpoints) == ("until-step", 300, 3)
    assert [Path(w.path).name for w in result.outputs] == [OUT.format(step=s) for s in live.steps()]
    assert result.missed == result.unusable == ()
    training.check(result, tmp_path / "out-300.safetensors")
    assert not (tmp_path / "state" / "pins").exists()


@pytest.mark.parametrize("preallocate", [False, True])
def test_what_is_written_in_place_waits_until_it_is_quiet(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preallocate: bool
) -> None:
    """A file that is allocated first looks complete, and is all zeros; only time tells."""
    monkeypatch.setattr(readiness, "QUIET_SECONDS", 0.4)
    with Live(training.run, tmp_path / "state", tmp_path / OUT, until_step=200) as live:
        for step in (100, 200):
            training.save_slowly(step, preallocate=preallocate)
            live.until_applied(step)
        result = live.end()
    training.check(result, tmp_path / "out-200.safetensors")


def test_a_newer_one_waits_for_an_older_one_that_is_being_written(
    training: Training, tmp_path: Path
) -> None:
    """Steps are applied in their order, whichever is finished first."""
    with Live(training.run, tmp_path / "state", tmp_path / OUT, until_step=300) as live:
        writer = threading.Thread(target=training.save_slowly, args=(200, 0.8))
        training.save(100)
        writer.start()
        training.save(300)
        writer.join()
        result = live.end()
    assert live.steps() == [100, 200, 300]
    training.check(result, tmp_path / "out-300.safetensors")


def test_a_fast_writer_that_rotates_loses_nothing_silently(
    training: Training, tmp_path: Path
) -> None:
    """Every checkpoint that was seen is applied or missed, and what is applied is whole."""
    steps = list(range(10, 610, 10))
    for step in steps:
        training.files(step)
    with Live(training.run, tmp_path / "state", tmp_path / "out.safetensors") as live:
        for k, step in enumerate(steps):
            training.save(step)
            if k >= 2:
                training.delete(steps[k - 2])
            time.sleep(0.3 if k % 20 == 10 else 0.02)
        live.until_applied(steps[-1])
        live.stop.set()
        result = live.end()
    applied, missed = set(live.steps()), set(live.missed())
    assert len(applied) > 3 and missed and not applied & missed
    training.check(result, tmp_path / "out.safetensors")
    with store.reading(str(tmp_path / "state")) as state:
        assert state.current is not None
        assert {row.step for row in state.current.rows if row.missed} == missed
        assert {row.missed for row in state.current.rows} == {"", readiness.GONE}


@pytest.mark.parametrize("row", ROWS)
def test_every_format_is_followed(row: str, tmp_path: Path) -> None:
    """Folders and prefixes too: complete, quiet, pinned, applied, published under new names."""
    training = Training(tmp_path, row)
    name = {"folder": "out-{step}", "prefix": "out.ckpt-{step}"}.get(FORMATS[row].kind)
    out = tmp_path / (name or f"out-{{step}}{FORMATS[row].suffix}")
    training.save(100, 200)
    with Live(training.run, tmp_path / "state", out, until_step=300) as live:
        live.until_applied(200)
        training.save(300)
        training.delete(100)
        result = live.end()
    assert [[row.step for row in report.rows] for report in live.of(Applied)] == [[100, 200], [300]]
    training.check(result, tmp_path / out.name.format(step=300))
    assert all(str(training.run) in row.path for row in result.applied)


# ---------------------------------------------------------------------------- pins


@pytest.mark.parametrize("row", ["safetensors", "safetensors-folder", "tensorflow"])
def test_rotation_in_the_middle_of_an_update_does_no_harm(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being read is pinned: the run may delete it meanwhile."""
    training = Training(tmp_path, row)
    training.save(100, 200)
    rotated: list[None] = []

    def rotate(event: object) -> None:
        if not rotated:
            rotated.append(None)
            training.delete(100)
            training.delete(200)

    out = tmp_path / ("out-{step}.safetensors" if row == "safetensors" else "out-{step}")
    options = {"on_event": rotate, "until_step": 200, "workers": 1}
    with Live(training.run, tmp_path / "state", out, **options) as live:
        result = live.end()
    assert rotated
    assert (live.steps(), live.missed()) == ([100, 200], [])
    training.check(result, tmp_path / out.name.format(step=200))
    with store.reading(str(tmp_path / "state")) as state:
        assert state.current is not None
        paths = [path for row in state.current.rows for path, *_ in row.files]
    assert all(os.path.dirname(path).startswith(str(training.run)) for path in paths)


def test_without_links_a_source_that_goes_is_missed(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another file system it is read in place; its update is dropped, the state stays."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    whole = updating.carry_out

    def rotated(*args: Any, **more: Any) -> int:
        if training.run.joinpath("model-step-200.safetensors").exists():
            training.delete(200)
        return whole(*args, **more)

    training.save(100)
    with Live(training.run, tmp_path / "state", tmp_path / OUT, until_step=300) as live:
        live.until_applied(100)
        monkeypatch.setattr(updating, "carry_out", rotated)
        training.save(200)
        live.until(lambda: live.missed() == [200])
        training.save(300)
        result = live.end()
    assert live.steps() == [100, 300]
    assert len(live.of(Dropped)) == 1
    training.check(result, tmp_path / "out-300.safetensors")


def test_one_that_is_rewritten_while_it_is_read_is_tried_again(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its update is dropped; when it is quiet again, the new contents are taken."""
    whole, once = updating.carry_out, threading.Event()
    training.save(100)

    def rewritten(*args: Any, **more: Any) -> int:
        if not once.is_set():
            once.set()
            write_checkpoint(training.run / "model-step-100.safetensors", {"w": np.float32([7])})
        return whole(*args, **more)

    monkeypatch.setattr(updating, "carry_out", rewritten)
    with Live(training.run, tmp_path / "state", tmp_path / OUT, until_step=100) as live:
        live.end()
    assert len(live.of(Dropped)) == 1
    assert "run/model-step-100.safetensors: " in live.of(Dropped)[0].reason
    assert bytes_of(tmp_path / "out-100.safetensors")
    assert ema_cli.inspect(tmp_path / "out-100.safetensors").index.tensors[0].shape == (1,)


# ---------------------------------------------------------------------------- outputs


def test_an_output_follows_every_nth_checkpoint_and_the_last(
    training: Training, tmp_path: Path
) -> None:
    """Counted by the ledger: a watch that is stopped and begun anew keeps the count."""
    options = {"every": 2}
    with Live(training.run, tmp_path / "state", tmp_path / OUT, **options) as live:
        for step in (100, 200, 300):
            training.save(step)
            live.until_applied(step)
    assert [report.step for report in live.of(Published)] == [200, 300]
    options["until_step"] = 600
    with Live(training.run, tmp_path / "state", tmp_path / OUT, **options) as live:
        for step in (400, 500, 600):
            training.save(step)
            live.until_applied(step)
        live.end()
    assert [report.step for report in live.of(Published)] == [400, 600]
    out = training.expected(tmp_path / "again", range(100, 700, 100), "out-600.safetensors")
    assert bytes_of(tmp_path / "out-600.safetensors") == bytes_of(out)


def test_a_single_file_without_a_step_is_replaced_if_it_is_ours(
    training: Training, tmp_path: Path
) -> None:
    """Each output takes the place of the one before; somebody else's file is never touched."""
    out = tmp_path / "out.safetensors"
    with Live(training.run, tmp_path / "state", out) as live:
        for step in (100, 200):
            training.save(step)
            live.until(lambda: len(live.of(Published)) == len(live.steps()))
            live.until_applied(step)
    assert [r.written.status for r in live.of(Published)][:2] == ["written", "written"]
    out.write_bytes(b"mine")
    with pytest.raises(ema_cli.EmaError) as caught:
        ema_cli.watch(training.run, out, state=tmp_path / "state", decay=0.9, until_step=200)
    assert caught.value.exit_code == 14
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("row", "output", "format"),
    [
        ("tensorflow", "out.ckpt", None),
        ("safetensors-folder", "out", None),
        ("safetensors", "out", "safetensors-folder"),
        ("safetensors", "out", "tensorflow"),
    ],
)
def test_what_is_several_files_needs_a_step_in_its_name(
    row: str, output: str, format: str | None, tmp_path: Path
) -> None:
    """Known from the option or else from the first checkpoint, before anything is averaged."""
    training = Training(tmp_path, row)
    training.save(100)
    with Live(training.run, tmp_path / "state", tmp_path / output, format=format) as live:
        with pytest.raises(ema_cli.EmaError, match=r"\{step\}") as caught:
            live.end()
        assert caught.value.exit_code == 2
    assert live.steps() == []
    assert not (tmp_path / "state" / "ROOT").exists()
    assert (tmp_path / "state").exists() is (format is None)


def test_a_directory_of_prefixes_has_the_steps_in_their_names(tmp_path: Path) -> None:
    """As with `run -o DIR/`; what stands there under such a name is not replaced."""
    training = Training(tmp_path, "tensorflow")
    training.save(100)
    out = f"{tmp_path}/out/"
    words = [training.run, "--state", tmp_path / "state", "-o", out, "--interval", "0.02"]
    words += ["--decay", "0.9", "--until-step", "100"]
    assert f"{out}model.ckpt-100" in cmd("watch", *words).out
    assert cmd("watch", *words).out.startswith("unchanged")
    cmd("watch", *words, "--names", "shadow", "--dtype", "float64", code=14)
    cmd("watch", *words, "--names", "shadow", "--dtype", "float64", "--overwrite")


def test_an_output_that_stands_already_is_unchanged(training: Training, tmp_path: Path) -> None:
    """A watch that begins anew repeats nothing, and finds what it wrote."""
    training.save(100)
    words = [training.run, "--state", tmp_path / "state", "-o", tmp_path / OUT, "--decay", "0.9"]
    more = ["--interval", "0.1", "--until-step", "100"]
    first = cmd("watch", *words, *more).out.splitlines()
    assert [line.split("  ")[0] for line in first] == ["applied", "written"]
    assert first[0] == f"applied  1 checkpoint  step 100  {tmp_path / 'state'}"
    again = cmd("watch", *words, *more).out.splitlines()
    assert [line.split("  ")[0] for line in again] == ["unchanged"]


def test_outputs_inside_the_run_are_no_checkpoints_of_it(
    training: Training, tmp_path: Path
) -> None:
    """Neither is a state that lies there."""
    state, out = training.run / "shadows-50", training.run / OUT
    with Live(training.run, state, out, until_step=300) as live:
        for step in (100, 200, 300):
            training.save(step)
            live.until_applied(step)
        result = live.end()
    assert live.steps() == [100, 200, 300]
    assert result.unusable == ()
