"""Child process that compares two checkpoints tensor by tensor, whatever their order and format."""

import json
import sys
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bench.datasets import DATA, MIB
from ema_cli.formats import read


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_entries(path: Path) -> dict[str, Entry]:
    """Return dtype, shape, and where the bytes begin and end, of each tensor."""
    if path.name.endswith(DATA):
        return read_index(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        found[name] = Entry(dtype, shape, 8 + size + begin, 8 + size + end)
    return found


def read_index(path: Path) -> dict[str, Entry]:
    """Return the same of a TensorFlow checkpoint with one data file, read by the tool."""
    codes = {"float32": "F32", "bfloat16": "BF16"}
    index = read(str(path), {}).index
    return {
        t.name: Entry(
            codes[t.dtype.name], t.shape, t.extent.offset, t.extent.offset + t.extent.nbytes
        )
        for t in index.tensors
    }


def same_bytes(a: BinaryIO, b: BinaryIO, a_at: int, b_at: int, size: int) -> bool:
    """Compare two ranges block by block."""
    a.seek(a_at)
    b.seek(b_at)
    while size:
        step = min(size, MIB)
        if a.read(step) != b.read(step):
            return False
        size -= step
    return True


def first_difference(reference: Path, result: Path) -> str:
    """Return what differs first, or nothing when all tensors are equal bit for bit."""
    expected, found = read_entries(reference), read_entries(result)
    if expected.keys() != found.keys():
        return f"other tensors: {sorted(expected.keys() ^ found.keys())[:3]}"
    with reference.open("rb") as a, result.open("rb") as b:
        for name, entry in expected.items():
            other = found[name]
            if entry[:2] != other[:2] or entry.end - entry.begin != other.end - other.begin:
                return f"{name}: dtype or shape"
            if not same_bytes(a, b, entry.begin, other.begin, entry.end - entry.begin):
                return f"{name}: values"
    return ""


def main() -> int:
    """Print the first difference between the two files on the command line, if there is one."""
    print(first_difference(Path(sys.argv[1]), Path(sys.argv[2])), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
