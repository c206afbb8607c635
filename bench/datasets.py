"""The runs that are averaged: what they hold, and where they lie.

This module must not import NumPy. On Linux the peak memory reported for a child includes that of
the process that started it, so the harness itself has to stay smaller than what it measures.
"""

import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ITEM_BYTES = {"F32": 4, "BF16": 2}
MIB = 1 << 20


@dataclass(frozen=True)
class DataSet:
    """A run of equally shaped safetensors checkpoints."""

    key: str
    title: str
    dtype: str
    tensors: int
    shape: tuple[int, ...]
    checkpoints: int

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

    def paths(self, data: Path) -> list[Path]:
        """Return the checkpoints in the order of their steps."""
        steps = range(100, 100 * self.checkpoints + 1, 100)
        return [self.folder(data) / f"step-{step:05d}.safetensors" for step in steps]

    def is_complete(self, data: Path) -> bool:
        """Tell whether all files are there; they were complete when renamed into place."""
        return all(p.is_file() and p.stat().st_size > self.payload_bytes for p in self.paths(data))


def catalogue(*, quick: bool) -> dict[str, DataSet]:
    """Return all data sets by key; the quick ones have an eighth of the bytes per tensor."""
    rows = 128 if quick else 1024
    size = f"8 x {rows // 4} MiB"
    sets = (
        DataSet("f32", f"{size} float32 in 32 tensors", "F32", 32, (rows, 2048), 8),
        DataSet("bf16", f"{size} bfloat16 in 32 tensors", "BF16", 32, (2 * rows, 2048), 8),
        DataSet("small", "8 x 20,000 float32 tensors of 1 KiB", "F32", 20_000, (256,), 8),
        DataSet("large", "8 x the same bytes in 32 tensors", "F32", 32, (625, 256), 8),
        DataSet("plan", "100 x 1,000 tiny float32 tensors", "F32", 1_000, (16,), 100),
    )
    return {data_set.key: data_set for data_set in sets}


def create_missing(sets: Iterable[DataSet], data: Path, *, quick: bool) -> None:
    """Write what is not there yet, in a child, because writing needs NumPy and buffers."""
    keys = [data_set.key for data_set in sets if not data_set.is_complete(data)]
    if not keys:
        return
    print(f"writing {', '.join(keys)} below {data}", file=sys.stderr)
    flags = ["--quick"] if quick else []
    command = [sys.executable, "-m", "bench.write_data", str(data), *keys, *flags]
    subprocess.run(command, check=True, cwd=ROOT)
