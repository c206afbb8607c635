"""TensorFlow's run directories: which checkpoints they hold, and what is said about the rest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, write_checkpoint
from run_folders import passed_over, search
from tensorflow_bundles import (
    read_bundle,
    shard_file,
    strings,
    tensorflow_run,
    write_bundle,
)

from ema_cli.errors import Disagreement, InputError
from ema_cli.formats.tensorflow import statefile
from ema_cli.runs import Run

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "tensorflow"
SHADOW = "/ExponentialMovingAverage"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def step_prefixes(folder: Path, *steps: int, shards: int = 1) -> Path:
    """Write ``model.ckpt-N`` for each step; ``w`` holds the step."""
    for step in steps:
        tensors = {"w": np.float32([step]), "b": np.float32([1])}
        write_bundle(folder / f"model.ckpt-{step}", tensors, shards=shards)
    return folder


def names(run: Run) -> list[str]:
    """The checkpoints of a run by their names."""
    return [checkpoint.name for checkpoint in run.checkpoints]


def mean_of(run: Path, out: Path, *words: str, code: int = 0) -> float:
    """The mean of ``w`` that a run over a directory writes."""
    cmd("run", run, "-o", out, "--average", "mean", *words, code=code)
    return float(read_bundle(out)[f"w{SHADOW}"][0])


# ---------------------------------------------------------------------------- what is found


def test_checkpoints_are_found_by_their_indexes_in_numeric_order(tmp_path: Path) -> None:
    """2 comes before 10, and each prefix is one checkpoint however many files it has."""
    run = step_prefixes(tmp_path / "run", 10, 2, 100, 9, shards=2)
    (run / "model.ckpt-10.meta").write_bytes(b"")
    os.utime(run / "model.ckpt-2.index", (2e9, 2e9))
    found = search(run)
    assert found.steps == [2, 9, 10, 100]
    assert names(found) == [f"model.ckpt-{step}" for step in (2, 9, 10, 100)]
    assert passed_over(found) == {}
    assert mean_of(run, tmp_path / "out") == pytest.approx(30.25)


def test_steps_may_be_many_digits_long(tmp_path: Path) -> None:
    """As in TPU runs; the width of the numbers does not matter."""
    run = step_prefixes(tmp_path / "run", 999_999, 1_000_000, 12_345_678)
    assert search(run).steps == [999_999, 1_000_000, 12_345_678]


STATES = {
    "only the last": ("model.ckpt-300", []),
    "stale absolute paths": ("/tmp/gone/model.ckpt-300", ["/tmp/gone/model.ckpt-200"]),
    "what was deleted": ("model.ckpt-300", ["model.ckpt-50", "model.ckpt-60"]),
    "an older one": ("model.ckpt-100", ["model.ckpt-100"]),
    "something else": ("other-7", ["other-7"]),
}


@pytest.mark.parametrize("case", STATES)
def test_the_state_file_is_a_hint_only(tmp_path: Path, case: str) -> None:
    """All checkpoints of the directory count, whatever it lists; it is no foreign file either."""
    run = step_prefixes(tmp_path / "run", 100, 200, 300)
    latest, others = STATES[case]
    (run / "checkpoint").write_bytes(statefile.encode(latest, [*others, latest]))
    found = search(run)
    assert found.steps == [100, 200, 300]
    assert passed_over(found) == {"checkpoint": ("TensorFlow's state file", False)}
    assert mean_of(run, tmp_path / "out") == 200


@pytest.mark.parametrize("text", [b"", b"\xff\0", b"garbage {", b"model_checkpoint_path: 3"])
def test_a_broken_state_file_does_no_harm(tmp_path: Path, text: bytes) -> None:
    """It is not needed."""
    run = step_prefixes(tmp_path / "run", 100, 200)
    (run / "checkpoint").write_bytes(text)
    assert search(run).steps == [100, 200]
    assert mean_of(run, tmp_path / "out") == 150


def test_the_fixtures_are_found() -> None:
    """The runs that TensorFlow wrote, each with all of its checkpoints."""
    assert search(FIXTURES / "graph").steps == list(range(0, 301, 20))
    assert search(FIXTURES / "partitioned").steps == [0, 20, 40, 60]
    keras = search(FIXTURES / "keras" / "compiled")
    assert names(keras) == [f"ckpt-{k}" for k in (1, 2, 3, 4)]
    assert keras.steps == [20, 40, 60, 80]


# ---------------------------------------------------------------------------- what is not


def test_what_a_sharded_save_has_not_merged_is_not_looked_at(tmp_path: Path) -> None:
    """Folders and files under the names TensorFlow gives parts; nothing of them, code 0."""
    run = step_prefixes(tmp_path / "run", 100, 200)
    for part in range(2):
        write_bundle(
            run / "model.ckpt-300_temp" / f"part-{part:05}-of-00002", {"w": np.float32([9])}
        )
        write_bundle(run / f"model.ckpt-300_temp_5d2e1f{part}" / "part-0", {"w": np.float32([9])})
    for name in ("model.ckpt-300.index", "model.ckpt-300.data-00000-of-00001"):
        (run / f"{name}.tempstate8467283946").write_bytes(b"half")
    found = search(run)
    assert found.steps == [100, 200]
    assert len(found.passed_over) == 5
    for reason, unusable in passed_over(found).values():
        assert reason.startswith("a temporary name")
        assert not unusable
    assert mean_of(run, tmp_path / "out") == 150


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_checkpoint_without_one_of_its_shards_is_unusable(tmp_path: Path, missing: int) -> None:
    """Passed over, with the file that is missing, and the exit code is 3."""
    run = step_prefixes(tmp_path / "run", 100, 200)
    prefix = write_bundle(
        run / "model.ckpt-300", {k: np.float32([k == "w"]) for k in ("a", "w", "z")}, shards=3
    )
    path = shard_file(prefix, missing, 3)
    path.unlink()
    [(reason, unusable)] = passed_over(search(run)).values()
    assert unusable
    assert path.name in reason
    assert "missing" in reason
    assert mean_of(run, tmp_path / "out", code=3) == 150


@pytest.mark.parametrize("content", [b"", b"half an index", b"\0" * 48])
def test_an_index_that_is_being_written_is_unusable(tmp_path: Path, content: bytes) -> None:
    """Its data is there already."""
    run = step_prefixes(tmp_path / "run", 100, 200, 300)
    (run / "model.ckpt-300.index").write_bytes(content)
    [(reason, unusable)] = passed_over(search(run)).values()
    assert unusable
    assert "expected" in reason
    assert mean_of(run, tmp_path / "out", code=3) == 150


@pytest.mark.parametrize(("step", "code"), [(300, 3), (50, 0)], ids=["the newest", "an old one"])
def test_data_without_an_index_is_told_once(tmp_path: Path, step: int, code: int) -> None:
    """The index is written last: the newest is incomplete (3), an old one is being deleted (0)."""
    run = step_prefixes(tmp_path / "run", 100, 200, step, shards=2)
    (run / f"model.ckpt-{step}.index").unlink()
    [(name, (reason, _))] = passed_over(search(run)).items()
    assert name.startswith(f"model.ckpt-{step}")
    assert "index is missing" in reason
    assert mean_of(run, tmp_path / "out", code=code) == 150


def test_graphs_without_their_checkpoints_are_told(tmp_path: Path) -> None:
    """TensorFlow deletes old checkpoints, and leaves graphs that were written by others."""
    run = step_prefixes(tmp_path / "run", 100, 200)
    (run / "model.ckpt-50.meta").write_bytes(b"")
    (run / "graph.pbtxt").write_text("node {}")
    (run / "events.out.tfevents.1700000000.host").write_bytes(b"\0" * 24)
    found = passed_over(search(run))
    assert found["model.ckpt-50.meta"] == ("a graph without its checkpoint", False)
    assert set(found) == {
        "model.ckpt-50.meta",
        "graph.pbtxt",
        "events.out.tfevents.1700000000.host",
    }
    assert mean_of(run, tmp_path / "out") == 150


def test_hidden_files_are_not_looked_at(tmp_path: Path) -> None:
    """A prefix that begins with a dot is nobody's checkpoint."""
    run = step_prefixes(tmp_path / "run", 100, 200)
    write_bundle(run / ".model.ckpt-300", {"w": np.float32([3])})
    found = search(run)
    assert found.steps == [100, 200]
    assert {reason for reason, _ in passed_over(found).values()} == {"hidden"}
    assert mean_of(run, tmp_path / "out") == 150


def link(run: Path, name: str, to: str) -> None:
    """Make links to the files of a checkpoint, under another prefix."""
    for suffix in (".index", ".data-00000-of-00001"):
        (run / f"{name}{suffix}").symlink_to(f"{to}{suffix}")


@pytest.mark.parametrize("name", ["z.ckpt-300", "model.ckpt-999", "a.ckpt-999", "latest", "last"])
def test_links_to_a_checkpoint_are_not_another_one(tmp_path: Path, name: str) -> None:
    """The checkpoint counts once and under its own name, wherever the link is sorted."""
    run = step_prefixes(tmp_path / "run", 100, 200, 300)
    link(run, name, "model.ckpt-300")
    found = search(run)
    assert names(found) == [f"model.ckpt-{step}" for step in (100, 200, 300)]
    assert set(passed_over(found)) == {name}
    assert mean_of(run, tmp_path / "out") == 200


def test_a_role_without_a_step_is_passed_over(tmp_path: Path) -> None:
    """``best`` is a copy of one of the others."""
    run = step_prefixes(tmp_path / "run", 100, 200)
    write_bundle(run / "best", {"w": np.float32([9]), "b": np.float32([9])})
    assert passed_over(search(run)) == {"best": ("an alias: its name tells no step", False)}


def test_a_child_with_checkpoints_of_its_own_is_no_part_of_the_run(tmp_path: Path) -> None:
    """An evaluation's folder, or an archive, is another run."""
    run = step_prefixes(tmp_path / "run", 100, 200)
    step_prefixes(run / "eval-300", 300)
    step_prefixes(run / "archive-50", 50, 60)
    found = search(run)
    assert found.steps == [100, 200]
    assert passed_over(found) == {
        "eval-300": ("a folder with 1 checkpoint of its own", False),
        "archive-50": ("a folder with 2 checkpoints of its own", False),
    }
    assert mean_of(run, tmp_path / "out") == 150


@pytest.mark.parametrize("where", ["run", "outside"])
def test_our_own_output_is_not_averaged_again(tmp_path: Path, where: str) -> None:
    """In the directory of the run it is told from the checkpoints by its provenance."""
    run = step_prefixes(tmp_path / "run", 100, 200)
    own = run / "model.ckpt-300"
    cmd("run", run, "-o", own, "--average", "mean", "--names", "variable")
    found = search(run)
    assert found.steps == [100, 200]
    assert passed_over(found) == {
        "model.ckpt-300": ("an output of ema-avg", False),
        "model.ckpt-300.ema.json": ("tells where an output came from", False),
    }
    out = own if where == "run" else tmp_path / "again"
    assert cmd("run", run, "-o", out, "--average", "mean", "--names", "variable").code == 0
    write_bundle(own, {"w": np.float32([300]), "b": np.float32([1])})
    assert search(run).steps == [100, 200, 300]


# ---------------------------------------------------------------------------- choice


def test_a_glob_chooses_prefixes_by_any_of_their_files(tmp_path: Path) -> None:
    """What it does not match is passed over once for each checkpoint."""
    run = step_prefixes(tmp_path / "run", 100, 150, 200, 250)
    write_bundle(run / "other-7", {"w": np.float32([7])})
    for pattern in ("model.ckpt-?00*", "*00.index", "model*00.data*"):
        found = search(run, glob=pattern)
        assert found.steps == [100, 200], pattern
        told = passed_over(found)
        assert told["other-7"] == ("not matched by --glob", False)
        assert set(told) == {"model.ckpt-150", "model.ckpt-250", "other-7"}
    assert mean_of(run, tmp_path / "out", "--glob", "model.ckpt-?5*") == 200


def test_a_glob_reaches_into_folders(tmp_path: Path) -> None:
    """One checkpoint in each child folder, with the step in the folder's name."""
    for step in (10, 9):
        write_bundle(tmp_path / "run" / f"step-{step}" / "model", {"w": np.float32([step])})
    assert search(tmp_path / "run", glob="step-*/model.index").steps == [9, 10]
    assert search(tmp_path / "run").steps == [9, 10]


def test_last_and_steps(tmp_path: Path) -> None:
    """As for every other format."""
    run = step_prefixes(tmp_path / "run", 100, 200, 300, 400, 500)
    assert search(run, last=2).steps == [400, 500]
    assert search(run, steps=(200, 400, 200)).steps == [200, 400]
    assert mean_of(run, tmp_path / "a", "--last", "2") == 450
    assert mean_of(run, tmp_path / "b", "--steps", "200:400") == 300


def test_prefixes_may_be_named_one_by_one(tmp_path: Path) -> None:
    """In any order, by any of their files; each twice is a mistake."""
    run = step_prefixes(tmp_path / "run", 100, 200, 300)
    first, second = run / "model.ckpt-300.index", run / "model.ckpt-100"
    found = search(first, second)
    assert found.steps == [100, 300]
    assert found.notes
    with pytest.raises(Disagreement, match="step 100 twice"):
        search(second, run / "model.ckpt-100.data-00000-of-00001")
    with pytest.raises(InputError):
        search(second, run / "model.ckpt-10")


# ---------------------------------------------------------------------------- steps


def test_a_stored_step_wins(tmp_path: Path) -> None:
    """``global_step`` of any integer dtype is the step; a name that differs is told."""
    for k, dtype in ((1, np.int64), (2, np.int32)):
        tensors = {"w": np.float32([k]), "global_step": dtype(k * 1000)}
        write_bundle(tmp_path / "run" / f"model.ckpt-{k}", tensors)
    found = search(tmp_path / "run")
    assert found.steps == [1000, 2000]
    assert len(found.notes) == 2
    assert "global_step says step 1000, its name says 1" in found.notes[0]


def test_a_name_that_counts_saves_is_no_other_step(tmp_path: Path) -> None:
    """``ckpt-3`` is the third save: its number is the stored save_counter, which is no step."""
    for k in (1, 2, 11):
        tensors = {
            f"w{VALUE}": np.float32([k]),
            f"step{VALUE}": np.int64(k * 500),
            f"save_counter{VALUE}": np.int64(k),
        }
        write_bundle(tmp_path / "run" / f"ckpt-{k}", tensors)
    found = search(tmp_path / "run")
    assert found.steps == [500, 1000, 5500]
    assert found.notes == ()
    assert search(FIXTURES / "keras" / "compiled").notes == ()


def test_without_a_stored_step_the_name_tells(tmp_path: Path) -> None:
    """Whatever the save_counter says."""
    for k in (1, 2):
        tensors = {f"w{VALUE}": np.float32([k]), f"save_counter{VALUE}": np.int64(k + 5)}
        write_bundle(tmp_path / "run" / f"ckpt-{k}", tensors)
    found = search(tmp_path / "run")
    assert (found.steps, found.notes) == ([1, 2], ())


def test_a_step_that_is_no_number_is_none(tmp_path: Path) -> None:
    """A string called global_step, or a vector, tells nothing."""
    write_bundle(
        tmp_path / "run" / "m-1", {"w": np.float32([1]), "global_step": strings([b"7"], ())}
    )
    write_bundle(tmp_path / "run" / "m-2", {"w": np.float32([1]), "global_step": np.int64([7, 8])})
    assert search(tmp_path / "run").steps == [1, 2]


def test_big_endian_steps(tmp_path: Path) -> None:
    """Read in the byte order of the machine that saved them."""
    for k in (1, 2):
        tensors = {"w": np.float32([k]), "global_step": np.int64(k * 256)}
        write_bundle(tmp_path / "run" / f"a{k}", tensors, big_endian=True)
    assert search(tmp_path / "run").steps == [256, 512]


# ---------------------------------------------------------------------------- SavedModels


def test_savedmodels_in_numbered_folders_are_a_run(tmp_path: Path) -> None:
    """As exporters and TF Serving lay them out."""
    for step in (3, 20, 100):
        model = tmp_path / "export" / str(step)
        write_bundle(model / "variables" / "variables", {"w": np.float32([step])})
        (model / "saved_model.pb").write_bytes(b"")
    (tmp_path / "export" / "101").mkdir()
    found = search(tmp_path / "export")
    assert found.steps == [3, 20, 100]
    assert names(found) == ["3", "20", "100"]
    assert found.checkpoints[0].path.endswith("3/variables/variables")
    assert set(passed_over(found)) == {"101"}
    assert mean_of(tmp_path / "export", tmp_path / "out", code=3) == 41


def test_a_savedmodel_is_a_checkpoint_and_no_run(tmp_path: Path) -> None:
    """Named alone it is averaged with nothing."""
    shutil.copytree(FIXTURES / "keras" / "savedmodel", tmp_path / "model-7")
    found = search(tmp_path / "model-7")
    assert not found.searched
    assert len(found.checkpoints) == 1


# ---------------------------------------------------------------------------- several formats


def test_other_formats_beside_tensorflows_are_found_too(tmp_path: Path) -> None:
    """But a run has one format of names: what disagrees is told."""
    run = tensorflow_run(tmp_path / "run", [{"w": np.float32([k])} for k in (1, 2)])
    write_checkpoint(run / "model-step-300.safetensors", {"w": np.float32([3])})
    assert search(run).steps == [100, 200, 300]
    assert mean_of(run, tmp_path / "out", "--format", "tensorflow") == 2
