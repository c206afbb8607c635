"""Hostile HDF5 files: one clear error, nothing else opened or run, little time and memory."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras_files
import numpy as np
import pytest

from ema_cli.errors import DamagedFile, InputChanged, InputError, UnsupportedInput
from ema_cli.formats import hdf5
from ema_cli.formats.hdf5 import isolation

Fill = Callable[[h5py.File], Any]


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Files beside the attacks' that nobody may open; atime tells, where it is kept."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["d"] = np.arange(4, dtype="f4")
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before


def refusal(path: Path) -> InputError:
    """Return the error with which reading and spilling a file end."""
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        keras_files.payload(keras_files.read(path), path.parent)
    assert time.monotonic() - began < 10
    assert caught.value.message.startswith(str(path))
    assert caught.value.message.isprintable() and "\n" not in caught.value.message
    return caught.value


# ---------------------------------------------------------------------------- other files


def base(file: h5py.File) -> None:
    """Put a sound tensor into a file."""
    file["a/w"] = np.arange(4, dtype="f4")


def adding(**things: Any) -> Fill:
    """Return what fills a file with a sound tensor and other things."""

    def fill(file: h5py.File) -> None:
        base(file)
        for name, thing in things.items():
            file[name] = thing(file) if callable(thing) else thing

    return fill


def in_the_middle(file: h5py.File) -> None:
    """A link that a path would lead through."""
    base(file)
    file["a/b"] = h5py.ExternalLink("other.h5", "/")


def external_data(file: h5py.File) -> None:
    """A dataset whose bytes are those of another file."""
    base(file)
    file.create_dataset("e", (4,), "f4", external=[("other.h5", 0, 16)])


def virtual_data(file: h5py.File) -> None:
    """A dataset that is put together from others; the file of one of them is missing."""
    base(file)
    layout = h5py.VirtualLayout((8,), "f4")
    layout[:4] = h5py.VirtualSource("other.h5", "d", (4,))
    layout[4:] = h5py.VirtualSource("missing.h5", "d", (4,))
    file.create_virtual_dataset("v", layout)


def odd_filter(file: h5py.File) -> None:
    """A filter that is compiled into some copies of the library only."""
    base(file)
    file.create_dataset("s", data=np.arange(100), chunks=(10,), scaleoffset=0)


def deep(file: h5py.File) -> None:
    """Two hundred groups in each other."""
    group: Any = file
    for _ in range(200):
        group = group.create_group("g")


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (adding(x=h5py.ExternalLink("other.h5", "/d")), ("'/x'", "an external link")),
        (adding(x=h5py.ExternalLink("/etc/passwd", "x")), ("'/x'", "an external link")),
        (in_the_middle, ("'/a/b'", "an external link")),
        (adding(x=h5py.SoftLink("/a/w")), ("'/x'", "a soft link")),
        (adding(x=h5py.SoftLink("/nowhere")), ("'/x'", "a soft link")),
        (adding(x=h5py.SoftLink("/x")), ("'/x'", "a soft link")),
        (adding(x=lambda file: file["/"]), ("'/x'", "this group is also '/'")),
        (adding(x=lambda file: file["a"]), ("'/x'", "this group is also 'a'")),
        (external_data, ("'/e'", "an external file")),
        (virtual_data, ("'/v'", "a virtual dataset")),
        (odd_filter, ("'/s'", "found filter 6")),
        (deep, ("at most 64 deep",)),
        (adding(x=np.zeros(3, "V1")), ("'/x'", "opaque bytes")),
        (adding(x=np.zeros(3, "V2")), ("'x'", "2 opaque bytes")),
        (adding(x=np.zeros(3, np.longdouble)), ("'/x'", "floats of 16 bytes")),
    ],
)
@pytest.mark.parametrize("userblock", [0, 512])
def test_what_leads_elsewhere_is_refused(
    tmp_path: Path, fill: Fill, words: tuple[str, ...], userblock: int
) -> None:
    """Named with its path; the file as a whole is refused, and the hint says what to do."""
    path = keras_files.make(tmp_path / "x.h5", fill, userblock_size=userblock)
    error = refusal(path)
    assert isinstance(error, UnsupportedInput)
    assert error.hint
    for word in words:
        assert word in error.message


def test_a_plug_in_is_never_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter of another number is refused, wherever the environment says plug-ins are."""
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(tmp_path))
    isolation.close()

    def fill(file: h5py.File) -> None:
        file.create_dataset("s", data=np.arange(100), chunks=(10,), compression="lzf")

    path = keras_files.make(tmp_path / "x.h5", fill)
    data = path.read_bytes()
    number = (32000).to_bytes(2, "little")
    assert data.count(number) == 1
    path.write_bytes(data.replace(number, (32015).to_bytes(2, "little")))
    assert "found filter 32015" in refusal(path).message


# ---------------------------------------------------------------------------- much out of little


def declared(count: int, shape: tuple[int, ...], **options: Any) -> Fill:
    """Return what fills a file with datasets of which nothing is stored."""

    def fill(file: h5py.File) -> None:
        for k in range(count):
            file.create_dataset(f"d{k}", shape, "f4", **options)

    return fill


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (declared(1, (1 << 40,), chunks=(1 << 20,)), "0 bytes that stand for 4.0 TiB"),
        (declared(1, (1 << 40,)), "0 bytes that stand for 4.0 TiB"),
        (declared(100, (1 << 28,), chunks=(1 << 20,)), "0 bytes that stand for 5.0 GiB"),
        (declared(1, (1 << 30,), chunks=(1 << 29,)), "expected chunks of at most 128.0 MiB"),
        (declared(1, (1 << 40, 1 << 40, 0)), "overflows 64 bits"),
    ],
)
def test_a_small_file_cannot_ask_for_much(tmp_path: Path, fill: Fill, words: str) -> None:
    """Limits hold for each dataset and for all together, before anything is allocated."""
    path = keras_files.make(tmp_path / "x.h5", fill)
    assert path.stat().st_size < 200_000
    assert words in refusal(path).message


def test_a_chunk_that_inflates_without_end_is_given_up(tmp_path: Path) -> None:
    """A compressed chunk may hold any number of zeros; the child may not have any memory."""

    def fill(file: h5py.File) -> None:
        dataset = file.create_dataset("z", (1000,), "f4", chunks=(1000,), compression="gzip")
        packer = zlib.compressobj(1)
        piece = bytes(4 << 20)
        packed = [packer.compress(piece) for _ in range(32)]
        dataset.id.write_direct_chunk((0,), b"".join([*packed, packer.flush()]))

    path = keras_files.make(tmp_path / "x.h5", fill)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "HDF5" in refusal(path).message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_long_names_cannot_be_told_over_and_over(tmp_path: Path) -> None:
    """Every dataset has the names of all groups it lies in, of which the file holds one copy."""

    def fill(file: h5py.File) -> None:
        group: Any = file
        for _ in range(50):
            group = group.create_group("x" * 1000)
        for k in range(200):
            group[f"{k}"] = np.float32(1)

    assert "to tell" in refusal(keras_files.make(tmp_path / "x.h5", fill)).message


def test_attributes_cannot_be_endless(tmp_path: Path) -> None:
    """The lists of names that are read have a limit."""

    def fill(file: h5py.File) -> None:
        base(file)
        file.attrs["model_config"] = np.zeros(1 << 21, "i1")

    path = keras_files.make(tmp_path / "x.h5", fill, libver="latest")
    assert "attribute is too large" in refusal(path).message


# ---------------------------------------------------------------------------- changing files


def test_a_file_that_shrinks_is_no_zeros(tmp_path: Path) -> None:
    """HDF5 fills up with zeros what it cannot read; here it is an error."""

    def fill(file: h5py.File) -> None:
        file.create_dataset("w", data=np.ones(100_000, "f4"), chunks=(1000,))

    path = keras_files.make(tmp_path / "x.h5", fill)
    checkpoint = keras_files.read(path)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    with pytest.raises(InputChanged):
        keras_files.payload(checkpoint, tmp_path)
    fd = os.open(path, os.O_RDONLY)
    window = isolation.Window(0, size)
    with pytest.raises(DamagedFile, match="HDF5"):
        list(
            isolation.read_boxes(fd, str(path), window, "w", [((0,), (100_000,))], [400_000], 4000)
        )
    os.close(fd)


@pytest.mark.parametrize("swapped", [external_data, virtual_data, base])
def test_what_was_listed_is_looked_at_again(tmp_path: Path, swapped: Fill) -> None:
    """Another dataset in the place of the listed one is refused, not read."""
    path = keras_files.make(tmp_path / "x.h5", swapped)
    name = {"external_data": "e", "virtual_data": "v"}.get(swapped.__name__, "a/missing")
    fd = os.open(path, os.O_RDONLY)
    window = isolation.Window(0, path.stat().st_size)
    with pytest.raises(InputError):
        list(isolation.read_boxes(fd, str(path), window, name, [((0,), (4,))], [16], 0))
    os.close(fd)


# ---------------------------------------------------------------------------- names and mutations


def test_hostile_names_are_only_names(tmp_path: Path) -> None:
    """Escapes, newlines and other encodings are names of tensors; errors show them escaped."""

    def fill(file: h5py.File) -> None:
        for name in ("\x1b[31m", "new\nline", "[red]", "ä"):
            file[name] = np.float32(1)
        group = h5py.Group(h5py.h5g.create(file.id, b"bad\xff"))
        group["x"] = np.float32(1)
        group["y"] = h5py.SoftLink("/\x1b[31m")

    path = keras_files.make(tmp_path / "x.h5", fill)
    assert "bad" in refusal(path).message
    with h5py.File(path, "a") as file:
        group = h5py.Group(h5py.h5g.open(file.id, b"bad\xff"))
        del group["y"]
    checkpoint = keras_files.read(path)
    assert {"\x1b[31m", "new\nline", "bad\udcff/x"} < set(checkpoint.index.by_name)
    draft = hdf5.fresh(keras_files.copies(checkpoint), checkpoint, None)
    data = keras_files.payload(checkpoint, tmp_path)
    again = keras_files.read(keras_files.build(draft, data, tmp_path / "out.h5"))
    assert set(again.index.by_name) == set(checkpoint.index.by_name)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return a file with a few bytes that are not as they were."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(raw))
        kind = rng.random()
        if kind < 0.6:
            raw[at] = rng.randrange(256)
        elif kind < 0.8:
            raw[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), (1 << 63).to_bytes(8, "little")))
        else:
            source, count = rng.randrange(len(raw)), rng.randrange(1, 64)
            raw[at : at + count] = raw[source : source + count]
    return bytes(raw)


@pytest.mark.parametrize("seed", (0, 1, 3))
def test_damaged_files_raise_only_our_errors(tmp_path: Path, seed: int) -> None:
    """Whatever bytes are wrong: a checkpoint, or one line."""
    rng = random.Random(seed)

    def fill(file: h5py.File) -> None:
        adding(s="text", big=np.arange(3, dtype=">f8"))(file)
        file.create_dataset("c", data=np.ones(50, "f4"), chunks=(7,), compression="gzip")

    sources = [
        (".h5", keras_files.make(tmp_path / "a.h5", fill).read_bytes()),
        (".h5", keras_files.make(tmp_path / "b.h5", fill, libver="latest").read_bytes()),
        (".h5", keras_files.MODEL_LEGACY),
        (".keras", keras_files.MODEL_KERAS),
    ]
    read = 0
    for _ in range(60):
        suffix, data = rng.choice(sources)
        path = keras_files.put(tmp_path / f"x{suffix}", damaged(rng, data))
        with contextlib.suppress(InputError):
            checkpoint = keras_files.read(path)
            keras_files.payload(checkpoint, tmp_path)
            read += 1
            row = hdf5.fresh_keras if suffix == ".keras" else hdf5.fresh
            row(keras_files.copies(checkpoint), checkpoint, None)
    assert 0 < read < 60
