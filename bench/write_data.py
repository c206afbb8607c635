"""Child process that writes data sets: finite random floats, cheaply and in little memory."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bench.datasets import MIB, DataSet, catalogue

Words = npt.NDArray[np.unsignedinteger[Any]]
BLOCK_BYTES = 16 * MIB
# One row per dtype: word type, bits of sign and mantissa, shift to the exponent, and a first
# exponent such that eight consecutive ones give magnitudes from 2^-7 up to 2, never infinity.
LAYOUTS: dict[str, tuple[type[np.unsignedinteger[Any]], int, int, int]] = {
    "F32": (np.uint32, 0x807F_FFFF, 23, 120),
    "BF16": (np.uint16, 0x807F, 7, 120),
}


def random_block(dtype: str) -> Words:
    """Return one block of words that are finite floats; all checkpoints derive from it."""
    word, mantissa, shift, first_exponent = LAYOUTS[dtype]
    items = BLOCK_BYTES // np.dtype(word).itemsize
    block: Words = np.random.default_rng(2024).integers(0, np.iinfo(word).max, items, dtype=word)
    exponents = (((block >> shift) & 7) + first_exponent) << shift
    return ((block & mantissa) | exponents).astype(word)


def header(data_set: DataSet) -> bytes:
    """Return what precedes the tensor data, the same in all checkpoints as in a real run."""
    size = data_set.tensor_bytes
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for i in range(data_set.tensors):
        entries[f"layers.{i:05d}.weight"] = {
            "dtype": data_set.dtype,
            "shape": data_set.shape,
            "data_offsets": [i * size, (i + 1) * size],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_payload(file: BinaryIO, data_set: DataSet, base: Words, seed: int) -> None:
    """Stream the tensor data: the base block again and again, its mantissas flipped by a key."""
    rng = np.random.default_rng(seed)
    word, mantissa, _, _ = LAYOUTS[data_set.dtype]
    scratch = np.empty_like(base)
    left = data_set.payload_bytes
    while left:
        key = word(int(rng.integers(0, mantissa, endpoint=True)) & mantissa)
        np.bitwise_xor(base, key, out=scratch)
        left -= file.write(scratch.data.cast("B")[: min(left, BLOCK_BYTES)])


def write_data_set(data_set: DataSet, data: Path) -> None:
    """Write all checkpoints, each renamed into place so that an interrupted one is not reused."""
    base, prefix = random_block(data_set.dtype), header(data_set)
    data_set.folder(data).mkdir(parents=True, exist_ok=True)
    for seed, path in enumerate(data_set.paths(data)):
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(prefix)
            write_payload(file, data_set, base, seed)
        os.replace(partial, path)


def main() -> int:
    """Write the data sets named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.write_data", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("keys", nargs="+", choices=list(catalogue(quick=False)))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sets = catalogue(quick=options.quick)
    for key in options.keys:
        write_data_set(sets[key], options.data)
    os.sync()
    return 0


if __name__ == "__main__":
    sys.exit(main())
