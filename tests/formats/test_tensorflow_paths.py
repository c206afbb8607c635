"""What people may call a TensorFlow checkpoint: prefixes, their files, folders; and its graph."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, write_checkpoint
from tensorflow_bundles import shard_file, write_bundle

import ema_cli
from ema_cli.errors import InputError, UnsupportedInput
from ema_cli.formats import read
from ema_cli.formats.tensorflow import statefile
from ema_cli.tensors import Checkpoint, Role

FIXTURES = Path(__file__).resolve().parent.parent.parent / "fixtures" / "tensorflow"
W = {"w": np.float32([1])}


def path_of(path: Path | str) -> str:
    """The prefix that a path is taken for."""
    return read(str(path), {}).path


def state(folder: Path, latest: str, *others: str) -> None:
    """Write a state file."""
    (folder / "checkpoint").write_bytes(statefile.encode(latest, [*others, latest]))


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "suffix", ["", ".index", ".data-00000-of-00002", ".data-00001-of-00002", ".meta"]
)
def test_every_file_of_a_checkpoint_stands_for_it(tmp_path: Path, suffix: str) -> None:
    """The prefix, its index, each shard, its graph: all are the prefix."""
    prefix = write_bundle(tmp_path / "model.ckpt-5", W, shards=2)
    Path(f"{prefix}.meta").write_bytes(b"")
    assert path_of(f"{prefix}{suffix}") == str(prefix)
    outcome = cmd("inspect", f"{prefix}{suffix}", "--json")
    assert json.loads(outcome.out.splitlines()[-1])["type"] == "result"


@pytest.mark.parametrize(
    "name", ["model.ckpt-5", "a.index", "x.meta", "m.data-00000-of-00001", "ö"]
)
def test_a_prefix_may_be_called_anything(tmp_path: Path, name: str) -> None:
    """Names that look like those of files, too: what follows the prefix tells its files."""
    prefix = write_bundle(tmp_path / name, W)
    assert path_of(prefix) == str(prefix)
    assert path_of(f"{prefix}.index") == str(prefix)
    assert path_of(shard_file(prefix)) == str(prefix)


def test_a_relative_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name in the working directory, as people type it."""
    write_bundle(tmp_path / "model.ckpt-5", W)
    monkeypatch.chdir(tmp_path)
    assert path_of("model.ckpt-5") == path_of("model.ckpt-5.index") == "model.ckpt-5"
    assert cmd("inspect", "model.ckpt-5").code == 0


@pytest.mark.parametrize("suffix", ["", ".index", ".meta", ".data-00000-of-00001"])
def test_what_is_not_there_is_an_error(tmp_path: Path, suffix: str) -> None:
    """A prefix of nothing, even one whose name others begin with."""
    write_bundle(tmp_path / "model.ckpt-50", W)
    outcome = cmd("inspect", tmp_path / f"model.ckpt-5{suffix}", code=12)
    assert "model.ckpt-5" in outcome.err


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """The message tells which file is missing."""
    prefix = write_bundle(tmp_path / "model.ckpt-5", {"a": W["w"], "b": W["w"]}, shards=2)
    shard_file(prefix, 1, 2).unlink()
    outcome = cmd("inspect", prefix, code=12)
    assert "model.ckpt-5.data-00001-of-00002: this data file is missing" in outcome.err


def test_a_shard_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    """A directory or a link to nowhere in place of a data file."""
    prefix = write_bundle(tmp_path / "model.ckpt-5", W)
    shard_file(prefix).unlink()
    shard_file(prefix).mkdir()
    assert "found a directory" in cmd("inspect", prefix, code=12).err
    shard_file(prefix).rmdir()
    shard_file(prefix).symlink_to("nowhere")
    assert shard_file(prefix).name in cmd("inspect", prefix, code=12).err


def test_files_may_be_links(tmp_path: Path) -> None:
    """Caches link to blobs by the digest of their content."""
    prefix = write_bundle(tmp_path / "blobs" / "x", W)
    link = tmp_path / "links" / "model.ckpt-5"
    link.parent.mkdir()
    for suffix in (".index", ".data-00000-of-00001"):
        Path(f"{link}{suffix}").symlink_to(f"{prefix}{suffix}")
    assert path_of(link) == str(link)


# ---------------------------------------------------------------------------- the old format


@pytest.mark.parametrize("name", ["model.ckpt-0", "model.ckpt", "model"])
def test_the_old_format_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    """One file without a suffix that ends as a table does: V1, and how to convert it."""
    path = tmp_path / name
    shutil.copyfile(FIXTURES / "v1" / "model.ckpt-0", path)
    with pytest.raises(UnsupportedInput) as caught:
        read(str(path), {})
    assert caught.value.exit_code == 12
    assert f"{path}: a checkpoint in TensorFlow's old V1 format" in caught.value.message
    assert "tf.compat.v1.train.SaverDef.V2" in caught.value.hint
    outcome = cmd("run", path, "-o", tmp_path / "out", code=12)
    assert "V1" in outcome.err
    assert sorted(os.listdir(tmp_path)) == [name]


def test_a_directory_of_the_old_format_has_nothing_to_average(tmp_path: Path) -> None:
    """And the reason is told."""
    assert "V1" in cmd("run", FIXTURES / "v1", "-o", tmp_path / "out", code=10).err


# ---------------------------------------------------------------------------- folders


@pytest.mark.parametrize("inside", ["", "variables", "variables/variables"])
def test_a_savedmodel_is_a_checkpoint(inside: str) -> None:
    """Its folder, the folder of its variables, or their prefix."""
    model = FIXTURES / "keras" / "savedmodel"
    assert path_of(model / inside) == str(model / "variables" / "variables")
    found = ema_cli.inspect(model / inside)
    assert isinstance(found, Checkpoint)
    assert len(found.index.tensors) > 10


def test_a_savedmodel_without_variables_is_none(tmp_path: Path) -> None:
    """A graph alone holds no weights."""
    shutil.copyfile(
        FIXTURES / "keras" / "savedmodel" / "saved_model.pb", tmp_path / "saved_model.pb"
    )
    with pytest.raises(InputError):
        read(str(tmp_path), {})


LATEST = {
    "a name": "m-2",
    "a path relative to the folder": "./m-2",
    "an absolute path that is right": "{folder}/m-2",
    "an absolute path of a folder that was moved": "/tmp/gone/train/m-2",
    "a path that leads out": "../../../m-2",
    "a path with another folder": "elsewhere/m-2",
}


@pytest.mark.parametrize("case", LATEST)
def test_a_folder_is_the_latest_of_its_state_file(tmp_path: Path, case: str) -> None:
    """Wherever the state file leads, the checkpoint of that name beside it is meant."""
    for k in (1, 2, 3):
        write_bundle(tmp_path / f"m-{k}", W)
    state(tmp_path, LATEST[case].format(folder=tmp_path), "m-1")
    assert path_of(tmp_path) == str(tmp_path / "m-2")


@pytest.mark.parametrize("latest", ["m-9", "../m-9", "", ".", "..", "/", "\1", "m-1\nm-2"])
def test_a_state_file_that_names_nothing_decides_nothing(tmp_path: Path, latest: str) -> None:
    """Then the only index is meant; of several, none."""
    write_bundle(tmp_path / "run" / "m-1", W)
    write_bundle(tmp_path / "m-9", W)  # outside the folder: never read
    state(tmp_path / "run", latest)
    assert path_of(tmp_path / "run") == str(tmp_path / "run" / "m-1")
    write_bundle(tmp_path / "run" / "m-2", W)
    with pytest.raises(InputError):
        read(str(tmp_path / "run"), {})


@pytest.mark.parametrize(
    "text", [b"", b"model_checkpoint_path", b"\xff\xfe", b'"' * 999, b"{" * 999]
)
def test_a_broken_state_file_decides_nothing(tmp_path: Path, text: bytes) -> None:
    """It is a hint, never a reason to fail."""
    write_bundle(tmp_path / "m-1", W)
    (tmp_path / "checkpoint").write_bytes(text)
    assert path_of(tmp_path) == str(tmp_path / "m-1")


def test_a_folder_with_one_index_is_its_checkpoint(tmp_path: Path) -> None:
    """Whatever other files it holds."""
    prefix = write_bundle(tmp_path / "weights", W)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "search.index").write_text("an index of something else")
    assert path_of(tmp_path) == str(prefix)


def test_safetensors_come_first(tmp_path: Path) -> None:
    """A folder of Hugging Face that also keeps TensorFlow's files is read as what it was."""
    write_checkpoint(tmp_path / "model.safetensors", W)
    write_bundle(tmp_path / "tf_model", W)
    assert read(str(tmp_path), {}).index.format == "safetensors-folder"


# ---------------------------------------------------------------------------- graphs


def test_the_graph_of_another_checkpoint_of_the_run_is_used() -> None:
    """TensorFlow writes it once: what is a variable is known for all checkpoints of that name."""
    last = read(str(FIXTURES / "graph" / "digits.ckpt-300"), {})
    assert last.index.roles_from == "the collections in digits.ckpt-0.meta"
    assert last.index.roles["conv/kernel"] is Role.VARIABLE
    assert "global_step" not in last.index.roles
    assert last.notes == ()


def test_graphs_of_other_names_are_not(tmp_path: Path) -> None:
    """Only that of the same name with another number; of several, the newest."""
    for name in ("digits.ckpt-300.index", "digits.ckpt-300.data-00000-of-00001"):
        shutil.copyfile(FIXTURES / "graph" / name, tmp_path / name)
    meta = FIXTURES / "graph" / "digits.ckpt-0.meta"
    for name in ("evaluation", "other-0", "digits-0"):
        shutil.copyfile(meta, tmp_path / f"{name}.meta")
    prefix = str(tmp_path / "digits.ckpt-300")
    assert read(prefix, {}).index.roles == {}
    for number in (2, 10, 9):
        shutil.copyfile(meta, tmp_path / f"digits.ckpt-{number}.meta")
    assert read(prefix, {}).index.roles_from == "the collections in digits.ckpt-10.meta"
    shutil.copyfile(meta, f"{prefix}.meta")
    assert read(prefix, {}).index.roles_from == "the collections in digits.ckpt-300.meta"


@pytest.mark.parametrize("content", [b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x7f", b"hello"])
def test_a_broken_graph_is_a_note(tmp_path: Path, content: bytes) -> None:
    """Names then tell what is a variable; the checkpoint itself is whole."""
    prefix = write_bundle(tmp_path / "m-1", {"w": np.float32([1]), "w/Adam": np.float32([2])})
    Path(f"{prefix}.meta").write_bytes(content)
    found = read(str(prefix), {})
    assert found.index.roles == {}
    assert "m-1.meta" in found.notes[0]
    assert "tell what is a variable" in found.notes[0]
    assert "m-1.meta" in cmd("run", prefix, "-o", tmp_path / "out").err


def test_an_object_graph_tells_the_names_of_the_program() -> None:
    """The keys of a tf.train.Checkpoint are paths through objects; each variable has a name."""
    checkpoint = read(str(FIXTURES / "keras" / "compiled" / "ckpt-4"), {})
    golden = json.loads((FIXTURES / "golden.json").read_bytes())["roles"]["keras/compiled/ckpt-4"]
    told = {"trainable": Role.VARIABLE, "statistics": Role.STATISTICS, "optimizer": Role.OPTIMIZER}
    for name, role in golden.items():
        if role in told:
            assert checkpoint.index.roles[name] is told[role], name
    assert checkpoint.index.roles_from == "its object graph"
    assert len(set(checkpoint.index.full_names.values())) > 5


def test_keras_alone_records_the_same_roles_in_all_its_checkpoints() -> None:
    """Four checkpoints of one model share an index and what is recorded of it."""
    run = ema_cli.inspect(FIXTURES / "keras" / "compiled")
    assert not isinstance(run, Checkpoint)
    assert len({id(checkpoint.index) for checkpoint in run.checkpoints}) == 1
