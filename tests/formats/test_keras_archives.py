"""Keras's .keras archives: read where their weights lie, and written whole."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import h5py
import keras_files
import numpy as np
import pytest

from ema_cli.errors import DamagedFile, InputError, UsageError
from ema_cli.formats import hdf5
from ema_cli.tensors import DTYPES, Checkpoint, Role


@pytest.fixture
def archive(tmp_path: Path) -> Checkpoint:
    """A whole model in Keras 3's layout, in its archive."""
    return keras_files.read(keras_files.put(tmp_path / "in.keras", keras_files.MODEL_KERAS))


@pytest.fixture
def weights(tmp_path: Path, archive: Checkpoint) -> Checkpoint:
    """The weights of that archive alone."""
    [(_, offset, nbytes)] = archive.index.records
    data = keras_files.MODEL_KERAS[offset : offset + nbytes]
    return keras_files.read(keras_files.put(tmp_path / "in.weights.h5", data))


# ---------------------------------------------------------------------------- reading


def rezipped(
    data: bytes, method: int, without: str = "", also: dict[str, bytes] | None = None
) -> bytes:
    """Return an archive with the same members, but for one, and others."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            if name != without:
                new.writestr(name, old.read(name))
        for name, content in (also or {}).items():
            new.writestr(name, content)
    return out.getvalue()


def test_an_archive_is_read_where_its_weights_lie(tmp_path: Path) -> None:
    """The member is one record with the CRC-32 the directory keeps."""
    path = keras_files.put(tmp_path / "x.keras", keras_files.MODEL_KERAS)
    checkpoint = keras_files.read(path)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("model.weights.h5")
        weights = keras_files.put(tmp_path / "w.weights.h5", archive.read(member))
    [record] = checkpoint.index.records
    assert path.read_bytes()[record.offset :][: record.nbytes] == weights.read_bytes()
    assert checkpoint.checksums.tolist() == [member.CRC]
    assert checkpoint.index.checksum == "crc32"
    expected = keras_files.payload(keras_files.read(weights), tmp_path)
    assert keras_files.payload(checkpoint, tmp_path) == expected


def test_a_compressed_archive_is_inflated(tmp_path: Path) -> None:
    """All tensors spill, with the values of the archive that is not compressed."""
    stored = keras_files.put(tmp_path / "stored.keras", keras_files.MODEL_KERAS)
    packed = rezipped(keras_files.MODEL_KERAS, zipfile.ZIP_DEFLATED)
    checkpoint = keras_files.read(keras_files.put(tmp_path / "packed.keras", packed))
    assert checkpoint.checksums is None and not checkpoint.index.records
    assert all(t.extent.file == 1 for t in checkpoint.index.tensors)
    assert checkpoint.told_step == (3, "optimizer/vars/0")
    expected = keras_files.payload(keras_files.read(stored), tmp_path)
    assert keras_files.payload(checkpoint, tmp_path) == expected


@pytest.mark.parametrize(
    ("without", "also", "words"),
    [
        ("model.weights.h5", {}, "expected a member model.weights.h5"),
        ("model.weights.h5", {"model.weights.npz": b"x"}, "found model.weights.npz"),
        ("config.json", {}, "expected a member config.json"),
        ("config.json", {"config.json": b"{"}, "config.json is not JSON"),
        ("config.json", {"config.json": b"[" * 100_000}, "config.json is not JSON"),
        ("config.json", {"config.json": b"\xff"}, "config.json is not UTF-8"),
        ("config.json", {"config.json": b"[" + b"0," * 2_000_000}, "config.json is too large"),
        ("model.weights.h5", {"model.weights.h5": b"no"}, "expected the signature of HDF5"),
    ],
)
def test_an_archive_that_lacks_something_is_refused(
    tmp_path: Path, without: str, also: dict[str, bytes], words: str
) -> None:
    """Each of the three members has to be there and be what it is called."""
    data = rezipped(keras_files.MODEL_KERAS, zipfile.ZIP_STORED, without, also)
    with pytest.raises(InputError, match=words):
        keras_files.read(keras_files.put(tmp_path / "x.keras", data))


def test_what_is_no_hdf5_file_is_not_inflated(tmp_path: Path) -> None:
    """A megabyte may stand for a gigabyte: the first bytes tell that it is none."""
    also = {"model.weights.h5": bytes(64 << 20)}
    data = rezipped(keras_files.MODEL_KERAS, zipfile.ZIP_DEFLATED, "model.weights.h5", also)
    path = keras_files.put(tmp_path / "x.keras", data)
    with pytest.raises(DamagedFile, match="expected an HDF5 file"):
        keras_files.read(path)


def test_spilling_from_an_archive_checks_its_crc(tmp_path: Path) -> None:
    """A flipped byte in a chunk, which HDF5 does not notice, is noticed."""

    def fill(file: h5py.File) -> None:
        file.create_dataset("layers/dense/vars/0", data=np.ones(1000, "f4"), chunks=(100,))

    weights = keras_files.make(tmp_path / "w.h5", fill).read_bytes()
    data = bytearray(
        rezipped(
            keras_files.MODEL_KERAS,
            zipfile.ZIP_STORED,
            "model.weights.h5",
            {"model.weights.h5": weights},
        )
    )
    path = keras_files.put(tmp_path / "x.keras", data)
    assert np.frombuffer(
        keras_files.payload(keras_files.read(path), tmp_path).popitem()[1], "f4"
    ).all()
    data[data.rindex(np.float32(1).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="expected CRC-32"):
        keras_files.payload(keras_files.read(path), tmp_path)


# ---------------------------------------------------------------------------- writing


def test_an_archives_copy_gets_a_new_checksum(archive: Checkpoint, tmp_path: Path) -> None:
    """Both places of the CRC-32 hold that of the new weights."""
    averaged = [t for t in archive.index.tensors if archive.index.roles[t.name] is Role.VARIABLE]
    draft = hdf5.template_keras(archive, averaged)
    assert draft.sums == archive.index.records
    data = {t.name: np.full(t.shape, 7, "f4").tobytes() for t in averaged}
    path = keras_files.build(draft, data, tmp_path / "out.keras", hdf5.seal_keras)
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
    again = keras_files.read(path)
    assert again.index.roles == archive.index.roles
    assert (
        keras_files.payload(again, tmp_path)["layers/dense/vars/0"] == data["layers/dense/vars/0"]
    )


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_new_archive_holds_what_the_last_one_held(tmp_path: Path, method: int) -> None:
    """Configuration and assets as they were, the weights stored."""
    path = keras_files.put(tmp_path / "source.keras", keras_files.MODEL_KERAS)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "in.keras", "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("assets/words.txt", b"a\nb\n" * 1000)
    last = keras_files.read(tmp_path / "in.keras")
    data = keras_files.payload(last, tmp_path)
    entries = [e for e in keras_files.copies(last) if not e.name.startswith("optimizer")]
    entries = [e._replace(dtype=DTYPES["float64"]) for e in entries]
    wide = {e.name: np.frombuffer(data[e.name], "f4").astype("f8").tobytes() for e in entries}
    _, found = keras_files.written(entries, last, tmp_path / "out.keras", wide)
    assert found.index.roles.items() <= last.index.roles.items()
    with zipfile.ZipFile(tmp_path / "out.keras") as new, zipfile.ZipFile(last.path) as old:
        assert new.testzip() is None
        assert new.namelist() == old.namelist()
        for name in ("config.json", "metadata.json", "assets/words.txt"):
            assert new.read(name) == old.read(name)
        assert new.getinfo("model.weights.h5").compress_type == zipfile.ZIP_STORED


def test_the_weights_of_an_archive_can_be_written_alone(
    archive: Checkpoint, weights: Checkpoint, tmp_path: Path
) -> None:
    """As Keras would save them: the same groups and attributes."""
    data = keras_files.payload(archive, tmp_path)
    out = tmp_path / "out.weights.h5"
    keras_files.written(keras_files.copies(archive), archive, out, data)
    assert keras_files.attributes(out) == keras_files.attributes(Path(weights.path))


def test_an_archive_needs_a_configuration(weights: Checkpoint) -> None:
    """Weights alone do not say how to build the model."""
    with pytest.raises(UsageError) as caught:
        hdf5.fresh_keras(keras_files.copies(weights), weights, None)
    assert ".weights.h5" in caught.value.hint
