"""Child process that compares two checkpoints tensor by tensor, whatever their order and format."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bench.datasets import MIB, SAFETENSORS, SUFFIXES
from ema_cli.formats import read
from ema_cli.tensors import Tensor

Equal = Callable[[bytes, bytes], bool]
# What eight additions in float32 may do to a mean of values below 2.
ROUNDING = 1e-6


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_entries(path: Path) -> dict[str, Entry]:
    """Return dtype, shape, and where the bytes begin and end, of each tensor.

    HDF5 files have the paths of groups for names, so slashes count as dots.
    """
    if path.suffix != SUFFIXES[SAFETENSORS]:
        return read_index(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        found[name.replace("/", ".")] = Entry(dtype, shape, 8 + size + begin, 8 + size + end)
    return found


def read_index(path: Path) -> dict[str, Entry]:
    """Return the same of a checkpoint in another format with one data file, read by the tool."""
    return {t.name.replace("/", "."): entry_of(t) for t in read(str(path), {}).index.tensors}


def entry_of(tensor: Tensor) -> Entry:
    """Return where a tensor lies, which must be in one piece of the first file, in C order."""
    name, file, begin = tensor.name, tensor.extent.file, tensor.extent.offset
    if file or tensor.slices or tensor.strides:
        raise ValueError(f"{name}: expected its bytes in order in the file itself")
    code = {"float32": "F32", "bfloat16": "BF16"}[tensor.dtype.name]
    return Entry(code, tensor.shape, begin, begin + tensor.extent.nbytes)


def same(one: bytes, other: bytes) -> bool:
    """Tell whether two blocks are equal bit for bit."""
    return one == other


def close(one: bytes, other: bytes) -> bool:
    """Tell whether float32 values differ only by how their sums were rounded."""
    difference = np.frombuffer(one, "<f4") - np.frombuffer(other, "<f4")
    return bool(np.all(np.abs(difference) <= ROUNDING))


def equal_ranges(a: BinaryIO, b: BinaryIO, a_at: int, b_at: int, size: int, equal: Equal) -> bool:
    """Compare two ranges block by block."""
    a.seek(a_at)
    b.seek(b_at)
    while size:
        step = min(size, MIB)
        if not equal(a.read(step), b.read(step)):
            return False
        size -= step
    return True


def first_difference(reference: Path, result: Path, equal: Equal) -> str:
    """Return what differs first, or nothing when all tensors are equal."""
    expected, found = read_entries(reference), read_entries(result)
    if expected.keys() != found.keys():
        return f"other tensors: {sorted(expected.keys() ^ found.keys())[:3]}"
    with reference.open("rb") as a, result.open("rb") as b:
        for name, entry in expected.items():
            other = found[name]
            if entry[:2] != other[:2] or entry.end - entry.begin != other.end - other.begin:
                return f"{name}: dtype or shape"
            size = entry.end - entry.begin
            if not equal_ranges(a, b, entry.begin, other.begin, size, equal):
                return f"{name}: values"
    return ""


def main() -> int:
    """Print the first difference between the two files on the command line, if there is one."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("--close", action="store_true", help="allow other roundings of float32")
    parser.add_argument("reference", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    equal = close if options.close else same
    print(first_difference(options.reference, options.result, equal), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
