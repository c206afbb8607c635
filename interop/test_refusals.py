"""What TensorFlow refuses is refused here, and what only TensorFlow reads can be converted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf
from support import (
    GRAPH,
    KERAS,
    PARTITIONED,
    V1,
    agreed,
    differences,
    files,
    session,
    theirs,
    tool,
    v1,
)

import ema_cli
from ema_cli.errors import DamagedFile


def copied(source: Path, folder: Path) -> Path:
    """Copy the files of a checkpoint; return the prefix of the copy."""
    for suffix, data in files(source).items():
        (folder / f"{source.name}{suffix}").write_bytes(data)
    return folder / source.name


def flipped(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)


DAMAGED = {
    "weights": (GRAPH / "digits.ckpt-300", "conv/kernel"),
    "strings": (GRAPH / "digits.ckpt-300", "class_names"),
    "a counter": (GRAPH / "digits.ckpt-300", "global_step"),
    "slots": (GRAPH / "digits.ckpt-300", "conv/kernel/Momentum"),
    "a half type": (PARTITIONED / "model.ckpt-60", "embedding/shift"),
    "a slice in the second shard": (PARTITIONED / "model.ckpt-60", "embedding/rows"),
    "an object graph": (KERAS / "compiled" / "ckpt-4", "_CHECKPOINTABLE_OBJECT_GRAPH"),
}


@pytest.mark.parametrize("source, name", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_changed_byte_is_refused_by_both(tmp_path: Path, source: Path, name: str) -> None:
    """TensorFlow says that checksums do not match; nothing is written, in either layout."""
    prefix = copied(source, tmp_path)
    checkpoint = ema_cli.inspect(prefix)
    extent = checkpoint.index.by_name[name].extents[-1]
    flipped(Path(checkpoint.files[extent.file].path), extent.offset + extent.nbytes - 1)
    with pytest.raises(tf.errors.OpError, match=r"hecksum|RC"):
        tf.train.load_checkpoint(str(prefix)).get_tensor(name)
    out = tmp_path / "out"
    tool("run", prefix, "-o", out, "--average", "mean", "--optimizer", "keep", code=12)
    with pytest.raises(DamagedFile):
        ema_cli.average_run(prefix, out, average=["mean"], names="variable")
    with pytest.raises(DamagedFile):
        ema_cli.diff(prefix, source)
    assert files(out) == {}


def test_a_renamed_copy_does_not_hide_damage(tmp_path: Path) -> None:
    """`rename` copies data without reading it, and its checksums too: TensorFlow still refuses."""
    prefix = copied(GRAPH / "digits.ckpt-300", tmp_path)
    flipped(Path(f"{prefix}.data-00000-of-00001"), -1)
    tool("rename", prefix, "-o", tmp_path / "out", "--rule", "^", "new/")
    with pytest.raises(tf.errors.OpError, match="hecksum"):
        theirs(tmp_path / "out")
    tool("diff", tmp_path / "out", tmp_path / "out", code=12)


def data_byte(prefix: Path) -> None:
    """Cut the last byte of the data off."""
    path = next(prefix.parent.glob("*.data-*"))
    path.write_bytes(path.read_bytes()[:-1])


def shard(prefix: Path) -> None:
    """Remove the second shard."""
    next(prefix.parent.glob("*.data-00001-*")).unlink()


def index_byte(prefix: Path) -> None:
    """Change a byte of the index."""
    flipped(Path(f"{prefix}.index"), 40)


def index_end(prefix: Path) -> None:
    """Cut the end of the index off."""
    path = Path(f"{prefix}.index")
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("harm", [data_byte, shard, index_byte, index_end])
def test_what_is_missing_is_refused_by_both(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """Files that are too short, gone or changed: TensorFlow raises, the tool ends with 12."""
    prefix = copied(PARTITIONED / "model.ckpt-60", tmp_path)
    harm(prefix)
    with pytest.raises((tf.errors.OpError, IndexError, RuntimeError, ValueError)):
        theirs(prefix)
    for words in (("run", "--average", "mean"), ("rename", "--names", "variable")):
        tool(*words, prefix, "-o", tmp_path / "out", code=12)
    assert files(tmp_path / "out") == {}


def test_the_old_format_is_converted_as_the_hint_says(tmp_path: Path) -> None:
    """The recipe: restore with a Saver, save with `write_version=SaverDef.V2`; then it averages."""
    for words in (("inspect", V1), ("run", V1, "-o", tmp_path / "out", "--average", "mean")):
        done = tool(*words, code=12)
        assert "V1" in done.stderr
        assert "tf.compat.v1.train.Saver and save it again" in done.stderr
        assert "write_version=tf.compat.v1.train.SaverDef.V2" in done.stderr
    new = str(tmp_path / "model.ckpt")
    with tf.Graph().as_default(), session() as active:
        v1.get_variable("dense/kernel", [3, 3])
        v1.train.get_or_create_global_step()
        v1.train.Saver().restore(active, str(V1))
        saver = v1.train.Saver(write_version=tf.compat.v1.train.SaverDef.V2)
        saver.save(active, new, global_step=0, write_meta_graph=False)
    tool("run", tmp_path, "-o", tmp_path / "out", "--average", "mean", "--names", "variable")
    assert differences(agreed(tmp_path / "out"), theirs(V1)) == []


def test_a_folder_that_was_moved_with_its_state_file(tmp_path: Path) -> None:
    """TensorFlow finds nothing by it; the tool takes the checkpoint of that name beside it."""
    shutil.copytree(GRAPH, tmp_path / "moved")
    assert tf.train.latest_checkpoint(str(tmp_path / "moved")) is None
    tool("rename", tmp_path / "moved", "-o", tmp_path / "out", "--names", "variable")
    assert agreed(tmp_path / "out")["global_step"] == 300
