"""Child process that compares two safetensors files tensor by tensor, whatever their order."""

import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

from bench.datasets import MIB


def read_entries(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the entries of the header, and where the tensor data begins."""
    size = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


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
    with reference.open("rb") as a, result.open("rb") as b:
        expected, a_base = read_entries(a)
        found, b_base = read_entries(b)
        if expected.keys() != found.keys():
            return f"other tensors: {sorted(expected.keys() ^ found.keys())[:3]}"
        for name, entry in expected.items():
            other = found[name]
            if (entry["dtype"], entry["shape"]) != (other["dtype"], other["shape"]):
                return f"{name}: dtype or shape"
            (begin, end), (other_begin, _) = entry["data_offsets"], other["data_offsets"]
            if not same_bytes(a, b, a_base + begin, b_base + other_begin, end - begin):
                return f"{name}: values"
    return ""


def main() -> int:
    """Print the first difference between the two files on the command line, if there is one."""
    print(first_difference(Path(sys.argv[1]), Path(sys.argv[2])), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
