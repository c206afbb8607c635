"""What ``--glob``, ``--steps`` and ``--last`` choose; links and odd names in a run directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, write_checkpoint, write_run
from run_folders import W, passed_over, search, step_files, step_folders

import ema_cli
from ema_cli.errors import NothingToAverage, UsageError
from ema_cli.runs import find
from ema_cli.search import Choice

# ---------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("steps", "last", "kept"),
    [
        ("200:400", None, [200, 300, 400]),
        (":200", None, [100, 200]),
        ("400:", None, [400, 500, 600]),
        (":", None, [100, 200, 300, 400, 500, 600]),
        ("150:250", None, [200]),
        ("100::200", None, [100, 300, 500]),
        ("::200", None, [200, 400, 600]),
        ("150:600:50", None, [200, 300, 400, 500, 600]),
        ("150:600:100", None, []),
        (None, 2, [500, 600]),
        (None, 9, [100, 200, 300, 400, 500, 600]),
        (":400", 2, [300, 400]),
        ("::200", 1, [600]),
    ],
)
def test_steps_and_last_choose(
    tmp_path: Path, steps: str | None, last: int | None, kept: list[int]
) -> None:
    """Both ends included, every C-th counted from A, then the newest N."""
    run = step_files(tmp_path / "run", 100, 200, 300, 400, 500, 600)
    if not kept:
        with pytest.raises(NothingToAverage):
            ema_cli.plan_run(run, steps=steps, last=last)
        return
    found = ema_cli.plan_run(run, steps=steps, last=last).run
    assert found.steps == kept
    assert len(found.passed_over) == 6 - len(kept)
    assert not any(entry.unusable for entry in found.passed_over)


@pytest.mark.parametrize("last", [0, -1])
def test_last_must_be_positive(tmp_path: Path, last: int) -> None:
    """``--last 0`` makes no sense."""
    with pytest.raises(UsageError, match="--last"):
        search(step_files(tmp_path, 100), last=last)


def test_glob_chooses_directory_entries(tmp_path: Path) -> None:
    """Only matching entries are considered; the others are reported, code 0."""
    run = step_files(tmp_path / "run", 100, 200)
    write_checkpoint(run / "ema-step-300.safetensors", W)
    (run / "model-step-400.safetensors").write_bytes(b"damaged, and matched by no glob")
    found = search(run, glob="model-step-[12]*")
    assert found.steps == [100, 200]
    skipped = ("not matched by --glob", False)
    assert passed_over(found) == {
        "ema-step-300.safetensors": skipped,
        "model-step-400.safetensors": skipped,
    }


def test_glob_may_go_into_folders(tmp_path: Path) -> None:
    """``checkpoint-*/unet`` finds a model inside each checkpoint, and its step in the path."""
    run = tmp_path / "run"
    for step in (100, 1000, 200):
        for part in ("unet", "vae"):
            path = run / f"checkpoint-{step}" / part / "model.safetensors"
            write_checkpoint(path, {"w": np.float32([step])})
    found = search(run, glob="checkpoint-*/unet")
    assert found.steps == [100, 200, 1000]
    assert [os.path.relpath(c.path, run) for c in found.checkpoints] == [
        "checkpoint-100/unet",
        "checkpoint-200/unet",
        "checkpoint-1000/unet",
    ]


def test_glob_is_applied_before_last(tmp_path: Path) -> None:
    """``--last`` counts among what ``--glob`` left."""
    run = step_files(tmp_path / "run", 100, 200, 300)
    assert search(run, glob="*-[12]00*", last=1).steps == [200]


# ---------------------------------------------------------------------------- links and odd names


def test_a_run_may_be_made_of_links(tmp_path: Path) -> None:
    """Links to files and folders elsewhere are checkpoints like any other."""
    run = tmp_path / "run"
    run.mkdir()
    store = step_files(tmp_path / "store", 100, 200)
    step_folders(store, 300)
    for entry in store.iterdir():
        (run / entry.name).symlink_to(entry)
    assert search(run).steps == [100, 200, 300]


@pytest.mark.parametrize("name", ["zz-step-300", "aa-step-300", "last", "model-step-200-copy"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_to_another_entry_is_reported_and_harmless(
    tmp_path: Path, name: str, relative: bool
) -> None:
    """A second name of a checkpoint in the same directory is passed over, whatever it says."""
    run = step_files(tmp_path / "run", 100, 200)
    target = run / "model-step-200.safetensors"
    (run / f"{name}.safetensors").symlink_to(target.name if relative else target)
    found = search(run)
    assert [c.path for c in found.checkpoints] == [
        str(run / "model-step-100.safetensors"),
        str(target),
    ]
    assert passed_over(found) == {f"{name}.safetensors": ("a link to another entry", False)}


def test_a_relative_run_directory_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is a link to another entry does not depend on how the directory is written."""
    run = step_files(tmp_path / "run", 100, 200)
    (run / "zz-step-300.safetensors").symlink_to("model-step-200.safetensors")
    (tmp_path / "alias").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for name in ("run", "run/", "./run", "alias", "run/../run"):
        assert search(Path(name)).steps == [100, 200]
        assert find([name], Choice()).steps == [100, 200]


def test_a_hard_link_to_another_entry_is_reported(tmp_path: Path) -> None:
    """One file under two names is one checkpoint."""
    run = step_files(tmp_path / "run", 100, 200)
    (run / "zz-step-300.safetensors").hardlink_to(run / "model-step-200.safetensors")
    found = search(run)
    assert found.steps == [100, 200]
    assert passed_over(found) == {"zz-step-300.safetensors": ("a link to another entry", False)}


def test_shards_may_be_links_as_in_a_hub_cache(tmp_path: Path, digits_bf16: Path) -> None:
    """Shards that are links into ``../../blobs`` are followed."""
    for step in (100, 200):
        source = digits_bf16 / f"checkpoint-{step}"
        folder = tmp_path / "snapshots" / source.name
        folder.mkdir(parents=True)
        for file in source.iterdir():
            blob = tmp_path / "blobs" / f"{step}-{file.name}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(file, blob)
            (folder / file.name).symlink_to(os.path.relpath(blob, folder))
    out = tmp_path / "out"
    cmd("run", tmp_path / "snapshots", "-o", out)
    expected = tmp_path / "expected"
    cmd("run", *(digits_bf16 / f"checkpoint-{step}" for step in (100, 200)), "-o", expected)
    for shard in sorted(expected.glob("*.safetensors")):
        assert (out / shard.name).read_bytes() == shard.read_bytes()


def test_file_names_that_are_not_utf8_are_checkpoints(tmp_path: Path) -> None:
    """An undecodable name is read, ordered and told in escaped form."""
    run = write_run(tmp_path / os.fsdecode(b"run-\xff"), [W, W])
    odd = run / os.fsdecode(b"model-\xfe-step-300.safetensors")
    write_checkpoint(odd, W)
    (run / os.fsdecode(b"notes-\xfd")).write_text("")
    assert search(run).steps == [100, 200, 300]
    for extra in ([], ["--json"]):
        out = tmp_path / os.fsdecode(b"out-\xff.safetensors")
        outcome = cmd("run", run, "-o", out, "--overwrite", *extra)
        assert (outcome.out + outcome.err).isascii()
        assert out.exists()
