"""Hostile and broken checkpoint folders, one defect each, in the manner of `hostile`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import write_checkpoint
from hostile import FOLDER, Hostile

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def shards(folder: Path) -> Path:
    """Write two sound shards, one tensor in each, without an index."""
    path = folder / FOLDER
    write_checkpoint(path / FIRST, {"layer/w": np.float32([1, 2])})
    write_checkpoint(path / SECOND, {"layer/b": np.float32([3])})
    return path


def of_index(name: str, index: bytes | dict[str, Any], *words: str) -> Hostile:
    """Return two sound shards with this index."""

    def build(folder: Path) -> Path:
        path = shards(folder)
        text = index if isinstance(index, bytes) else json.dumps(index).encode()
        (path / INDEX).write_bytes(text)
        return path

    return Hostile(name, build, words)


def of_map(name: str, weight_map: Mapping[str, Any], *words: str) -> Hostile:
    """Return two sound shards whose index has this weight map."""
    return of_index(name, {"metadata": {}, "weight_map": weight_map}, *words)


def of_shard(name: str, shard: Any, *words: str) -> Hostile:
    """Return a folder whose index says that ``layer/w`` lies in `shard`."""
    return of_map(name, {"layer/w": shard, "layer/b": SECOND}, *words)


def changed(name: str, change: Callable[[Path], None], *words: str, code: int = 12) -> Hostile:
    """Return a sound sharded folder after `change`."""

    def build(folder: Path) -> Path:
        path = shards(folder)
        index = {"metadata": {}, "weight_map": {"layer/w": FIRST, "layer/b": SECOND}}
        (path / INDEX).write_text(json.dumps(index))
        change(path)
        return path

    return Hostile(name, build, words, code)


def _twice(path: Path) -> None:
    write_checkpoint(path / SECOND, {"layer/b": np.float32([3]), "layer/w": np.float32([1, 2])})


def _cut(path: Path) -> None:
    content = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(content[:-1])


def _dangling(path: Path) -> None:
    (path / SECOND).unlink()
    (path / SECOND).symlink_to("../../blobs/gone")


def _pipe(path: Path) -> None:
    (path / SECOND).unlink()
    os.mkfifo(path / SECOND)


def _directory(path: Path) -> None:
    (path / SECOND).unlink()
    (path / SECOND).mkdir()


def _two_indexes(path: Path) -> None:
    (path / "other.safetensors.index.json").write_bytes((path / INDEX).read_bytes())


_BARE = ("'layer/w'", "bare name")

FOLDERS = (
    of_shard("a shard in the parent folder", "../model.safetensors", *_BARE, "../model"),
    of_shard("a shard with an absolute path", "/etc/passwd.safetensors", *_BARE, "/etc/passwd"),
    of_shard("a shard in a folder below", "a/b.safetensors", *_BARE),
    of_shard("a shard behind a backslash", "..\\b.safetensors", *_BARE),
    of_shard("a shard on a drive", "C:b.safetensors", *_BARE),
    of_shard("a shard with NUL in its name", "b\0.safetensors", *_BARE),
    of_shard("a shard that is no safetensors file", "/dev/zero", *_BARE),
    of_shard("a shard without a name", ".safetensors", *_BARE),
    of_shard("a shard named by 300 bytes", "b" * 300 + ".safetensors", *_BARE),
    of_shard("a shard with a lone surrogate", "\ud800.safetensors", "'layer/w'", "ud800"),
    of_shard("a shard that is a number", 1, *_BARE),
    of_shard("a shard that is a list", [FIRST], *_BARE),
    of_shard("a shard that is missing", "gone.safetensors", "gone.safetensors", "No such file"),
    of_shard(
        "a tensor in another shard than the index says", SECOND, "'layer/w'", SECOND, "nowhere"
    ),
    of_map(
        "tensors swapped between shards",
        {"layer/w": SECOND, "layer/b": FIRST},
        f"expected it in '{SECOND}'",
        f"found it in '{FIRST}'",
    ),
    of_map(
        "a listed tensor that is nowhere",
        {"layer/w": FIRST, "layer/b": SECOND, "layer/x": FIRST},
        "'layer/x'",
        FIRST,
        "nowhere",
    ),
    of_map("an empty weight map", {}, INDEX, "weight_map"),
    of_index("an index without a weight map", {"metadata": {}}, INDEX, "weight_map"),
    of_index("a weight map that is a list", {"weight_map": [FIRST]}, INDEX, "weight_map"),
    of_index("an index that is a list", b"[]", INDEX, "JSON object"),
    of_index("an empty index", b"", INDEX, "not JSON"),
    of_index("an index cut short", b'{"weight_map": {"layer/w"', INDEX, "not JSON"),
    of_index("an index that is not UTF-8", b'{"\xff": 1}', INDEX, "not UTF-8", "byte 2"),
    of_index("an index of 5,000 brackets", b"[" * 5000, INDEX, "nested too deeply"),
    of_index(
        "one tensor listed twice",
        b'{"weight_map": {"layer/w": "%b", "layer/w": "%b"}}' % (FIRST.encode(), SECOND.encode()),
        INDEX,
        "'layer/w' stands twice",
    ),
    changed("one tensor in two shards", _twice, "'layer/w'", "two shards"),
    changed("a shard that is truncated", _cut, SECOND, "truncated", "4 bytes", "holds 3"),
    changed("a shard that is a dangling link", _dangling, SECOND, "No such file"),
    changed("a shard that is a named pipe", _pipe, SECOND, "a named pipe"),
    changed("a shard that is a directory", _directory, SECOND, "a directory"),
    changed("two indexes", _two_indexes, "expected one index", "2 indexes"),
    # Searched as a run directory, it offers shards without steps that belong to no index.
    Hostile("shards without an index", shards, ("expected a checkpoint folder",), code=13),
)
