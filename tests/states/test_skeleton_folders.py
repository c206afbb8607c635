"""Skeletons of checkpoints of several files: folders of shards, and prefixes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import write_checkpoint
from skeletons import copy_of, kept, layouts, same
from tensorflow_bundles import write_bundle

from ema_cli import formats
from ema_cli.states.skeleton import keep, read
from ema_cli.tensors import Role


def test_a_folder_is_kept_with_what_makes_it_load(tmp_path: Path) -> None:
    """By the allow-list, and no file that a link would bring in."""
    path = copy_of("digits/bf16/checkpoint-2000", tmp_path)
    (path / "tokenizer.json").write_text("{}")
    (path / "modeling.py").write_text("")
    (path / "secret.pem").write_text("")
    (tmp_path / "elsewhere").write_text("")
    (path / "tokenizer_config.json").symlink_to(tmp_path / "elsewhere")
    pair = kept(path)
    names = {Path(file.name).name for file in pair.skeleton.files}
    assert {Path(file.name).parent.name for file in pair.skeleton.files} == {"checkpoint-2000"}
    assert names == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "modeling.py",
    }
    assert layouts(pair.read()) == layouts(pair.source)


def test_a_hub_cache_is_followed(tmp_path: Path) -> None:
    """Its links become files, side files among them."""
    path = copy_of("digits/bf16/checkpoint-2000", tmp_path)
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for k, file in enumerate(sorted(path.iterdir())):
        shutil.copy(file, blobs / str(k))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(k)))
    pair = kept(snapshot)
    assert pair.skeleton.path == "abc"
    assert {Path(file.name).name for file in pair.skeleton.files} > {"config.json"}
    assert not any(found.is_symlink() for found in pair.directory.rglob("*"))
    same(pair.source, pair.read())


def test_a_single_file_in_a_folder(tmp_path: Path) -> None:
    """A folder of its own kind, and one that only stands for the file in it."""
    write_checkpoint(tmp_path / "a" / "x.safetensors", {"w": np.ones(100, np.float32)})
    pair = kept(tmp_path / "a")
    assert (pair.skeleton.path, pair.skeleton.files[0].name) == ("a", "a/x.safetensors")
    same(pair.source, pair.read())
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "x.npz", w=np.ones(100))
    pair = kept(tmp_path / "b")
    assert (pair.skeleton.path, len(pair.skeleton.files)) == ("x.npz", 1)
    same(pair.source, pair.read())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain-1", "plain-1"),
        ("größe", "größe"),
        ("v=1,2", "checkpoint"),
        ("\x1b[31m", "checkpoint"),
        ("a\nb", "checkpoint"),
        (".hidden", "checkpoint"),
        ("x" * 201, "checkpoint"),
        ("x.json", "checkpoint"),
        ("\udcff", "checkpoint"),
        ("a b", "checkpoint"),
    ],
)
def test_the_folder_has_a_harmless_name(name: str, expected: str, tmp_path: Path) -> None:
    """That of the checkpoint's, where nothing is odd about it."""
    folder = tmp_path / "in" / name
    write_checkpoint(folder / "x.safetensors", {"w": np.ones(100, np.float32)})
    pair = kept(folder)
    assert pair.skeleton.path == expected
    same(pair.source, pair.read())


def test_the_folder_we_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is not ``.``."""
    write_checkpoint(tmp_path / "in" / "x.safetensors", {"w": np.ones(100, np.float32)})
    monkeypatch.chdir(tmp_path / "in")
    for path in (".", "./", "../in/", os.fspath(tmp_path / "in") + "/"):
        source = formats.read(path, {})
        skeleton = keep(source, ["w"], "../state")
        assert skeleton.path == "in"
        same(source, read(skeleton, "../state"))


def test_an_index_that_is_called_as_a_side_file(tmp_path: Path) -> None:
    """It is kept once."""
    path = copy_of("digits/bf16/checkpoint-2000", tmp_path)
    (path / "model.safetensors.index.json").rename(path / "config.safetensors.index.json")
    pair = kept(path)
    same(pair.source, pair.read())


def test_what_a_graph_told_is_known_without_it(tmp_path: Path) -> None:
    """Neither a graph file nor a SavedModel is kept, their words are."""
    for fixture, role in (
        ("tensorflow/graph/digits.ckpt-300", Role.VARIABLE),
        ("tensorflow/keras/savedmodel", Role.FIXED),
    ):
        path = copy_of(fixture, tmp_path / Path(fixture).name)
        pair = kept(path)
        shutil.rmtree(path.parent / "savedmodel", ignore_errors=True)
        found = pair.read()
        assert role in found.index.roles.values()
        assert found.index.roles == pair.source.index.roles
        assert found.index.roles_from == pair.source.index.roles_from
        assert found.index.full_names == pair.source.index.full_names


def test_data_of_another_count_is_not_kept(tmp_path: Path) -> None:
    """Files of an older save of the same prefix are none of its."""
    path = write_bundle(tmp_path / "c-1", {"w": np.ones(100, np.float32)})
    (tmp_path / "c-1.data-00000-of-00002").write_bytes(b"old")
    pair = kept(path)
    names = [file.name for file in pair.skeleton.files]
    assert names == ["c-1.data-00000-of-00001", "c-1.index"]
    same(pair.source, pair.read())


def test_the_model_inside_is_found_again(tmp_path: Path) -> None:
    """Where the user said it is."""
    pair = kept(copy_of("torch/gan/gan-20.pt", tmp_path), key="netG")
    assert pair.skeleton.key == "netG"
    same(pair.source, pair.read())
