"""Skeletons that are damaged and sources that change while they are kept: all of it is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance
import numpy as np
import pytest
from conformance import ROWS
from helpers import Failing, write_checkpoint
from skeletons import Pair, copy_of, kept, same
from tensorflow_bundles import write_bundle

from ema_cli import formats
from ema_cli.errors import DamagedFile, EmaError, InputChanged, InputError, StorageError
from ema_cli.states import skeleton as skeletons
from ema_cli.states.skeleton import keep, read

FOLDER = "digits/bf16/checkpoint-2000"
VALUES = {"w": np.arange(40_000, dtype=np.float32), "b": np.ones(3, np.float32)}
each_row = pytest.mark.parametrize("row", ROWS)


def refused(pair: Pair, file: Path | None = None) -> EmaError:
    """Return the error of reading a skeleton, which names the file that was damaged."""
    with pytest.raises(DamagedFile) as caught:
        pair.read()
    if file is not None:
        assert caught.value.args[0] == os.fspath(file)
    return caught.value


def files_of(pair: Pair) -> list[Path]:
    """Return the files of a skeleton."""
    return [pair.directory / file.name for file in pair.skeleton.files]


# ---------------------------------------------------------------------------- on disk


@each_row
def test_a_flipped_byte_is_told(row: str, tmp_path: Path) -> None:
    """Anywhere in what was kept, with the file it is in; nothing looks into the holes."""
    pair = kept(conformance.make(row, tmp_path / "in", VALUES))
    for path, file in zip(files_of(pair), pair.skeleton.files, strict=True):
        for offset, length in file.pieces:
            for at in {offset, offset + length // 2, offset + length - 1}:
                conformance.flip(path, at)
                error = refused(pair, path)
                assert "of what was kept" in error.message
                assert error.exit_code == 12
                conformance.flip(path, at)
    file, offset, _ = pair.source.index.by_name["w"].extent
    conformance.flip(files_of(pair)[file], offset + 40_000)
    same(pair.source, pair.read())


@each_row
def test_another_size_is_told(row: str, tmp_path: Path) -> None:
    """One byte less or more, or none at all."""
    pair = kept(conformance.make(row, tmp_path / "in", VALUES))
    for path in files_of(pair):
        whole = path.read_bytes()
        for other in (whole[:-1], whole + b"\0", b""):
            path.write_bytes(other)
            assert f"found {len(other):,}" in refused(pair, path).message
        path.write_bytes(whole)
    same(pair.source, pair.read())


def _missing(path: Path) -> None:
    path.unlink()


def _link(path: Path) -> None:
    path.rename(path.parent.parent.parent / "away")
    path.symlink_to(path.parent.parent.parent / "away")


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("row", ["safetensors", "safetensors-folder", "tensorflow"])
@pytest.mark.parametrize("change", [_missing, _link, _dangling, _folder, _pipe])
def test_a_file_that_is_none_is_told(
    row: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    """Links are not followed, pipes not waited for."""
    for k in range(len(kept(conformance.make(row, tmp_path / "in", VALUES)).skeleton.files)):
        pair = kept(conformance.make(row, tmp_path / str(k) / "in", VALUES))
        change(files_of(pair)[k])
        refused(pair, files_of(pair)[k])


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", ["config.json", "x.safetensors", "checkpoint", ".hidden", "a.py"])
def test_what_was_not_kept_is_told(deep: bool, name: str, tmp_path: Path) -> None:
    """An extra file could be taken for a side file, or for the checkpoint."""
    pair = kept(copy_of(FOLDER, tmp_path))
    if name == "config.json" and deep:
        name = "config_of_mine.json"
    path = pair.directory / "checkpoint-2000" / name if deep else pair.directory / name
    path.symlink_to("/etc/passwd")
    assert "none of the files" in refused(pair, path).message
    path.unlink()
    path.write_text("{}")
    refused(pair, path)
    path.unlink()
    path.mkdir()
    refused(pair, path)


def test_directories_that_are_links_are_told(tmp_path: Path) -> None:
    """The skeleton's own, and the folder in it; or none are there."""
    pair = kept(copy_of(FOLDER, tmp_path))
    for path in (pair.directory, pair.directory / "checkpoint-2000"):
        away = tmp_path / "away"
        path.rename(away)
        refused(pair)
        path.symlink_to(away)
        refused(pair, path)
        path.unlink()
        path.write_text("")
        refused(pair, path)
        path.unlink()
        away.rename(path)
    same(pair.source, pair.read())


@each_row
def test_damage_that_checksums_miss_is_met_by_the_format(row: str, tmp_path: Path) -> None:
    """Whoever changes files and document alike; data without a structure has none to damage."""
    pair = kept(conformance.make(row, tmp_path / "in", VALUES))
    for ordinal, path in enumerate(files_of(pair)):
        file = pair.skeleton.files[ordinal]
        files = list(pair.skeleton.files)
        os.truncate(path, 0)
        os.truncate(path, file.size)
        files[ordinal] = file._replace(pieces=(), crc=0)
        changed = pair._replace(skeleton=pair.skeleton._replace(files=tuple(files)))
        if ".data-" in file.name:
            same(pair.source, changed.read())
        else:
            with pytest.raises(InputError):
                changed.read()
        pair = kept(Path(pair.source.path))


def test_another_key_or_format_is_an_error(tmp_path: Path) -> None:
    """A document may say one that the files do not have."""
    pair = kept(copy_of("torch/gan/gan-20.pt", tmp_path), key="netG")
    for wrong in ({"key": ""}, {"key": "no"}, {"format": "npz", "key": ""}, {"format": "torch "}):
        with pytest.raises(DamagedFile):
            read(pair.skeleton._replace(**wrong), os.fspath(pair.directory))


def test_files_of_another_checkpoint_are_an_error(tmp_path: Path) -> None:
    """What is read has to be what was verified: a prefix could mean another one's files."""
    write_bundle(tmp_path / "in" / "c-1", {"w": np.ones(100, np.float32)})
    pair = kept(tmp_path / "in" / "c-1")
    skeleton = pair.skeleton
    index = next(file for file in skeleton.files if file.name.endswith(".index"))
    outside = tmp_path / "in" / "c-1.data-00000-of-00001"
    pair.directory.joinpath("c-1.data-00000-of-00001").unlink()
    with pytest.raises(InputError):
        read(skeleton._replace(files=(index,)), os.fspath(pair.directory))
    assert outside.exists()


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error says so."""
    pair = kept(write_checkpoint(tmp_path / "a.safetensors", VALUES))
    for function, code in (("open", errno.EIO), ("open", errno.EMFILE), ("preadv", errno.EIO)):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, Failing(getattr(os, function), 1, code))
            patch.setattr("ema_cli.files._preadv", _preadv)
            with pytest.raises(StorageError):
                pair.read()
    same(pair.source, pair.read())


def _preadv(fd: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(fd, [buffer], offset)


# ---------------------------------------------------------------------------- sources


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def _rewritten(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def _replaced(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@each_row
@pytest.mark.parametrize("change", [_cut, _rewritten, _replaced])
def test_a_source_that_changed_is_told(
    row: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    """Each file of tensors must be the one whose header was read."""
    count = len(formats.read(os.fspath(conformance.make(row, tmp_path / "in", VALUES)), {}).files)
    for k in range(count):
        path = conformance.make(row, tmp_path / str(k) / "in", VALUES)
        source = formats.read(os.fspath(path), {})
        change(Path(source.files[k].path))
        with pytest.raises(InputChanged, match="changed while it was read"):
            keep(source, source.index.by_name, os.fspath(tmp_path / "state"))


def test_a_source_that_changes_while_it_is_kept_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its last byte was read it must still be the same."""
    path = write_checkpoint(tmp_path / "a.safetensors", VALUES)
    source = formats.read(os.fspath(path), {})
    parts = skeletons._parts

    def changing(*args: Any) -> Any:
        yield from parts(*args)
        os.utime(path, (0, 0))

    monkeypatch.setattr(skeletons, "_parts", changing)
    with pytest.raises(InputChanged):
        keep(source, ["w"], os.fspath(tmp_path / "state"))


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model-00002-of-00002.safetensors", ""]
)
def test_a_source_that_is_gone_is_told(name: str, tmp_path: Path) -> None:
    """Whichever of its files, or all of them; a side file that is gone is none any more."""
    path = copy_of(FOLDER, tmp_path)
    source = formats.read(os.fspath(path), {})
    directory = os.fspath(tmp_path / "state")
    (path / "config.json").unlink()
    same(source, read(keep(source, [], directory), directory))
    if name:
        (path / name).unlink()
    else:
        shutil.rmtree(path)
    with pytest.raises(InputError):
        keep(source, [], directory)


def test_an_index_that_changed_is_told_when_it_is_read(tmp_path: Path) -> None:
    """It was not stamped; but it has to fit the shards."""
    path = copy_of(FOLDER, tmp_path)
    source = formats.read(os.fspath(path), {})
    index = path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"].popitem()
    document["weight_map"]["other"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(document))
    skeleton = keep(source, [], os.fspath(tmp_path / "s"))
    with pytest.raises(DamagedFile):
        read(skeleton, os.fspath(tmp_path / "s"))


@pytest.mark.parametrize("function", ["ftruncate", "pwrite", "fsync", "mkdir"])
def test_a_full_disk_is_told(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails first; the next attempt begins anew."""
    path = write_checkpoint(tmp_path / "a.safetensors", VALUES)
    source = formats.read(os.fspath(path), {})
    with monkeypatch.context() as patch:
        patch.setattr(os, function, Failing(getattr(os, function), 1, errno.ENOSPC))
        with pytest.raises(StorageError):
            keep(source, ["w"], os.fspath(tmp_path / "state"))
    same(source, kept(path).read())
