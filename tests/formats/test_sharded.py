"""Hugging Face folders: one weights file, or shards and the index that binds them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_checkpoint
from hostile_folders import FIRST, INDEX, SECOND

from ema_cli import formats
from ema_cli.errors import InputError
from ema_cli.formats import sharded
from ema_cli.tensors import Checkpoint

WEIGHT_MAP = {"layer/w": FIRST, "layer/b": SECOND}


def folder(path: Path, value: float = 1, **metadata: Any) -> Path:
    """Write a folder of two shards with an index."""
    write_checkpoint(path / FIRST, {"layer/w": np.float32([value, value])}, {"format": "pt"})
    write_checkpoint(path / SECOND, {"layer/b": np.float32([value])}, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": WEIGHT_MAP}))
    return path


def read(path: Path, known: dict | None = None) -> Checkpoint:
    """Read a checkpoint."""
    return formats.read(os.fspath(path), {} if known is None else known)


def values(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Return the float32 values of a checkpoint, found through its index."""
    found = {}
    for name, _, _, (file, offset, nbytes), *_ in checkpoint.index.tensors:
        content = Path(checkpoint.files[file].path).read_bytes()
        found[name] = np.frombuffer(content[offset : offset + nbytes], np.float32).tolist()
    return found


def test_the_tensors_of_all_shards_are_one_checkpoint(tmp_path: Path) -> None:
    """Each tensor is found in its own shard, and the file metadata is kept."""
    found = read(folder(tmp_path / "checkpoint-100"))
    assert values(found) == {"layer/w": [1, 1], "layer/b": [1]}
    assert found.index.names == (FIRST, SECOND)
    assert found.index.metadata == {"format": "pt"}
    assert found.notes == ()


def test_an_index_may_be_named_itself(tmp_path: Path) -> None:
    """The path of the index file names the checkpoint it binds."""
    path = folder(tmp_path / "checkpoint-100")
    found = read(path / INDEX)
    assert values(found) == values(read(path))
    assert found.path == os.fspath(path / INDEX)


def test_folders_with_the_same_headers_share_one_index(tmp_path: Path) -> None:
    """Identity of indexes means equality, across folders too."""
    known: dict = {}
    first = read(folder(tmp_path / "checkpoint-100", 1), known)
    second = read(folder(tmp_path / "checkpoint-200", 2), known)
    assert first.index is second.index
    assert values(second) == {"layer/w": [2, 2], "layer/b": [2]}


def test_other_shard_names_are_another_index(tmp_path: Path) -> None:
    """Where the tensors lie is part of an index."""
    known: dict = {}
    first = read(folder(tmp_path / "a"), known)
    path = folder(tmp_path / "b")
    (path / SECOND).rename(path / "other.safetensors")
    text = (path / INDEX).read_text().replace(SECOND, "other.safetensors")
    (path / INDEX).write_text(text)
    assert read(path, known).index is not first.index


def test_shards_may_hold_tensors_the_index_does_not_list(tmp_path: Path) -> None:
    """What lies in a listed shard belongs to the checkpoint; an unlisted file does not."""
    path = folder(tmp_path)
    write_checkpoint(path / SECOND, {"layer/b": np.float32([1]), "extra": np.float32([7])})
    write_checkpoint(path / "adapter.safetensors", {"stray": np.float32([1])})
    assert set(read(path).index.by_name) == {"layer/w", "layer/b", "extra"}


@pytest.mark.parametrize("total", [11, 13, 0, 12.5, 1e400, -1])
def test_a_stale_total_size_is_a_note_not_an_error(tmp_path: Path, total: float) -> None:
    """Indexes in the wild carry wrong sizes; the shards themselves decide."""
    [note] = read(folder(tmp_path, total_size=total)).notes
    assert note.startswith(f"{tmp_path / INDEX}: total_size says ")
    assert note.endswith("the shards hold 12")


@pytest.mark.parametrize("total", [12, 12.0, None, "12", True])
def test_a_right_or_unreadable_total_size_is_no_note(tmp_path: Path, total: Any) -> None:
    """Equal as a number, or no number at all, there is nothing to say."""
    assert read(folder(tmp_path, total_size=total)).notes == ()


def test_a_single_weights_file_needs_no_index(tmp_path: Path) -> None:
    """A folder with exactly one weights file is a checkpoint, whatever the file is called."""
    write_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors", {"w": np.float32([5])})
    (tmp_path / "config.json").write_text("{}")
    assert values(read(tmp_path)) == {"w": [5]}


def test_a_single_file_goes_before_its_own_index(tmp_path: Path) -> None:
    """Both saved: the file that holds everything is taken."""
    path = folder(tmp_path)
    write_checkpoint(path / "model.safetensors", {"w": np.float32([5])})
    assert values(read(path)) == {"w": [5]}


def test_hidden_files_are_no_weights(tmp_path: Path) -> None:
    """A hidden file beside the weights, e.g. ours before it is published, changes nothing."""
    path = folder(tmp_path)
    (path / ".model.safetensors.ema-avg.tmp").write_bytes(b"")
    (path / ".other.safetensors").write_bytes(b"")
    (path / ".other.safetensors.index.json").write_bytes(b"")
    assert values(read(path)) == {"layer/w": [1, 1], "layer/b": [1]}


def test_a_folder_that_cannot_be_listed_is_an_error_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without read permission is refused with the system's reason."""

    def denied(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    path = folder(tmp_path / "checkpoint-100")
    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(InputError, match="checkpoint-100: cannot list: Permission denied"):
        read(path)


def test_an_index_we_write_is_one_we_read(tmp_path: Path) -> None:
    """`encode_index` makes the index that binds the same shards."""
    path = folder(tmp_path)
    before = read(path)
    (path / INDEX).write_bytes(sharded.encode_index(WEIGHT_MAP, before.index.nbytes))
    after = read(path)
    assert (after.index.tensors, after.notes) == (before.index.tensors, ())
