"""The runs that are averaged: what they hold, and where they lie.

This module must not import NumPy. On Linux the peak memory reported for a child includes that of
the process that started it, so the harness itself has to stay smaller than what it measures.
"""

import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ITEM_BYTES = {"F32": 4, "BF16": 2}
MIB = 1 << 20
SAFETENSORS, TENSORFLOW, TORCH, HDF5 = "safetensors", "tensorflow", "torch", "hdf5"
# What follows the prefix of a TensorFlow checkpoint with one data file in the names of its files.
INDEX, DATA = ".index", ".data-00000-of-00001"
# What the file with the tensor data ends with.
SUFFIXES = {SAFETENSORS: ".safetensors", TENSORFLOW: DATA, TORCH: ".pt", HDF5: ".h5"}
VARIABLE = "layers.{:05d}.weight"


@dataclass(frozen=True)
class DataSet:
    """A run of equally shaped checkpoints; those of equal shapes hold the same values.

    `source` is the key of the safetensors files that it is made from, in formats that the tool
    writes itself.
    """

    key: str
    title: str
    dtype: str
    tensors: int
    shape: tuple[int, ...]
    checkpoints: int
    format: str = SAFETENSORS
    names: str = VARIABLE
    source: str = ""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def payload_bytes(self) -> int:
        """Bytes of tensor data in one checkpoint."""
        return self.tensor_bytes * self.tensors

    @property
    def input_bytes(self) -> int:
        """Bytes of tensor data that an average of the whole run has to read."""
        return self.payload_bytes * self.checkpoints

    def folder(self, data: Path) -> Path:
        """Return the run directory below the data directory."""
        return data / f"run-{self.key}"

    def checkpoint_paths(self, data: Path) -> list[Path]:
        """Return what the tool calls the checkpoints, in the order of their steps."""
        steps = range(100, 100 * self.checkpoints + 1, 100)
        prefix = self.format == TENSORFLOW
        name = "model.ckpt-{}" if prefix else f"step-{{:05d}}{SUFFIXES[self.format]}"
        return [self.folder(data) / name.format(step) for step in steps]

    def paths(self, data: Path) -> list[Path]:
        """Return the files that hold the tensor data, one for each checkpoint."""
        found = self.checkpoint_paths(data)
        return [beside(path, DATA) for path in found] if self.format == TENSORFLOW else found

    def files(self, data: Path) -> list[Path]:
        """Return all files; of a checkpoint's the last is renamed into place after the others."""
        if self.format != TENSORFLOW:
            return self.paths(data)
        prefixes = self.checkpoint_paths(data)
        return [beside(path, suffix) for path in prefixes for suffix in (DATA, INDEX)]

    def is_complete(self, data: Path) -> bool:
        """Tell whether all files are there; they were complete when renamed into place."""
        there = all(path.is_file() for path in self.files(data))
        return there and all(p.stat().st_size >= self.payload_bytes for p in self.paths(data))


def beside(prefix: Path, suffix: str) -> Path:
    """Return a file of a TensorFlow checkpoint, whose prefix may have a dot in its name."""
    return prefix.with_name(prefix.name + suffix)


def catalogue(*, quick: bool) -> dict[str, DataSet]:
    """Return all data sets by key; the quick ones have an eighth of the bytes per tensor."""
    rows = 128 if quick else 1024
    large = (rows, 2048)
    mib, bytes_of_8 = f"{rows // 4} MiB", f"8 x {rows // 4} MiB"
    tf_small = "8 TensorFlow checkpoints of 20,000 float32 tensors of 1 KiB"
    shadow = f"{VARIABLE}/ExponentialMovingAverage"
    sets = (
        DataSet("f32", f"{bytes_of_8} float32 in 32 tensors", "F32", 32, large, 8),
        DataSet("bf16", f"{bytes_of_8} bfloat16 in 32 tensors", "BF16", 32, (2 * rows, 2048), 8),
        DataSet("small", "8 x 20,000 float32 tensors of 1 KiB", "F32", 20_000, (256,), 8),
        DataSet("large", "8 x the same bytes in 32 tensors", "F32", 32, (625, 256), 8),
        DataSet("plan", "100 x 1,000 tiny float32 tensors", "F32", 1_000, (16,), 100),
        DataSet("tf", f"8 TensorFlow checkpoints of {mib}", "F32", 32, large, 8, TENSORFLOW),
        DataSet("tf-small", tf_small, "F32", 20_000, (256,), 8, TENSORFLOW),
        DataSet("tf-shadow", f"{mib} of shadows", "F32", 32, large, 1, TENSORFLOW, shadow),
    )
    found = {data_set.key: data_set for data_set in sets}
    conversions = (
        converted(found["f32"], "torch", TORCH, "PyTorch"),
        converted(found["small"], "torch-small", TORCH, "PyTorch"),
        converted(found["f32"], "hdf5", HDF5, "HDF5"),
        converted(found["small"], "hdf5-small", HDF5, "HDF5"),
    )
    return found | {data_set.key: data_set for data_set in conversions}


def converted(source: DataSet, key: str, format: str, title: str) -> DataSet:
    """Return a run made from one of safetensors files; in HDF5, modules are groups."""
    names = source.names.replace(".", "/") if format == HDF5 else source.names
    title = f"{source.title} as {title} files"
    return replace(source, key=key, title=title, format=format, names=names, source=source.key)


def create_missing(sets: Iterable[DataSet], data: Path, *, quick: bool) -> None:
    """Write what is not there yet, in a child, because writing needs NumPy and buffers."""
    keys = [data_set.key for data_set in sets if not data_set.is_complete(data)]
    if not keys:
        return
    print(f"writing {', '.join(keys)} below {data}", file=sys.stderr)
    flags = ["--quick"] if quick else []
    command = [sys.executable, "-m", "bench.write_data", str(data), *keys, *flags]
    subprocess.run(command, check=True, cwd=ROOT)
