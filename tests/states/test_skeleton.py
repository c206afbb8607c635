"""What is kept of a checkpoint: its format reads it as before, when the checkpoint is gone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import conformance
import h5py
import numpy as np
import pytest
from conformance import ROWS
from helpers import write_checkpoint
from skeletons import copy_of, kept, kept_of, layouts, same
from tensorflow_bundles import Sliced, strings, write_bundle
from torch_files import ref, saved, state_of
from torch_views import View, write_views

from ema_cli import formats, spilling
from ema_cli.formats import FORMATS

FORMAT_OF = {
    "digits/run/digits-step-2000.safetensors": "safetensors",
    "digits/bf16/checkpoint-2000": "safetensors-folder",
    "digits/bf16/checkpoint-2000/model-00001-of-00002.safetensors": "safetensors",
    "digits/bf16/checkpoint-2000/model.safetensors.index.json": "safetensors-folder",
    "tensorflow/graph/digits.ckpt-300": "tensorflow",
    "tensorflow/graph/digits.ckpt-0": "tensorflow",
    "tensorflow/keras/savedmodel": "tensorflow",
    "tensorflow/keras/uncompiled": "tensorflow",
    "tensorflow/keras/compiled/ckpt-1": "tensorflow",
    "tensorflow/keras/plain/v": "tensorflow",
    "tensorflow/partitioned/model.ckpt-20": "tensorflow",
    "torch/run/ckpt-10.pt": "torch",
    "torch/legacy/model-20.pt": "torch",
    "torch/lightning/epoch=1-step=40.ckpt": "torch",
    "torch/lightning-ema/epoch=1-step=40.ckpt": "torch",
    "torch/whole/model-20.pt": "torch",
    "torch/hf/checkpoint-10": "torch-folder",
    "torch/hf/checkpoint-10/pytorch_model.bin.index.json": "torch-folder",
    "keras/archive/epoch-2.keras": "keras",
    "keras/weights/epoch-2.weights.h5": "hdf5",
    "keras/bfloat16/epoch-2.weights.h5": "hdf5",
    "keras/legacy/epoch-1.h5": "hdf5",
    "npz/run/epoch-1.npz": "npz",
    "npz/compressed/epoch-1.npz": "npz",
}
each_fixture = pytest.mark.parametrize("fixture", FORMAT_OF)
each_row = pytest.mark.parametrize("row", ROWS)


# ---------------------------------------------------------------------------- all formats


def test_the_fixtures_are_of_all_formats() -> None:
    """A new row of the table needs a fixture here."""
    assert set(FORMAT_OF.values()) == set(FORMATS) == set(ROWS)


@each_fixture
def test_a_kept_checkpoint_reads_as_before(fixture: str, tmp_path: Path) -> None:
    """Tensors, roles, records, steps; and any output is laid out alike."""
    path = copy_of(fixture, tmp_path)
    pair = kept(path)
    before = layouts(pair.source)
    assert pair.skeleton.format == FORMAT_OF[fixture]
    pair.directory.parent.rename(tmp_path / "moved")
    shutil.rmtree(path.parent)
    pair = pair._replace(directory=tmp_path / "moved" / "last-1")
    found = pair.read()
    same(pair.source, found)
    assert layouts(found) == before


@each_fixture
def test_only_bytes_of_held_tensors_are_gone(fixture: str, tmp_path: Path) -> None:
    """Every other byte is the source's; the tensors' own make the files whole again."""
    pair = kept(copy_of(fixture, tmp_path))
    real = [file for file in pair.source.files if file.path]
    assert len(pair.skeleton.files) >= len(real)
    for ordinal, file in enumerate(real):
        whole = Path(file.path).read_bytes()
        missing = np.ones(len(whole), bool)
        for start, stop in pair.pieces(ordinal):
            missing[start:stop] = False
        mended = bytearray(pair.raw(ordinal))
        assert not np.frombuffer(mended, np.uint8)[missing].any()
        mine = np.zeros(len(whole), bool)
        for tensor in pair.source.index.tensors:
            for extent in tensor.extents:
                if extent.file == ordinal and tensor.nbytes > 64 and tensor.dtype.bits:
                    mine[extent.offset : extent.offset + extent.nbytes] = True
        assert (mine == missing).all()
        mended = np.where(missing, np.frombuffer(whole, np.uint8), mended)
        assert mended.tobytes() == whole


@each_row
def test_the_files_are_sparse(row: str, tmp_path: Path) -> None:
    """What a slot holds takes no room a second time."""
    values = {"large": np.ones((1 << 20,), np.float32), "small": np.ones(3, np.float32)}
    pair = kept(conformance.make(row, tmp_path / "in", values))
    size = sum(file.size for file in pair.skeleton.files)
    found = [(pair.directory / file.name).stat() for file in pair.skeleton.files]
    assert sum(status.st_size for status in found) == size > 4 << 20
    assert sum(status.st_blocks * 512 for status in found) < 128 << 10
    assert {status.st_mode & 0o777 for status in found} == {0o600}
    assert pair.directory.stat().st_mode & 0o777 == 0o700
    same(pair.source, pair.read())


@each_row
def test_what_is_not_held_stays(row: str, tmp_path: Path) -> None:
    """A tensor that no slot holds can still be read."""
    values = {"a": np.arange(100, dtype=np.float32), "b": np.arange(200, dtype=np.float32)}
    path = conformance.make(row, tmp_path / "in", values)
    pair = kept(path, ["a"])
    found = pair.read()
    for name, value in values.items():
        file, offset, nbytes = found.index.by_name[name].extent
        raw = Path(found.files[file].path).read_bytes()[offset : offset + nbytes]
        assert raw == (bytes(nbytes) if name == "a" else value.tobytes())


# ---------------------------------------------------------------------------- which bytes


def test_small_tensors_are_always_kept(tmp_path: Path) -> None:
    """Up to 64 bytes; scalars such as the step are among them."""
    values = {"step": np.int64(7), "w": np.ones(16, np.float32), "v": np.ones(17, np.float32)}
    pair = kept(write_checkpoint(tmp_path / "a.safetensors", values))
    extent = pair.source.index.by_name["v"].extent
    assert pair.pieces() == [(0, extent.offset)]
    assert extent.offset + extent.nbytes == len(pair.raw())


def test_an_unknown_name_holds_nothing(tmp_path: Path) -> None:
    """Names that the checkpoint has not got change nothing."""
    path = write_checkpoint(tmp_path / "a.safetensors", {"w": np.ones(100, np.float32)})
    pair = kept(path, ["x"])
    assert pair.raw() == path.read_bytes()
    assert pair.pieces() == [(0, path.stat().st_size)]


def test_strings_are_always_kept(tmp_path: Path) -> None:
    """No slot can hold them, and an object graph is one."""
    text = strings([b"x" * 1000])
    pair = kept(write_bundle(tmp_path / "c-1", {"s": text, "w": np.ones(100, np.float32)}))
    at = pair.source.index.by_name["s"].extent.offset
    assert pair.raw()[at : at + len(text.data)] == text.data


def test_slices_are_holes(tmp_path: Path) -> None:
    """A partitioned variable is in none of the files any more, wherever its slices lay."""
    values = {
        "w": Sliced(np.ones((8, 100), np.float32), [((0, 3), (0, -1)), ((3, 5), (0, -1))]),
        "b": np.ones(2, np.float32),
    }
    pair = kept(write_bundle(tmp_path / "c-1", values, shards=2))
    assert sum(stop - start for k in (0, 1) for start, stop in pair.pieces(k)) == 8
    same(pair.source, pair.read())


def test_bytes_of_others_too_are_kept(tmp_path: Path) -> None:
    """Of views that share elements only what is held by all names is a hole."""
    views = {
        "whole": View("0", (100,), (1,)),
        "part": View("0", (30,), (1,), 20),
        "other": View("1", (100,), (1,)),
        "tied": View("1", (100,), (1,)),
    }
    storages = {key: np.arange(1, 101, dtype=np.float32) for key in "01"}
    path = write_views(tmp_path / "m.pt", storages, views)
    values = {name: conformance.read(path).index.by_name[name].extent for name in views}

    def shown(held: Collection[str]) -> list[float]:
        raw = kept(path, held).raw()
        return [
            np.frombuffer(raw[e.offset : e.offset + e.nbytes], np.float32).astype(bool).sum()
            for e in values.values()
        ]

    assert shown(["whole", "other"]) == [30, 30, 100, 100]
    assert shown(["part", "other", "tied"]) == [100, 30, 0, 0]
    assert shown(views) == [0, 0, 0, 0]


def test_elements_that_lie_scattered_are_kept(tmp_path: Path) -> None:
    """What lies between them may be anything."""
    views = {
        "columns": View("0", (50, 2), (4, 1)),
        "turned": View("1", (20, 10), (1, 20)),
        "shown_often": View("2", (100, 50), (0, 1)),
    }
    storages = {key: np.ones(300, np.float32) for key in "012"}
    path = write_views(tmp_path / "m.pt", storages, views)
    pair = kept(path)
    same(pair.source, pair.read())
    extent = pair.source.index.by_name["turned"].extent
    gone = [(a[1], b[0]) for a, b in zip(pair.pieces(), pair.pieces()[1:], strict=False)]
    assert gone == [(extent.offset, extent.offset + 800)]


@pytest.mark.parametrize("row", ["npz", "hdf5", "keras"])
def test_what_spills_is_kept_as_it_lies(row: str, tmp_path: Path) -> None:
    """Compressed, and the file it was unpacked to is none of the checkpoint's."""
    values = {"w": np.zeros((100, 100), np.float32), "n": np.int64(3)}
    path = conformance.make_packed(row, tmp_path / "in", 1, values)
    source = formats.read(os.fspath(path), {})
    held = ["w", "n"]
    unpacked = spilling.spill(source, held, os.fspath(tmp_path / "unpacked"))
    assert unpacked.files[1].path
    for checkpoint in (source, unpacked):
        pair = kept_of(checkpoint, held, path)
        assert pair.raw() == path.read_bytes()
        assert len(pair.skeleton.files) == 1
        found = pair.read()
        same(source, found)
        again = spilling.spill(found, held, os.fspath(tmp_path / "again"))
        assert Path(again.files[1].path).read_bytes() == (tmp_path / "unpacked").read_bytes()


def test_a_file_that_spills_in_parts_has_holes(tmp_path: Path) -> None:
    """Contiguous datasets beside chunked ones."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["flat"] = np.ones(5000, np.float32)
        file.create_dataset("chunked", data=np.ones(5000, np.float32), chunks=(1000,))
    pair = kept(path)
    assert sum(stop - start for start, stop in pair.pieces()) == path.stat().st_size - 20_000
    found = pair.read()
    same(pair.source, found)
    again = spilling.spill(found, ["chunked"], os.fspath(tmp_path / "again"))
    assert Path(again.files[1].path).read_bytes() == np.ones(5000, np.float32).tobytes()


# ---------------------------------------------------------------------------- directories, costs


def test_the_directory_is_emptied(tmp_path: Path) -> None:
    """Whatever an interrupted update left; a link is not followed."""
    path = write_checkpoint(tmp_path / "a.safetensors", {"w": np.ones(100, np.float32)})
    for _ in range(2):
        pair = kept(path)
        (pair.directory / "deep" / "er").mkdir(parents=True)
        (pair.directory / "left").write_text("over")
    pair = kept(path)
    assert conformance.listing(pair.directory) == ["a.safetensors"]
    elsewhere = tmp_path / "elsewhere"
    pair.directory.rename(elsewhere)
    pair.directory.symlink_to(elsewhere)
    (elsewhere / "mine").write_text("")
    pair = kept(path)
    assert not pair.directory.is_symlink()
    assert conformance.listing(elsewhere) == ["a.safetensors", "mine"]
    same(pair.source, pair.read())


@pytest.mark.parametrize("fixture", ["npz/run/epoch-1.npz", "digits/bf16/checkpoint-2000"])
def test_everything_is_made_durable(
    fixture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file, then the directories, the outer one last."""
    path = copy_of(fixture, tmp_path)
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    pair = kept(path)
    expected = [pair.directory / file.name for file in pair.skeleton.files]
    expected += [pair.directory / path.name] if path.is_dir() else []
    assert synced == [found.stat().st_ino for found in (*expected, pair.directory)]


def test_many_small_tensors_are_kept_soon(tmp_path: Path) -> None:
    """20,000 of an archive, with as many gaps of some hundred bytes between them."""
    path = tmp_path / "m.pt"
    path.write_bytes(saved(state_of(**{f"l.{k}": ref(str(k), (30,)) for k in range(20_000)})))
    source = formats.read(os.fspath(path), {})
    began = time.process_time()
    pair = kept_of(source, source.index.by_name, path)
    assert time.process_time() - began < 2
    assert len(pair.skeleton.files[0].pieces) == 20_001
    same(source, pair.read())


def test_pieces_of_all_sizes_are_copied(tmp_path: Path) -> None:
    """Longer than a buffer, far apart, near each other, and none at all."""
    rng = np.random.default_rng(5)
    held: list[str] = []
    values: dict[str, np.ndarray] = {}
    for k, size in enumerate([3 << 20, 5, 1 << 20, (1 << 20) - 1, 20_000, 300, (1 << 20) + 1, 70]):
        values[f"t{2 * k}"] = rng.integers(1, 255, size, np.uint8)
        values[f"t{2 * k + 1}"] = rng.integers(1, 255, 65 + 9000 * k, np.uint8)
        held.append(f"t{2 * k + 1}")
    path = write_checkpoint(tmp_path / "a.safetensors", values)
    pair = kept(path, held)
    expected = bytearray(path.read_bytes())
    for name in held:
        _, offset, nbytes = pair.source.index.by_name[name].extent
        expected[offset : offset + nbytes] = bytes(nbytes)
    assert pair.raw() == bytes(expected)
    same(pair.source, pair.read())


def test_empty_data_files_are_kept(tmp_path: Path) -> None:
    """A shard of no bytes has no pieces."""
    path = write_bundle(tmp_path / "c-1", {"w": np.ones(100, np.float32)}, shards=3)
    pair = kept(path)
    assert [file.pieces for file in pair.skeleton.files[:3]] == [(), (), ()]
    assert [file.crc for file in pair.skeleton.files[:3]] == [0, 0, 0]
    same(pair.source, pair.read())
