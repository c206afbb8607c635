"""Which checkpoints a run has, in which order, and what is said about the rest of its directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, read_checkpoint, write_checkpoint
from run_folders import W, passed_over, search, step_files, step_folders

from ema_cli.errors import Disagreement, InputError, NothingToAverage

# ---------------------------------------------------------------------------- order


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    """10000 comes after 900, whatever the text order and the modification times say."""
    run = step_files(tmp_path / "run", 900, 10000, 1000, 20)
    os.utime(run / "model-step-10000.safetensors", (0, 0))
    assert search(run).steps == [20, 900, 1000, 10000]
    assert search(run).searched


def test_folders_are_checkpoints_one_level_deep(tmp_path: Path) -> None:
    """A child folder counts; what lies deeper does not."""
    run = step_folders(tmp_path / "run", 100, 200)
    step_folders(run / "archive", 50)
    found = search(run)
    assert found.steps == [100, 200]
    assert passed_over(found) == {"archive": ("a folder without weights", False)}


def test_given_checkpoints_are_sorted_by_step_and_that_is_said(tmp_path: Path) -> None:
    """Several checkpoints are put in step order; a note tells when that changed the order."""
    run = step_files(tmp_path, 100, 200)
    early, late = sorted(run.iterdir())
    assert search(early, late).notes == ()
    swapped = search(late, early)
    assert swapped.steps == [100, 200]
    assert swapped.notes == (
        "sorted by step, which is not the given order (--order given keeps it)",
    )
    outcome = cmd("run", late, early, "-o", tmp_path / "out.safetensors")
    assert "--order given" in outcome.err


def test_order_given_keeps_the_given_order(tmp_path: Path) -> None:
    """``--order given`` is obeyed without a word."""
    run = step_files(tmp_path, 100, 200)
    early, late = sorted(run.iterdir())
    found = search(late, early, order="given")
    assert (found.steps, found.notes) == ([200, 100], ())


def test_checkpoints_without_steps_count_in_the_given_order(tmp_path: Path) -> None:
    """No steps at all, given one by one: the given order, one step each, and a note."""
    paths = [write_checkpoint(tmp_path / f"{name}.safetensors", W) for name in "cab"]
    found = search(*paths)
    assert [checkpoint.name[0] for checkpoint in found.checkpoints] == ["c", "a", "b"]
    assert found.steps == [1, 2, 3]
    assert found.notes == ("no steps found: the given order counts, one step each",)


def test_some_with_and_some_without_a_step_is_a_disagreement(tmp_path: Path) -> None:
    """A list in which only some checkpoints have a step has no order."""
    run = step_files(tmp_path, 100)
    write_checkpoint(run / "other.safetensors", W)
    with pytest.raises(Disagreement, match=r"other\.safetensors: no step"):
        search(*sorted(run.iterdir()))


def test_two_checkpoints_of_one_step_are_a_disagreement(tmp_path: Path) -> None:
    """Exit code 13 with both names; the hint says how to choose."""
    run = step_files(tmp_path / "run", 100, 200)
    write_checkpoint(run / "copy-step-200.safetensors", W)
    outcome = cmd("run", run, "-o", tmp_path / "out.safetensors", code=13)
    assert "step 200 twice" in outcome.err
    assert "copy-step-200.safetensors" in outcome.err
    assert "model-step-200.safetensors" in outcome.err
    assert "--glob" in outcome.err


# ---------------------------------------------------------------------------- what is passed over


@pytest.mark.parametrize(
    "name", ["last", "latest", "best", "final", "best_model", "last-v1", "Best", "current"]
)
def test_an_alias_is_reported_and_harmless(tmp_path: Path, name: str) -> None:
    """A name that tells no step but a role is passed over, and the exit code stays 0."""
    run = step_files(tmp_path / "run", 100, 200)
    write_checkpoint(run / f"{name}.safetensors", W)
    write_checkpoint(run / f"{name}" / "model.safetensors", W)
    found = search(run)
    assert found.steps == [100, 200]
    alias = ("an alias: its name tells no step", False)
    assert passed_over(found) == {name: alias, f"{name}.safetensors": alias}
    assert name in cmd("run", run, "-o", tmp_path / "out.safetensors").err


def test_a_role_with_a_step_is_a_checkpoint(tmp_path: Path) -> None:
    """``best-step-300`` tells a step and is taken."""
    run = step_files(tmp_path / "run", 100)
    write_checkpoint(run / "best-step-300.safetensors", W)
    assert search(run).steps == [100, 300]


@pytest.mark.parametrize(
    "name",
    [
        "tmp-step-300.safetensors",
        "tmp_abc-300.safetensors",
        "model-step-300.tmp.safetensors",
        "model-step-300.safetensors.tmp",
        "model-step-300.safetensors.part",
        "model-step-300.safetensors.partial",
        "model-step-300-incomplete.safetensors",
        "model-step-300.safetensors~",
        ".model-step-300.safetensors",
        ".model-step-300.safetensors.ema-avg.tmp",
        ".model-step-300.safetensors.ema-avg.old",
    ],
)
def test_a_temporary_name_is_reported_and_harmless(tmp_path: Path, name: str) -> None:
    """What is still being written, or left over, is not read at all, and the code stays 0."""
    run = step_files(tmp_path / "run", 100, 200)
    (run / name).write_bytes(b"half a checkpoint")
    found = search(run)
    assert found.steps == [100, 200]
    assert list(passed_over(found)) == [name]
    assert not passed_over(found)[name][1]
    cmd("run", run, "-o", tmp_path / "out.safetensors")


def test_a_name_that_only_contains_temp_is_a_checkpoint(tmp_path: Path) -> None:
    """``temperature`` and ``attempt`` are no temporary names."""
    run = tmp_path / "run"
    for name in ("temperature-step-100", "attempt-step-200", "template-step-300"):
        write_checkpoint(run / f"{name}.safetensors", W)
    assert search(run).steps == [100, 200, 300]


def test_foreign_files_are_reported_and_harmless(tmp_path: Path) -> None:
    """Logs, other frameworks' files and folders of something else keep the exit code 0."""
    run = step_files(tmp_path / "run", 100, 200)
    (run / "README.md").write_text("about this run")
    (run / "optimizer.pt").write_bytes(b"PK\x03\x04")
    (run / "events").mkdir()
    found = search(run)
    assert passed_over(found) == {
        "README.md": ("not a checkpoint", False),
        "optimizer.pt": ("training state beside the weights", False),
        "events": ("a folder without weights", False),
    }
    cmd("run", run, "-o", tmp_path / "out.safetensors")


def test_a_folder_with_shards_and_no_index_is_unusable(tmp_path: Path) -> None:
    """Several weights files without an index look like a checkpoint: exit code 3."""
    run = step_folders(tmp_path / "run", 100, 200)
    for k in (1, 2):
        write_checkpoint(run / "checkpoint-300" / f"model-0000{k}-of-00002.safetensors", W)
    assert passed_over(search(run)) == {"checkpoint-300": ("2 weights files and no index", True)}
    outcome = cmd("run", run, "-o", tmp_path / "out", code=3)
    assert "checkpoint-300" in outcome.err


@pytest.mark.parametrize(("step", "code"), [(300, 3), (150, 0)])
def test_the_newest_folder_without_weights_is_unusable(
    tmp_path: Path, step: int, code: int
) -> None:
    """The newest one, incomplete, is exit code 3; an old empty folder is not."""
    run = step_folders(tmp_path / "run", 100, 200)
    (run / f"checkpoint-{step}").mkdir()
    (run / f"checkpoint-{step}" / "config.json").write_text("{}")
    assert search(run).steps == [100, 200]
    outcome = cmd("run", run, "-o", tmp_path / "out", code=code)
    assert f"checkpoint-{step}" in outcome.err


# ---------------------------------------------------------------------------- own outputs


def test_our_own_output_in_the_run_is_not_averaged_again(tmp_path: Path) -> None:
    """Provenance tells an output from a checkpoint: a second run gives the same bits, code 0."""
    run = step_files(tmp_path / "run", 100, 200)
    own = run / "average-step-300.safetensors"
    cmd("run", run, "-o", own, "--average", "mean", "--names", "variable")
    assert passed_over(search(run)) == {
        own.name: ("an output of ema-avg", False),
        f"{own.name}.ema.json": ("tells where an output came from", False),
    }
    cmd("run", run, "-o", tmp_path / "again.safetensors", "--average", "mean")
    [again] = read_checkpoint(tmp_path / "again.safetensors").values()
    assert list(again) == [150]


def test_our_own_folder_in_the_run_is_not_averaged_again(tmp_path: Path) -> None:
    """The same for outputs that are folders."""
    run = step_folders(tmp_path / "run", 100, 200)
    cmd("run", run, "-o", run / "checkpoint-300", "--average", "mean")
    found = search(run)
    assert found.steps == [100, 200]
    assert passed_over(found)["checkpoint-300"] == ("an output of ema-avg", False)


def test_a_replaced_output_is_a_checkpoint_again(tmp_path: Path) -> None:
    """Provenance counts only for the bytes it tells of."""
    run = step_files(tmp_path / "run", 100, 200)
    own = run / "average-step-300.safetensors"
    cmd("run", run, "-o", own, "--average", "mean", "--names", "variable")
    write_checkpoint(own, {"w": np.float32([300])})
    assert search(run).steps == [100, 200, 300]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 1, "output": {"files": [{}]}}'])
def test_broken_provenance_hides_no_checkpoint(tmp_path: Path, text: str) -> None:
    """A side file that proves nothing is ignored."""
    run = step_files(tmp_path / "run", 100, 200)
    (run / "model-step-200.safetensors.ema.json").write_text(text)
    assert search(run).steps == [100, 200]


# ---------------------------------------------------------------------------- run or checkpoint


def test_weights_at_the_root_of_a_run_are_unnumbered(tmp_path: Path) -> None:
    """A folder with numbered children is a run; its own weights are reported, code 0."""
    run = step_folders(tmp_path / "run", 100, 200)
    write_checkpoint(run / "model.safetensors", W)
    found = search(run)
    assert found.steps == [100, 200]
    assert passed_over(found) == {
        "model.safetensors": ("unnumbered weights at the run's root", False)
    }
    assert "unnumbered" in cmd("run", run, "-o", tmp_path / "out").err


def test_sharded_weights_at_the_root_of_a_run_are_unnumbered(
    tmp_path: Path, digits_bf16: Path
) -> None:
    """The same when the final model at the root is sharded."""
    run = tmp_path / "run"
    shutil.copytree(digits_bf16 / "checkpoint-2000", run)
    for step in (100, 200):
        shutil.copytree(digits_bf16 / f"checkpoint-{step}", run / f"checkpoint-{step}")
    found = search(run)
    assert found.steps == [100, 200]
    assert not any(entry.unusable for entry in found.passed_over)


def test_a_folder_with_one_weights_file_is_one_checkpoint(tmp_path: Path) -> None:
    """Without numbered children a folder is the checkpoint it holds."""
    folder = step_folders(tmp_path, 100) / "checkpoint-100"
    (folder / "logs").mkdir()
    found = search(folder)
    assert (found.steps, found.searched) == ([100], False)
    assert [c.path for c in found.checkpoints] == [str(folder)]


def test_a_folder_with_one_numbered_file_is_a_run_of_one(tmp_path: Path) -> None:
    """A single numbered file is the beginning of a run."""
    run = step_files(tmp_path / "run", 100)
    found = search(run)
    assert (found.steps, found.searched) == ([100], True)


def test_one_checkpoint_is_its_own_average_with_a_warning(tmp_path: Path) -> None:
    """The result of one checkpoint is that checkpoint, and people are warned."""
    run = step_files(tmp_path / "run", 100)
    out = tmp_path / "out.safetensors"
    outcome = cmd("run", run, "-o", out, "--names", "variable")
    assert "warning" in outcome.err
    assert list(read_checkpoint(out)["w"]) == [100]


# ---------------------------------------------------------------------------- nothing


@pytest.mark.parametrize("names", [[], ["notes.txt"], ["last.safetensors"]])
def test_nothing_to_average_is_exit_code_10(tmp_path: Path, names: list[str]) -> None:
    """A directory without a usable checkpoint says what it holds instead."""
    run = tmp_path / "run"
    run.mkdir()
    for name in names:
        (run / name).write_bytes(b"")
    with pytest.raises(NothingToAverage):
        search(run, glob="*")
    outcome = cmd("run", run, "-o", tmp_path / "out.safetensors", "--glob", "*", code=10)
    assert all(name in outcome.err for name in names)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """A name that was given must be there."""
    with pytest.raises(InputError, match="nowhere: no such file or directory"):
        search(tmp_path / "nowhere")
