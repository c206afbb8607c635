"""What the conformance suite does with every format: checkpoints made, read, cut and damaged.

A case for each row of the table of formats says what only that format can know of itself: how a
checkpoint of a step is called, whether a flipped byte is noticed, and whether a new file can say
that two tensors are one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from helpers import CODES, raw_safetensors, write_checkpoint
from tensorflow_bundles import (
    NUMBER_OF,
    QUANTIZED,
    STRING,
    VARIANT,
    Opaque,
    strings,
    variants,
    write_bundle,
)

import ema_cli
from ema_cli import formats
from ema_cli.reading import Values
from ema_cli.tensors import DTYPES, Checkpoint

Arrays = Mapping[str, Any]
Contents = dict[str, tuple[str, tuple[int, ...], bytes]]


class Case(NamedTuple):
    """What the suite has to be told of a format.

    Attributes:
        called: the path of the checkpoint of a step, within its directory.
        checked: whether its files hold checksums of the tensors.
        ties: whether a new file can say that two names are one tensor.
        made_like: the format of a file that is made first, where nothing else becomes one of this.
    """

    called: str
    checked: bool
    ties: bool = False
    made_like: str = ""


CASES: Mapping[str, Case] = {
    "safetensors": Case("model-step-{}.safetensors", checked=False),
    "safetensors-folder": Case("checkpoint-{}", checked=False),
    "tensorflow": Case("model.ckpt-{}", checked=True),
    "torch": Case("model-step-{}.pt", checked=True, ties=True),
    "torch-folder": Case("checkpoint-{}", checked=True, ties=True),
    "hdf5": Case("model-step-{}.weights.h5", checked=False),
    "keras": Case("model-step-{}.keras", checked=True, made_like="hdf5"),
    "npz": Case("model-step-{}.npz", checked=True),
}
ROWS = tuple(CASES)

_PACKED = {"float4_e2m1fn": "F4", "float6_e2m3fn": "F6_E2M3", "float6_e3m2fn": "F6_E3M2"}
_TENSORFLOWS = {
    **NUMBER_OF,
    **{f"q{name}": number for number, name in QUANTIZED.items()},
    "float4_e2m1fn_byte": NUMBER_OF["float4_e2m1fn"],
    "string": STRING,
    "variant": VARIANT,
}
_ONCE = "was/"


# ---------------------------------------------------------------------------- values


def floats(factor: float = 1.0) -> dict[str, np.ndarray]:
    """Return what a small model is made of: floats, and an int that is copied."""
    return {
        "dense/kernel": np.float32([[0.1, -2.5, 3.25], [4.0, 1e-3, 7.7]]) * np.float32(factor),
        "dense/bias": np.float32([1.5, 3e8]) / np.float32(factor),
        "scale": np.float32(factor),
        "steps_done": np.int64(round(100 * factor)),
    }


def every_dtype(elements: int = 4) -> dict[str, Opaque]:
    """Return a tensor of every dtype there is, by the dtype's name; their bytes are arbitrary."""
    chance = np.random.default_rng(1)
    found = {}
    for name, dtype in DTYPES.items():
        if dtype.bits:
            data = chance.bytes(elements * dtype.bits // 8)
            if name in ("bool", "int2", "uint2", "int4", "uint4", "float4_e2m1fn_byte"):
                data = bytes(byte & 1 for byte in data)
            found[name] = Opaque(_TENSORFLOWS.get(name, 0), (elements,), data)
    found["string"] = strings([b"one", b"", b"\xff\0"])
    found["variant"] = variants([b"first", b"second"])
    return found


def raw_of(values: Mapping[str, Opaque]) -> Contents:
    """Return tensors named by their dtypes as they are to be read back."""
    return {name: (name, value.shape, value.data) for name, value in values.items()}


def raw_arrays(values: Arrays) -> Contents:
    """Return arrays as they are to be read back."""
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()}


# ---------------------------------------------------------------------------- making


def write_source(folder: Path, values: Mapping[str, Opaque]) -> list[Path]:
    """Write tensors named by their dtypes: a safetensors file, and TensorFlow's for the others.

    Both have a float32, for something to be averaged.
    """
    codes = {**CODES, **_PACKED}
    header: dict[str, Any] = {}
    data = b""
    for name in codes.keys() & values.keys():
        _, shape, content, _ = values[name]
        header[name] = {
            "dtype": codes[name],
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    folder.mkdir(parents=True)
    path = folder / "source.safetensors"
    path.write_bytes(raw_safetensors(header, data))
    others = {name: v for name, v in values.items() if name not in header or name == "float32"}
    assert others.keys() <= _TENSORFLOWS.keys()
    return [path, write_bundle(folder / "source.ckpt-1", others)]


def as_keras(weights: Path, path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive as Keras does, with the HDF5 file `weights` and a model of no layers."""
    config = {"class_name": "Sequential", "config": {"name": "net", "layers": []}}
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", json.dumps(config))
        archive.write(weights, "model.weights.h5")
    return path


def convert(source: Path, row: str, path: Path, rules: Sequence[tuple[str, str]] = ()) -> Path:
    """Write what a checkpoint holds in a format, by `rename`; `rules` are for its names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    like = CASES[row].made_like
    if not like or formats.detect(os.fspath(source)) == row:
        ema_cli.rename(source, path, format=row, rule=rules)
        return path
    # Only an archive becomes an archive: one is made of the weights, under names to be changed.
    room = path.parent / f".{path.name}.making"
    room.mkdir()
    ema_cli.rename(source, room / "x", format=like, rule=[("^", _ONCE)])
    archive = as_keras(room / "x", room / "x.keras")
    back = [(f"^{_ONCE}", ""), *rules]
    ema_cli.rename(archive, path, format=row, rule=back)
    shutil.rmtree(room)
    return path


def make(row: str, folder: Path, values: Arrays, step: int = 1) -> Path:
    """Write arrays as the checkpoint of a step in a format."""
    path = folder / CASES[row].called.format(step)
    if row == "safetensors":
        return write_checkpoint(path, values)
    source = write_checkpoint(folder.parent / f"source-of-{folder.name}.safetensors", values)
    return convert(source, row, path)


def make_run(row: str, folder: Path) -> list[Path]:
    """Write three checkpoints in a format."""
    return [make(row, folder, floats(1 + k / 7), 100 * (k + 1)) for k in range(3)]


def make_tied(row: str, folder: Path, step: int, values: Arrays) -> Path:
    """Write a checkpoint in which ``tied`` is ``dense/kernel``, in so far as a format can say it.

    An HDF5 file can by a second link to a dataset, a ``.keras`` archive with it.
    """
    source = folder.parent / f"tied-{step}.h5"
    folder.mkdir(exist_ok=True)
    with h5py.File(source, "w") as file:
        for name, value in values.items():
            file[name] = value
        file["tied"] = file["dense/kernel"]
    path = folder / CASES[row].called.format(step)
    if row == "hdf5":
        return Path(shutil.copy(source, path))
    return as_keras(source, path) if row == "keras" else convert(source, row, path)


def make_packed(row: str, folder: Path, step: int, values: Arrays) -> Path:
    """Write a checkpoint whose tensors do not lie in its file as they are, as its library does."""
    path = folder / CASES[row].called.format(step)
    folder.mkdir(exist_ok=True)
    if row == "npz":
        np.savez_compressed(path, **values)
    elif row == "hdf5":
        with h5py.File(path, "w") as file:
            for name, value in values.items():
                packed = {"chunks": True, "compression": "gzip"} if np.ndim(value) else {}
                file.create_dataset(name, data=value, **packed)
    elif row == "keras":
        weights = make("hdf5", folder.parent / f"weights-{step}", values)
        as_keras(weights, path, zipfile.ZIP_DEFLATED)
    return path


# ---------------------------------------------------------------------------- reading


def read(path: Path) -> Checkpoint:
    """Return a checkpoint, told by its content."""
    return formats.read(os.fspath(path), {})


def contents(path: Path, block: int = 0) -> Contents:
    """Return every tensor of a checkpoint, read at once or in blocks of so many elements."""
    values = Values(path)
    found: Contents = {}
    for name, (dtype, shape) in values.specs.items():
        with values.open(name) as reader:
            step = block or max(reader.elements, 1)
            starts = range(0, reader.elements, step)
            parts = [reader.block(at, min(step, reader.elements - at)) for at in starts]
        found[name] = (dtype.name, shape, b"".join(part.tobytes() for part in parts))
    return found


def files_of(path: Path) -> dict[str, Path]:
    """Return the files of a checkpoint by what tells them apart, its index among them."""
    checkpoint = read(path)
    paths = [Path(stamp.path) for stamp in checkpoint.files if stamp.path]
    if checkpoint.index_file:
        paths.append(Path(checkpoint.index_file))
    stem = "" if path.is_dir() else path.name
    return {found.name.removeprefix(stem): found for found in paths}


def bytes_of(path: Path) -> dict[str, bytes]:
    """Return the contents of the files of a checkpoint."""
    return {name: found.read_bytes() for name, found in files_of(path).items()}


def check_extents(path: Path) -> None:
    """Check that tensors lie inside the files, and are disjoint or the same."""
    checkpoint = read(path)
    extents = sorted({e for t in checkpoint.index.tensors for e in t.extents if e.nbytes})
    for file, offset, nbytes in extents:
        assert offset >= 0 and offset + nbytes <= checkpoint.files[file].size
    for before, after in itertools.pairwise(extents):
        assert before.file < after.file or before.offset + before.nbytes <= after.offset
    for tensor in checkpoint.index.tensors:
        if tensor.dtype.bits:
            assert tensor.nbytes == math.prod(tensor.shape) * tensor.dtype.bits // 8


def signs(path: Path) -> Iterator[tuple[str, Path, int]]:
    """Yield each tensor that has bytes: its name, its file, and where its first sign lies."""
    checkpoint = read(path)
    for tensor in checkpoint.index.tensors:
        if tensor.nbytes:
            file, offset, _ = tensor.extent
            last = tensor.dtype.bits // 8 - 1
            yield tensor.name, Path(checkpoint.files[file].path), offset + last


def flip(path: Path, offset: int) -> None:
    """Change the highest bit of a byte of a file, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x80]))


def listing(folder: Path) -> list[str]:
    """Return everything there is below a folder."""
    return sorted(os.path.relpath(path, folder) for path in folder.rglob("*"))
