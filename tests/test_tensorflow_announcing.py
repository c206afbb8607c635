"""What lies beside a TensorFlow output: its provenance, and the state file of its directory."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cmd
from tensorflow_bundles import read_bundle, shard_file, tensorflow_run, write_bundle

from ema_cli.cli import main
from ema_cli.formats.tensorflow import statefile


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where outputs go, with nothing else in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of two tensors."""
    values = [{"w": np.full(4, k, np.float32), "b": np.float32(k)} for k in (1, 2, 3)]
    return tensorflow_run(tmp_path / "run", values)


def words(run: Path, place: Path, decay: str = "0.5") -> list[str]:
    """The command that writes ``out``."""
    names = ["--names", "variable"]
    return ["run", str(run), "-o", str(place / "out"), "--decay", decay, *names, "-q"]


# ---------------------------------------------------------------------------- provenance


def test_the_same_again_is_unchanged(run: Path, place: Path) -> None:
    """A second run writes nothing; one with other settings, or after a changed byte, is refused."""
    cmd(*words(run, place))
    before = {name: (place / name).stat().st_mtime_ns for name in os.listdir(place)}
    assert cmd(*words(run, place)[:-1]).out.startswith("unchanged")
    assert before == {name: (place / name).stat().st_mtime_ns for name in os.listdir(place)}
    cmd(*words(run, place, "0.25"), code=14)
    data = shard_file(place / "out")
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    cmd(*words(run, place), code=14)


@pytest.mark.parametrize("options", [{"big_endian": True}, {"compress": True}, {"gap": 3}])
@pytest.mark.parametrize("names", ["shadow", "variable"])
def test_unchanged_whatever_the_input_looks_like(
    tmp_path: Path, place: Path, names: str, options: dict[str, Any]
) -> None:
    """The sizes a plan tells are those of the files it writes."""
    values = [{"w": np.float32([k]), "n": np.int16([k])} for k in (1, 2)]
    run = tensorflow_run(tmp_path / "run", values, **options)
    command = ["run", run, "-o", place / "out", "--average", "mean", "--names", names]
    assert cmd(*command).out.startswith("written")
    kept = json.loads((place / "out.ema.json").read_bytes())["output"]["files"]
    sizes = {file["name"]: file["bytes"] for file in kept}
    assert sizes == {name: Path(f"{place}/out{name}").stat().st_size for name in sizes}
    assert cmd(*command).out.startswith("unchanged")


def test_provenance_goes_with_the_files(run: Path, place: Path, tmp_path: Path) -> None:
    """Moved together, even to another prefix, they still tell where they came from."""
    cmd(*words(run, place))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in os.listdir(place):
        if name != "checkpoint":
            shutil.move(place / name, moved / name.replace("out", "other"))
    origin = json.loads(cmd("inspect", moved / "other", "--json").out.splitlines()[-1])
    assert origin["type"] == "result"
    assert "made by ema-avg" in cmd("inspect", moved / "other").err
    command = [word.replace(f"{place}/out", f"{moved}/other") for word in words(run, place)]
    assert cmd(*command[:-1]).out.startswith("unchanged")
    os.truncate(shard_file(moved / "other"), 3)
    assert "made by ema-avg" not in cmd("inspect", moved / "other", code=12).err


# ---------------------------------------------------------------------------- state files


def state_of(folder: Path) -> statefile.State:
    """What the state file of a folder says."""
    return statefile.parse((folder / "checkpoint").read_bytes())


def test_a_new_directory_gets_a_state_file(run: Path, place: Path) -> None:
    """So that tf.train.latest_checkpoint finds the output; a second one is added, none twice."""
    cmd("run", run, "-o", place / "a")
    assert state_of(place) == ("a", ("a",))
    assert (place / "checkpoint").read_text() == (
        'model_checkpoint_path: "a"\nall_model_checkpoint_paths: "a"\n'
    )
    cmd("run", run, "-o", place / "b", "--last", "2")
    assert state_of(place) == ("b", ("a", "b"))
    cmd("run", run, "-o", place / "a", "--last", "1", "--overwrite")
    assert state_of(place) == ("a", ("b", "a"))
    for path in place.glob("b.*"):
        path.unlink()
    cmd("run", run, "-o", place / "c", "--average", "mean")
    assert state_of(place) == ("c", ("a", "c"))


def test_the_state_file_of_a_training_run_is_never_touched(run: Path) -> None:
    """Training would resume from the average: a note says so, the output is written."""
    text = statefile.encode("model.ckpt-300", ["model.ckpt-300"])
    (run / "checkpoint").write_bytes(text)
    outcome = cmd("run", run, "-o", run / "average")
    assert "not touched" in outcome.err
    assert (run / "checkpoint").read_bytes() == text
    (run / "checkpoint").unlink()
    cmd("run", run, "-o", run / "other", "--last", "2")
    assert not (run / "checkpoint").exists()


FOREIGN = {
    "another checkpoint": statefile.encode("/elsewhere/model-3", ["/elsewhere/model-3"]),
    "no state file": b"my notes",
    "bytes": b"\xff\0",
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_state_file_of_somebody_else_is_never_touched(run: Path, place: Path, case: str) -> None:
    """Whatever a file called checkpoint is, it is not ours."""
    (place / "checkpoint").write_bytes(FOREIGN[case])
    cmd("run", run, "-o", place / "a")
    assert (place / "checkpoint").read_bytes() == FOREIGN[case]


@pytest.mark.parametrize("kind", ["directory", "dangling link", "link"])
def test_what_is_called_checkpoint_and_no_file_stays(run: Path, place: Path, kind: str) -> None:
    """Directories and links."""
    target = place.parent / "target"
    if kind == "directory":
        (place / "checkpoint").mkdir()
    else:
        (place / "checkpoint").symlink_to(target)
    if kind == "link":
        target.write_text("mine")
    cmd("run", run, "-o", place / "a")
    assert (place / "checkpoint").is_dir() == (kind == "directory")
    assert (place / "checkpoint").is_symlink() == (kind != "directory")
    assert target.exists() == (kind == "link")


def test_a_directory_with_other_checkpoints_gets_no_state_file(run: Path, place: Path) -> None:
    """They may belong to a training that keeps none."""
    write_bundle(place / "somebodys", {"w": np.float32([1])})
    cmd("run", run, "-o", place / "a")
    assert not (place / "checkpoint").exists()


def test_a_name_with_odd_characters_is_found_again(run: Path, place: Path) -> None:
    """Quotes, backslashes and bytes that are no UTF-8 in the state file."""
    for name in ('a"b\\c', "ü", os.fsdecode(b"x\xff")):
        cmd("run", run, "-o", place / name)
        assert state_of(place).latest == name


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_state_file_that_could_not_be_written_is_settled_by_the_next_run(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The output stands; the next run writes the state file too, and leaves nothing behind."""
    function = getattr(os, call)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if (place / ".checkpoint.ema-avg.tmp").exists():
            raise OSError(errno.EIO, "Input/output error")
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        main(words(run, place))
    assert float(read_bundle(place / "out")["b"]) == 2.25
    cmd(*words(run, place))
    assert state_of(place).latest == "out"
    assert not [name for name in os.listdir(place) if name.startswith(".")]


def test_an_older_output_found_unchanged_does_not_become_the_latest(tmp_path: Path) -> None:
    """Running the same command again changes nothing, least of all what an evaluation takes."""
    run = tensorflow_run(tmp_path / "run", [{"w": np.float32([k])} for k in (1, 2, 3)])
    place = tmp_path / "eval"
    for steps in (":200", ":300", ":200"):
        cmd("run", run, "-o", f"{place}/", "--average", "mean", "--steps", steps)
    state = (place / "checkpoint").read_text()
    assert state.splitlines()[0] == 'model_checkpoint_path: "model.ckpt-300"'
    assert state.count("all_model_checkpoint_paths") == 2
